from __future__ import annotations

from pathlib import Path
from statistics import fmean

import pytest

from tests.benchmarks.texts import (
    BULK_TEXTS,
    MIXED_MEAN_TOKENS,
    MIXED_TOKENS,
    PROFILE_TOKENS,
    SHORT_TOKENS,
    Writer,
    read_phrases,
)


@pytest.fixture(scope="session")
def writer(tiny_lunchbox_path: Path) -> Writer:
    return Writer(tiny_lunchbox_path / "tokenizer.json")


def test_phrases_are_distinct_and_not_empty() -> None:
    phrases = read_phrases()
    assert len(phrases) > 1000
    assert len(set(phrases)) == len(phrases)
    assert all(phrases)


@pytest.mark.parametrize(
    ("kind", "mean"),
    [("write_short", SHORT_TOKENS), ("write_profiles", PROFILE_TOKENS), ("write_mixed", MIXED_MEAN_TOKENS)],
)
def test_texts_are_as_long_as_promised_and_none_comes_twice(writer: Writer, kind: str, mean: float) -> None:
    texts = getattr(writer, kind)("seed", 640)
    assert len(set(texts)) == 640
    assert fmean(writer.count_tokens(texts)) == pytest.approx(mean, rel=0.1)


def test_two_writers_write_the_same_and_neither_repeats_itself(tiny_lunchbox_path: Path) -> None:
    one, other = (Writer(tiny_lunchbox_path / "tokenizer.json") for _ in range(2))
    first, second = one.write_short("seed", 200), one.write_short("seed", 200)
    assert other.write_short("seed", 200) == first
    assert other.write_short("seed", 200) == second
    assert set(first).isdisjoint(second)


def test_every_bulk_request_is_about_as_much_work(writer: Writer) -> None:
    tokens = writer.count_tokens(writer.write_mixed("seed", 4 * BULK_TEXTS))
    sums = [sum(tokens[at : at + BULK_TEXTS]) for at in range(0, len(tokens), BULK_TEXTS)]
    assert max(sums) < 1.05 * min(sums)
    assert min(tokens) < 2 * MIXED_TOKENS[0]
    assert max(tokens) > 0.9 * MIXED_TOKENS[1]
