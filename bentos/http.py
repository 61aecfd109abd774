"""HTTP in and out: the two middlewares around BentoML's application, and how answers are written.

`Intake` (innermost) checks a request before BentoML sees it: vector space, content type, size, JSON, fields, limits.
`Envelope` (outermost) gives every answer the model's headers and every error, BentoML's own included, the one shape
`{"error": {"code", "message", "details"?}}`; it also folds unknown paths into one, which keeps the metrics small.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping
from http import HTTPStatus
from pathlib import Path
from typing import Any

import orjson
from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.routing import BaseRoute, Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from bentos.errors import ServeError, SpaceMismatchError, TooLargeError, UnsupportedMediaError
from bentos.schemas import TextsRequest, parse_request
from bentos.settings import ServeSettings

MODEL_HEADER, SPACE_HEADER, EXPECT_SPACE_HEADER = "X-Ekiben-Model", "X-Ekiben-Space", "X-Ekiben-Expect-Space"
UNAVAILABLE = "unavailable"  # value of both headers while no model is loaded
UNKNOWN_PATH = "/unknown"
DRAIN_LIMIT = 4  # a refused body is read on up to this many times the limit, so that the client can read the refusal
CODES = {400: "invalid_request", 404: "not_found", 405: "method_not_allowed", 429: "overloaded", 503: "not_ready"}
CODES |= {500: "internal", 504: "timeout"}
logger = logging.getLogger("bentos")

RequestModels = Mapping[str, type[TextsRequest]]
Identity = Callable[[], tuple[str, str]]  # () -> (model tag, space id) of what is served


def json_response(content: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """Write `content` as JSON; NumPy arrays are written as lists, with the digits that float32 needs and no more."""
    body = orjson.dumps(content, option=orjson.OPT_SERIALIZE_NUMPY)
    return Response(body, status, headers, media_type="application/json")


def error_response(error: ServeError) -> Response:
    """Write an error in the one shape; an overload also says in `Retry-After` when to come back."""
    headers = {"Retry-After": str(error.details["retry_after_s"])} if "retry_after_s" in error.details else None
    content = {"code": error.code, "message": error.message, **({"details": error.details} if error.details else {})}
    return json_response({"error": content}, error.status, headers)


async def answer(work: Awaitable[Any]) -> Response:
    """Await the content of an answer and write it, or the error raised. What nobody foresaw is logged and hidden."""
    try:
        return json_response(await work)
    except ServeError as error:
        return error_response(error)
    except Exception:
        logger.exception("request failed")
        return error_response(ServeError("unexpected error; the server's log says more"))


class Intake:
    """Checks the bodies of the routes in `models`; a request that passes goes on as it came, with its body read."""

    def __init__(self, app: ASGIApp, models: RequestModels, settings: ServeSettings, identity: Identity) -> None:
        self.app = app
        self.models = models
        self.settings = settings
        self.identity = identity

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one ASGI connection."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        model = self.models.get(scope["path"]) if scope["method"] == "POST" else None
        try:
            if model is None:
                return await self.app(scope, receive, send)
            headers = Headers(scope=scope)
            self._check_space(headers)
            _check_media_type(headers)
            body = await self._read_body(headers, receive)
            if body is None:
                return  # the client went away
            parse_request(model, body, self.settings)
        except ServeError as error:
            return await error_response(error)(scope, receive, send)
        await _run_until_disconnect(self.app, scope, body, receive, send)

    def _check_space(self, headers: Headers) -> None:
        expected = headers.get(EXPECT_SPACE_HEADER)
        model, space = self.identity()
        if expected is not None and expected != space:
            raise SpaceMismatchError(
                f"{EXPECT_SPACE_HEADER} is {expected!r}, but {model} makes vectors of space {space!r}, which must not "
                "be compared with them. Embed your texts again, or ask the server that made the old vectors",
                expected=expected,
                found=space,
            )

    async def _read_body(self, headers: Headers, receive: Receive) -> bytes | None:
        """Read the body up to the limit, whatever its declared length."""
        limit = self.settings.max_body_bytes
        declared = headers.get("content-length", "")
        size = int(declared) if declared.isdecimal() else 0
        if size > limit * DRAIN_LIMIT:
            raise _too_large(f"{size} bytes", limit)
        chunks: list[bytes] = []
        size, more = 0, True
        while more and size <= limit * DRAIN_LIMIT:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            chunk, more = message.get("body", b""), message.get("more_body", False)
            size += len(chunk)
            if size <= limit:
                chunks.append(chunk)
            else:
                chunks.clear()
        if size > limit:
            raise _too_large(f"more than {limit} bytes" if more else f"{size} bytes", limit)
        return b"".join(chunks)


class Envelope:
    """The outermost layer: known paths, the model's headers, the one error shape."""

    def __init__(self, app: ASGIApp, known_paths: Collection[str], identity: Identity) -> None:
        self.app = app
        self.known_paths = frozenset(known_paths)
        self.identity = identity

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one ASGI connection."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        asked = scope["path"]
        if asked not in self.known_paths:
            scope = {**scope, "path": UNKNOWN_PATH, "raw_path": UNKNOWN_PATH.encode()}
        start: Message | None = None
        body = b""

        async def send_enveloped(message: Message) -> None:
            nonlocal start, body
            if message["type"] == "http.response.start":
                headers = MutableHeaders(raw=list(message.get("headers", [])))
                headers[MODEL_HEADER], headers[SPACE_HEADER] = self.identity()
                message = {**message, "headers": headers.raw}
                if message["status"] >= 400 and scope["method"] != "HEAD":
                    start = message  # held back until the body shows whether it has the shape
                    return
            elif start is not None and message["type"] == "http.response.body":
                body += message.get("body", b"")
                if message.get("more_body", False):
                    return
                body = _shape_error(start["status"], body, scope["method"], asked)
                headers = MutableHeaders(raw=start["headers"])
                headers["Content-Type"], headers["Content-Length"] = "application/json", str(len(body))
                await send(start)
                message = {"type": "http.response.body", "body": body}
            await send(message)

        await self.app(scope, receive, send_enveloped)


