"""Callers who never stop, for tests of swaps: each answer is kept whole, with the time that it took.

Closed loop, W1 of the benchmarks: so many connections, each sends a short text and waits for its vector. They have a
thread and an event loop of their own, so that the test can act meanwhile.
"""

from __future__ import annotations

import asyncio
import base64
import re
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import cast

import numpy as np
import orjson
import uvloop

from bentos.vectors import Vectors

HOST = "127.0.0.1"
BROKEN = 0  # in place of a status


@dataclass(frozen=True, slots=True)
class Shot:
    """One request as it went. Times are those of `time.monotonic()`."""

    text: int  # number of the text
    sent: float
    done: float
    head: bytes
    body: bytes

    @property
    def status(self) -> int:
        """Of HTTP; `BROKEN` when the connection ended instead."""
        return int(self.head[9:12]) if self.head else BROKEN

    @property
    def model(self) -> str:
        """The version that the header names."""
        found = re.search(rb"\r\nx-ekiben-model: ([^\r]+)", self.head)
        return found[1].decode() if found else ""

    @property
    def vector(self) -> Vectors:
        """The vector of the answer."""
        (encoded,) = orjson.loads(self.body)["embeddings"]
        return np.frombuffer(base64.b64decode(encoded), "<f4")


class _Connection(asyncio.Protocol):
    def __init__(self, finish: Callable[[bytes, bytes], None]) -> None:
        self._finish = finish
        self._data = b""
        self.transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def connection_lost(self, _: Exception | None) -> None:
        self.transport = None
        self._finish(b"", b"")

    def data_received(self, data: bytes) -> None:
        self._data += data
        head, found, body = self._data.partition(b"\r\n\r\n")
        if not found:
            return
        length = re.search(rb"content-length: (\d+)", head)
        if length is not None and len(body) >= int(length[1]):
            self._data = b""
            self._finish(head + b"\r\n", body)


class Traffic:
    """Sends `texts` again and again, each by its number, while the block lasts."""

    def __init__(
        self,
        url: str,
        texts: Sequence[str],
        *,
        connections: int = 32,
        seed: int = 0,
        models: Sequence[str | None] = (None,),
    ) -> None:
        """Prepare to send; `models` are what requests name, in turn."""
        self.shots: list[Shot] = []
        self._port = int(url.rpartition(":")[2])
        self._requests = [_render(text, models[number % len(models)]) for number, text in enumerate(texts)]
        self._connections = connections
        self._order = np.random.default_rng(seed).permutation(len(texts)).tolist()
        self._next = 0
        self._stopping = False
        self._thread = threading.Thread(target=lambda: uvloop.run(self._run()), name="traffic")

    def __enter__(self) -> Traffic:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stopping = True
        self._thread.join()

    async def _run(self) -> None:
        await asyncio.gather(*(self._call() for _ in range(self._connections)))

    async def _call(self) -> None:
        """One caller: a request at a time; a broken connection is noted, and another one made."""
        loop = asyncio.get_running_loop()
        answered: asyncio.Future[tuple[bytes, bytes]] = loop.create_future()

        def finish(head: bytes, body: bytes) -> None:
            if not answered.done():
                answered.set_result((head, body))

        connection: _Connection | None = None
        while not self._stopping:
            number = self._order[self._next % len(self._order)]
            self._next += 1
            answered = loop.create_future()
            sent = time.monotonic()
            try:
                if connection is None or connection.transport is None:
                    _, connection = await loop.create_connection(lambda: _Connection(finish), HOST, self._port)
                connection.transport.write(self._requests[number])  # type: ignore[union-attr]
                head, body = await answered
            except OSError:
                head = body = b""
            self.shots.append(Shot(number, sent, time.monotonic(), head, body))
            if not head:
                await asyncio.sleep(0.05)
        if connection is not None and connection.transport is not None:
            connection.transport.close()


def _render(text: str, model: str | None) -> bytes:
    body = orjson.dumps({"texts": [text], "encoding": "base64", **({"model": model} if model else {})})
    head = f"POST /encode HTTP/1.1\r\nHost: {HOST}\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


def find_wrong(shots: Sequence[Shot], vectors: dict[str, Vectors], *, atol: float = 1e-4) -> list[str]:
    """Say of each answer that is no answer, or whose vector is not that of the version in its header, what it is.

    `vectors`: tag -> (texts, dim), as each version's own engine computes them.
    """
    wrong = []
    for shot in shots:
        if shot.status != 200:
            wrong.append(f"{shot.status} {shot.head[:200]!r} {shot.body[:300]!r}")
        elif shot.model not in vectors:
            wrong.append(f"a version that nobody released: {shot.model!r}")
        elif not np.allclose(shot.vector, vectors[shot.model][shot.text], atol=atol):
            others = [tag for tag, rows in vectors.items() if np.allclose(shot.vector, rows[shot.text], atol=atol)]
            wrong.append(f"text {shot.text} has the vector of {others}, and says that it is of {shot.model}")
    return wrong


def percentile_ms(shots: Sequence[Shot], begin: float, end: float, percent: float = 99) -> float:
    """Latency in ms of the requests that were under way at some time between two instants."""
    times = [shot.done - shot.sent for shot in shots if shot.done >= begin and shot.sent <= end]
    return float(np.percentile(times, percent)) * 1000
