"""The load generator: one thread, raw HTTP/1.1 on loopback, requests rendered beforehand, answers barely parsed.

It shares the cores with the server under test, so it must be light: about 0.1 ms of CPU a request, measured and
reported with every figure. Three kinds of load: closed loop (each connection sends when its last answer is there),
paced (one connection, a fixed rhythm) and open loop (requests arrive at a constant rate, whatever the server does).
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import uvloop

from tests.benchmarks.connection import Answer, Connection, LoadError

RESET, GAVE_UP = 0, -1  # in place of a status: the connection broke; no answer within the client's patience
ANSWER_TIMEOUT_S = 60.0  # of closed loops, whose clients are patient
TICK_S = 0.001  # of the open loop
PAUSE_S = 0.01  # after a broken connection
NEVER = float("inf")


@dataclass(frozen=True, slots=True)
class Shot:
    """One request as it went. Times in seconds of `time.perf_counter`."""

    due: float  # when it had to be sent; a late sender does not make a server look fast
    done: float
    status: int  # of HTTP, or RESET, or GAVE_UP
    has_retry_after: bool = False


@dataclass
class Load:
    """What one load phase gave."""

    begin: float  # of the measured window
    end: float
    shots: list[Shot] = field(default_factory=list)
    bodies: dict[int, bytes] = field(default_factory=dict)  # number of a measured request -> its answer's body
    generator_cpu_s: float = 0.0  # CPU time of this process in the window

    @property
    def seconds(self) -> float:
        """Length of the measured window."""
        return self.end - self.begin


class Requests:
    """A stock of rendered requests, handed out once each, in order."""

    def __init__(self, rendered: Sequence[bytes], keep: Collection[int] = ()) -> None:
        """Take the stock.

        Args:
            rendered: the requests.
            keep: numbers of the requests whose answers are kept.
        """
        self._rendered = rendered
        self._keep = frozenset(keep)
        self._next = 0

    def take(self) -> tuple[int, bytes, bool]:
        """Hand out a request: its number, its bytes, and whether its answer is kept.

        Raises:
            LoadError: when none is left; no text may be sent twice.
        """
        number = self._next
        if number >= len(self._rendered):
            raise LoadError(f"all {number} texts were sent before the time was up; prepare more of them")
        self._next += 1
        return number, self._rendered[number], number in self._keep


OnEdge = Callable[[], None]


async def run_closed(
    port: int,
    warm: Requests,
    requests: Requests,
    *,
    connections: int,
    warm_s: float,
    seconds: float,
    on_edge: OnEdge = lambda: None,
) -> Load:
    """Keep `connections` connections busy: `warm_s` with warm-up texts, then `seconds` that count.

    `on_edge` is called at the beginning and at the end of the measured window. The result also holds the requests
    that reach into the window from before or beyond it.
    """
    load = _plan(warm_s, seconds)
    async with asyncio.TaskGroup() as group:
        group.create_task(_watch_edges(load, on_edge))
        for _ in range(connections):
            group.create_task(_send_in_turn(port, load, warm, requests))
    return load


async def run_paced(
    port: int, requests: Requests, *, per_second: float, warm_s: float, seconds: float, on_edge: OnEdge = lambda: None
) -> Load:
    """Send a request every 1/`per_second` on one connection; one that must wait for the last is timed from when due."""
    load = _plan(warm_s, seconds)
    first = load.begin - warm_s
    schedule = iter(first + step / per_second for step in range(int((warm_s + seconds) * per_second)))
    async with asyncio.TaskGroup() as group:
        group.create_task(_watch_edges(load, on_edge))
        group.create_task(_send_in_turn(port, load, requests, requests, schedule))
    return load


async def run_open(
    port: int,
    requests: Requests,
    *,
    per_second: float,
    patience_s: float,
    warm_s: float,
    seconds: float,
    on_edge: OnEdge = lambda: None,
) -> Load:
    """Let requests arrive at a constant rate; a client hangs up when its answer is not there after `patience_s`."""
    load = _plan(warm_s, seconds)
    first, count = load.begin - warm_s, int((warm_s + seconds) * per_second)
    async with asyncio.TaskGroup() as group:
        group.create_task(_watch_edges(load, on_edge))
        clients = _Clients(port, requests, patience_s, load.shots, group)
        for step in range(count):
            due = first + step / per_second
            while due > time.perf_counter():
                await asyncio.sleep(TICK_S)
            clients.arrive(due)
            clients.hang_up()
        while clients.waiting:
            await asyncio.sleep(TICK_S)
            clients.hang_up()
        clients.leave()
    return load


class _Clients:
    """The clients of an open loop: each sends one request, on a connection that is free or on a new one."""

    def __init__(
        self, port: int, requests: Requests, patience_s: float, shots: list[Shot], group: asyncio.TaskGroup
    ) -> None:
        self.waiting = 0
        self._port = port
        self._requests = requests
        self._patience_s = patience_s
        self._shots = shots
        self._group = group
        self._idle: list[Connection] = []
        self._sent: deque[tuple[float, Connection, asyncio.Future[Answer]]] = deque()  # due, in order

    def arrive(self, due: float) -> None:
        """Send the next request."""
        self.waiting += 1
        while self._idle:
            connection = self._idle.pop()
            if connection.is_open:
                return self._send(connection, due)
        self._group.create_task(self._send_anew(due))

    def hang_up(self) -> None:
        """Close the connections of those whose patience is over."""
        now = time.perf_counter()
        while self._sent and self._sent[0][0] + self._patience_s <= now:
            _, connection, answer = self._sent.popleft()
            if not answer.done():
                answer.cancel()
                connection.close()

    def leave(self) -> None:
        """Close all connections."""
        for connection in self._idle:
            connection.close()

    async def _send_anew(self, due: float) -> None:
        try:
            async with asyncio.timeout(self._patience_s):
                connection = await Connection.open(self._port)
        except OSError as error:  # TimeoutError is one of them
            self._note(due, GAVE_UP if isinstance(error, TimeoutError) else RESET)
        else:
            self._send(connection, due)

    def _send(self, connection: Connection, due: float) -> None:
        answer = connection.send(self._requests.take()[1])
        answer.add_done_callback(partial(self._finish, connection, due))
        self._sent.append((due, connection, answer))

    def _finish(self, connection: Connection, due: float, answer: asyncio.Future[Answer]) -> None:
        if answer.cancelled():
            self._note(due, GAVE_UP)
        elif answer.exception() is not None:
            self._note(due, RESET)
        else:
            self._note(due, answer.result().status, answer.result().has_retry_after)
            self._idle.append(connection)

    def _note(self, due: float, status: int, has_retry_after: bool = False) -> None:
        self._shots.append(Shot(due, time.perf_counter(), status, has_retry_after))
        self.waiting -= 1


def run(phase: Callable[[], Awaitable[Load]]) -> Load:
    """Run one phase on an event loop of its own."""

    async def wait() -> Load:
        return await phase()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        try:
            return runner.run(wait())
        except ExceptionGroup as group:  # the first of the connections' errors is as good as all of them
            raise group.exceptions[0] from group


def _plan(warm_s: float, seconds: float) -> Load:
    begin = time.perf_counter() + warm_s
    return Load(begin, begin + seconds)


async def _watch_edges(load: Load, on_edge: OnEdge) -> None:
    await asyncio.sleep(max(load.begin - time.perf_counter(), 0))
    load.begin = time.perf_counter()
    cpu_s = time.process_time()
    on_edge()
    await asyncio.sleep(max(load.end - time.perf_counter(), 0))
    load.end = time.perf_counter()
    load.generator_cpu_s = time.process_time() - cpu_s
    on_edge()


async def _send_in_turn(
    port: int, load: Load, warm: Requests, requests: Requests, schedule: Iterator[float] | None = None
) -> None:
    """One connection: request after request until the window ends."""
    connection = await Connection.open(port)
    while True:
        due = time.perf_counter() if schedule is None else next(schedule, NEVER)
        if due >= load.end:
            break
        if time.perf_counter() >= load.end:  # of a schedule that the server could not follow
            load.shots.append(Shot(due, load.end, GAVE_UP))
            continue
        if (pause := due - time.perf_counter()) > 0:
            await asyncio.sleep(pause)
            due = time.perf_counter()  # the server was not waited for: the timer's error is not its own
        measured = due >= load.begin
        number, request, keep = (requests if measured else warm).take()
        try:
            if not connection.is_open:
                connection = await Connection.open(port)
            async with asyncio.timeout(ANSWER_TIMEOUT_S):
                answer = await connection.fetch(request, keep=keep and measured)
        except (OSError, TimeoutError):
            connection.close()
            load.shots.append(Shot(due, time.perf_counter(), RESET))
            await asyncio.sleep(PAUSE_S)
            continue
        load.shots.append(Shot(due, time.perf_counter(), answer.status, answer.has_retry_after))
        if answer.body is not None:
            load.bodies[number] = answer.body
    connection.close()
