"""What comes in: the body of a request within its limits, and the news that its client has gone."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

from starlette.types import Receive

from bentos.errors import TooLargeError, UnsupportedMediaError

DRAIN_LIMIT = 4  # a refused body is read on up to this many times the limit, so that the client can read the refusal
MAX_LENGTH_DIGITS = 18
WATCH_AFTER_S = 0.05  # a request that takes longer is watched, and dropped when its client goes away

Headers = Mapping[bytes, bytes]


class ClientGoneError(Exception):
    """The client closed the connection before its answer."""


class DisconnectWatch:
    """While the block runs: when the client goes away, end it with `ClientGoneError`. Quick ones cost nothing."""

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._gone = False
        self._watch: asyncio.Task[None] | None = None

    def __enter__(self) -> None:
        self._task = asyncio.current_task()
        self._timer = asyncio.get_running_loop().call_later(WATCH_AFTER_S, self._start)

    def _start(self) -> None:
        self._watch = asyncio.ensure_future(self._wait_for_disconnect())

    async def _wait_for_disconnect(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        if self._task is not None:
            self._gone = True
            self._task.cancel()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._timer.cancel()
        if self._watch is not None:
            self._watch.cancel()
        # Somebody else may want the task ended as well: then it is not for us to say that it goes on.
        if self._gone and self._task is not None and self._task.uncancel() == 0:
            raise ClientGoneError from None


def check_media_type(headers: Headers) -> None:
    """Refuse what is not declared as plain JSON.

    Raises:
        UnsupportedMediaError: names what was declared.
    """
    found = headers.get(b"content-type", b"")
    if found == b"application/json" and b"content-encoding" not in headers:
        return
    named = found.decode("latin-1")
    media_type, _, parameters = named.lower().partition(";")
    if media_type.strip() != "application/json" or ("charset" in parameters and "utf-8" not in parameters):
        raise UnsupportedMediaError(
            f"the Content-Type is {named[:200]!r}; it must be 'application/json', in UTF-8"
            if found
            else "there is no Content-Type; it must be 'application/json'"
        )
    encoding = headers.get(b"content-encoding", b"identity").decode("latin-1")
    if encoding.lower() != "identity":
        raise UnsupportedMediaError(f"the Content-Encoding is {encoding[:200]!r}; send the body uncompressed")


async def read_body(headers: Headers, receive: Receive, limit: int) -> bytes:
    """Read the body up to the limit, whatever its declared length.

    Raises:
        ClientGoneError: when the connection ends before the body.
        TooLargeError: when it is longer than `limit` bytes.
    """
    declared = headers.get(b"content-length", b"")
    if declared.isdigit() and (len(declared) > MAX_LENGTH_DIGITS or int(declared) > limit * DRAIN_LIMIT):
        raise _too_large(f"{declared[:MAX_LENGTH_DIGITS].decode()} bytes", limit)
    chunks: list[bytes] = []
    size, more = 0, True
    while more and size <= limit * DRAIN_LIMIT:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGoneError
        chunk, more = message.get("body", b""), message.get("more_body", False)
        size += len(chunk)
        if size <= limit:
            chunks.append(chunk)
        else:
            chunks.clear()
    if size > limit:
        raise _too_large(f"more than {limit} bytes" if more else f"{size} bytes", limit)
    return b"".join(chunks)


def _too_large(found: str, limit: int) -> TooLargeError:
    return TooLargeError(
        f"the body has {found}; at most {limit} are allowed. Send several requests, "
        "or raise EKIBEN_MAX_BODY_BYTES on the server",
        limit=limit,
    )
