"""The champion's vectors, as what a retrain may be kept near to: from its lunchbox, by the engine that serves it.

Core layer; knows neither torch nor MLflow.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from bentos.engine import Engine
from bentos.manifest import Manifest, read_manifest
from bentos.text import apply_prompt, clean_text
from bentos.vectors import Vectors, cosine_pairs, normalize
from flows.errors import ParamsError

if TYPE_CHECKING:
    from flows.core.evaluation import Encode
    from flows.core.tracking import Tracker
    from flows.settings import FlowSettings

PROBE_TEXT = "how long is a vector"


class Anchor:
    """A function from texts to the unit vectors that a lunchbox gives them, in fp32, under its default prompt."""

    def __init__(self, box: Path, manifest: Manifest) -> None:
        """Load the engine of the lunchbox at `box`.

        Raises:
            LunchboxError: when a file cannot be loaded.
        """
        self._engine = Engine(box, manifest, precision="fp32")
        self._prompt = manifest.prompts.get(manifest.default_prompt or "", "")
        self.tag = manifest.tag
        self.version = manifest.version
        self.dim = manifest.dim
        self.nested_dims = tuple(manifest.nested_dims)

    def __call__(self, texts: Sequence[str]) -> Vectors:
        """Return float32 (texts, dim)."""
        if not texts:
            return np.empty((0, self.dim), dtype=np.float32)
        prompted = [apply_prompt(clean_text(text), self._prompt) for text in texts]
        return self._engine.embed(prompted, normalize=True)


def load_anchor(tracker: Tracker, settings: FlowSettings) -> Anchor | None:
    """Return the champion as an anchor, or the lunchbox that the settings name; None when there is neither.

    Raises:
        NothingReleasedError: when its lunchbox is found whole neither on this machine nor with its run.
    """
    from flows.core.boxes import find_box

    box = settings.anchor_box
    if box is None:
        champion = tracker.champion()
        if champion is None:
            return None
        box = find_box(tracker, champion, settings.lunchboxes_path)
    return Anchor(box, read_manifest(box))


def shorten_anchor(anchor: Encode, dim: int) -> Encode:
    """Return the anchor with vectors of `dim` dimensions, for a model that has as many.

    Vectors of different lengths cannot be near each other, with one exception: when the anchor was itself trained so
    that its first `dim` dimensions stand alone, a model may take the place of those.

    Raises:
        ParamsError: when there is no such part of the anchor.
    """
    width = anchor([PROBE_TEXT]).shape[1]
    if width == dim:
        return anchor
    tag = getattr(anchor, "tag", "the champion")
    nested = tuple(getattr(anchor, "nested_dims", ()))
    if dim not in nested:
        known = " or ".join(map(str, (width, *nested)))
        raise ParamsError(
            f"train.anchor_weight asks to stay near {tag}, whose vectors have {width} dimensions, but those of this "
            f"model have {dim}: set train.dimensions={known} (with a base model that has as many), or "
            "train.anchor_weight=0"
        )

    def encode(texts: Sequence[str]) -> Vectors:
        return normalize(anchor(texts)[:, :dim])

    return encode


def same_text_cosine(texts: Sequence[str], model: Encode, anchor: Encode) -> float:
    """Mean cosine of the two vectors of the same text, over `texts`; at least one."""
    ours = model(texts)
    theirs = shorten_anchor(anchor, ours.shape[1])(texts)
    return float(cosine_pairs(ours, theirs).mean())
