"""The batcher: many requests in, their vectors out. Knows texts and deadlines, nothing of HTTP.

A text's way: the event loop admits its request and looks for it in the cache and among the texts in flight; the
tokenizing thread turns it into ids; a thread of its lane computes it with others (see lanes.py, scheduler.py); the
event loop hands its vector to every request that waits for it. Who waits for what is known on the event loop only.

There are two lanes. Requests of a few texts go by the `interactive` one, all others by `bulk`, whose threads stand
back: when somebody waits for one vector, the operating system takes the core from the bulk work at once.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
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
BYTES_PER_TOKEN = 4  # until a text is tokenized
MAX_RETRY_AFTER_S = 60
SUPERVISE_EVERY_S = 0.5
logger = logging.getLogger("bentos")
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
    batch_tokens: int
    batch_texts: int
    interactive_texts: int  # requests of more texts go by the bulk lane
    interactive_wait_s: float  # an interactive request that would wait longer is refused
    queue_tokens: Mapping[LaneName, int]
    cache_bytes: int
    stall_s: float


class Batcher:
    """Queues requests and computes them in batches. All public methods run on the event loop that called `start`."""

    def __init__(self, model: Model, limits: Limits, observer: Observer | None = None) -> None:
        """Prepare a batcher for one model."""
        self._model = model
        self._limits = limits
        self._observer = observer or Observer()
        self._cache = VectorCache(limits.cache_bytes)
        self._generation = 0  # of vectors that may be kept
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
        untouched = await asyncio.to_thread(self._tokenizer.stop)
        left = [await asyncio.to_thread(lane.stop) for lane in self._lanes.values()]
        await asyncio.sleep(0)  # what the last batches delivered
        stopping = NotReadyError("the server is stopping; send the request again")
        for text in [*self._in_flight.values(), *(text for texts in left for text in texts)]:
            self._finish(cast(Text, text), stopping)
        for request in untouched:
            request.fail(stopping)
        self.forget()
        self._loop = None

    def find_problem(self) -> str | None:
        """Say which thread cannot work at the moment, or None."""
        if not self._running:
            return "the batcher is not running"
        checks = [self._tokenizer.find_problem, *(lane.find_problem for lane in self._lanes.values())]
        return next((problem for check in checks if (problem := check()) is not None), None)

    @property
    def waiting_texts(self) -> int:
        """Texts that wait in both lanes."""
        return sum(lane.texts for lane in self._lanes.values())

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
        lane: LaneName | None = None,
    ) -> Embedded:
        """Wait for the vectors of one request. When the caller is cancelled, what nobody else wants is not computed.

        Args:
            inputs: cleaned texts with their prompt before them, or token ids of this model.
            deadline: as `time.monotonic()` counts; a request that cannot meet it is refused at once.
            inspect: looks at the lengths of all texts before anything is computed; what it raises fails this request.
                Called in the tokenizing thread.
            urgent: go to the head of the queue, and in even when it is full: for the readiness check.
            lane: by which to go; None: as the number of texts says.

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
        if lane is None:
            lane = "interactive" if urgent or len(inputs) <= self._limits.interactive_texts else "bulk"
        keys: list[Hashable] = [each if isinstance(each, str) else tuple(each) for each in inputs]
        if not urgent:
            self._admit(lane, keys, deadline)
        request = Request(len(inputs), lane, inspect, urgent)
        self._take_in(request, keys)
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

    def _admit(self, lane: LaneName, keys: Sequence[Hashable], deadline: float | None) -> None:
        """Refuse what does not fit, or would wait too long. What is known already, or meets an empty queue, goes in."""
        waiting, limit = self._tokens[lane], self._limits.queue_tokens[lane]
        if not waiting:
            return
        new = {key for key in keys if key not in self._cache and self._find_in_flight(key, lane) is None}
        if not new:
            return
        tokens = sum(self._estimate_tokens(key) for key in new)
        wait_s = waiting / self._lanes[lane].tokens_per_s
        retry_after_s = min(max(math.ceil(wait_s), 1), MAX_RETRY_AFTER_S)
        again = f"Try again in {retry_after_s} s"
        if waiting + tokens > limit:
            self._observer.record_shed("queue")
            raise OverloadedError(
                f"about {waiting} tokens are waiting in the {lane} lane and the request has about {tokens}; "
                f"at most {limit} may wait (EKIBEN_QUEUE_TOKENS_{lane.upper()}). {again}",
                retry_after_s=retry_after_s,
                limit=limit,
            )
        # Some may always wait: the speed of a large model says nothing about its next text.
        is_long = self._lanes[lane].texts >= self._limits.threads * self._limits.batch_texts
        if lane == "interactive" and is_long and wait_s > (longest_s := self._limits.interactive_wait_s):
            self._observer.record_shed("wait")
            raise OverloadedError(
                f"the request would wait about {wait_s:.1f} s in the interactive lane; at most {longest_s:g} s are "
                f"allowed (EKIBEN_INTERACTIVE_WAIT_S). {again}",
                retry_after_s=retry_after_s,
                limit=longest_s,
            )
        if deadline is not None and time.monotonic() + wait_s > deadline:
            self._observer.record_shed("deadline")
            left_s = max(deadline - time.monotonic(), 0.0)
            raise OverloadedError(
                f"the request would wait about {wait_s:.1f} s, longer than the {left_s:.1f} s that are left of its "
                f"time limit (X-Ekiben-Timeout-Ms, EKIBEN_TIMEOUT_S). {again}, or allow more time",
                retry_after_s=retry_after_s,
            )

    def _estimate_tokens(self, key: Hashable) -> int:
        """What a text will hold of the queue: its tokens, or a guess from its size that serves all scripts."""
        guess = len(key.encode()) // BYTES_PER_TOKEN + 1 if isinstance(key, str) else len(cast(tuple[int, ...], key))
        return min(guess, self._limits.max_tokens)

    def _find_in_flight(self, key: Hashable, lane: LaneName) -> Text | None:
        """The same text on its way for somebody else; the interactive lane does not wait for the bulk one."""
        text = self._in_flight.get(key)
        return text if text is not None and text.lane in (lane, "interactive") else None

    def _take_in(self, request: Request, keys: Sequence[Hashable]) -> None:
        """Find each text in the cache or in flight, or bring it in. The readiness check must see the model at work."""
        hits = shared = 0
        for row, key in enumerate(keys):
            if not request.urgent and (cached := self._cache.get(key)) is not None:
                hits += 1
                request.put(row, *cached)
                continue
            text = None if request.urgent else self._find_in_flight(key, request.lane)
            if text is None:
                text = Text(key=key, lane=request.lane, cost=self._estimate_tokens(key), generation=self._generation)
                request.new.append(text)
                if not request.urgent:
                    self._in_flight[key] = text
                self._tokens[request.lane] += text.cost
            else:
                shared += 1
            text.waiters.append((request, row))
            request.texts[row] = text
        if self._limits.cache_bytes and not request.urgent:
            self._observer.record_cache(hits, len(keys) - hits)
        if shared:
            self._observer.record_duplicates(shared)

    def forget(self) -> None:
        """Throw the cache away, with what is being computed for it: the vectors are not to be trusted."""
        self._cache = VectorCache(self._limits.cache_bytes)
        self._generation += 1

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
            request.fail(
                DeadlineExceededError(
                    "the request's time limit (X-Ekiben-Timeout-Ms, at most EKIBEN_TIMEOUT_S) passed before it was "
                    "computed: allow more time, or send fewer texts at once"
                )
            )

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
        if text.generation == self._generation:
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

    def _put_refused(self, request: Request, error: Exception) -> None:
        self._call(self._refuse, request, error)

    def _refuse(self, request: Request, error: Exception) -> None:
        """Fail a request after tokenizing; the texts that others have joined meanwhile go on, if they have ids."""
        request.fail(error)
        self._leave(request)
        for text in request.new:
            if text.done:
                continue
            if text.count is None:
                self._finish(text, error)
            else:
                self._lanes[text.lane].put([text])

    async def _supervise(self) -> None:
        while True:
            await asyncio.sleep(SUPERVISE_EVERY_S)
            try:
                self._tokenizer.supervise()
                for lane in self._lanes.values():
                    lane.supervise()
                    lane.report()
            except Exception:  # whatever it is, the next look may heal it
                logger.exception("the lanes could not be looked after")
