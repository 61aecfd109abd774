"""Rankings and what is kept of them, by hand and by property."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flows.core.neighbours import (
    choose_ranks,
    group_judgements,
    low_end,
    ndcg,
    rank,
    share_found,
    similarities,
    similarity_kept,
)

NOTHING_SAME = np.zeros((1, 4), dtype=bool)


@pytest.mark.parametrize(
    ("documents", "ranks"), [(1, 1), (9, 1), (20, 2), (99, 9), (100, 10), (101, 10), (100_000, 10)]
)
def test_chance_finds_a_tenth_at_most_where_there_are_ten_documents(documents: int, ranks: int) -> None:
    assert choose_ranks(documents) == ranks


def test_the_nearest_come_first_and_a_query_does_not_find_itself() -> None:
    documents = np.array([[1.0, 0.5, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 1.0], [0.0, 1.0, 0.0]])
    cosines = similarities(np.array([[1.0, 0.5, 0.0]]), documents, np.array([[True, False, False, False]]))
    assert rank(cosines, 2).tolist() == [[1, 3]]
    assert np.isneginf(cosines[0, 0])


def test_equal_documents_keep_their_order() -> None:
    assert rank(np.array([[0.5, 0.7, 0.7, 0.5]]), 4).tolist() == [[1, 2, 0, 3]]


def test_shares_by_hand() -> None:
    found, wanted = np.array([[0, 1, 2], [5, 4, 3]]), np.array([[2, 1, 9], [3, 4, 5]])
    assert share_found(found, wanted).tolist() == pytest.approx([2 / 3, 1.0])


def test_kept_nearness_by_hand() -> None:
    cosines = np.array([[0.9, 0.8, 0.1, 0.2]])  # any document: 0.5, the two nearest: 0.85
    assert similarity_kept(np.array([[0, 1]]), cosines)[0] == pytest.approx(1.0)
    assert similarity_kept(np.array([[0, 3]]), cosines)[0] == pytest.approx((0.55 - 0.5) / 0.35)
    assert similarity_kept(np.array([[2, 3]]), cosines)[0] < 0
    assert similarity_kept(np.array([[2, 3]]), np.full((1, 4), 0.4))[0] == 1.0  # all are as near: nothing can be lost


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), documents=st.integers(20, 60))
def test_what_is_found_by_chance_keeps_nothing_on_average(seed: int, documents: int) -> None:
    random = np.random.default_rng(seed)
    cosines = random.uniform(-1, 1, size=(200, documents))
    ranks = choose_ranks(documents)
    chance = rank(random.uniform(size=cosines.shape), ranks)
    assert abs(similarity_kept(chance, cosines).mean()) < 0.35
    assert share_found(chance, rank(cosines, ranks)).mean() < 0.3
    assert similarity_kept(rank(cosines, ranks), cosines).min() == pytest.approx(1.0)


def test_ndcg_by_hand() -> None:
    relevances = {0: {3: 1.0, 7: 0.5}, 2: {1: 2.0}}
    figures = ndcg(np.array([[7, 0, 3], [1, 1, 1], [4, 5, 6]]), relevances)
    best = 1.0 + 0.5 / np.log2(3)
    assert figures.tolist() == pytest.approx([(0.5 + 1.0 / np.log2(4)) / best, 0.0])
    assert ndcg(np.array([[3, 7]]), {0: {3: 1.0, 7: 0.5, 9: 0.25}}).tolist() == [pytest.approx(1.0)]


def test_judgements_leave_out_documents_that_are_the_query() -> None:
    same = np.zeros((2, 3), dtype=bool)
    same[0, 1] = True
    assert group_judgements([(0, 1, 1.0), (0, 2, 0.5), (1, 1, 1.0)], same) == {0: {2: 0.5}, 1: {1: 1.0}}


def test_the_low_end_is_below_the_mean_and_nearer_to_it_with_more_queries() -> None:
    few, many = np.array([0.0, 1.0, 1.0, 1.0] * 4), np.array([0.0, 1.0, 1.0, 1.0] * 100)
    assert low_end(few) < low_end(many) < 0.75
    assert low_end(np.ones(16)) == 1.0
    assert low_end(few, few) == 1.0  # the same loss on the same queries is no loss
    assert low_end(np.zeros(5), np.zeros(5)) == 1.0
