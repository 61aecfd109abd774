"""The map between two spaces, on spaces whose relation is known."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bentos.adapter import Adapter, find_problem
from bentos.vectors import cosine_pairs, normalize
from flows.core.procrustes import fit_map


def make_vectors(random: np.random.Generator, texts: int, dim: int) -> np.ndarray:
    return normalize(random.normal(size=(texts, dim))).astype(np.float32)


def make_turn(random: np.random.Generator, dim: int) -> np.ndarray:
    """A random orthogonal matrix: a turn, or a turn and a mirror."""
    return np.linalg.qr(random.normal(size=(dim, dim)))[0]


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), dim=st.integers(2, 24), more=st.integers(0, 200))
def test_any_turn_of_a_space_is_undone_for_texts_that_it_was_not_fitted_on(seed: int, dim: int, more: int) -> None:
    random = np.random.default_rng(seed)
    old, turn = make_vectors(random, 4 * dim + more + 20, dim), make_turn(random, dim)
    new = (old @ turn).astype(np.float32)
    mapped = Adapter("old", fit_map(new[20:], old[20:])).apply(new[:20])
    # The prior for the identity, of one text among many, turns the map by a little.
    assert cosine_pairs(mapped, old[:20]).min() > 0.99


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    dims=st.tuples(st.integers(1, 24), st.integers(1, 24)),
    texts=st.integers(1, 60),
    scale=st.sampled_from([1e-3, 1.0, 1e3]),
)
def test_every_map_is_one_that_a_lunchbox_takes(seed: int, dims: tuple[int, int], texts: int, scale: float) -> None:
    random = np.random.default_rng(seed)
    new, old = make_vectors(random, texts, dims[0]) * scale, make_vectors(random, texts, dims[1])
    matrix = fit_map(new, old)
    assert matrix.shape == dims
    assert matrix.dtype == np.float32
    assert find_problem(matrix, dims[0]) is None


def test_of_a_smaller_old_space_the_map_finds_the_dimensions_that_it_kept() -> None:
    random = np.random.default_rng(3)
    whole = make_vectors(random, 400, 16)
    turn = make_turn(random, 16)
    matrix = fit_map((whole @ turn)[50:], whole[50:, :6])
    assert cosine_pairs((whole @ turn)[:50] @ matrix, whole[:50, :6]).min() > 0.99


def test_of_a_larger_old_space_the_map_reaches_the_part_that_the_new_one_spans() -> None:
    random = np.random.default_rng(4)
    small = make_vectors(random, 400, 6)
    into = make_turn(random, 16)[:6]
    matrix = fit_map(small[50:], (small @ into)[50:])
    assert cosine_pairs(small[:50] @ matrix, (small @ into)[:50]).min() > 0.99


def test_where_the_texts_say_nothing_the_map_changes_nothing() -> None:
    random = np.random.default_rng(5)
    known = make_vectors(random, 40, 8) * np.array([1, 1, 1, 1, 0, 0, 0, 0])
    matrix = fit_map(known, known)
    np.testing.assert_allclose(matrix, np.eye(8), atol=1e-5)


def test_without_texts_or_partners_there_is_no_map() -> None:
    with pytest.raises(ValueError, match="0 new and 0 old"):
        fit_map(np.empty((0, 4), dtype=np.float32), np.empty((0, 4), dtype=np.float32))
    with pytest.raises(ValueError, match="3 new and 2 old"):
        fit_map(np.ones((3, 4)), np.ones((2, 4)))
