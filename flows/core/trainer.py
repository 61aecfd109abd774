"""How a fit uses sentence-transformers' trainer: batches, arguments, callbacks.

Core layer, heavy: imports torch and the trainer at the top. flows/core/training.py loads it when a fit starts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, DatasetDict
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.base.sampler import DefaultBatchSampler, NoDuplicatesBatchSampler
from torch import nn
from transformers import PrinterCallback, TrainerCallback

from flows.params import TrainParams

WARMUP_SHARE = 10  # a tenth of the steps; none below ten, since the first step of a warm-up has rate 0
LABEL_COLUMNS = ("score", "label")
RANKING_COLUMNS = {"query", "document"}
POOL_BATCHES = 10  # as many batches are sorted by length together

Columns = Mapping[str, Sequence[Any]]
StepHook = Callable[[int, float, float], bool]  # step, loss, gradient norm -> whether to stop


def run_trainer(
    model: SentenceTransformer,
    columns: Mapping[str, Columns],
    losses: Mapping[str, nn.Module],
    params: TrainParams,
    *,
    scratch: Path,
    on_step: StepHook,
) -> None:
    """Train `model` in place.

    Args:
        model: Parameters that do not require a gradient stay as they are.
        columns: Kind of data -> columns. Beside the texts `score` or `label`: what the loss gets as labels.
        losses: Kind of data -> its loss, the same kinds.
        params: Steps, batch size, learning rate, seed.
        scratch: Folder that the trainer may write to; nothing in it is needed afterwards.
        on_step: Called after each optimizer step; true ends the training.
    """
    use_gpu = torch.cuda.is_available()
    trainer = _Trainer(
        model=model,
        args=SentenceTransformerTrainingArguments(
            output_dir=str(scratch),
            max_steps=params.steps,
            per_device_train_batch_size=params.batch_size,
            learning_rate=params.learning_rate,
            lr_scheduler_type="linear",
            warmup_steps=params.steps // WARMUP_SHARE,
            batch_sampler=_make_batch_sampler,
            prompts=model.prompts.get(model.default_prompt_name),  # encoding puts it before every text, so must we
            seed=params.seed,
            data_seed=params.seed,
            use_cpu=not use_gpu,
            dataloader_num_workers=0,
            dataloader_pin_memory=use_gpu,
            logging_steps=1,
            logging_nan_inf_filter=False,  # it would show the mean of earlier losses in place of a NaN
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=DatasetDict({kind: Dataset.from_dict(dict(columns[kind])) for kind in losses}),
        loss=dict(losses),
        callbacks=[_StepCallback(on_step)],
    )
    trainer.remove_callback(PrinterCallback)  # comes with disable_tqdm
    with _deterministic_algorithms():
        trainer.train()


class _Trainer(SentenceTransformerTrainer):  # type: ignore[misc]
    def add_model_card_callback(self, default_args_dict: dict[str, Any]) -> None:
        """Add none: it would put training texts into the model card."""


class _StepCallback(TrainerCallback):  # type: ignore[misc]
    def __init__(self, on_step: StepHook) -> None:
        self._on_step = on_step

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
        if "loss" in logs and self._on_step(state.global_step, logs["loss"], logs.get("grad_norm", 0.0)):
            control.should_training_stop = True


class _LengthGroupedBatches(DefaultBatchSampler):  # type: ignore[misc]
    """Batches of texts of similar length, for less padding: about a third less work on short mixed texts.

    Rows are shuffled, cut into pools of `POOL_BATCHES` batches, sorted by length within the pool only, cut into
    batches, and the batches of a pool are shuffled again. All of it depends on seed and epoch alone.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, generator: torch.Generator, seed: int) -> None:
        super().__init__(range(len(lengths)), batch_size=batch_size, drop_last=False, generator=generator, seed=seed)
        self._lengths = np.asarray(lengths)

    def __iter__(self) -> Iterator[list[int]]:
        self.generator.manual_seed(self.seed + self.epoch)
        order = torch.randperm(len(self._lengths), generator=self.generator).numpy()
        pool_size = POOL_BATCHES * self.batch_size
        for start in range(0, len(order), pool_size):
            pool = order[start : start + pool_size]
            pool = pool[np.argsort(self._lengths[pool], kind="stable")]
            batches = [pool[row : row + self.batch_size].tolist() for row in range(0, len(pool), self.batch_size)]
            for index in torch.randperm(len(batches), generator=self.generator).tolist():
                yield batches[index]


def _make_batch_sampler(dataset: Any, batch_size: int, generator: Any, seed: int, **_: Any) -> Any:
    """Batches are grouped by length; but ranking batches hold no text twice, each being the others' wrong answer."""
    if RANKING_COLUMNS.issubset(dataset.column_names):
        return NoDuplicatesBatchSampler(
            dataset,
            batch_size=batch_size,
            drop_last=False,
            valid_label_columns=list(LABEL_COLUMNS),
            generator=generator,
            seed=seed,
        )
    texts = (dataset[name] for name in dataset.column_names if name not in (*LABEL_COLUMNS, "dataset_name"))
    lengths = [sum(map(len, row)) for row in zip(*texts, strict=True)]
    return _LengthGroupedBatches(lengths, batch_size, generator, seed)


@contextmanager
def _deterministic_algorithms() -> Iterator[None]:
    """Ask torch for algorithms whose result does not change from run to run."""
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
