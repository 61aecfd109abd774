"""The cache keeps what is used, within its bytes."""

from __future__ import annotations

import numpy as np

from bentos.cache import VectorCache
from bentos.engine import TokenCount

COUNT = TokenCount(3, truncated=False)
VECTOR = np.arange(100, dtype=np.float32)


def test_what_was_put_is_found() -> None:
    cache = VectorCache(10_000)
    cache.put("a", COUNT, VECTOR)
    count, vector = cache.get("a") or (None, None)
    assert count == COUNT
    np.testing.assert_array_equal(vector, VECTOR)
    assert cache.get("b") is None


def test_the_least_recently_used_leaves_first() -> None:
    cache = VectorCache(2_000)  # two entries of some 850 bytes
    cache.put("a", COUNT, VECTOR)
    cache.put("b", COUNT, VECTOR)
    cache.get("a")
    cache.put("c", COUNT, VECTOR)
    assert [cache.get(key) is not None for key in "abc"] == [True, False, True]


def test_it_stays_within_its_bytes_whatever_comes() -> None:
    cache = VectorCache(20_000)
    for number in range(500):
        cache.put("x" * number, COUNT, VECTOR)
        cache.put((number,) * (number % 50), COUNT, VECTOR)
    assert 5 < len(cache) <= 20_000 // 800


def test_a_kept_vector_does_not_keep_its_batch_alive() -> None:
    batch = np.zeros((64, 100), dtype=np.float32)
    cache = VectorCache(10_000)
    cache.put("a", COUNT, batch[0])
    _, vector = cache.get("a") or (None, np.empty(0))
    assert vector.base is None


def test_an_entry_larger_than_the_cache_is_not_kept() -> None:
    cache = VectorCache(100)
    cache.put("a", COUNT, VECTOR)
    assert len(cache) == 0
