"""What the server logs: one JSON object a line (or a line of text), with the request's id, and never a caller's text.

BentoML has set up its own logging when the service is loaded, with a line for every request; `configure_logging`
replaces it. Messages of exceptions that may quote what they were given are left out: the place remains.
"""

from __future__ import annotations

import itertools
import json
import logging
import re
import secrets
import sys
import traceback
from collections.abc import Iterator
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any

import orjson

from bentos.errors import ServeError
from bentos.settings import ServeSettings

REQUEST_ID: ContextVar[str | None] = ContextVar("request_id", default=None)  # of the request that is being answered
REQUEST_ID_HEADER = "X-Request-Id"
WELL_FORMED_ID = re.compile(rb"[A-Za-z0-9._-]{1,128}")
QUOTING_ERRORS = (LookupError, ServeError, ValueError)  # pydantic's and Unicode errors are ValueErrors
MAX_ERROR_CHARS = 500
LIBRARIES = ("asyncio", "bentoml", "circus", "opentelemetry", "uvicorn", "uvicorn.error")  # had handlers, or levels
CONTROL_CHARS = dict.fromkeys([*range(0x20), 0x7F, 0x85, 0x2028, 0x2029], " ")  # would break a line of text
_ids_prefix = secrets.token_hex(6)
_ids = itertools.count(1)
access_logger = logging.getLogger("bentos.access")


def configure_logging(settings: ServeSettings) -> None:
    """Replace the handlers of this process by one, on standard output; to be called once BentoML has set up its own."""
    handler = logging.StreamHandler(sys.stdout)
    show_all = settings.log_level == "debug"
    handler.setFormatter((JsonFormatter if settings.log_format == "json" else TextFormatter)(show_all))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.DEBUG if show_all else logging.WARNING)
    for logger in list(logging.root.manager.loggerDict.values()):
        if isinstance(logger, logging.Logger):
            logger.disabled = False  # BentoML has silenced those that were there before, asyncio's among them
    for name in LIBRARIES:
        library = logging.getLogger(name)
        library.handlers.clear()
        library.propagate = True
        library.setLevel(logging.NOTSET)
    if not show_all:  # it warns of every client that does not speak HTTP: the metrics count those
        logging.getLogger("uvicorn.error").setLevel(logging.ERROR)
    uvicorn_access = logging.getLogger("uvicorn.access")
    uvicorn_access.handlers.clear()
    uvicorn_access.propagate = False  # without a handler in reach, uvicorn does not even format its lines
    logging.getLogger("bentos").setLevel(settings.log_level.upper())
    access_logger.setLevel(logging.INFO)  # by `access_log` alone, however little else is logged


def choose_request_id(shown: bytes | None) -> str:
    """Return the id that the caller gave when it is well formed, else a new one."""
    if shown is not None and WELL_FORMED_ID.fullmatch(shown):
        return shown.decode("ascii")
    return f"{_ids_prefix}-{next(_ids):x}"


def log_request(
    *,
    method: str,
    route: str,
    code: int,
    seconds: float,
    texts: int = 0,
    tokens: int = 0,
    key: str | None = None,
    client: str | None = None,
) -> None:
    """Write the line of a request that was answered; `key` is a fingerprint, `client` an address."""
    fields = {
        "method": method,
        "route": route,
        "code": code,
        "seconds": round(seconds, 6),
        "texts": texts,
        "tokens": tokens,
        "key": key,
        "client": client,
    }
    record = logging.LogRecord(access_logger.name, logging.INFO, __file__, 0, "request", None, None)
    record.fields = fields
    access_logger.handle(record)  # not `info`, which would first look for the caller's file and line


class _Formatter(logging.Formatter):
    """What both formats have in common."""

    def __init__(self, show_all: bool = False) -> None:
        """Prepare a formatter; with `show_all` also the messages that may quote what callers sent."""
        super().__init__()
        self._show_all = show_all

    def message(self, record: logging.LogRecord) -> str:
        """The message; asyncio's quote arguments and exceptions, so only their beginning."""
        message = record.getMessage()
        quotes = record.name == "asyncio" and not self._show_all
        return re.split(r"[\n(<{]", message)[0].rstrip() if quotes else message.rstrip()

    def trace(self, record: logging.LogRecord) -> str | None:
        """The exception of a record with its causes, the first one last."""
        error = record.exc_info[1] if record.exc_info else None
        return None if error is None else "\n".join(self._describe(error, set())).rstrip()

    def _describe(self, error: BaseException, seen: set[int]) -> Iterator[str]:
        if id(error) in seen:
            return
        seen.add(id(error))
        yield from (line.rstrip() for line in traceback.format_tb(error.__traceback__))
        kind = f"{type(error).__module__}.{type(error).__qualname__}".removeprefix("builtins.")
        hidden = isinstance(error, QUOTING_ERRORS) and not self._show_all
        yield f"{kind}: {'(message shown at log level debug)' if hidden else str(error)[:MAX_ERROR_CHARS]}"
        inner = error.exceptions if isinstance(error, BaseExceptionGroup) else ()
        cause = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
        for other in (*inner, *((cause,) if cause else ())):
            yield "because of:"
            yield from self._describe(other, seen)


class JsonFormatter(_Formatter):
    """One JSON object a record."""

    def format(self, record: logging.LogRecord) -> str:
        """Write a record."""
        line: dict[str, Any] = {"time": _time(record), "level": record.levelname.lower(), "logger": record.name}
        line["message"] = self.message(record)
        if (request_id := REQUEST_ID.get()) is not None:
            line["request_id"] = request_id
        line |= getattr(record, "fields", {})
        if (trace := self.trace(record)) is not None:
            line["exception"] = trace
        try:
            return orjson.dumps(line, default=str).decode()
        except TypeError:  # a lone surrogate, which UTF-8 cannot hold
            return json.dumps(line, default=str)


class TextFormatter(_Formatter):
    """One line of text a record, and the lines of its exception."""

    def format(self, record: logging.LogRecord) -> str:
        """Write a record."""
        fields: dict[str, Any] = {"request_id": REQUEST_ID.get(), **getattr(record, "fields", {})}
        parts = [_time(record), record.levelname, f"[{record.name}]", self.message(record)]
        parts += [f"{name}={value}" for name, value in fields.items() if value is not None]
        line = " ".join(parts).translate(CONTROL_CHARS)
        return line if (trace := self.trace(record)) is None else f"{line}\n{trace}"


def _time(record: logging.LogRecord) -> str:
    return datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
