"""Connections to clients that are slow, greedy or gone must not hurt the others.

uvicorn reads headers of any size for any time, queues any number of pipelined requests, waits for ever for a body or a
reader, and counts no connections; BentoML hands it none of the few limits that it has. `guard_connections` puts a
subclass of its protocol in place of it. One timer a process looks at the few connections that someone has to wait for;
a request that comes in one piece, as nearly all do, pays some three microseconds.
"""

from __future__ import annotations

import asyncio
import logging
import sys
import time
from collections.abc import Callable
from typing import Any

import orjson
from uvicorn._types import ASGI3Application
from uvicorn.config import HTTP_PROTOCOLS, Config
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

from bentos.settings import ServeSettings

if sys.platform != "win32":
    import resource

MAX_PIPELINED = 16  # requests that may wait on one connection for the answer to an earlier one
MAX_FRAMING = 8  # bytes of chunk sizes and the like for each byte of a body; the smallest chunks need 6
MAX_BODIES = 32  # of the largest size allowed, or as much in smaller ones, may be incomplete at a time
LINGER_S = 2.0  # a refused client may go on sending so long: cut off at once, it could not read why
SWEEP_S = 1.0  # longest time between two looks at the timeouts
OWN_FILES = 128  # that the process may open beside its connections
BENTOML_KEEP_ALIVE_S = 5  # what BentoML hands over unless `--timeout-keep-alive` says otherwise

logger = logging.getLogger("bentos")

Since = dict["GuardedProtocol", float]  # time.monotonic() at which something began; the oldest first


class _RefusedError(Exception):
    """Raised inside the parser, which ends its work; the refusal is noted in the protocol."""


class Guard:
    """The connections of one process, by what they are waited for."""

    def __init__(self, settings: ServeSettings, note_refused: Callable[[str], None]) -> None:
        """Prepare a guard.

        Args:
            settings: sizes and times.
            note_refused: told the reason whenever a connection is closed for what its client did.
        """
        self.settings = settings
        self.note_refused = note_refused
        self.max_connections = _allow_files(settings.max_connections + OWN_FILES) - OWN_FILES
        self.connections = 0
        self.held_bytes = 0  # of bodies that are not complete
        self.unheard: Since = {}  # the headers of a request are not complete
        self.resting: Since = {}  # between two requests
        self.receiving: Since = {}  # a body is not complete
        self.sending: Since = {}  # much is still to be sent, or anything before the connection can close
        self.lingering: Since = {}  # refused, and not cut off yet
        timeouts = (settings.header_timeout_s, settings.body_timeout_s, settings.send_timeout_s)
        self._sweep_s = min(SWEEP_S, min(timeouts) / 4)
        self._timer: asyncio.TimerHandle | None = None

    def admit(self, connection: GuardedProtocol) -> None:
        """Count a new connection, and make room for it or refuse it when there are too many."""
        if self._timer is None:
            self._timer = connection.loop.call_later(self._sweep_s, self._sweep)
        self.connections += 1
        if self.connections > self.max_connections and not self._make_room():
            message = f"{self.max_connections} connections are open; try again in a moment"
            connection.refuse("connections", 503, "overloaded", message, retry=True)
        else:
            self.unheard[connection] = time.monotonic()

    def forget(self, connection: GuardedProtocol) -> None:
        """A connection has gone."""
        self.connections -= 1
        self.release_body(connection)
        for since in (self.unheard, self.resting, self.receiving, self.sending, self.lingering):
            since.pop(connection, None)

    def admit_body(self, bytes_more: int) -> None:
        """Count a piece of a body; when too much is held for bodies that do not end, the oldest of them goes."""
        self.held_bytes += bytes_more
        if self.held_bytes > MAX_BODIES * self.settings.max_body_bytes:
            self._cut_off_oldest(self.receiving)

    def release_body(self, connection: GuardedProtocol) -> None:
        """What was held of a body is held no more."""
        self.held_bytes -= connection.held_bytes
        connection.held_bytes = 0

    def _make_room(self) -> bool:
        """Cut off one that has been waited for the longest; those that wait for us stay."""
        kinds = (self.lingering, self.unheard, self.resting, self.receiving, self.sending)
        return any(self._cut_off_oldest(since) for since in kinds)

    def _cut_off_oldest(self, since: Since) -> bool:
        connection = next(iter(since), None)
        if connection is None:
            return False
        del since[connection]
        self.release_body(connection)
        self.note_refused("evicted")
        connection.transport.abort()
        return True

    def _sweep(self) -> None:
        """End what took too long."""
        self._timer = asyncio.get_running_loop().call_later(self._sweep_s, self._sweep)
        settings = self.settings
        for connection in _take_older(self.unheard, settings.header_timeout_s):
            connection.give_up_headers()
        for connection in _take_older(self.receiving, settings.body_timeout_s):
            connection.give_up_body()
        for connection in _take_older(self.lingering, LINGER_S):
            connection.close()
        for connection in _take_older(self.sending, settings.send_timeout_s):
            if connection.has_read_on():
                self.sending[connection] = time.monotonic()
            else:
                self.note_refused("send_timeout")
                connection.transport.abort()