def _shape_error(status: int, body: bytes, method: str, path: str) -> bytes:
    """Leave an error of ours as it is, and give any other the same shape."""
    try:
        error = orjson.loads(body)["error"]
        if isinstance(error["code"], str) and isinstance(error["message"], str):
            return body
    except (orjson.JSONDecodeError, KeyError, TypeError):
        pass
    message = {
        404: f"there is no {method} {path} here; /docs.json lists the routes",
        405: f"{path} does not take {method}; /docs.json lists the routes and their methods",
        429: "too many requests at once; try again in a moment",
        500: "unexpected error; the server's log says more",
        504: "the request took too long and was given up; send fewer texts at once",
    }.get(status, HTTPStatus(status).phrase)
    code = CODES.get(status, HTTPStatus(status).name.lower())
    return orjson.dumps({"error": {"code": code, "message": message}})


def _check_media_type(headers: Headers) -> None:
    found = headers.get("content-type", "")
    media_type, _, parameters = found.lower().partition(";")
    if media_type.strip() != "application/json" or ("charset" in parameters and "utf-8" not in parameters):
        raise UnsupportedMediaError(
            f"the Content-Type is {found!r}; it must be 'application/json', in UTF-8"
            if found
            else "there is no Content-Type; it must be 'application/json'"
        )
    encoding = headers.get("content-encoding", "identity")
    if encoding.lower() != "identity":
        raise UnsupportedMediaError(f"the Content-Encoding is {encoding!r}; send the body uncompressed")


def _too_large(found: str, limit: int) -> TooLargeError:
    return TooLargeError(
        f"the body has {found}; at most {limit} are allowed. Send several requests, "
        "or raise EKIBEN_MAX_BODY_BYTES on the server",
        limit=limit,
    )


async def _run_until_disconnect(app: ASGIApp, scope: Scope, body: bytes, receive: Receive, send: Send) -> None:
    """Run `app` on a body that was already read, and cancel it when the client goes away before the answer."""
    unread: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return unread.pop() if unread else await receive()

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    work, gone = asyncio.ensure_future(app(scope, replay, send)), asyncio.ensure_future(watch())
    try:
        await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
        if work.done():
            work.result()
    finally:  # also when this request is cancelled, as BentoML's timeout does
        gone.cancel()
        if not work.done():
            work.cancel()
            await asyncio.wait({work})


def list_paths(routes: Iterable[BaseRoute], prefix: str = "") -> set[str]:
    """Every path that an application answers, files of its static folders included."""
    paths: set[str] = set()
    for route in routes:
        if isinstance(route, Route):
            paths.add(prefix + route.path)
        elif isinstance(route, Mount):
            if isinstance(route.app, StaticFiles) and route.app.directory is not None:
                folder = Path(route.app.directory)
                names = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
                paths.update(f"{prefix}{route.path}/{name}" for name in names)
            else:
                paths |= list_paths(route.routes, prefix + route.path)
    return paths
