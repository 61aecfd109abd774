"""The way of a request through the server, as thin as it can be: every door is answered here, from bytes to bytes.

key > space > media type > body > fields and limits > encoder > bytes > metrics. BentoML's application gets all other
routes; of its middlewares, which cost more than the model on a short text, a door passes none.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Collection, Iterator
from typing import Any

import orjson
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from bentos.access import METRICS_PATH, ApiKeys
from bentos.calls import Call
from bentos.doors import Door
from bentos.encoder import Encoder
from bentos.envelope import UNKNOWN_PATH, HeaderList, run_enveloped
from bentos.errors import (
    InvalidRequestError,
    OverloadedError,
    ServeError,
    SpaceMismatchError,
    UnauthorizedError,
)
from bentos.logs import REQUEST_ID, REQUEST_ID_HEADER
from bentos.metrics import ServeMetrics
from bentos.openai import PREFIX, describe_error
from bentos.parsing import parse_request
from bentos.receiving import ClientGoneError, DisconnectWatch, Headers, check_media_type, read_body
from bentos.render import JSON, Rendered, negotiate, render
from bentos.settings import ServeSettings
from bentos.tracing import Tracing

MODEL_HEADER, SPACE_HEADER, EXPECT_SPACE_HEADER = "X-Ekiben-Model", "X-Ekiben-Space", "X-Ekiben-Expect-Space"
TIMEOUT_HEADER = "X-Ekiben-Timeout-Ms"
# As ASGI has them: every answer carries the first three.
MODEL_NAME, SPACE_NAME, ID_NAME, EXPECT_SPACE_NAME, TIMEOUT_NAME = (
    name.lower().encode()
    for name in (MODEL_HEADER, SPACE_HEADER, REQUEST_ID_HEADER, EXPECT_SPACE_HEADER, TIMEOUT_HEADER)
)
UNAVAILABLE = "unavailable"  # value of both headers while no model is loaded
CLIENT_GONE = 499  # in metrics and logs only: there is nobody to answer
API_PAGE = "/"
API_PAGE_POLICY = b"default-src 'self' 'unsafe-inline' data:"  # BentoML's page would load a tracker from elsewhere
MODELS_FOLDER, MODEL_ROUTE = f"{PREFIX}models/", f"{PREFIX}models/{{name}}"
logger = logging.getLogger("bentos")

GetEncoder = Callable[[], Encoder]  # raises NotReadyError while no model is loaded


def json_response(content: Any, status: int = 200) -> Response:
    """Write `content` as JSON; NumPy arrays are written as lists, with the digits that float32 needs and no more."""
    body = orjson.dumps(content, option=orjson.OPT_SERIALIZE_NUMPY)
    return Response(body, status, media_type=JSON)


def render_error(error: ServeError, path: str) -> Rendered:
    """Write an error in the one shape; OpenAI's clients also get what they look for."""
    content = {"code": error.code, "message": error.message, **({"details": error.details} if error.details else {})}
    if path.startswith(PREFIX):
        content |= describe_error(error)
    headers = {}
    if "retry_after_s" in error.details:
        headers["Retry-After"] = str(error.details["retry_after_s"])
    if isinstance(error, UnauthorizedError):
        headers["WWW-Authenticate"] = "Bearer"
    return Rendered(orjson.dumps({"error": content}), JSON, headers)