def _take_older(since: Since, seconds: float) -> list[GuardedProtocol]:
    """Remove the connections that have been in `since` for more than so many seconds."""
    before = time.monotonic() - seconds
    old = []
    for connection, began in since.items():
        if began > before:
            break
        old.append(connection)
    for connection in old:
        del since[connection]
    return old


class GuardedProtocol(HttpToolsProtocol):
    """uvicorn's HTTP/1.1 with limits."""

    guard: Guard

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self.ws_protocol_class = None  # there is no WebSocket here
        if config.timeout_keep_alive == BENTOML_KEEP_ALIVE_S:
            self.timeout_keep_alive = self.guard.settings.keep_alive_s  # type: ignore[assignment]
        self._refused = False
        self._answering: RequestResponseCycle | None = None
        self._refusal: tuple[str, int, str, str] | None = None
        self._in_headers = False
        self._in_body = False
        self._framing = 0  # bytes of the message so far that are no body, but for those of its first piece
        self.body_bytes = 0  # of a body that is not complete
        self.held_bytes = 0  # of them, while the request is not answered: the rest is read and dropped
        self._piece = 0  # bytes of the latest piece of anything
        self._unsent = 0  # bytes of an answer, when the client was last looked at

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client has connected."""
        super().connection_made(transport)
        self.guard.admit(self)

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection is gone."""
        self.guard.forget(self)
        self._disconnect_application()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """A piece of a request has come, several requests, or anything."""
        if not self._refused:
            self._piece = len(data)
            self._framing += self._piece
            self.guard.resting.pop(self, None)
            super().data_received(data)
            self._watch()

    def _watch(self) -> None:
        """Note what is waited for now, unless it is us."""
        if self._refused:
            return
        limit = self.guard.settings.max_header_bytes
        if self._framing > limit + MAX_FRAMING * self.body_bytes:
            self.refuse(*_headers_too_large(limit))
        elif self._in_body:
            self.guard.receiving.setdefault(self, time.monotonic())
        elif self._in_headers or self.cycle is None or self.cycle.response_complete:
            self.guard.unheard.setdefault(self, time.monotonic())

    def on_message_begin(self) -> None:
        """The first byte of a request has come."""
        super().on_message_begin()
        self._in_headers = True
        self._framing = 0

    def on_headers_complete(self) -> None:
        """All headers have come: the application takes over."""
        limit = self.guard.settings.max_header_bytes
        if self._framing or self._piece > limit:  # else they came in one piece that is no larger
            size = len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)
            if size > limit:
                self._refusal = _headers_too_large(limit)
                raise _RefusedError
        if len(self.pipeline) >= MAX_PIPELINED:
            self._refusal = ("pipelined", 429, "overloaded", f"more than {MAX_PIPELINED} requests wait here")
            raise _RefusedError
        self._in_headers, self._in_body = False, True
        self.guard.unheard.pop(self, None)
        super().on_headers_complete()
        self.headers = []  # what comes after the body is no header of the request

    def on_body(self, body: bytes) -> None:
        """A piece of the body has come."""
        self._framing -= len(body)
        self.body_bytes += len(body)
        if not self.cycle.response_complete:
            self.held_bytes += len(body)
            self.guard.admit_body(len(body))
        super().on_body(body)

    def on_message_complete(self) -> None:
        """The request is complete."""
        self._in_body = False
        self.body_bytes = 0
        self.guard.release_body(self)
        self.guard.receiving.pop(self, None)
        super().on_message_complete()

    def on_response_complete(self) -> None:
        """The answer is written."""
        super().on_response_complete()
        self.guard.release_body(self)
        if self.transport.is_closing():
            self._watch_sending()
        elif not self._in_body and not self._in_headers:
            self.guard.resting[self] = time.monotonic()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: ASGI3Application) -> None:
        self._answering = cycle
        super()._start_asgi_task(cycle, app)

    def _disconnect_application(self) -> None:
        """Tell the application that nobody waits for its answer; uvicorn tells it of the latest request only."""
        if self._answering is not None and not self._answering.response_complete:
            self._answering.disconnected = True
            self._answering.message_event.set()

    def pause_writing(self) -> None:
        """The client does not read as fast as we write."""
        super().pause_writing()
        self._watch_sending()

    def resume_writing(self) -> None:
        """The client has read on."""
        super().resume_writing()
        if not self.transport.is_closing():
            self.guard.sending.pop(self, None)

    def timeout_keep_alive_handler(self) -> None:
        """The connection has rested for too long."""
        self.close()

    def send_400_response(self, msg: str) -> None:
        """The parser has given up: on what is no HTTP, or on what was refused inside it."""
        message = "this is not HTTP/1.1 as it should be; is it TLS, HTTP/2, or another protocol?"
        self.refuse(*(self._refusal or ("malformed", 400, "malformed_request", message)))

    def give_up_headers(self) -> None:
        """The headers have not come in time; a connection that never spoke is closed without a word."""
        if self._in_headers:
            seconds = self.guard.settings.header_timeout_s
            self.refuse("header_timeout", 408, "timeout", f"the headers were not complete after {seconds:g} s")
        else:
            self.close()

    def give_up_body(self) -> None:
        """The body has not come in time."""
        seconds = self.guard.settings.body_timeout_s
        self.refuse("body_timeout", 408, "timeout", f"the body was not complete after {seconds:g} s; send less at once")

    def refuse(self, reason: str, status: int, code: str, message: str, *, retry: bool = False) -> None:
        """Answer with an error when it is the client's turn to be answered, hear no more, and close in a moment."""
        self._refused = True
        self.guard.note_refused(reason)
        for since in (self.guard.unheard, self.guard.receiving, self.guard.resting):
            since.pop(self, None)
        self._unset_keepalive_if_required()
        answering = self._answering
        if answering is not None and (self._in_body or not answering.response_complete):
            self._disconnect_application()
            if answering.response_started or answering is not self.cycle or not self._in_body:
                self.close()  # this request is answered already, or an earlier one is not
                return
        body = orjson.dumps({"error": {"code": code, "message": message}})
        headers = [*self.server_state.default_headers, (b"content-type", b"application/json")]
        headers += [(b"content-length", b"%d" % len(body)), (b"connection", b"close")]
        headers += [(b"retry-after", b"1")] if retry else []
        lines = b"".join(b"%b: %b\r\n" % header for header in headers)
        self.transport.write(b"%b%b\r\n%b" % (STATUS_LINE[status], lines, body))
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self.guard.lingering[self] = time.monotonic()

    def close(self) -> None:
        """Close; the guard cuts off a client that does not take what is still to be sent."""
        if not self.transport.is_closing():
            self._watch_sending()
            self.transport.close()

    def _watch_sending(self) -> None:
        self._unsent = self.transport.get_write_buffer_size()
        self.guard.sending.setdefault(self, time.monotonic())

    def has_read_on(self) -> bool:
        """Whether the client has taken some of its answer since it was last asked."""
        before, self._unsent = self._unsent, self.transport.get_write_buffer_size()
        return self._unsent < before


def guard_connections(settings: ServeSettings, note_refused: Callable[[str], None]) -> Guard:
    """Make the uvicorn that starts next in this process use the guarded protocol."""
    guard = Guard(settings, note_refused)
    protocol = type("GuardedProtocol", (GuardedProtocol,), {"guard": guard})
    HTTP_PROTOCOLS["auto"] = protocol  # type: ignore[assignment]  # which BentoML leaves uvicorn to choose
    return guard


def _allow_files(wanted: int) -> int:
    """Raise the number of files that this process may have open, as far as it may; return what is allowed then."""
    if sys.platform == "win32":
        return wanted
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        if soft < wanted:
            logger.warning("%d files may be open: EKIBEN_MAX_CONNECTIONS is lowered to fit; see `ulimit -n`", soft)
    return wanted if soft == resource.RLIM_INFINITY else max(min(soft, wanted), OWN_FILES + 1)


def _headers_too_large(limit: int) -> tuple[str, int, str, str]:
    message = (
        f"the request's line and headers have more than {limit} bytes; "
        "send fewer or shorter ones, or raise EKIBEN_MAX_HEADER_BYTES on the server"
    )
    return "headers", 431, "headers_too_large", message
