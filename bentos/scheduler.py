"""Which texts go next, and together: a queue that knows turns and lengths. Pure: no threads, no clock.

The text whose turn it is goes, with the waiting texts most like it in length, as padding is what a batch wastes. So an
idle server answers at once, and under load the batches grow by themselves: there is no timer.

Turns: row r of a request that arrives after b batches has turn b + r. So a short request passes a long one that came
before it, and yet every batch brings the long one forward by a text at least.
"""

from __future__ import annotations

import math
from bisect import insort
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Generic, TypeVar

SCAN_TEXTS = 256  # how far behind the text whose turn it is its batch mates are looked for
_by_turn = attrgetter("turn")


@dataclass(eq=False, slots=True)
class QueuedText:
    """One text that waits to be computed."""

    ids: Sequence[int] = ()
    turn: float = 0.0
    alone: bool = field(default=False, init=False)  # has no mates
    queued: bool = field(default=False, init=False)
    dropped: bool = field(default=False, init=False)  # nobody waits for it any more


T = TypeVar("T", bound=QueuedText)


class Queue(Generic[T]):
    """The texts that wait for one lane."""

    def __init__(self, *, batch_tokens: int, batch_texts: int) -> None:
        """Prepare an empty queue.

        Args:
            batch_tokens: budget of a batch, padding included; a longer text goes alone.
            batch_texts: most texts in a batch.
        """
        self._batch_tokens = batch_tokens
        self._batch_texts = batch_texts
        self._waiting: list[T] = []  # by turn; dropped ones stay until they are come across
        self._batches = 0
        self.texts = 0  # that wait, without the dropped ones
        self.tokens = 0

    def add(self, texts: Iterable[T], *, urgent: bool = False) -> None:
        """Append the texts of one request, or put them at the head."""
        first_turn = -math.inf if urgent else self._batches
        for row, text in enumerate(texts):
            if text.dropped:
                continue
            text.turn, text.queued = first_turn + row, True
            insort(self._waiting, text, key=_by_turn)
            self.texts += 1
            self.tokens += len(text.ids)

    def drop(self, text: T) -> None:
        """Let a text be passed over, whether it waits here already or is still to come."""
        if text.queued and not text.dropped:
            self.texts -= 1
            self.tokens -= len(text.ids)
        text.dropped = True

    def take(self, takers: int = 1) -> list[T]:
        """Remove the text whose turn it is and its best mates; empty when nothing waits.

        `takers` is how many share the queue: none takes more than its share, so that none stands idle.
        """
        window: list[T] = []
        while self._waiting and not window:
            window = [text for text in self._waiting[:SCAN_TEXTS] if not text.dropped]
            if not window:
                del self._waiting[:SCAN_TEXTS]
        if not window:
            return []
        self._batches += 1
        first = window[0]
        most = 1 if first.alone else min(self._batch_texts, math.ceil(self.texts / takers))
        batch, longest = [first], len(first.ids)
        mates = [text for text in window[1:] if not text.alone] if most > 1 else []
        for text in sorted(mates, key=lambda text: abs(len(text.ids) - longest)):
            longest = max(longest, len(text.ids))
            if len(batch) == most or longest * (len(batch) + 1) > self._batch_tokens:
                break
            batch.append(text)
        for text in batch:
            text.queued = False
        self._waiting[:SCAN_TEXTS] = [text for text in window if text.queued]
        self.texts -= len(batch)
        self.tokens -= sum(len(text.ids) for text in batch)
        return batch

    def first(self) -> T | None:
        """The text whose turn it is, or None."""
        return next((text for text in self._waiting if not text.dropped), None)
