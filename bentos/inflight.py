"""Requests and texts in flight: who waits for what. Their waiting lists belong to the event loop alone."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from bentos.engine import TokenCount
from bentos.lanes import LaneText
from bentos.vectors import Vectors

LaneName = Literal["interactive", "bulk"]
Inspect = Callable[[Sequence[TokenCount]], None]


@dataclass(frozen=True, slots=True)
class Embedded:
    """The answer to one request."""

    vectors: Vectors  # (n, dim) float32, raw as the model gives them: not normalised
    texts: list[TokenCount]  # (n,)


class Request:
    """One caller's texts, and where their vectors are collected. Belongs to the event loop."""

    __slots__ = ("answer", "counts", "inspect", "lane", "missing", "new", "rows", "texts", "urgent")

    def __init__(self, size: int, lane: LaneName, inspect: Inspect | None, urgent: bool) -> None:
        self.lane: LaneName = lane
        self.inspect = inspect
        self.urgent = urgent
        self.answer: asyncio.Future[Embedded] = asyncio.get_running_loop().create_future()
        self.missing = size
        self.rows: list[Vectors | None] = [None] * size
        self.counts: list[TokenCount | None] = [None] * size
        self.texts: list[Text | None] = [None] * size  # None: it was in the cache
        self.new: list[Text] = []  # those that this request was the first to bring

    def be_inspected(self) -> None:
        """Show the lengths of all texts to `inspect`, which may raise."""
        if self.inspect is not None:
            counts = (text.count if text is not None else self.counts[row] for row, text in enumerate(self.texts))
            self.inspect([count for count in counts if count is not None])

    def put(self, row: int, count: TokenCount, vector: Vectors) -> None:
        """Collect the vector of one text; the last one completes the answer."""
        self.rows[row], self.counts[row] = vector, count
        self.missing -= 1
        if self.missing == 0 and not self.answer.done():
            vectors = np.stack([vector for vector in self.rows if vector is not None])
            self.answer.set_result(Embedded(vectors, [count for count in self.counts if count is not None]))

    def fail(self, error: Exception) -> None:
        """End the request without an answer."""
        if not self.answer.done():
            self.answer.set_exception(error)


@dataclass(eq=False, slots=True)
class Text(LaneText):
    """One text in flight, however many requests wait for it. `waiters` belongs to the event loop."""

    key: Hashable = None
    lane: LaneName = "interactive"
    cost: int = 0  # tokens that it holds in the queue, estimated
    count: TokenCount | None = None
    generation: int = 0  # of vectors that may be kept
    waiters: list[tuple[Request, int]] = field(default_factory=list)
    done: bool = False
