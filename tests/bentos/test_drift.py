"""What is said of two versions: cosines where they mean something, neighbours always, and never more than fits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bentos.adapter import Adapter
from bentos.drift import FEWEST_TEXTS, NEIGHBOURS, RECENT_TEXTS, RECENT_VALUES, Drift
from bentos.lunchbox import Lunchbox
from bentos.manifest import Manifest
from bentos.vectors import Vectors, cosine_matrix
from tests.bentos.shelves import make_map

A, B = "a" * 16, "b" * 16


def make_box(space: str, dim: int = 32, **adapters: Vectors) -> Lunchbox:
    """What a drift looks at: a manifest, and maps by the space that they lead to."""
    manifest = Manifest.model_construct(name="ekiben", version="1", run_id=space * 2, space_id=space, dim=dim)
    maps = {to: Adapter(to, matrix) for to, matrix in adapters.items()}
    return Lunchbox(Path(), manifest, None, None, {}, maps)  # type: ignore[arg-type]


def make_rows(count: int, dim: int = 32, seed: int = 0) -> Vectors:
    return np.random.default_rng(seed).normal(size=(count, dim)).astype(np.float32)


def follow(drift: Drift, live: Vectors, other: Vectors, at_a_time: int = 5) -> None:
    for begin in range(0, len(live), at_a_time):
        part = slice(begin, begin + at_a_time)
        drift.add(drift.compare(live[part], other[part]), live[part], other[part])


W = make_map()
SQUARE = {"same": (make_box(A), make_box(A)), "of the shadow": (make_box(A), make_box(B, **{A: W}))}
SQUARE["of the live one"] = (make_box(A, **{B: np.ascontiguousarray(W.T)}), make_box(B))


@pytest.mark.parametrize("name", SQUARE)
def test_vectors_that_differ_by_a_known_map_only_have_cosine_1_and_the_same_neighbours(name: str) -> None:
    live = make_rows(200)
    other = live if name == "same" else live @ W.T  # so that `other @ W` is `live`
    drift = Drift(*SQUARE[name])
    follow(drift, 3 * live, other)
    told = drift.describe()
    assert told["relation"] == ("same" if name == "same" else "mapped")
    assert told["texts"] == 200
    assert told["cosine"]["min"] == pytest.approx(1, abs=1e-5)
    assert told["cosine"]["values"] == 200
    assert told["overlap_at_10"]["min"] == 1
    assert told["overlap_at_10"]["values"] == 200 - FEWEST_TEXTS


def test_spaces_without_a_map_have_no_cosine_but_neighbours_of_any_dimensions() -> None:
    drift = Drift(make_box(A, 32), make_box(B, 8))
    live = make_rows(200)
    follow(drift, live, np.ascontiguousarray(live[:, :8]))
    told = drift.describe()
    assert (told["relation"], told["cosine"]) == ("apart", None)
    assert 0.05 < told["overlap_at_10"]["mean"] < 0.95
    by_chance = Drift(make_box(A), make_box(B))
    follow(by_chance, live, make_rows(200, seed=1))
    assert by_chance.describe()["overlap_at_10"]["mean"] < 0.25


def test_noise_shows_in_both_figures() -> None:
    drift = Drift(make_box(A), make_box(A))
    live = make_rows(200)
    follow(drift, live, live + 0.3 * make_rows(200, seed=1))
    told = drift.describe()
    assert 0.9 < told["cosine"]["mean"] < 0.99
    assert told["cosine"]["min"] <= told["cosine"]["p05"] <= told["cosine"]["mean"]
    assert 0.4 < told["overlap_at_10"]["mean"] < 0.95


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**16), st.integers(FEWEST_TEXTS, 120), st.floats(0, 2))
def test_the_overlap_is_that_of_a_plain_count(seed: int, kept: int, noise: float) -> None:
    live, rows = make_rows(kept, seed=seed), make_rows(4, seed=seed + 1)
    other, others = live + noise * make_rows(kept, seed=seed + 2), rows + noise * make_rows(4, seed=seed + 3)
    drift = Drift(make_box(A), make_box(B))
    follow(drift, live, other, at_a_time=kept)
    found = drift.compare(rows, others).overlaps
    nearest = [
        np.argsort(-cosine_matrix(new, before), axis=1)[:, :NEIGHBOURS]
        for new, before in ((rows, live), (others, other))
    ]
    assert found == [len({*a} & {*b}) / NEIGHBOURS for a, b in zip(*(each.tolist() for each in nearest), strict=True)]


def test_a_text_that_comes_again_is_kept_once_and_is_no_neighbour_of_itself() -> None:
    drift = Drift(make_box(A), make_box(A))
    live = make_rows(FEWEST_TEXTS)
    follow(drift, live, live)
    again = drift.compare(live[:3], live[:3])
    assert (again.fresh, again.overlaps) == ([], []), "without itself there is one too few"
    follow(drift, make_rows(1, seed=9), make_rows(1, seed=9))
    again = drift.compare(live[:3], live[:3])
    assert (again.fresh, again.overlaps) == ([], [1, 1, 1])
    assert drift._kept == FEWEST_TEXTS + 1


def test_nothing_grows_for_ever_and_no_text_is_kept() -> None:
    drift = Drift(make_box(A), make_box(A))
    rows = make_rows(RECENT_VALUES + 500)
    follow(drift, rows, rows, at_a_time=16)
    assert len(drift._live_rows) == len(drift._other_rows) == RECENT_TEXTS
    assert len(drift._cosines) == len(drift._overlaps) == RECENT_VALUES
    assert drift.describe()["texts"] == RECENT_VALUES + 500
    newest = rows[-1] / np.linalg.norm(rows[-1])
    assert np.abs(drift._live_rows - newest).sum(axis=1).min() < 1e-5

    def holds_text(value: Any) -> bool:
        return isinstance(value, str) and value not in ("same", "mapped", "apart")

    assert not [name for name, value in vars(drift).items() if holds_text(value)]
