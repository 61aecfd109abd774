"""A lane: a queue of texts and the threads that empty it, one batch a thread at a time. Knows token ids, not requests.

One thread a core, each with one text or a few, beats one inference that is spread over all cores. Threads that die or
hang are replaced, and what they were at is computed again, once.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from bentos.errors import NotReadyError
from bentos.machine import stand_back
from bentos.observer import BatchRecord, Observer
from bentos.scheduler import Queue, QueuedText
from bentos.vectors import Vectors

Infer = Callable[[list[Sequence[int]]], Vectors]  # token ids of n texts -> (n, dim)
FIRST_TOKENS_PER_S = 2500.0  # assumed speed of a thread until its first batch is measured
SPEED_SHARE = 0.05  # of the last batch in the speed
MAX_ATTEMPTS = 2  # a text that was there when two threads ended is given up
logger = logging.getLogger("bentos")


@dataclass(eq=False, slots=True)
class LaneText(QueuedText):
    """A text on its way through a lane."""

    since: float = field(default_factory=time.monotonic)
    attempts: int = field(default=0, init=False)


Result = Vectors | Exception  # (dim,)
Deliver = Callable[[Sequence[LaneText], Sequence[Result]], None]


@dataclass(eq=False)
class _Worker:
    """One thread, and what it is at."""

    thread: threading.Thread | None = None
    batch: Sequence[LaneText] = ()
    started: float = 0.0
    abandoned: bool = False


class Lane:
    """Computes the texts of one kind of request. All methods may be called from any thread."""

    def __init__(
        self,
        name: str,
        infer: Infer,
        deliver: Deliver,
        *,
        threads: int,
        batch_tokens: int,
        batch_texts: int,
        niceness: int = 0,
        stall_s: float = 60.0,
        observer: Observer | None = None,
    ) -> None:
        """Prepare a lane.

        Args:
            name: of the lane, for metrics and logs.
            infer: computes one batch; called by several threads at once.
            deliver: takes texts and their results; called in a lane's thread, and must not block.
            threads: how many compute at the same time.
            batch_tokens: budget of a batch, padding included.
            batch_texts: most texts in a batch.
            niceness: how much the threads stand back for others (0..19); has an effect on Linux only.
            stall_s: a batch that takes longer hangs, and its thread is given up.
            observer: hears of batches and restarts.
        """
        self.name = name
        self._infer = infer
        self._deliver = deliver
        self._niceness = niceness
        self._stall_s = stall_s
        self._observer = observer or Observer()
        self._queue: Queue[LaneText] = Queue(batch_tokens=batch_tokens, batch_texts=batch_texts)
        self._changed = threading.Condition(threading.Lock())
        self._stopping = False
        self._workers = [_Worker() for _ in range(threads)]
        self._thread_tokens_per_s = FIRST_TOKENS_PER_S
        self._measured = 0  # batches

    def start(self) -> None:
        """Start the threads."""
        for worker in self._workers:
            self._start(worker)

    def stop(self) -> list[LaneText]:
        """End the threads after their batches; return the texts that nobody will compute any more."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        for worker in self._workers:
            if worker.thread is not None and not self._hangs(worker):
                worker.thread.join(self._stall_s)
        left: list[LaneText] = []
        while batch := self._queue.take():
            left += batch
        try:
            self.report()
        except Exception:  # whoever looks on must not keep us from ending
            logger.exception("nobody could be told that the lane %s is empty", self.name)
        return left

    def put(self, texts: Sequence[LaneText], *, urgent: bool = False) -> None:
        """Queue the texts of one request, or put them at the head."""
        with self._changed:
            self._queue.add(texts, urgent=urgent)
            self._changed.notify(len(texts))

    def drop(self, text: LaneText) -> None:
        """Do not compute a text that nobody waits for any more, unless it is too late."""
        with self._changed:
            self._queue.drop(text)

    @property
    def texts(self) -> int:
        """Texts that wait."""
        return self._queue.texts

    @property
    def tokens(self) -> int:
        """Tokens of the texts that wait."""
        return self._queue.tokens

    @property
    def tokens_per_s(self) -> float:
        """Speed of the whole lane while it is busy, as measured lately."""
        return self._thread_tokens_per_s * len(self._workers)

    def report(self) -> None:
        """Tell the observer what waits."""
        with self._changed:
            first = self._queue.first()
            oldest_s = 0.0 if first is None else max(0.0, time.monotonic() - first.since)
            self._observer.set_queue(self.name, self._queue.texts, self._queue.tokens, oldest_s, owner=id(self))

    def supervise(self) -> None:
        """Replace threads that died or hang; their texts go to the head of the queue, or are given up."""
        for position, worker in enumerate(self._workers):
            with self._changed:
                if self._stopping or worker.thread is None or (worker.thread.is_alive() and not self._hangs(worker)):
                    continue
                worker.abandoned = True
                batch, worker.batch = worker.batch, ()
            how = "hangs" if worker.thread.is_alive() else "died"
            logger.error("a thread of the lane %s %s; it is replaced (%d texts again)", self.name, how, len(batch))
            self._observer.record_lane_restart(self.name)
            for text in batch:
                text.attempts += 1
                text.alone = True  # the second time only the guilty one fails
            self.put([text for text in batch if text.attempts < MAX_ATTEMPTS], urgent=True)
            if lost := [text for text in batch if text.attempts >= MAX_ATTEMPTS]:
                error = NotReadyError("the model ended twice while it computed this text; it was given up")
                self._deliver(lost, [error] * len(lost))
            self._workers[position] = replacement = _Worker()
            self._start(replacement)

    def find_problem(self) -> str | None:
        """Say whether a thread is dead, or hangs, or that all is well (None)."""
        for worker in self._workers:
            if worker.thread is None or not worker.thread.is_alive():
                return f"a thread of the lane {self.name} is dead"
            if self._hangs(worker):
                return f"a thread of the lane {self.name} hangs"
        return None

    def _start(self, worker: _Worker) -> None:
        worker.thread = threading.Thread(
            target=self._run, args=(worker,), name=f"ekiben-{self.name}", daemon=True
        )  # a daemon: one that hangs must not keep the process alive
        worker.thread.start()

    def _hangs(self, worker: _Worker) -> bool:
        return bool(worker.batch) and time.monotonic() - worker.started > self._stall_s

    def _run(self, worker: _Worker) -> None:
        stand_back(self._niceness)
        while True:
            with self._changed:
                batch: list[LaneText] = []
                while not self._stopping and not worker.abandoned:
                    if batch := self._queue.take(len(self._workers)):
                        break
                    self._changed.wait()
                if not batch:
                    return
                worker.started, worker.batch = time.monotonic(), batch
            results = self._compute(batch)
            with self._changed:
                if worker.abandoned:  # too late: the texts are in other hands
                    return
                worker.batch = ()
            self._deliver(batch, results)

    def _compute(self, batch: list[LaneText]) -> Sequence[Result]:
        """Compute a batch; when it fails, compute each text by itself, so that only the guilty ones fail."""
        taken = time.monotonic()
        try:
            vectors = self._infer([text.ids for text in batch])
            if len(vectors) != len(batch):
                raise RuntimeError(f"the model gave {len(vectors)} vectors for {len(batch)} texts")
        except Exception as error:
            if len(batch) == 1:
                return [error]
            return [self._compute([text])[0] for text in batch]
        infer_s = time.monotonic() - taken
        lengths = [len(text.ids) for text in batch]
        tokens = sum(lengths)
        self._measured += 1  # the mean of the first ones, then of the last ones: the guess is soon forgotten
        share = max(SPEED_SHARE, 1 / (self._measured + 1))
        self._thread_tokens_per_s += share * (tokens / max(infer_s, 1e-6) - self._thread_tokens_per_s)
        queue_s = [taken - text.since for text in batch]
        padded = len(batch) * max(lengths)
        self._observer.record_batch(BatchRecord(self.name, len(batch), tokens, padded, queue_s, infer_s))
        return list(vectors)
