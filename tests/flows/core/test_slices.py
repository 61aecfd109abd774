"""The test rows in slices: what is in each, and whether a difference is more than luck."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flows.core.dataset import Part
from flows.core.heldout import FrozenTest
from flows.core.retrieval import Retrieval
from flows.core.slices import MAX_SAMPLES, find_language, label_lengths, label_units, slice_tests, widen
from flows.params import EvaluateParams

PARAMS = EvaluateParams(bootstrap_samples=200)


def make_test(rows: int = 300, seed: int = 0, **columns: object) -> FrozenTest:
    random = np.random.default_rng(seed)
    pairs = pd.DataFrame(
        {
            "text_a": ["x" * int(count) for count in random.integers(1, 100, rows)],
            "text_b": "a text",
            "score": random.uniform(size=rows),
            **columns,
        }
    )
    return FrozenTest(Part(pairs), None, None)


def cosines(test: FrozenTest, noise: float, seed: int = 1) -> np.ndarray:
    assert test.labels is not None
    return test.labels + noise * np.random.default_rng(seed).normal(size=len(test))


@given(st.lists(st.integers(0, 500), min_size=1, max_size=200))
def test_lengths_are_dealt_out_in_order_and_equal_ones_stay_together(counts: list[int]) -> None:
    labels, meanings = label_lengths(counts)
    rank = {"short": 0, "medium": 1, "long": 2}
    for count, label in zip(counts, labels, strict=True):
        for other, other_label in zip(counts, labels, strict=True):
            assert rank[label] <= rank[other_label] or count > other
    assert set(labels) <= meanings.keys()
    if len(set(counts)) == len(counts) and len(counts) >= 6:
        sizes = [labels.count(name) for name in rank]
        assert max(sizes) - min(sizes) <= 2


def test_a_column_of_the_users_is_cut_by_its_values_and_rare_ones_are_folded() -> None:
    values = ["de"] * 100 + ["fr"] * 60 + [None] * 40 + [f"rare{number}" for number in range(100)]
    labelled = label_units(make_test(lang=values), "lang", min_units=30)
    assert labelled is not None
    counts = pd.Series(labelled[0]).value_counts()
    assert (counts["de"], counts["fr"], counts["none"]) == (100, 60, 40)
    assert len(counts) == 21  # the twenty most frequent and `other`
    assert counts["other"] == 300 - counts.drop("other").sum()


def test_the_users_own_column_goes_before_what_is_found() -> None:
    labelled = label_units(make_test(4, length=["x", "y", "x", "y"]), "length", min_units=2)
    assert labelled == (["x", "y", "x", "y"], {})


@pytest.mark.parametrize("column", ["region", "text_a", "score"])
def test_a_column_that_is_not_there_is_said_to_be_missing(column: str) -> None:
    test = make_test()
    slices, missing = slice_tests(test, [column], cosines(test, 0.1), None, PARAMS, min_units=30)
    assert (slices, missing) == ([], [column])


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("The man is playing a guitar on the street.", "en"),
        ("Der Mann spielt auf der Straße Gitarre.", "de"),
        ("L'homme joue de la guitare dans la rue.", "fr"),
        ("男の人が通りでギターを弾いています。", "ja"),
        ("Мужчина, который играет на гитаре, стоит уже целый час на улице.", "ru"),
    ],
)
def test_languages_are_found_by_the_text(text: str, language: str) -> None:
    assert find_language(text) == language


def test_rare_languages_are_one_slice() -> None:
    texts = ["The cat sat on the mat with the dog."] * 40 + ["Die Katze saß mit dem Hund auf der Matte."] * 3
    pairs = pd.DataFrame({"text_a": texts, "text_b": texts, "score": np.linspace(0, 1, 43)})
    labelled = label_units(FrozenTest(Part(pairs), None, None), "language", min_units=30)
    assert labelled is not None
    assert labelled[0] == ["en"] * 40 + ["other"] * 3


def test_queries_are_cut_by_their_own_text() -> None:
    queries = {"q1": "a", "q2": "a b c d e f", "q3": "a b c d e f g h i j k l"}
    retrieval = Retrieval({"d": "d"}, queries, {query: {"d": 1.0} for query in queries})
    test = FrozenTest(Part(make_test(0).part.pairs, retrieval), None, None)
    slices, missing = slice_tests(
        test, ["length", "region"], np.array([0.1, 0.5, 0.9]), np.array([0.1, 0.2, 0.9]), PARAMS, min_units=1
    )
    assert [(item.name, item.ours, item.theirs) for item in slices] == [
        ("length=short", 0.1, 0.1),
        ("length=medium", 0.5, 0.2),
        ("length=long", 0.9, 0.9),
    ]
    assert missing == ["region"]


def test_small_slices_and_those_of_one_label_are_shown_and_not_judged() -> None:
    test = make_test(120, lang=["de"] * 90 + ["fr"] * 10 + ["it"] * 20)
    test.part.pairs.loc[100:, "score"] = 1.0
    slices, _ = slice_tests(test, ["lang"], cosines(test, 0.1), cosines(test, 0.2, 2), PARAMS, min_units=20)
    judged = {item.name: item.judged for item in slices}
    assert judged == {"lang=de": True, "lang=it": False, "lang=fr": False}
    for item in slices:
        assert (item.gain is not None) == item.judged
        assert item.theirs is not None
        assert math.isfinite(item.ours)


def test_a_slice_that_broke_is_seen_under_a_mean_that_rose() -> None:
    test = make_test(600, lang=["de"] * 540 + ["fr"] * 60)
    theirs = cosines(test, 0.3)
    ours = cosines(test, 0.1, seed=2)
    ours[540:] = np.random.default_rng(3).uniform(size=60)  # noise where there was a model
    slices, _ = slice_tests(test, ["lang"], ours, theirs, PARAMS, min_units=30)
    gains = {item.name: item.gain for item in slices}
    assert gains["lang=de"] is not None
    assert gains["lang=fr"] is not None
    assert gains["lang=de"].low > 0
    assert gains["lang=fr"].high < -0.02


@given(confidence=st.floats(0.51, 0.999), intervals=st.integers(0, 60))
def test_intervals_that_shall_hold_together_are_wider_each(confidence: float, intervals: int) -> None:
    wide = widen(EvaluateParams(confidence=confidence), intervals)
    assert 1 - wide.confidence == pytest.approx((1 - confidence) / max(intervals, 1))
    assert 1000 <= wide.bootstrap_samples <= MAX_SAMPLES


def test_equal_models_are_rarely_told_apart() -> None:
    """Two models that are equally good, in eight slices: by luck alone nearly none may look worse by 0.02 for sure."""
    bad = 0
    for seed in range(8):
        test = make_test(400, seed, part=[str(number % 8) for number in range(400)])
        ours, theirs = cosines(test, 0.3, seed + 100), cosines(test, 0.3, seed + 200)
        slices, _ = slice_tests(test, ["part"], ours, theirs, PARAMS, min_units=30)
        bad += sum(item.gain is not None and item.gain.high < -0.02 for item in slices)
    assert bad <= 1  # of 64 slices
