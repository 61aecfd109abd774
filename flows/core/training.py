"""Fine-tune a base model on one part of the data, and save and use the result.

Core layer; light to import, flows/core/trainer.py has the heavy half.
Same parameters, data and machine give the same vectors. Nothing is printed and nothing is left on disk.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from bentos.text import clean_text
from bentos.vectors import normalize
from flows.core.anchor import shorten_anchor
from flows.core.folders import replaced_folder
from flows.core.heads import attach_head, nearest_axes, nest_dims, note_nested_dims, set_head
from flows.core.models import count_layers, get_transformer, load_base_model, quiet_libraries
from flows.core.rows import choose_losses, list_texts, make_columns, number_texts
from flows.errors import DivergedError, ParamsError
from flows.params import TrainParams

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

    from flows.core.dataset import Part
    from flows.core.evaluation import Encode

CHECK_BATCH = 32  # texts at once while a check scores the model
HEAD_TEXTS = 2048  # training texts by which a head is turned to the anchor
DISTILL_LEARNING_RATE = 2e-4  # peak; a copy of known vectors stands a higher one than labels do
DISTILL_SHARE = 0.5  # of the time budget, at most


@dataclass(frozen=True)
class Progress:
    """Where a fit stands after an optimizer step. The steps of a distillation are counted apart, and come first."""

    step: int
    steps: int
    loss: float
    elapsed_s: float  # since the first of these steps began
    distilling: bool = False


@dataclass(frozen=True)
class Fit:
    """A trained model and how it came about."""

    model: SentenceTransformer
    steps_done: int
    stopped_early: bool  # by the time budget
    seconds: float
    losses: tuple[tuple[int, float], ...]  # (step, loss)
    loss_name: str  # several are joined by "+"
    hopeless: bool = False  # ended by a check
    distill_losses: tuple[tuple[int, float], ...] = ()  # (step, mean of 1 - cosine to the whole model)


def make_architecture(params: TrainParams) -> SentenceTransformer:
    """Return what a fit with `params` starts from and, in shape, what it ends as: untrained, in eval mode.

    Layers are dropped, and `dimensions` is a head that keeps the first ones. What a model costs in serving depends on
    this alone.

    Raises:
        ModelNotFoundError: when the base model cannot be had.
        ParamsError: when the model has fewer layers, dimensions or tokens than asked for.
        UnsupportedModelError: when a lunchbox could not hold the model.
    """
    return _build(params)[1].eval()


def check_points(steps: int, checks: int) -> dict[int, int]:
    """Optimizer step -> number of the check after it, from 1; a fit that is too short for all of them has fewer."""
    points: dict[int, int] = {}
    for check in range(1, checks + 1):
        step = round(check * steps / (checks + 1))
        if 0 < step < steps:
            points.setdefault(step, check)
    return points


def fit_model(
    train: Part,
    params: TrainParams,
    *,
    on_progress: Callable[[Progress], None] | None = None,
    on_check: Callable[[int, Encode], bool] | None = None,
    checks: int = 0,
    anchor: Encode | None = None,
) -> Fit:
    """Fine-tune the base model on `train`.

    A model with fewer layers first learns the vectors that the whole base model gives the training texts
    (`distill_steps`); then come the steps that see labels, which train the head for `dimensions` as well. Rows
    are drawn in an order shuffled by the seed, epoch after epoch until `params.steps` optimizer steps are done. The
    learning rate rises for the first tenth of the steps, then falls linearly to 0. The time budget, counted from the
    call, is checked after every step: a native computation is never interrupted, and what was trained is kept.
    Distillation may take half of it.

    Args:
        train: The training rows. Retrieval data give a (query, document) pair for every relevance above 0.
        params: The base model and how to train it.
        on_progress: Called after every optimizer step.
        on_check: Called with the number of the check and the model so far, as a function from texts to vectors, after
            the steps that `check_points` names; true ends the fit as hopeless. Asking changes no vector.
        checks: How many checks there are, evenly spread over the steps that see labels.
        anchor: The champion's vectors, for `params.anchor_weight`; None: there is no champion.

    Raises:
        ModelNotFoundError: when the base model cannot be had.
        ParamsError: when the parameters do not fit the data, the model or the champion.
        DivergedError: when the loss or the gradient is no longer a number.
        UnsupportedModelError: when a lunchbox could not hold the model: better said before the fit than after it.
    """
    from transformers import set_seed

    from flows.core.losses import Pull, Targets, make_loss
    from flows.core.trainer import run_trainer

    started = time.monotonic()
    losses = choose_losses(train, params.loss)
    set_seed(params.seed)  # before loading: weights that the base model lacks are drawn
    body, model = _build(params)
    _freeze(model, params)
    near = shorten_anchor(anchor, model.get_embedding_dimension() or 0) if anchor and params.anchor_weight else None
    if "angle" in losses.values() and (model.get_embedding_dimension() or 0) % 2:
        raise ParamsError(
            f"train.loss is angle, which needs an even number of dimensions, found {model.get_embedding_dimension()}: "
            "choose another loss, or set train.dimensions"
        )
    columns = make_columns(train, list(losses))
    texts = list_texts(columns)
    with quiet_libraries(), tempfile.TemporaryDirectory(prefix="ekiben-fit-") as scratch:
        distilling = _distill(body, texts, params, started, Path(scratch), on_progress)
        pull = None
        if near is not None:
            if params.dimensions:
                _turn_head(body, model, texts, near, params.seed)
            pull = Pull(params.anchor_weight, Targets(texts, near))
            columns = number_texts(columns, texts)
        watch = _Watch(params, started, on_progress)
        if on_check is not None:
            watch.check(make_encode(model, CHECK_BATCH), on_check, check_points(params.steps, checks))
        modules = {kind: make_loss(name, model, _nested(params), pull) for kind, name in losses.items()}
        run_trainer(model, columns, modules, params, scratch=Path(scratch), on_step=watch.note)
    model.eval()
    return Fit(
        model=model,
        steps_done=watch.steps_done,
        stopped_early=watch.stopped_early or distilling.stopped_early,
        seconds=time.monotonic() - started,
        losses=tuple(watch.losses),
        loss_name="+".join(losses.values()),
        hopeless=watch.hopeless,
        distill_losses=tuple(distilling.losses),
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
    """What the trainer reports to after each step: losses, progress, checks, time budget."""

    def __init__(
        self,
        params: TrainParams,
        started: float,
        on_progress: Callable[[Progress], None] | None,
        *,
        distilling: bool = False,
    ) -> None:
        self.losses: list[tuple[int, float]] = []
        self.steps_done = 0
        self.stopped_early = False
        self.hopeless = False
        self._params = params
        self._budget_s = 60 * params.max_minutes * (DISTILL_SHARE if distilling else 1.0)
        self._started = started
        self._began = time.monotonic()
        self._on_progress = on_progress
        self._distilling = distilling
        self._checks: dict[int, Callable[[], bool]] = {}

    def check(self, encode: Encode, on_check: Callable[[int, Encode], bool], points: Mapping[int, int]) -> None:
        """Have `on_check` asked after the steps in `points`."""
        self._checks = {step: partial(on_check, number, encode) for step, number in points.items()}

    def note(self, step: int, loss: float, gradient_norm: float) -> bool:
        """Take note of a finished step; return whether it was the last one."""
        params = self._params
        if not (math.isfinite(loss) and math.isfinite(gradient_norm)):
            cure = f"lower train.learning_rate (now {params.learning_rate:g})"
            raise DivergedError(
                f"{'distillation' if self._distilling else 'training'} diverged at step {step} of {params.steps} (loss "
                f"{loss:g}, gradient {gradient_norm:g}): {'set train.distill_steps=0' if self._distilling else cure}"
            )
        now = time.monotonic()
        self.losses.append((step, loss))
        self.steps_done = step
        if self._on_progress is not None:
            self._on_progress(Progress(step, params.steps, loss, now - self._began, self._distilling))
        self.stopped_early = step < params.steps and now - self._started >= self._budget_s
        if not self.stopped_early and step in self._checks:
            self.hopeless = self._checks[step]()
        return self.stopped_early or self.hopeless


def _build(params: TrainParams) -> tuple[SentenceTransformer, SentenceTransformer]:
    """Return the model without its head, and with it; they share their modules, and are one when there is none."""
    from flows.core.export import dissect_model

    body = load_base_model(params.base_model, max_tokens=params.max_tokens, layers=params.layers)
    model = attach_head(body, params.dimensions, params.base_model) if params.dimensions else body
    note_nested_dims(model, _nested(params))
    dissect_model(model)
    return body, model


def _nested(params: TrainParams) -> tuple[int, ...]:
    return nest_dims(params.dimensions) if params.dimensions else ()


def _distill(
    body: SentenceTransformer,
    texts: Sequence[str],
    params: TrainParams,
    started: float,
    scratch: Path,
    on_progress: Callable[[Progress], None] | None,
) -> _Watch:
    """Teach a model that lost layers the vectors of the whole one, in place, without labels."""
    from flows.core.losses import DistillLoss
    from flows.core.trainer import run_trainer

    params = params.model_copy(update={"steps": params.distill_steps, "learning_rate": DISTILL_LEARNING_RATE})
    watch = _Watch(params, started, on_progress, distilling=True)
    if params.layers is None or params.steps == 0:
        return watch
    teacher = load_base_model(params.base_model, max_tokens=params.max_tokens)
    if count_layers(teacher) != params.layers:
        columns = {"texts": {"text": texts}}
        run_trainer(body, columns, {"texts": DistillLoss(body, teacher)}, params, scratch=scratch, on_step=watch.note)
    return watch


def _turn_head(
    body: SentenceTransformer, model: SentenceTransformer, texts: Sequence[str], near: Encode, seed: int
) -> None:
    """Start the head from what brings the training texts nearest to the anchor, whose axes may be turned."""
    chosen = np.random.default_rng(seed).permutation(len(texts))[:HEAD_TEXTS]
    sample = [texts[row] for row in chosen]
    set_head(model, nearest_axes(normalize(make_encode(body, CHECK_BATCH)(sample)), near(sample)))


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
