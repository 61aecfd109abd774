"""An HTTP client that sees everything: each byte of each answer, and those that nobody asked for."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import time
from collections.abc import Mapping
from dataclasses import dataclass

HOST = "127.0.0.1"
PATIENCE_S = 60.0  # longer than anything takes here: an answer that is later is lost
STRAY_WAIT_S = 0.01


class BrokenError(Exception):
    """The connection ended before the answer."""


class LostError(Exception):
    """No answer came within `PATIENCE_S`."""


class MalformedError(Exception):
    """What came is no HTTP answer."""


@dataclass(frozen=True)
class Answer:
    """A whole answer."""

    status: int
    headers: Mapping[str, str]  # names in small letters
    body: bytes


def render_request(
    method: str, path: str, body: bytes | None = None, headers: Mapping[str, str] | None = None, *, declare: bool = True
) -> bytes:
    """Write a request; with `declare` the length of its body is told."""
    named = {"Host": HOST, **(headers or {})}
    if body is not None and declare:
        named["Content-Length"] = str(len(body))
    head = "".join(f"{name}: {value}\r\n" for name, value in named.items())
    return f"{method} {path} HTTP/1.1\r\n{head}\r\n".encode("latin-1") + (body or b"")


class Connection:
    """One connection to the server."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.opened = time.monotonic()
        self._reader, self._writer = reader, writer
        self.ended = False

    @classmethod
    async def open(cls, port: int) -> Connection:
        """Connect.

        Raises:
            BrokenError: when nobody listens.
        """
        try:
            return cls(*await asyncio.open_connection(HOST, port))
        except OSError as error:
            raise BrokenError(f"cannot connect: {error}") from None

    async def send(self, data: bytes) -> None:
        """Send some bytes of a request.

        Raises:
            BrokenError: when the connection has ended.
        """
        try:
            self._writer.write(data)
            async with asyncio.timeout(PATIENCE_S):
                await self._writer.drain()
        except OSError as error:  # a time-out is one, too
            self.ended = True
            raise BrokenError(f"cannot send: {error!r}") from None

    async def read_answer(self) -> Answer:
        """Wait for one answer.

        Raises:
            BrokenError: when the connection ends instead, or within it.
            LostError: when nothing comes.
            MalformedError: when it is no HTTP.
        """
        try:
            async with asyncio.timeout(PATIENCE_S):
                return await self._read_answer()
        except TimeoutError:
            self.ended = True
            raise LostError(f"no answer within {PATIENCE_S:g} s") from None
        except (OSError, asyncio.IncompleteReadError) as error:
            self.ended = True
            raise BrokenError(f"cannot receive: {error!r}") from None

    async def _read_answer(self) -> Answer:
        head = (await self._reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        status_line, *lines = head[:-4].split("\r\n")
        version, status, *_ = status_line.split(" ")
        if version != "HTTP/1.1" or not status.isdigit():
            raise MalformedError(f"an answer begins with {status_line!r}")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        if headers.get("transfer-encoding") == "chunked":
            body = await self._read_chunks()
        else:
            body = await self._reader.readexactly(int(headers["content-length"]))
        self.ended = self.ended or headers.get("connection", "").lower() == "close"
        return Answer(int(status), headers, body)

    async def _read_chunks(self) -> bytes:
        body = b""
        while size := int(await self._reader.readuntil(b"\r\n"), 16):
            body += await self._reader.readexactly(size)
            await self._reader.readexactly(2)
        await self._reader.readexactly(2)
        return body

    async def read_some(self, size: int) -> None:
        """Take a few bytes of an answer, if any come.

        Raises:
            BrokenError: when the connection ends instead.
        """
        try:
            async with asyncio.timeout(PATIENCE_S):
                await self._reader.readexactly(size)
        except (OSError, asyncio.IncompleteReadError) as error:
            raise BrokenError(f"cannot receive: {error!r}") from None

    async def close(self) -> bytes:
        """Hang up; return what came that nobody asked for."""
        stray = b""
        try:
            async with asyncio.timeout(STRAY_WAIT_S):
                stray = await self._reader.read(1000)
        except OSError:  # nothing within the time, or a reset
            pass
        self._writer.close()
        return stray

    def abort(self) -> None:
        """Hang up with a reset, as a client does that crashes."""
        connection: socket.socket = self._writer.get_extra_info("socket")
        with contextlib.suppress(OSError):  # it is closed already
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._writer.transport.abort()
