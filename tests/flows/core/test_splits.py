"""No text on both sides, whatever the pairs look like."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flows.core.splits import split_groups

FRACTIONS = {"train": 0.7, "dev": 0.15, "test": 0.15}
Rows = list[tuple[str, str]]
TEXTS = st.text("abcdefgh☕", min_size=1, max_size=2)


def split(rows: Rows, seed: int = 13, fractions: dict[str, float] = FRACTIONS) -> tuple[dict[str, Rows], int]:
    result = split_groups([a for a, _ in rows], [b for _, b in rows], fractions, seed=seed)
    return {name: [rows[i] for i in positions] for name, positions in result.rows.items()}, result.dropped


def pools(count: int, size: int = 4) -> Rows:
    return [(f"q{pool}-{i}", f"p{pool}-{k}") for pool in range(count) for i in range(size) for k in range(size)]


@given(st.lists(st.tuples(TEXTS, TEXTS), max_size=60), st.integers(0, 9))
def test_no_text_stands_on_both_sides_and_no_row_gets_lost(rows: Rows, seed: int) -> None:
    parts, dropped = split(rows, seed)
    seen: set[str] = set()
    for part in parts.values():
        texts = {text for row in part for text in row}
        assert not texts & seen
        seen |= texts
    assert sum(map(len, parts.values())) + dropped == len(rows)
    kept = [row for part in parts.values() for row in part]
    assert not [row for row in rows if row not in kept and row[0] == row[1]], "a row of one text can always be kept"


@given(st.lists(st.tuples(TEXTS, TEXTS), max_size=60, unique=True), st.randoms(use_true_random=False))
def test_the_order_of_the_rows_does_not_matter(rows: Rows, shuffle: random.Random) -> None:
    shuffled = list(rows)
    shuffle.shuffle(shuffled)
    one, other = split(rows)[0], split(shuffled)[0]
    assert {name: sorted(part) for name, part in one.items()} == {name: sorted(part) for name, part in other.items()}


def test_many_groups_meet_the_asked_fractions_exactly_enough() -> None:
    rows = pools(100)
    parts, dropped = split(rows)
    assert dropped == 0
    assert {name: len(part) / len(rows) for name, part in parts.items()} == pytest.approx(FRACTIONS, abs=0.01)
    assert parts["train"] == [row for row in rows if row in parts["train"]], "rows keep their order"


def test_the_seed_decides_and_the_same_seed_repeats() -> None:
    rows = pools(40)
    assert split(rows, 1) == split(rows, 1)
    assert split(rows, 1)[0]["test"] != split(rows, 2)[0]["test"]


def test_a_group_that_fits_into_train_stays_whole() -> None:
    rows = pools(1, size=10) + pools(60, size=1)
    parts, dropped = split(rows)
    assert dropped == 0
    assert {row for row in parts["train"] if row[0].startswith("q0-")} == set(pools(1, size=10))
    assert len(parts["dev"]) == len(parts["test"]) == 24


@pytest.mark.parametrize(
    ("rows", "most_dropped"),
    [
        pytest.param(pools(1, size=40), 0.65, id="every query is judged against every profile"),
        pytest.param([(f"t{i}", f"t{i + 1}") for i in range(1000)], 0.25, id="a chain"),
        pytest.param(pools(3, size=20), 0.25, id="three groups of a third"),
    ],
)
def test_a_group_that_is_too_big_is_cut_by_texts(rows: Rows, most_dropped: float) -> None:
    parts, dropped = split(rows)
    assert 0 < dropped <= most_dropped * len(rows)
    kept = len(rows) - dropped
    for name, fraction in FRACTIONS.items():
        assert len(parts[name]) >= 0.5 * fraction * kept


def test_two_way_splits_and_no_rows_work_too() -> None:
    parts, _ = split(pools(50), fractions={"train": 0.8, "dev": 0.2})
    assert len(parts["dev"]) == pytest.approx(160, abs=16)
    assert split([]) == ({"train": [], "dev": [], "test": []}, 0)
