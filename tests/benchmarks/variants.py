"""The models that the retraining benchmark compares: a champion, what becomes of it, and smaller ones.

Every model is made by the project's own functions, from one recipe (`TrainParams`) and small changes of it.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from bentos.manifest import read_manifest
from flows.core.anchor import Anchor
from flows.core.dataset import Dataset, Part
from flows.core.heads import attach_head, set_head
from flows.core.lunchbox import ReleaseFacts, pack_lunchbox
from flows.core.models import count_layers, load_base_model, load_saved_model
from flows.core.precision import Int8Trial
from flows.core.training import fit_model, save_model
from flows.params import ReleaseParams, TrainParams

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

CHAMPION = "champion"
LONGER, FASTER = 1.5, 2.0  # times the champion's steps and rate: a retrain that learns more
TOO_FAST = 10.0
SEED = 29
SMALL_DIMENSIONS = (2 / 3, 1 / 3)  # of the base model's: 256 and 128 of 384


@dataclass(frozen=True)
class Variant:
    """A model beside the champion."""

    key: str
    title: str
    train: TrainParams
    change: Literal["train", "keep", "turn", "cut"] = "train"  # all but the first: of the champion itself
    int8: bool = False  # served in int8; the others are compared in fp32
    anchored: bool = False
    shuffled: bool = False


def list_variants(base: TrainParams, dim: int, anchors: Sequence[float]) -> list[Variant]:
    """List what a champion trained with `base`, whose vectors have `dim` dimensions, is compared with."""
    longer = base.model_copy(update={"steps": round(LONGER * base.steps), "learning_rate": FASTER * base.learning_rate})
    told = f"trained longer ({longer.steps} steps, not {base.steps}), at twice the rate"
    free = Variant("longer", told, longer)
    other_seed = base.model_copy(update={"seed": base.seed + 1})
    too_fast = base.model_copy(update={"learning_rate": min(TOO_FAST * base.learning_rate, 1e-2)})
    return [
        Variant("int8", "the champion itself, as int8", base, change="keep", int8=True),
        Variant("seed", "the same recipe, another seed", other_seed),
        free,
        *(
            replace(
                free,
                key=f"anchor-{weight:g}",
                title=f"the same with `train.anchor_weight={weight:g}`",
                train=longer.model_copy(update={"anchor_weight": weight}),
                anchored=True,
            )
            for weight in anchors
        ),
        Variant("turned", "the champion, turned at random (synthetic)", base, change="turn"),
        Variant("cut", f"the champion, cut to its first {cut_to(dim)} of {dim} dimensions", base, change="cut"),
        Variant("shuffled", "trained on shuffled scores", base, shuffled=True),
        Variant("too-fast", "trained at ten times the rate", too_fast),
    ]


def list_smaller(base: TrainParams, dim: int, layers: int) -> list[Variant]:
    """List the smaller models, the whole one first; the base model has `layers` layers and `dim` dimensions."""
    half = max(1, layers // 2)
    few = base.model_copy(update={"layers": half})
    dimensions = [max(8, round(share * dim)) for share in SMALL_DIMENSIONS]
    distilled = f"{half} of {layers} layers, after {few.distill_steps} steps of distillation"
    return [
        Variant("whole", "the whole model, the champion", base, change="keep"),
        Variant("layers", f"{half} of {layers} layers", few.model_copy(update={"distill_steps": 0})),
        Variant("distilled", distilled, few),
        *(
            Variant(f"dim-{number}", f"`train.dimensions={number}`", base.model_copy(update={"dimensions": number}))
            for number in dimensions
        ),
        Variant(
            "small",
            f"{half} layers distilled, `train.dimensions={dimensions[-1]}`",
            few.model_copy(update={"dimensions": dimensions[-1]}),
        ),
    ]


def cut_to(dim: int) -> int:
    """How many dimensions the cut champion keeps: two thirds."""
    return dim * 2 // 3


def measure_base(params: TrainParams) -> tuple[int, int]:
    """Return the dimensions and the layers of the base model.

    Raises:
        ModelNotFoundError: it cannot be had.
    """
    model = load_base_model(params.base_model)
    return model.get_embedding_dimension() or 0, count_layers(model) or 1


class NotCertifiedError(Exception):
    """No int8 could be made that a release would serve."""


class Kitchen:
    """Trains and packs variants in a scratch folder; the champion comes first."""

    def __init__(self, dataset: Dataset, champion: TrainParams, folder: Path) -> None:
        self.dataset = dataset
        self._recipe = champion
        self._folder = folder
        self._packed = 0

    @property
    def champion_box(self) -> Path:
        """The champion's lunchbox."""
        return self._folder / CHAMPION

    def bake(self, variant: Variant) -> Path:
        """Make a variant and return its lunchbox, certified as a release would.

        Raises:
            NotCertifiedError: it is to be served in int8, and a release would not.
        """
        save_model(self.make(variant), self._model_of(variant.key))
        return self._pack(variant)

    def make(self, variant: Variant) -> SentenceTransformer:
        """Train a variant, or change the champion into it."""
        if variant.change == "train":
            return self._train(variant)
        champion = load_saved_model(self._model_of(CHAMPION))
        if variant.change == "turn":
            return turn_model(champion, self._recipe.base_model)
        return cut_model(champion, self._recipe.base_model) if variant.change == "cut" else champion

    def forget(self, variant: Variant) -> None:
        """Remove the files of a variant."""
        for path in (self._folder / variant.key, self._model_of(variant.key)):
            shutil.rmtree(path, ignore_errors=True)

    def _train(self, variant: Variant) -> SentenceTransformer:
        part = shuffle_labels(self.dataset.train) if variant.shuffled else self.dataset.train
        anchor = Anchor(self.champion_box, read_manifest(self.champion_box)) if variant.anchored else None
        return fit_model(part, variant.train, anchor=anchor).model

    def _model_of(self, key: str) -> Path:
        return self._folder / f"{key}.model"

    def _pack(self, variant: Variant) -> Path:
        release = ReleaseParams()
        # Which machine finds int8 fast enough is no question here.
        trial = Int8Trial(release.model_copy(update={"int8_min_speedup": 1e-9}), self.dataset.test)
        self._packed += 1
        facts = ReleaseFacts(
            name="ekiben",
            version=str(self._packed),
            run_id=f"{self._packed:032x}",
            data=self.dataset.version,
            base_model=variant.train.base_model,
        )
        box = self._folder / variant.key
        packed = pack_lunchbox(
            self._model_of(variant.key),
            box,
            facts,
            min_cosine=release.min_cosine,
            int8=trial if variant.int8 else None,
        )
        if variant.int8 and "int8" not in packed.precisions:
            raise NotCertifiedError(variant.title)
        return box


def turn_model(model: SentenceTransformer, name: str) -> SentenceTransformer:
    """Turn all vectors at random: as good a model, in a space that has nothing in common with the old one."""
    dim = model.get_embedding_dimension() or 0
    turned = attach_head(model, dim, name)
    set_head(turned, np.linalg.qr(np.random.default_rng(SEED).normal(size=(dim, dim)))[0])
    return turned


def cut_model(model: SentenceTransformer, name: str) -> SentenceTransformer:
    """Keep the first dimensions, without any training for that."""
    return attach_head(model, cut_to(model.get_embedding_dimension() or 0), name)


def shuffle_labels(part: Part) -> Part:
    """Deal scores out to other pairs, and the relevant documents to other queries."""
    pairs = part.pairs.assign(score=np.random.default_rng(SEED).permutation(part.pairs["score"].to_numpy()))
    retrieval = part.retrieval
    if retrieval is not None:
        queries, judged = list(retrieval.qrels), list(retrieval.qrels.values())
        random.Random(SEED).shuffle(judged)
        retrieval = replace(retrieval, qrels=dict(zip(queries, judged, strict=True)))
    return Part(pairs, retrieval)
