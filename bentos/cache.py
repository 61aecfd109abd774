"""The cache of vectors: bounded by memory, the least recently used leave first. Belongs to one model and one thread.

A key is the whole input of the model (the text with its prompt before it, or its token ids), and a value is the full
raw vector; length and dimensions are made from it per request. The space is the model's own: each has its own cache.
"""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Hashable

from bentos.engine import TokenCount
from bentos.vectors import Vectors

ENTRY_BYTES = 400  # what Python itself takes for an entry, about
Cached = tuple[TokenCount, Vectors]


class VectorCache:
    """Keeps vectors of texts that come again and again, such as frequent search queries."""

    def __init__(self, max_bytes: int) -> None:
        """Prepare an empty cache; with 0 bytes nothing is ever kept."""
        self._max_bytes = max_bytes
        self._bytes = 0
        self._entries: OrderedDict[Hashable, Cached] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, key: Hashable) -> bool:
        return key in self._entries

    def get(self, key: Hashable) -> Cached | None:
        """Find token count and vector (dim,), or None."""
        entry = self._entries.get(key)
        if entry is not None:
            self._entries.move_to_end(key)
        return entry

    def put(self, key: Hashable, count: TokenCount, vector: Vectors) -> None:
        """Keep a vector (dim,), and let the least recently used ones go to make room."""
        size = _entry_bytes(key, vector)
        if size > self._max_bytes or key in self._entries:
            return
        self._entries[key] = (count, vector.copy())  # a row would keep its whole batch alive
        self._bytes += size
        while self._bytes > self._max_bytes:
            oldest, (_, old_vector) = self._entries.popitem(last=False)
            self._bytes -= _entry_bytes(oldest, old_vector)


def _entry_bytes(key: Hashable, vector: Vectors) -> int:
    numbers = 36 * len(key) if isinstance(key, tuple) else 0  # token ids are objects of their own
    return ENTRY_BYTES + sys.getsizeof(key) + numbers + vector.nbytes
