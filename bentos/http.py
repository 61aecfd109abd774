"""The way of a request through the server, as thin as it can be: every door is answered here, from bytes to bytes.

key > media type > body > fields and limits > which version > space > encoder > bytes > metrics. BentoML's application
gets all other routes; of its middlewares, which cost more than the model on a short text, a door passes none.

A request is given its version once, when it has been read; that version is held until the answer is there, and is the
one that headers, body and metrics name, whichever is live by then.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Collection, Iterator

import orjson
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from bentos.access import METRICS_PATH, ApiKeys
from bentos.calls import Call
from bentos.doors import Door
from bentos.encoder import Encoder
from bentos.envelope import UNKNOWN_PATH, HeaderList, run_enveloped
from bentos.errors import InvalidRequestError, OverloadedError, ServeError
from bentos.loads import LOAD_FOLDER, LOAD_ROUTE, LOAD_TIMEOUT_S, LoadDoor, LoadVersion, check_method
from bentos.logs import REQUEST_ID, REQUEST_ID_HEADER
from bentos.metrics import ServeMetrics
from bentos.openai import PREFIX
from bentos.parsing import parse_request
from bentos.pinning import pin
from bentos.receiving import ClientGoneError, DisconnectWatch, Headers, check_media_type, read_body
from bentos.render import JSON, Rendered, negotiate, render
from bentos.responses import render_error
from bentos.schemas import DoorRequest
from bentos.settings import ServeSettings
from bentos.shadow import Shadow
from bentos.shelf import Shelf
from bentos.spaces import EXPECT_SPACE_HEADER, check_expected, choose_adapter
from bentos.tracing import Tracing

MODEL_HEADER, SPACE_HEADER, ADAPTED_HEADER = "X-Ekiben-Model", "X-Ekiben-Space", "X-Ekiben-Adapted-From"
TIMEOUT_HEADER = "X-Ekiben-Timeout-Ms"
# As ASGI has them: every answer carries the first three.
MODEL_NAME, SPACE_NAME, ID_NAME, ADAPTED_NAME, EXPECT_SPACE_NAME, TIMEOUT_NAME = (
    name.lower().encode()
    for name in (MODEL_HEADER, SPACE_HEADER, REQUEST_ID_HEADER, ADAPTED_HEADER, EXPECT_SPACE_HEADER, TIMEOUT_HEADER)
)
SHOWN_ENCODER = "ekiben.encoder"  # in the scope: the version that the headers of this answer name
CLIENT_GONE = 499  # in metrics and logs only: there is nobody to answer
API_PAGE = "/"
API_PAGE_POLICY = b"default-src 'self' 'unsafe-inline' data:"  # BentoML's page would load a tracker from elsewhere
MODELS_FOLDER, MODEL_ROUTE = f"{PREFIX}models/", f"{PREFIX}models/{{name}}"
logger = logging.getLogger("bentos")

GetShelf = Callable[[], Shelf]  # raises NotReadyError while the service is still starting


class Frontend:
    """The outermost application: answers the doors, and passes all else on to BentoML's."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        known_paths: Collection[str],
        get_shelf: GetShelf,
        settings: ServeSettings,
        keys: ApiKeys,
        metrics: ServeMetrics,
        load_version: LoadVersion | None = None,
        shadow: Shadow | None = None,
        tracing: Tracing | None = None,
        before_metrics: Callable[[], None] = lambda: None,
    ) -> None:
        """Put the doors before `app`.

        Args:
            app: BentoML's application.
            known_paths: those that it answers; all others count as one.
            get_shelf: the versions that are loaded.
            settings: the limits.
            keys: who may ask.
            metrics: told of every request.
            load_version: loads another version in all workers; None: none can be loaded.
            shadow: shown a share of what is asked; None: nothing is.
            tracing: told as well, unless it is off.
            before_metrics: called before /metrics is answered, to bring the gauges up to date.
        """
        self._app = app
        self._known_paths = frozenset(known_paths)
        self._get_shelf = get_shelf
        self._settings = settings
        self._keys = keys
        self._metrics = metrics
        self._loads = None if load_version is None else LoadDoor(load_version, settings)
        self._shadow = shadow
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
            if call.route == LOAD_ROUTE and self._loads is not None:
                rendered = await self._load(self._loads, call, receive)
            else:
                if not self._keys.is_open(call.path):
                    shown = headers.get(b"authorization"), headers.get(b"x-api-key")
                    call.key = self._keys.check(*shown, path=call.path)
                if door is None:
                    return await self._pass_on(call, scope, receive, send)
                if door.method is None:
                    return await self._let_bentoml_answer(door, call, scope, receive, send)
                rendered = await self._answer(door, call, receive)
            call.status = 200
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
        with contextlib.suppress(ServeError):
            call.encoder = call.encoder or self._get_shelf().live
        scope = {**scope, SHOWN_ENCODER: call.encoder}
        own = self._own_headers(call)
        if call.path == API_PAGE:
            own.append((b"content-security-policy", API_PAGE_POLICY))
        call.status = await run_enveloped(self._app, scope, receive, send, route=call.route, headers=own)

    def _name_route(self, path: str) -> str:
        if path in self._known_paths:
            return path
        if path.startswith(MODELS_FOLDER):
            return MODEL_ROUTE
        return LOAD_ROUTE if path.startswith(LOAD_FOLDER) else UNKNOWN_PATH

    async def _answer(self, door: Door, call: Call, receive: Receive) -> Rendered:
        """Answer a door's request, unless something is wrong with it."""
        headers = call.headers
        accept = headers.get(b"accept", b"").decode("latin-1")
        negotiate(accept, door.offered)
        request = await self._read(door, headers, receive)
        deadline = call.started + self._find_time_limit(headers, self._settings.timeout_s)
        shelf = self._get_shelf()
        encoder = self._choose(shelf, call, request)
        call.parsed = time.monotonic()
        watch = None if self._shadow is None else self._shadow.pick(encoder)
        with shelf.holding(encoder), self._room(), DisconnectWatch(receive):
            content = await getattr(encoder, str(door.method))(request, deadline, watch)
        call.computed = time.monotonic()
        rendered = render(content, accept or JSON)
        call.answered = time.monotonic()
        self._metrics.record_answer(*call.names()[:2])
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

    async def _let_bentoml_answer(self, door: Door, call: Call, scope: Scope, receive: Receive, send: Send) -> None:
        """Check the request of a door that BentoML answers, and give it the texts, pinned to the version chosen."""
        negotiate(call.headers.get(b"accept", b"").decode("latin-1"), door.offered)
        request = await self._read(door, call.headers, receive)
        shelf = self._get_shelf()
        encoder = self._choose(shelf, call, request)
        (field,) = request.text_fields()
        with shelf.holding(encoder), self._room(), pin([str(text) for text in field.texts], encoder) as texts:
            body = orjson.dumps({field.name: texts})
            unread: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

            async def replay() -> Message:
                return unread.pop() if unread else await receive()

            length = b"%d" % len(body)
            headers = [(name, length if name == b"content-length" else value) for name, value in scope["headers"]]
            await self._pass_on(call, {**scope, "headers": headers}, replay, send)
        if call.status == 200:
            self._metrics.record_answer(*call.names()[:2])

    async def _read(self, door: Door, headers: Headers, receive: Receive) -> DoorRequest:
        check_media_type(headers)
        body = await read_body(headers, receive, self._settings.max_body_bytes)
        return parse_request(door.request, body, self._settings)

    def _choose(self, shelf: Shelf, call: Call, request: DoorRequest) -> Encoder:
        """Give the request its version, and the map that its vectors shall go through.

        Raises:
            UnknownModelError: when it names a version that is not loaded.
            SpaceMismatchError: when the answer would not be in the space asked for, or in the one expected.
        """
        encoder = call.encoder = shelf.choose(*request.asked_model)
        expected = call.headers.get(EXPECT_SPACE_NAME)
        if expected is not None or request.asked_space is not None:
            loaded = [other.box for other in shelf.encoders()]
            call.adapter = choose_adapter(encoder.box, request, loaded)
            if expected is not None:
                check_expected(expected.decode("latin-1"), encoder.box, call.adapter, request, loaded)
        return encoder

    async def _load(self, loads: LoadDoor, call: Call, receive: Receive) -> Rendered:
        """Load a version, when an admin asks for it."""
        check_method(call.method)
        call.key = self._keys.check_admin(call.headers.get(b"authorization"), call.headers.get(b"x-api-key"))
        return await loads.answer(
            call.path.removeprefix(LOAD_FOLDER),
            call.headers,
            receive,
            time_limit_s=self._find_time_limit(call.headers, LOAD_TIMEOUT_S),
            key=call.key,
        )

    def _find_time_limit(self, headers: Headers, longest_s: float) -> float:
        """Seconds that the request may take: what the caller allows, but not more than `longest_s`."""
        asked = headers.get(TIMEOUT_NAME)
        if asked is None:
            return longest_s
        if not asked.isdigit() or len(asked) > 9 or int(asked) == 0:
            raise InvalidRequestError(
                f"{TIMEOUT_HEADER} is {asked[:30].decode('latin-1')!r}; it must be a whole number of milliseconds, "
                "1 or more",
                field=TIMEOUT_HEADER,
            )
        return min(int(asked) / 1000, longest_s)

    def _own_headers(self, call: Call) -> HeaderList:
        """The headers that every answer carries: of the version that was chosen, else of the live one."""
        live = None
        if call.encoder is None:
            with contextlib.suppress(ServeError):
                live = self._get_shelf().live
        model, space, own = call.names(live)
        named = [(MODEL_NAME, model), (SPACE_NAME, space), (ID_NAME, call.request_id)]
        if own is not None:
            named.append((ADAPTED_NAME, own))
        return [(name, value.encode("latin-1")) for name, value in named]

    async def _send(self, send: Send, call: Call, rendered: Rendered) -> None:
        out = [
            (b"content-type", rendered.media_type.encode("latin-1")),
            (b"content-length", b"%d" % len(rendered.body)),
            *self._own_headers(call),
        ]
        out += [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in rendered.headers.items()]
        await send({"type": "http.response.start", "status": call.status, "headers": out})
        await send({"type": "http.response.body", "body": rendered.body})
