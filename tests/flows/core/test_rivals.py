"""Two models on the same rows: the difference, how sure it is, and lunchboxes as they serve."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import spearmanr

from bentos.errors import LunchboxError
from flows.core.dataset import Part
from flows.core.heldout import FrozenTest
from flows.core.models import load_saved_model
from flows.core.retrieval import Retrieval
from flows.core.rivals import compare, open_box, score_units
from flows.core.training import make_encode
from flows.params import EvaluateParams

PARAMS = EvaluateParams(bootstrap_samples=200)
TEXTS = [
    "the chef will cook dinner",
    "a cup of coffee",
    "the train is at the station",
    "play the piano",
    "read code and data",
    "a walk in town",
]


def make_test(rows: int, seed: int = 0) -> FrozenTest:
    labels = np.random.default_rng(seed).uniform(size=rows)
    pairs = pd.DataFrame({"text_a": [f"a{n}" for n in range(rows)], "text_b": "b", "score": labels})
    return FrozenTest(Part(pairs), None, None)


def noisy(labels: np.ndarray, noise: float, seed: int = 1) -> np.ndarray:
    return labels + noise * np.random.default_rng(seed).normal(size=len(labels))


@settings(deadline=None, max_examples=25)
@given(rows=st.integers(5, 60), noise=st.floats(0, 2), seed=st.integers(0, 99))
def test_the_difference_is_that_of_the_metrics_and_lies_in_its_interval(rows: int, noise: float, seed: int) -> None:
    test = make_test(rows, seed)
    assert test.labels is not None
    ours, theirs = noisy(test.labels, noise, seed), noisy(test.labels, 0.5, seed + 1)
    found = compare(test, ours, theirs, PARAMS, metric="spearman")
    assert found.ours == pytest.approx(spearmanr(ours, test.labels).statistic, abs=1e-9)
    assert found.gain.value == pytest.approx(found.ours - found.theirs)
    assert found.gain.low <= found.gain.high
    back = compare(test, theirs, ours, PARAMS, metric="spearman")
    assert (back.gain.value, back.gain.low, back.gain.high) == pytest.approx(
        (-found.gain.value, -found.gain.high, -found.gain.low)
    )


def test_equal_models_differ_by_nothing_and_more_rows_make_it_surer() -> None:
    few, many = make_test(100), make_test(2000)
    assert few.labels is not None
    assert many.labels is not None
    same = compare(few, few.labels, few.labels, PARAMS, metric="spearman").gain
    assert (same.value, same.low, same.high) == (0.0, 0.0, 0.0)
    spans = [
        compare(test, noisy(test.labels, 0.3), noisy(test.labels, 0.3, seed=2), PARAMS, metric="spearman").gain
        for test in (few, many)
        if test.labels is not None
    ]
    assert (spans[1].high - spans[1].low) < 0.5 * (spans[0].high - spans[0].low)


def test_queries_are_compared_by_their_mean() -> None:
    queries = {str(n): f"q{n}" for n in range(40)}
    part = Part(make_test(0).part.pairs, Retrieval({"d": "d"}, queries, {query: {"d": 1.0} for query in queries}))
    theirs = np.random.default_rng(0).uniform(0.2, 0.6, 40)
    found = compare(FrozenTest(part, None, None), theirs + 0.1, theirs, PARAMS, metric="ndcg_at_10")
    assert found.gain.value == pytest.approx(0.1)
    assert (found.gain.low, found.gain.high) == pytest.approx((0.1, 0.1))  # better by as much on every query
    assert "40 test queries" in found.span


def test_a_lunchbox_scores_as_the_model_that_it_was_made_of(tiny_lunchbox_path: Path, tiny_model_path: Path) -> None:
    pairs = pd.DataFrame({"text_a": TEXTS, "text_b": TEXTS[::-1], "score": np.linspace(0, 1, len(TEXTS))})
    corpus = {f"d{n}": text for n, text in enumerate(TEXTS)}
    retrieval = Retrieval(corpus, {"q": "coffee in a cup", "none": "x"}, {"q": {"d1": 1.0}, "none": {}})
    _, encode = open_box(tiny_lunchbox_path)
    reference = make_encode(load_saved_model(tiny_model_path), 8)
    both = FrozenTest(Part(pairs, retrieval), None, None)
    assert score_units(both, encode) == pytest.approx(score_units(both, reference), abs=1e-4)  # pairs go first
    assert len(score_units(both, encode)) == len(both) == len(TEXTS)
    queries = FrozenTest(Part(pairs.iloc[:0], retrieval), None, None)
    assert queries.queries == ["q"]
    assert score_units(queries, encode) == pytest.approx(score_units(queries, reference))
    assert len(score_units(queries, encode)) == len(queries) == 1


def test_texts_get_the_default_prompt_as_in_a_request(variants: dict[str, Path]) -> None:
    box = variants["last token, raw, prompts"]
    _, encode = open_box(box)
    reference = make_encode(load_saved_model(box.parent / f"{box.name}-model"), 8)  # sentence-transformers applies it
    ours, theirs = encode(TEXTS), reference(TEXTS)
    assert ours == pytest.approx(theirs, abs=1e-3)


def test_a_folder_that_is_no_lunchbox_says_so(tmp_path: Path) -> None:
    with pytest.raises(LunchboxError, match="not a lunchbox"):
        open_box(tmp_path)
