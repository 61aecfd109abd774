"""HTTP/1.1 as the load generator speaks it: rendered requests out, answers in that are barely looked at."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import cast

HOST = "127.0.0.1"
UNKNOWN = -1  # bytes of an answer still to come, before its head is there


class LoadError(Exception):
    """The load could not be made as asked for."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What is looked at in an answer."""

    status: int
    has_retry_after: bool
    body: bytes | None


def render_request(path: str, body: bytes) -> bytes:
    """Write a POST request."""
    head = (
        f"POST {path} HTTP/1.1\r\nHost: {HOST}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


class Connection(asyncio.Protocol):
    """A kept-alive connection with at most one request under way."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._answer: asyncio.Future[Answer] | None = None
        self._keep = False
        self._head, self._missing, self._chunks = b"", UNKNOWN, list[bytes]()
        self._status, self._has_retry_after, self._closes = 0, False, False

    @classmethod
    async def open(cls, port: int) -> Connection:
        """Connect.

        Raises:
            OSError: when nobody listens.
        """
        _, connection = await asyncio.get_running_loop().create_connection(cls, HOST, port)
        return connection

    @property
    def is_open(self) -> bool:
        """Whether a further request can be sent."""
        return self._transport is not None

    def close(self) -> None:
        """Hang up, also on a request under way."""
        if self._transport is not None:
            self._transport.abort()
            self._transport = None

    async def fetch(self, request: bytes, *, keep: bool = False) -> Answer:
        """Send `request` and wait for its answer, of which the body is thrown away unless `keep` is set.

        Raises:
            ConnectionResetError: when the server hangs up instead.
        """
        return await self.send(request, keep=keep)

    def send(self, request: bytes, *, keep: bool = False) -> asyncio.Future[Answer]:
        """The same without waiting."""
        self._answer = asyncio.get_running_loop().create_future()
        if self._transport is None:
            self._answer.set_exception(ConnectionResetError())
        else:
            self._keep = keep
            self._transport.write(request)
        return self._answer

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Part of asyncio's protocol."""
        self._transport = cast(asyncio.Transport, transport)  # uvloop's transports have no common class

    def connection_lost(self, _: Exception | None) -> None:
        """Part of asyncio's protocol."""
        self._transport = None
        self._fail(ConnectionResetError())

    def data_received(self, data: bytes) -> None:
        """Part of asyncio's protocol."""
        if self._missing == UNKNOWN:
            self._head += data
            end = self._head.find(b"\r\n\r\n")
            if end < 0:
                return
            head, data = self._head[:end].lower(), self._head[end + 4 :]
            self._status = int(head[9:12])
            self._has_retry_after = b"\r\nretry-after:" in head
            self._closes = b"\r\nconnection: close" in head
            self._missing = _find_length(head)
            if self._missing == UNKNOWN:
                return self._fail(LoadError(f"an answer without Content-Length cannot be read: {head[:200]!r}"))
        self._missing -= len(data)
        if self._keep:
            self._chunks.append(data)
        if self._missing <= 0:
            self._finish()

    def _fail(self, error: Exception) -> None:
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(error)

    def _finish(self) -> None:
        answer = Answer(self._status, self._has_retry_after, b"".join(self._chunks) if self._keep else None)
        if self._closes:
            self.close()
        self._head, self._missing, self._chunks = b"", UNKNOWN, []
        if self._answer is not None and not self._answer.done():
            self._answer.set_result(answer)


def _find_length(head: bytes) -> int:
    start = head.find(b"\r\ncontent-length:")
    return UNKNOWN if start < 0 else int(head[start + 17 :].split(b"\r\n", 1)[0])
