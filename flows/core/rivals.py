"""Candidate against rival, unit by unit, on the same frozen test rows. Core layer.

Rivals are the base model, whose figures the run kept, and the champion, whose lunchbox embeds the rows anew. A model
with a lunchbox is scored as it serves: by the engine, in the precision that is its default. The interval comes from a
paired bootstrap (see `bootstrap_difference`), so what makes a row hard for both does not blur their difference.

Two things it cannot see. The luck of the training seed: it covers the choice of test rows only. And whether a champion
that was trained on other data has seen the test rows, which makes it look better than it is, and so can keep a
candidate out, never let one in; `Comparison.doubt` says so when the data differ.

For retrieval data the rows are the pool that `keep_test` wrote, with the documents that base and candidate ranked
high; a champion misses some of the documents that only it would have ranked high, wrong ones mostly, and so looks a
little better than it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from bentos.engine import Engine
from bentos.manifest import Manifest, read_manifest
from bentos.text import apply_prompt, clean_text
from flows.core.evaluation import Array, Encode, Interval, bootstrap_difference, score_part, unit_metric
from flows.core.heldout import FrozenTest
from flows.params import EvaluateParams

MAX_PAIRS = 3000  # of a test set that are embedded: the difference is known to about 0.005 then, within a minute or two


@dataclass(frozen=True)
class Champion:
    """The version that a candidate would replace."""

    tag: str  # `ekiben:2-9c1d3b5f`
    version: str
    box: Path  # its lunchbox
    space_id: str = ""  # as the registry has it, for when the box cannot say so; empty: unknown
    problem: str = ""  # why its lunchbox cannot be used, as far as is known
    params: Mapping[str, str] | None = None  # of its run, under their names in MLflow; None: unknown


@dataclass(frozen=True)
class Comparison:
    """Candidate and rival on the same units."""

    metric: str  # spearman, ndcg_at_10
    ours: float
    theirs: float
    gain: Interval  # ours - theirs
    units: int
    confidence: float
    doubt: str = ""  # what makes the rival's figure doubtful, as a clause

    @property
    def span(self) -> str:
        """The gain and its interval in words."""
        units = "pairs" if self.metric == "spearman" else "queries"
        return (
            f"{self.gain.value:+.4f} ({100 * self.confidence:.4g}% interval {self.gain.low:+.4f} to "
            f"{self.gain.high:+.4f}{f', {self.units} test {units}' if self.units else ''})"
        )


def open_box(box: Path) -> tuple[Manifest, Encode]:
    """Load the lunchbox at `box` in its default precision; return its manifest and what it makes of texts.

    Texts get the default prompt, as in a request that names none.

    Raises:
        LunchboxError: when it cannot be loaded.
    """
    manifest = read_manifest(box)
    engine = Engine(box, manifest)
    prompt = manifest.prompts.get(manifest.default_prompt or "", "")

    def encode(texts: Sequence[str]) -> npt.NDArray[np.float32]:
        return engine.embed([apply_prompt(clean_text(str(text)), prompt) for text in texts])

    return manifest, encode


def score_units(test: FrozenTest, encode: Encode) -> Array:
    """Return one figure a unit: the cosine of each pair, or the nDCG@10 of each query when there are no pairs."""
    if test.part.has_pairs:
        part = type(test.part)(test.part.pairs)  # documents do not count when pairs do
        scores = score_part(part, encode, EvaluateParams())
        values = scores.cosines
    else:
        values = score_part(test.part, encode, EvaluateParams()).per_query_ndcg
    return np.empty(0) if values is None else np.asarray(values, dtype=np.float64)


def compare(
    test: FrozenTest, ours: Array, theirs: Array, params: EvaluateParams, *, metric: str, doubt: str = ""
) -> Comparison:
    """Compare two models by their figures of every unit, (units,) each."""
    labels = test.labels
    return Comparison(
        metric=metric,
        ours=unit_metric(ours, labels),
        theirs=unit_metric(theirs, labels),
        gain=bootstrap_difference(theirs, ours, labels, params),
        units=len(ours),
        confidence=params.confidence,
        doubt=doubt,
    )
