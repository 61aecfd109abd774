"""The batcher: many requests in, one batch at a time through the model, without a timer. Knows token ids, not texts.

While the model computes, requests pile up; the moment it is free, the text whose turn it is goes, together with the
waiting texts most like it in length that fit the token budget. So an idle server answers at once, and under load the
batches grow by themselves. One batch is in flight, in one thread of its own; everything else happens on the event loop.

Turns: row r of a request that arrives after b batches has turn b + r. So a short request passes a long one that came
before it, and yet every batch brings the long one forward by a text at least.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from bisect import insort
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from operator import attrgetter

import numpy as np

from bentos.errors import NotReadyError, OverloadedError
from bentos.vectors import Vectors

TokenIds = Sequence[int]
Infer = Callable[[list[TokenIds], bool], Vectors]  # (token ids of n texts, normalize) -> (n, dim)
SCAN_TEXTS = 256  # how far behind the text whose turn it is its batch mates are looked for
MAX_RETRY_AFTER_S = 60
FIRST_TOKENS_PER_S = 5000.0  # assumed speed until the first batch is measured


class _Request:
    """The texts of one caller, and where their vectors are collected."""

    def __init__(self, count: int, normalize: bool, answer: asyncio.Future[Vectors]) -> None:
        self.normalize = normalize
        self.answer = answer
        self.missing = count
        self.rows: list[Vectors | None] = [None] * count

    def put(self, row: int, vector: Vectors) -> None:
        self.rows[row] = vector
        self.missing -= 1
        if self.missing == 0 and not self.answer.done():
            self.answer.set_result(np.stack([vector for vector in self.rows if vector is not None]))

    def fail(self, error: Exception) -> None:
        if not self.answer.done():
            self.answer.set_exception(error)


@dataclass(eq=False, slots=True)
class _Text:
    """One waiting text."""

    ids: TokenIds
    row: int
    request: _Request
    turn: float


class Batcher:
    """Queues requests and computes them in batches. `start` and `stop` run on the event loop that submits."""

    def __init__(self, infer: Infer, *, batch_tokens: int, queue_texts: int) -> None:
        """Prepare a batcher.

        Args:
            infer: computes one batch; called in the batcher's own thread, one call at a time.
            batch_tokens: budget of a batch, padding included.
            queue_texts: texts that may wait before requests are refused.
        """
        self._infer = infer
        self._batch_tokens = batch_tokens
        self._queue_texts = queue_texts
        self._waiting: list[_Text] = []  # by turn
        self._batches = 0
        self._reserved = 0
        self._wake = asyncio.Event()
        self._tokens_per_s = FIRST_TOKENS_PER_S
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="ekiben-infer")
        self._loop_task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to take batches from the queue."""
        self._loop_task = asyncio.create_task(self._run(), name="ekiben-batcher")

    async def stop(self) -> None:
        """Let the batch in flight finish, refuse what still waits, end the thread."""
        task, self._loop_task = self._loop_task, None
        if task is not None:
            self._wake.set()
            await asyncio.wait([task])
        self._thread.shutdown(wait=False)

    @property
    def texts_waiting(self) -> int:
        """Texts in the queue, without the batch in flight."""
        return len(self._waiting)

    @contextlib.contextmanager
    def reserve(self, texts: int) -> Iterator[None]:
        """Keep room in the queue for texts that are still being tokenized, so that no other queue can grow for ever.

        Raises:
            OverloadedError: when there is no room for so many.
        """
        self._check_room(texts)
        self._reserved += texts
        try:
            yield
        finally:
            self._reserved -= texts

    def _check_room(self, texts: int) -> None:
        if len(self._waiting) + self._reserved + texts <= self._queue_texts:
            return
        seconds = sum(len(text.ids) for text in self._waiting) / self._tokens_per_s
        retry_after_s = min(max(math.ceil(seconds), 1), MAX_RETRY_AFTER_S)
        raise OverloadedError(
            f"{len(self._waiting) + self._reserved} texts are waiting and the request has {texts}; "
            f"at most {self._queue_texts} may wait. Try again in {retry_after_s} s",
            retry_after_s=retry_after_s,
        )

    async def submit(self, token_ids: Sequence[TokenIds], *, normalize: bool, urgent: bool = False) -> Vectors:
        """Wait for the vectors of one request; when the caller is cancelled, its waiting texts are dropped.

        Args:
            token_ids: one list of ids a text.
            normalize: whether the vectors have length 1.
            urgent: go to the head of the queue, and in even when it is full: for the readiness check.

        Returns:
            float32 (texts, dim).

        Raises:
            OverloadedError: when the queue is full; `retry_after_s` is the time it takes at the speed measured so far.
            NotReadyError: when the batcher is not running.
            Exception: what `infer` raised for a text of this request.
        """
        if self._loop_task is None or self._loop_task.done():
            raise NotReadyError("the batcher is not running")
        if not urgent:
            self._check_room(len(token_ids))
        request = _Request(len(token_ids), normalize, asyncio.get_running_loop().create_future())
        first_turn = -math.inf if urgent else self._batches
        for row, ids in enumerate(token_ids):
            insort(self._waiting, _Text(ids, row, request, first_turn + row), key=attrgetter("turn"))
        self._wake.set()
        try:
            return await request.answer
        finally:
            if request.missing:  # cancelled or failed: what has not been computed need not be
                self._drop(request)

    def _drop(self, request: _Request) -> None:
        self._waiting = [text for text in self._waiting if text.request is not request]

    async def _run(self) -> None:
        try:
            while self._loop_task is not None:
                if batch := self._take():
                    await self._compute(batch)
                elif not self._waiting:
                    self._wake.clear()
                    await self._wake.wait()
        finally:  # stopped, or broken: nobody may wait for ever
            for text in self._waiting:
                text.request.fail(NotReadyError("the batcher has stopped; send the request again"))
            self._waiting.clear()

    def _take(self) -> list[_Text]:
        """Remove from the queue the text whose turn it is and its best batch mates."""
        alive = [text for text in self._waiting[:SCAN_TEXTS] if not text.request.answer.done()]
        if not alive:
            del self._waiting[:SCAN_TEXTS]
            return []
        self._batches += 1
        first, *others = alive
        mates = [text for text in others if text.request.normalize == first.request.normalize]
        mates.sort(key=lambda text: abs(len(text.ids) - len(first.ids)))
        batch = [first]
        longest = len(first.ids)
        for text in mates:
            longest = max(longest, len(text.ids))
            if longest * (len(batch) + 1) > self._batch_tokens:
                break
            batch.append(text)
        taken = set(map(id, batch))
        self._waiting = [text for text in self._waiting if id(text) not in taken]
        return batch

    async def _compute(self, batch: list[_Text]) -> None:
        """Compute a batch; when it fails, compute each text by itself, so that only the guilty ones fail."""
        started = time.perf_counter()
        try:
            vectors = await self._in_thread([text.ids for text in batch], batch[0].request.normalize)
        except Exception as error:
            if len(batch) == 1:
                batch[0].request.fail(error)
                return
            for text in batch:
                if not text.request.answer.done():
                    await self._compute([text])
            return
        self._measure(sum(len(text.ids) for text in batch), time.perf_counter() - started)
        for text, vector in zip(batch, vectors, strict=True):
            text.request.put(text.row, vector)

    async def _in_thread(self, token_ids: list[TokenIds], normalize: bool) -> Vectors:
        vectors = await asyncio.get_running_loop().run_in_executor(self._thread, self._infer, token_ids, normalize)
        if len(vectors) != len(token_ids):
            raise RuntimeError(f"the model gave {len(vectors)} vectors for {len(token_ids)} texts")
        return vectors

    def _measure(self, tokens: int, seconds: float) -> None:
        """Keep a running mean of the speed, for Retry-After."""
        self._tokens_per_s += 0.1 * (tokens / max(seconds, 1e-6) - self._tokens_per_s)
