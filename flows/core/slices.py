"""The test rows in slices: by length, by language, or by any column that the user kept. Core layer, pure.

A mean over all rows hides a model that got better on most texts and broke on some. Each slice has its own metric, for
the candidate and for a reference, and the interval of their difference.

Many small slices are many chances to be unlucky: with 200 pairs a Spearman correlation moves by 0.02 from one choice
of rows to the next. So the interval of each slice is widened to the confidence 1 - (1 - c) / k for k slices that are
judged (Bonferroni): with the confidence c of 0.95, all of a release's slices together are refused by bad luck in at
most one case of forty. `gate_rules.judge_slices` says what is refused.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from flows.core.evaluation import Array, Interval, bootstrap_difference, unit_metric
from flows.core.heldout import FrozenTest
from flows.params import PAIR_COLUMNS, EvaluateParams

IntArray = npt.NDArray[np.int64]
LENGTH, LANGUAGE = "length", "language"
FOUND = (LENGTH, LANGUAGE)  # those that need no column of the user's
OTHER = "other"
NO_VALUE = "none"
MAX_VALUES = 20  # of one column; the rows of rarer ones go to `other`
MIN_TAIL_SAMPLES = 10  # resamples beyond each end of an interval
MAX_SAMPLES = 5000


@dataclass(frozen=True)
class Slice:
    """One slice: how the candidate does on it, and the reference."""

    name: str  # `length=short`
    meaning: str  # what is in it, when the name does not say it: `up to 57 characters`
    units: int
    ours: float
    judged: bool  # whether it is big enough, and its labels differ
    theirs: float | None = None  # None without a reference
    gain: Interval | None = None  # ours - theirs
    confidence: float = math.nan  # of that interval


def slice_tests(
    test: FrozenTest,
    columns: Sequence[str],
    ours: Array,
    theirs: Array | None,
    params: EvaluateParams,
    *,
    min_units: int,
) -> tuple[list[Slice], list[str]]:
    """Cut the test rows by each of `columns` and score both models on every slice.

    Args:
        test: The rows.
        columns: `length`, `language`, or columns of the pairs.
        ours: (units,) the candidate's figures.
        theirs: (units,) those of the reference; None when there is none.
        params: Resamples and confidence of the bootstrap.
        min_units: A slice of fewer is not judged.

    Returns:
        The slices, and the columns that the test rows do not have.
    """
    values = {column: label_units(test, column, min_units=min_units) for column in columns}
    missing = [column for column, found in values.items() if found is None]
    cut: list[tuple[str, str, IntArray, bool]] = []  # name, meaning, which units, judged
    for column, found in values.items():
        if found is None:
            continue
        labels, meanings = found
        for value in _order(column, labels):
            rows = np.flatnonzero(np.asarray(labels, dtype=object) == value)
            cut.append((f"{column}={value}", meanings.get(value, ""), rows, _can_be_judged(test, rows, min_units)))
    wide = widen(params, sum(judged for *_, judged in cut))
    slices = [_score(test, *item, ours=ours, theirs=theirs, params=wide) for item in cut]
    return slices, missing


def widen(params: EvaluateParams, intervals: int) -> EvaluateParams:
    """Return the parameters of each of so many intervals that shall hold together with the confidence of `params`."""
    tail = (1 - params.confidence) / max(intervals, 1)
    samples = max(params.bootstrap_samples, min(math.ceil(2 * MIN_TAIL_SAMPLES / tail), MAX_SAMPLES))
    return params.model_copy(update={"confidence": 1 - tail, "bootstrap_samples": samples})


def label_units(test: FrozenTest, column: str, *, min_units: int) -> tuple[list[str], dict[str, str]] | None:
    """Return the value of every unit in `column`, and what values mean; None when the rows have no such column.

    A column of the user's goes before what is found by the text.
    """
    if column in test.part.pairs.columns and column not in PAIR_COLUMNS and test.part.has_pairs:
        return _fold(test.part.pairs[column].map(_name_value).tolist(), MAX_VALUES, 1), {}
    if column == LENGTH:
        return label_lengths([len(text) for text in _texts(test)])
    if column == LANGUAGE:
        return _fold([find_language(text) for text in _texts(test)], MAX_VALUES, min_units), {}
    return None


def label_lengths(characters: Sequence[int]) -> tuple[list[str], dict[str, str]]:
    """Deal units out by their length into thirds: short, medium, long; equal lengths stay together."""
    if not len(characters):
        return [], {}
    low, high = (int(np.quantile(characters, share, method="lower")) for share in (1 / 3, 2 / 3))
    labels = ["short" if count <= low else "medium" if count <= high else "long" for count in characters]
    meanings = {
        "short": f"up to {low} characters",
        "medium": f"{low + 1} to {high} characters",
        "long": f"above {high} characters",
    }
    return labels, meanings


def find_language(text: str) -> str:
    """Return the ISO 639 code of the language that a text is most likely in; short texts are often guessed wrong."""
    return str(_identifier().classify(text)[0])


@lru_cache(maxsize=1)
def _identifier() -> Any:
    """A model of py3langid's own: the package's default one can be set to other languages by anybody."""
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE)


def _texts(test: FrozenTest) -> list[str]:
    """What a unit is to the eye: both texts of a pair, or a query."""
    if test.part.has_pairs:
        pairs = test.part.pairs
        return [f"{a} {b}" for a, b in zip(pairs["text_a"], pairs["text_b"], strict=True)]
    return [test.part.retrieval.queries[query] for query in test.queries] if test.part.retrieval else []


def _name_value(value: object) -> str:
    if value is None or value is pd.NA or (isinstance(value, float) and math.isnan(value)):
        return NO_VALUE
    return str(value)


def _fold(values: list[str], most: int, least: int) -> list[str]:
    """Keep the `most` frequent values that at least `least` units have; the others become `other`."""
    frequent = {value for value, count in Counter(values).most_common(most) if count >= least}
    return [value if value in frequent else OTHER for value in values]


def _order(column: str, labels: Sequence[str]) -> list[str]:
    """Values in the order of their meaning, or the frequent ones first, `other` last."""
    counts = Counter(labels)
    if column == LENGTH and set(counts) <= {"short", "medium", "long"}:
        return [value for value in ("short", "medium", "long") if value in counts]
    return sorted(counts, key=lambda value: (value == OTHER, -counts[value], value))


def _can_be_judged(test: FrozenTest, rows: IntArray, min_units: int) -> bool:
    labels = test.labels
    return len(rows) >= min_units and (labels is None or bool(np.ptp(labels[rows]) > 0))


def _score(
    test: FrozenTest,
    name: str,
    meaning: str,
    rows: IntArray,
    judged: bool,
    *,
    ours: Array,
    theirs: Array | None,
    params: EvaluateParams,
) -> Slice:
    labels = None if test.labels is None else test.labels[rows]
    found = Slice(name, meaning, len(rows), unit_metric(ours[rows], labels), judged)
    if theirs is None:
        return found
    gain = bootstrap_difference(theirs[rows], ours[rows], labels, params) if judged else None
    return replace(found, theirs=unit_metric(theirs[rows], labels), gain=gain, confidence=params.confidence)
