"""The batcher: many requests in, their vectors out. Knows texts and deadlines, nothing of HTTP.

A text's way: the event loop admits its request and looks for it in the cache and among the texts in flight; the
tokenizing thread turns it into ids; a thread of its lane computes it with others (see lanes.py, scheduler.py); the
event loop hands its vector to every request that waits for it. Who waits for what is known on the event loop only.

There are two lanes. Requests of a few texts go by the `interactive` one, all others by `bulk`, whose threads stand
back: when somebody waits for one vector, the operating system takes the core from the bulk work at once.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Protocol, cast

from bentos.cache import VectorCache
from bentos.engine import TokenizedText
from bentos.errors import DeadlineExceededError, NotReadyError, OverloadedError
from bentos.inflight import Embedded, Inspect, LaneName, Request, Text
from bentos.lanes import Lane, LaneText, Result
from bentos.observer import Observer
from bentos.tokenizing import TokenizingThread
from bentos.vectors import Vectors

Input = str | Sequence[int]  # a text, or its token ids
CHARS_PER_TOKEN = 4  # until a text is tokenized
MAX_RETRY_AFTER_S = 60
SUPERVISE_EVERY_S = 0.5
BULK_NICENESS = 10


class Model(Protocol):
    """What the batcher needs of an engine."""

    def tokenize(self, texts: Sequence[str]) -> Sequence[TokenizedText]:
        """Turn texts into token ids."""

    def infer(self, token_ids: Sequence[Sequence[int]], *, normalize: bool | None = None) -> Vectors:
        """Compute one batch: (n, dim)."""


@dataclass(frozen=True, slots=True)
class Limits:
    """How much may be computed and may wait at once."""

    threads: int  # of each lane
    max_tokens: int  # a longer text is cut to so many
    batch_tokens: int = 256
    batch_texts: int = 8
    interactive_texts: int = 4  # requests of more texts go by the bulk lane
    queue_tokens: dict[str, int] = field(default_factory=lambda: {"interactive": 16_384, "bulk": 131_072})
    cache_bytes: int = 0
    stall_s: float = 60.0


class Batcher:
    """Queues requests and computes them in batches. All public methods run on the event loop that called `start`."""

    def __init__(self, model: Model, limits: Limits, observer: Observer | None = None) -> None:
        """Prepare a batcher for one model."""
        self._model = model
        self._limits = limits
        self._observer = observer or Observer()
        self._cache = VectorCache(limits.cache_bytes)
        self._in_flight: dict[Hashable, Text] = {}
        self._tokens: dict[LaneName, int] = {"interactive": 0, "bulk": 0}  # admitted and not yet computed
        self._lanes: dict[LaneName, Lane] = {
            "interactive": self._make_lane("interactive", niceness=0),
            "bulk": self._make_lane("bulk", niceness=BULK_NICENESS),
        }
        self._tokenizer = TokenizingThread(model.tokenize, self._observer, self._put_tokenized, self._put_refused)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._running = False
        self._supervisor: asyncio.Task[None] | None = None

    def _make_lane(self, name: LaneName, *, niceness: int) -> Lane:
        limits = self._limits
        return Lane(
            name,
            lambda token_ids: self._model.infer(token_ids, normalize=False),
            self._deliver,
            threads=limits.threads,
            batch_tokens=limits.batch_tokens,
            batch_texts=limits.batch_texts,
            niceness=niceness,
            stall_s=limits.stall_s,
            observer=self._observer,
        )

    def start(self) -> None:
        """Start the threads."""
        self._loop = asyncio.get_running_loop()
        self._tokenizer.start()
        for lane in self._lanes.values():
            lane.start()
        self._running = True
        self._supervisor = asyncio.create_task(self._supervise(), name="ekiben-supervisor")

    async def stop(self) -> None:
        """Let the batches in flight finish, refuse what still waits, end the threads."""
        if not self._running:
            return
        self._running = False
        if self._supervisor is not None:
            self._supervisor.cancel()
        await asyncio.to_thread(self._tokenizer.stop)
        left = [await asyncio.to_thread(lane.stop) for lane in self._lanes.values()]
        await asyncio.sleep(0)  # what the last batches delivered
        stopping = NotReadyError("the server is stopping; send the request again")
        for text in [*self._in_flight.values(), *(text for texts in left for text in texts)]:
            self._finish(cast(Text, text), stopping)
        self._loop = None

    def find_problem(self) -> str | None:
        """Say which lane cannot compute at the moment, or None."""
        if not self._running:
            return "the batcher is not running"
        return next((problem for lane in self._lanes.values() if (problem := lane.find_problem()) is not None), None)

    def report_queues(self) -> None:
        """Tell the observer what waits now."""
        for lane in self._lanes.values():
            lane.report()

    async def embed(
        self,
        inputs: Sequence[Input],
        *,
        deadline: float | None = None,
        inspect: Inspect | None = None,
        urgent: bool = False,
    ) -> Embedded:
        """Wait for the vectors of one request. When the caller is cancelled, what nobody else wants is not computed.

        Args:
            inputs: cleaned texts with their prompt before them, or token ids of this model.
            deadline: as `time.monotonic()` counts; a request that cannot meet it is refused at once.
            inspect: looks at the lengths of all texts before anything is computed; what it raises fails this request.
                Called in the tokenizing thread.
            urgent: go to the head of the queue, and in even when it is full: for the readiness check.

        Raises:
            OverloadedError: when the queue is full; `retry_after_s` is the time it takes at the speed measured so far.
            DeadlineExceededError: when the deadline passed.
            NotReadyError: when the batcher is not running.
            Exception: what `inspect` raised, or the model for a text of this request.
        """
        if not self._running:
            raise NotReadyError("the batcher is not running")
        if not inputs:
            raise ValueError("a request has at least one text")
        lane: LaneName = "interactive" if urgent or len(inputs) <= self._limits.interactive_texts else "bulk"
        costs = [min(_estimate_tokens(each), self._limits.max_tokens) for each in inputs]
        if not urgent:
            self._admit(lane, sum(costs), deadline)
        request = Request(len(inputs), lane, inspect, urgent)
        self._add(request, inputs, costs)
        if request.new or inspect is not None:
            self._tokenizer.put(request)
        timer = None
        if deadline is not None:
            loop = asyncio.get_running_loop()
            timer = loop.call_later(max(deadline - time.monotonic(), 0.0), self._expire, request)
        try:
            return await request.answer
        finally:
            if timer is not None:
                timer.cancel()
            if request.missing:
                self._leave(request)

    def _admit(self, lane: LaneName, tokens: int, deadline: float | None) -> None:
        """Refuse what does not fit, or what would wait past its deadline. An empty queue takes any request."""
        waiting, limit = self._tokens[lane], self._limits.queue_tokens[lane]
        wait_s = waiting / self._lanes[lane].tokens_per_s
        retry_after_s = min(max(math.ceil(wait_s), 1), MAX_RETRY_AFTER_S)
        if waiting and waiting + tokens > limit:
            self._observer.record_shed("queue")
            raise OverloadedError(
                f"{waiting} tokens are waiting in the {lane} lane and the request has about {tokens}; at most {limit} "
                f"may wait (EKIBEN_QUEUE_TOKENS_{lane.upper()}). Try again in {retry_after_s} s",
                retry_after_s=retry_after_s,
                limit=limit,
            )
        if deadline is not None and waiting and time.monotonic() + wait_s > deadline:
            self._observer.record_shed("deadline")
            raise OverloadedError(
                f"the request would wait about {wait_s:.1f} s, longer than its time limit allows. "
                f"Try again in {retry_after_s} s, or allow more time",
                retry_after_s=retry_after_s,
            )

    def _add(self, request: Request, inputs: Sequence[Input], costs: Sequence[int]) -> None:
        """Find each text in the cache or in flight, or bring it in."""
        hits = shared = 0
        for row, (each, cost) in enumerate(zip(inputs, costs, strict=True)):
            key: Hashable = each if isinstance(each, str) else tuple(each)
            if not request.urgent:  # the readiness check must see the model at work
                if self._limits.cache_bytes and (cached := self._cache.get(key)) is not None:
                    hits += 1
                    request.put(row, *cached)
                    continue
                if (text := self._in_flight.get(key)) is not None:
                    shared += 1
                    text.waiters.append((request, row))
                    request.texts[row] = text
                    continue
            text = Text(key=key, lane=request.lane, cost=cost, waiters=[(request, row)])
            request.texts[row] = text
            request.new.append(text)
            if not request.urgent:
                self._in_flight[key] = text
            self._tokens[request.lane] += cost
        if self._limits.cache_bytes:
            self._observer.record_cache(hits, len(inputs) - hits)
        if shared:
            self._observer.record_duplicates(shared)

    def _leave(self, request: Request) -> None:
        """The caller has gone, or has failed: what nobody else waits for need not be computed."""
        for text in request.texts:
            if text is not None and not text.done:
                text.waiters = [waiter for waiter in text.waiters if waiter[0] is not request]
                if not text.waiters:
                    self._lanes[text.lane].drop(text)
                    self._settle(text)

    def _expire(self, request: Request) -> None:
        if not request.answer.done():
            self._observer.record_shed("deadline")
            request.fail(DeadlineExceededError("the request's time limit passed before it was computed"))

    def _settle(self, text: Text) -> None:
        """Take a text off the books."""
        text.done = True
        self._tokens[text.lane] -= text.cost
        if self._in_flight.get(text.key) is text:
            del self._in_flight[text.key]

    def _finish(self, text: Text, result: Result) -> None:
        """Hand a result to everybody who waits for it; a second one, of a thread given up, is not heard."""
        if text.done:
            return
        self._settle(text)
        if isinstance(result, Exception) or text.count is None:
            error = result if isinstance(result, Exception) else RuntimeError("a text was computed without its length")
            for request, _ in text.waiters:
                request.fail(error)
            return
        if self._limits.cache_bytes:
            self._cache.put(text.key, text.count, result)
        for request, row in text.waiters:
            request.put(row, text.count, result)

    # Called by the threads: each hands over to the event loop.

    def _call(self, callback: Callable[..., None], *args: object) -> None:
        loop = self._loop
        if loop is not None and not loop.is_closed():
            loop.call_soon_threadsafe(callback, *args)

    def _deliver(self, texts: Sequence[LaneText], results: Sequence[Result]) -> None:
        self._call(self._finish_all, texts, results)

    def _finish_all(self, texts: Sequence[LaneText], results: Sequence[Result]) -> None:
        for text, result in zip(texts, results, strict=True):
            self._finish(cast(Text, text), result)

    def _put_tokenized(self, request: Request) -> None:
        self._lanes[request.lane].put(request.new, urgent=request.urgent)

    def _put_refused(self, request: Request, error: Exception, broken: bool) -> None:
        self._call(self._refuse, request, error, broken)

    def _refuse(self, request: Request, error: Exception, broken: bool) -> None:
        """Fail a request after tokenizing; the texts that others have joined meanwhile go on, if they have ids."""
        request.fail(error)
        self._leave(request)
        for text in request.new:
            if not text.done and broken:
                self._finish(text, error)
            elif not text.done:
                self._lanes[text.lane].put([text])

    async def _supervise(self) -> None:
        while True:
            await asyncio.sleep(SUPERVISE_EVERY_S)
            self._tokenizer.supervise()
            for lane in self._lanes.values():
                lane.supervise()
                lane.report()


def _estimate_tokens(text: Input) -> int:
    return len(text) // CHARS_PER_TOKEN + 1 if isinstance(text, str) else len(text)