class Frontend:
    """The outermost application: answers the doors, and passes all else on to BentoML's."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        known_paths: Collection[str],
        get_encoder: GetEncoder,
        settings: ServeSettings,
        keys: ApiKeys,
        metrics: ServeMetrics,
        tracing: Tracing | None = None,
        before_metrics: Callable[[], None] = lambda: None,
    ) -> None:
        """Put the doors before `app`.

        Args:
            app: BentoML's application.
            known_paths: those that it answers; all others count as one.
            get_encoder: the model that is served.
            settings: the limits.
            keys: who may ask.
            metrics: told of every request.
            tracing: told as well, unless it is off.
            before_metrics: called before /metrics is answered, to bring the gauges up to date.
        """
        self._app = app
        self._known_paths = frozenset(known_paths)
        self._get_encoder = get_encoder
        self._settings = settings
        self._keys = keys
        self._metrics = metrics
        self._tracing = tracing
        self._counts_texts = settings.access_log or tracing is not None
        self._before_metrics = before_metrics
        self._requests = 0  # whose body has been read, and that are not answered yet

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one ASGI connection."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        call = Call(scope, self._name_route(scope["path"]))
        REQUEST_ID.set(call.request_id)
        try:
            await self._serve(call, scope, receive, send)
        except ClientGoneError:
            call.status = CLIENT_GONE
        finally:
            call.tell(self._metrics, log=self._settings.access_log, tracing=self._tracing)

    async def _serve(self, call: Call, scope: Scope, receive: Receive, send: Send) -> None:
        headers, door = call.headers, call.door
        try:
            if not self._keys.is_open(call.path):
                call.key = self._keys.check(headers.get(b"authorization"), headers.get(b"x-api-key"))
            if door is not None and door.method is not None:
                rendered = await self._answer(door, call, receive)
                call.status = 200
            elif door is not None:
                receive = await self._check_in(door, headers, receive)
                with self._room():
                    return await self._pass_on(call, scope, receive, send)
            else:
                return await self._pass_on(call, scope, receive, send)
        except ServeError as error:
            call.status, rendered = error.status, render_error(error, call.path)
        except ClientGoneError:
            raise
        except Exception:
            logger.exception("request failed")
            hidden = ServeError("unexpected error; the server's log says more")
            call.status, rendered = hidden.status, render_error(hidden, call.path)
        await self._send(send, call, rendered)

    async def _pass_on(self, call: Call, scope: Scope, receive: Receive, send: Send) -> None:
        """Let BentoML's application answer."""
        if call.path == METRICS_PATH:
            self._before_metrics()
        own = self._own_headers(call)
        if call.path == API_PAGE:
            own.append((b"content-security-policy", API_PAGE_POLICY))
        call.status = await run_enveloped(self._app, scope, receive, send, route=call.route, headers=own)

    def _name_route(self, path: str) -> str:
        if path in self._known_paths:
            return path
        return MODEL_ROUTE if path.startswith(MODELS_FOLDER) else UNKNOWN_PATH

    async def _answer(self, door: Door, call: Call, receive: Receive) -> Rendered:
        """Answer a door's request, unless something is wrong with it."""
        headers = call.headers
        accept = headers.get(b"accept", b"").decode("latin-1")
        negotiate(accept, door.offered)
        body = await self._check_body(headers, receive)
        request = parse_request(door.request, body, self._settings)
        deadline = call.started + self._find_time_limit(headers)
        encoder = self._get_encoder()
        call.parsed = time.monotonic()
        with self._room(), DisconnectWatch(receive):
            content = await getattr(encoder, str(door.method))(request, deadline)
        call.computed = time.monotonic()
        rendered = render(content, accept or JSON)
        call.answered = time.monotonic()
        if self._counts_texts:
            call.count(request, content)
        return rendered

    @contextlib.contextmanager
    def _room(self) -> Iterator[None]:
        """Hold one of the places for requests; a body that is still on its way takes none.

        Raises:
            OverloadedError: when all are taken.
        """
        limit = self._settings.max_requests
        if self._requests >= limit:
            self._metrics.record_shed("requests")
            raise OverloadedError(
                f"{self._requests} requests are in flight; at most {limit} may be (EKIBEN_MAX_REQUESTS). "
                "Try again in 1 s",
                retry_after_s=1,
                limit=limit,
            )
        self._requests += 1
        try:
            yield
        finally:
            self._requests -= 1

    async def _check_in(self, door: Door, headers: Headers, receive: Receive) -> Receive:
        """Check the request of a door that BentoML answers; the body that was read is given to it again."""
        negotiate(headers.get(b"accept", b"").decode("latin-1"), door.offered)
        body = await self._check_body(headers, receive)
        parse_request(door.request, body, self._settings)
        self._get_encoder()  # or say why there is none
        unread: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> Message:
            return unread.pop() if unread else await receive()

        return replay

    async def _check_body(self, headers: Headers, receive: Receive) -> bytes:
        self._check_space(headers)
        check_media_type(headers)
        return await read_body(headers, receive, self._settings.max_body_bytes)

    def _check_space(self, headers: Headers) -> None:
        expected = headers.get(EXPECT_SPACE_NAME)
        if expected is None:
            return
        manifest = self._get_encoder().manifest
        if expected.decode("latin-1") != manifest.space_id:
            raise SpaceMismatchError(
                f"{EXPECT_SPACE_HEADER} is {expected.decode('latin-1')!r}, but {manifest.tag} makes vectors of space "
                f"{manifest.space_id!r}, which must not be compared with them. Embed your texts again, or ask the "
                "server that made the old vectors",
                expected=expected.decode("latin-1"),
                found=manifest.space_id,
            )

    def _find_time_limit(self, headers: Headers) -> float:
        """Seconds that the request may take: what the caller allows, but not more than the server."""
        asked = headers.get(TIMEOUT_NAME)
        if asked is None:
            return self._settings.timeout_s
        if not asked.isdigit() or len(asked) > 9 or int(asked) == 0:
            raise InvalidRequestError(
                f"{TIMEOUT_HEADER} is {asked[:30].decode('latin-1')!r}; it must be a whole number of milliseconds, "
                "1 or more",
                field=TIMEOUT_HEADER,
            )
        return min(int(asked) / 1000, self._settings.timeout_s)

    def _own_headers(self, call: Call) -> HeaderList:
        """The headers that every answer carries."""
        try:
            manifest = self._get_encoder().manifest
            model, space = manifest.tag, manifest.space_id
        except ServeError:
            model = space = UNAVAILABLE
        return [
            (MODEL_NAME, model.encode("latin-1")),
            (SPACE_NAME, space.encode("latin-1")),
            (ID_NAME, call.request_id.encode("latin-1")),
        ]

    async def _send(self, send: Send, call: Call, rendered: Rendered) -> None:
        out = [
            (b"content-type", rendered.media_type.encode("latin-1")),
            (b"content-length", b"%d" % len(rendered.body)),
            *self._own_headers(call),
        ]
        out += [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in rendered.headers.items()]
        await send({"type": "http.response.start", "status": call.status, "headers": out})
        await send({"type": "http.response.body", "body": rendered.body})
