"""The envelope around BentoML's own routes: their answers get the model's headers, their errors the one shape.

Paths that nobody answers are folded into one, so that they cannot fill the metrics with labels.
"""

from __future__ import annotations

from collections.abc import Iterable
from http import HTTPStatus
from pathlib import Path

import orjson
from starlette.datastructures import MutableHeaders
from starlette.routing import BaseRoute, Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from bentos.errors import ServeError
from bentos.render import JSON
from bentos.responses import error_response, render_error

UNKNOWN_PATH = "/unknown"
ASKED_PATH = "ekiben.asked_path"  # in the scope of a request whose path was folded into its route
DEFAULT_RETRY_AFTER_S = "1"
CODES = {400: "invalid_request", 404: "not_found", 405: "method_not_allowed", 429: "overloaded", 503: "not_ready"}
CODES |= {500: "internal", 504: "timeout"}

HeaderList = list[tuple[bytes, bytes]]


class ForeignError(ServeError):
    """An error that BentoML or Starlette answered, to be told as ours are."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.code = CODES.get(status, HTTPStatus(status).name.lower())


async def run_enveloped(
    app: ASGIApp, scope: Scope, receive: Receive, send: Send, *, route: str, headers: HeaderList
) -> int:
    """Let `app` answer a request, and return the status that went out.

    Args:
        app: BentoML's application.
        scope: of the request.
        receive: of the request.
        send: of the request.
        route: the known path that the asked one counts as, or `UNKNOWN_PATH`.
        headers: added to the answer.
    """
    asked = scope["path"]
    if route != asked:  # BentoML's metrics have the path as a label
        scope = {**scope, "path": route, "raw_path": route.encode(), ASKED_PATH: asked}
    status = 500
    held: Message | None = None  # the start of an error, until its body shows whether it has the shape
    body = b""

    async def send_enveloped(message: Message) -> None:
        nonlocal status, held, body
        if message["type"] == "http.response.start":
            status = message["status"]
            own = {name for name, _ in headers}
            kept = [(name, value) for name, value in message.get("headers", []) if name.lower() not in own]
            message = {**message, "headers": [*kept, *headers]}
            if status >= 400 and scope["method"] != "HEAD":
                held = message
                return
        elif held is not None and message["type"] == "http.response.body":
            body += message.get("body", b"")
            if message.get("more_body", False):
                return
            body = _shape_error(status, body, scope["method"], asked)
            started = MutableHeaders(raw=held["headers"])
            started["Content-Type"], started["Content-Length"] = JSON, str(len(body))
            if status == 429:
                started.setdefault("Retry-After", DEFAULT_RETRY_AFTER_S)
            await send(held)
            held, message = None, {"type": "http.response.body", "body": body}
        await send(message)

    await app(scope, receive, send_enveloped)
    return status


def _shape_error(status: int, body: bytes, method: str, path: str) -> bytes:
    """Leave an error of ours as it is, and give any other the same shape."""
    told = None
    try:
        content = orjson.loads(body)
        if isinstance(content, list):  # BentoML's own errors: [{"error": "what was raised in an api"}]
            told = content[0]["error"]
        elif isinstance(content["error"]["code"], str) and isinstance(content["error"]["message"], str):
            return body
    except (orjson.JSONDecodeError, LookupError, TypeError):
        pass
    message = told or {
        404: f"there is no {method} {path} here; /docs.json lists the routes",
        405: f"{path} does not take {method}; /docs.json lists the routes and their methods",
        429: "too many requests at once; try again in a moment",
        500: "unexpected error; the server's log says more",
        504: "the request took too long and was given up; send fewer texts at once",
    }.get(status, HTTPStatus(status).phrase)
    return render_error(ForeignError(status, message), path).body


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


class ServeErrors:
    """A middleware inside BentoML's application: answers what our own parts raise there."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one ASGI connection."""
        try:
            await self.app(scope, receive, send)
        except ServeError as error:
            await error_response(error, scope.get(ASKED_PATH, scope["path"]))(scope, receive, send)
