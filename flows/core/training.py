"""Fine-tune a base model on one part of the data, and save and use the result.

Core layer; light to import, flows/core/trainer.py has the heavy half.
Same parameters, data and machine give the same vectors. Nothing is printed and nothing is left on disk.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from bentos.text import clean_text
from flows.core.folders import replaced_folder
from flows.core.models import get_transformer, load_base_model, quiet_libraries
from flows.errors import DivergedError, ParamsError
from flows.params import TrainParams

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

    from flows.core.dataset import Part
    from flows.core.evaluation import Encode

PAIR_LOSSES = ("cosine_similarity", "cosent", "angle")
RANKING_LOSS = "multiple_negatives_ranking"


@dataclass(frozen=True)
class Progress:
    """Where a fit stands after an optimizer step."""

    step: int
    steps: int
    loss: float
    elapsed_s: float


@dataclass(frozen=True)
class Fit:
    """A trained model and how it came about."""

    model: SentenceTransformer
    steps_done: int
    stopped_early: bool  # by the time budget
    seconds: float
    losses: tuple[tuple[int, float], ...]  # (step, loss)
    loss_name: str  # several are joined by "+"


def choose_losses(train: Part, loss: str) -> dict[str, str]:
    """Say which loss each kind of data gets: `pairs` and `retrieval` -> name of the loss.

    `auto` is cosine similarity for scored pairs and multiple negatives ranking for retrieval data. The name of a pair
    loss concerns the pairs; retrieval data beside them keep their ranking loss. `multiple_negatives_ranking` trains on
    the retrieval data alone.

    Raises:
        ParamsError: when the data cannot feed the loss.
    """
    if loss == "auto":
        chosen = {"pairs": "cosine_similarity", "retrieval": RANKING_LOSS}
    elif loss in PAIR_LOSSES:
        chosen = {"pairs": loss, "retrieval": RANKING_LOSS}
        if not train.has_pairs:
            raise ParamsError(
                f"train.loss is {loss}, which needs scored pairs, but there are only retrieval data: "
                f"use auto or {RANKING_LOSS}, or give data.pairs"
            )
    else:
        chosen = {"retrieval": RANKING_LOSS}
        if train.retrieval is None:
            raise ParamsError(
                f"train.loss is {loss}, which needs retrieval data, but there are only scored pairs: "
                f"use auto, {', '.join(PAIR_LOSSES)}, or give data.retrieval"
            )
    present = {"pairs": train.has_pairs, "retrieval": train.retrieval is not None}
    losses = {kind: name for kind, name in chosen.items() if present[kind]}
    if not losses:
        raise ParamsError("there is nothing to train on: give data.pairs, data.retrieval or data.profiles")
    return losses


def fit_model(train: Part, params: TrainParams, *, on_progress: Callable[[Progress], None] | None = None) -> Fit:
    """Fine-tune the base model on `train`.

    Rows are drawn in an order shuffled by the seed, epoch after epoch until `params.steps` optimizer steps are done.
    The learning rate rises for the first tenth of the steps, then falls linearly to 0. The time budget, counted from
    the call, is checked after every step: a native computation is never interrupted, and what was trained is kept.

    Args:
        train: The training rows. Retrieval data give a (query, document) pair for every relevance above 0.
        params: The base model and how to train it.
        on_progress: Called after every optimizer step.

    Raises:
        ModelNotFoundError: when the base model cannot be had.
        ParamsError: when the parameters do not fit the data or the model.
        DivergedError: when the loss or the gradient is no longer a number.
        UnsupportedModelError: when a lunchbox could not hold the model: better said before the fit than after it.
    """
    from transformers import set_seed

    from flows.core.export import dissect_model
    from flows.core.trainer import run_trainer

    started = time.monotonic()
    losses = choose_losses(train, params.loss)
    set_seed(params.seed)  # before loading: weights that the base model lacks are drawn
    model = load_base_model(params.base_model, max_tokens=params.max_tokens, layers=params.layers)
    dissect_model(model)
    _freeze(model, params)
    watch = _Watch(params, started, on_progress)
    columns = {"pairs": _pair_columns(train), "retrieval": _retrieval_columns(train)}
    with quiet_libraries(), tempfile.TemporaryDirectory(prefix="ekiben-fit-") as scratch:
        run_trainer(model, columns, losses, params, scratch=Path(scratch), on_step=watch.note)
    model.eval()
    return Fit(
        model=model,
        steps_done=watch.steps_done,
        stopped_early=watch.stopped_early,
        seconds=time.monotonic() - started,
        losses=tuple(watch.losses),
        loss_name="+".join(losses.values()),
    )


def save_model(model: SentenceTransformer, path: Path) -> None:
    """Save the model in the folder `path`, replacing what is there; nobody ever reads half a model."""
    with replaced_folder(path) as folder, quiet_libraries():
        model.save(str(folder), create_model_card=False)  # ours is written with the lunchbox


def make_encode(model: SentenceTransformer, batch_size: int) -> Encode:
    """Return the function that evaluation takes: texts, cleaned as in serving -> vectors (texts, dim) in float32."""

    def encode(texts: Sequence[str]) -> npt.NDArray[np.float32]:
        if not texts:
            return np.empty((0, model.get_embedding_dimension() or 0), dtype=np.float32)
        vectors = model.encode([clean_text(text) for text in texts], batch_size=batch_size, show_progress_bar=False)
        return np.asarray(vectors, dtype=np.float32)

    return encode


class _Watch:
    """What the trainer reports to after each step: losses, progress, time budget."""

    def __init__(self, params: TrainParams, started: float, on_progress: Callable[[Progress], None] | None) -> None:
        self.losses: list[tuple[int, float]] = []
        self.steps_done = 0
        self.stopped_early = False
        self._params = params
        self._started = started
        self._on_progress = on_progress

    def note(self, step: int, loss: float, gradient_norm: float) -> bool:
        """Take note of a finished step; return whether the time is up."""
        params = self._params
        if not (math.isfinite(loss) and math.isfinite(gradient_norm)):
            raise DivergedError(
                f"training diverged at step {step} of {params.steps} (loss {loss:g}, gradient {gradient_norm:g}): "
                f"lower train.learning_rate (now {params.learning_rate:g})"
            )
        elapsed_s = time.monotonic() - self._started
        self.losses.append((step, loss))
        self.steps_done = step
        if self._on_progress is not None:
            self._on_progress(Progress(step, params.steps, loss, elapsed_s))
        self.stopped_early = step < params.steps and elapsed_s >= 60 * params.max_minutes
        return self.stopped_early


def _pair_columns(train: Part) -> dict[str, list[Any]]:
    pairs = train.pairs
    return {
        "text_a": [clean_text(text) for text in pairs["text_a"]],
        "text_b": [clean_text(text) for text in pairs["text_b"]],
        "score": [float(score) for score in pairs["score"]],
    }


def _retrieval_columns(train: Part) -> dict[str, list[Any]]:
    if train.retrieval is None:
        return {"query": [], "document": []}
    queries, corpus = train.retrieval.queries, train.retrieval.corpus
    relevant = [
        (clean_text(queries[query]), clean_text(corpus[document]))
        for query, relevances in train.retrieval.qrels.items()
        for document, relevance in relevances.items()
        if relevance > 0
    ]
    return {"query": [query for query, _ in relevant], "document": [document for _, document in relevant]}


def _freeze(model: SentenceTransformer, params: TrainParams) -> None:
    """Take the word embeddings out of the training, when asked to."""
    if not params.freeze_embeddings:
        return
    transformer = get_transformer(model)
    embeddings = transformer.get_input_embeddings() if transformer is not None else model[0]
    embeddings.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ParamsError(
            f"train.freeze_embeddings leaves nothing to train in {params.base_model}: set train.freeze_embeddings=false"
        )
