"""POST /models/load/{version}: an admin has all workers load a version, and hears what became of it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Iterator
from typing import Any, Protocol

import orjson
from pydantic import Field
from starlette.types import Receive

from bentos.errors import InvalidRequestError, MethodNotAllowedError
from bentos.parsing import parse_request
from bentos.receiving import DisconnectWatch, Headers, check_media_type, read_body
from bentos.render import JSON, Rendered
from bentos.schemas import DoorRequest, TextField
from bentos.settings import ServeSettings

LOAD_FOLDER, LOAD_ROUTE = "/models/load/", "/models/load/{version}"
MAX_NAME_CHARS = 200
LOAD_TIMEOUT_S = 600.0  # a large model comes over the network
logger = logging.getLogger("bentos")


class LoadRequest(DoorRequest):
    """How a version shall be loaded; the body may be left out."""

    live: bool = Field(
        True,
        description="Whether it takes the place of the live version in all workers at once. `false`: it stands beside, "
        "for requests that name it.",
    )

    def text_fields(self) -> Iterator[TextField]:
        """It holds none."""
        yield from ()


class LoadVersion(Protocol):
    """What does the work: `EmbeddingService.load_version`."""

    def __call__(self, version: str, *, live: bool, timeout_s: float) -> Awaitable[dict[str, Any]]:
        """Have all workers load a version; raise a `ServeError` unless all have it."""


class LoadDoor:
    """Answers the route. A load that was begun goes on when its caller goes away: it concerns all workers."""

    def __init__(self, load_version: LoadVersion, settings: ServeSettings) -> None:
        self._load_version = load_version
        self._settings = settings
        self._under_way: set[asyncio.Task[dict[str, Any]]] = set()

    async def answer(
        self, version: str, headers: Headers, receive: Receive, *, time_limit_s: float, key: str
    ) -> Rendered:
        """Load a version.

        Args:
            version: as the path names it.
            headers: of the request.
            receive: where its body comes from.
            time_limit_s: for all workers to have it.
            key: fingerprint of the admin's key, for the log.

        Raises:
            ServeError: when the request is wrong, the version unknown, refused, or not in every worker in time.
        """
        if not 1 <= len(version) <= MAX_NAME_CHARS:
            raise InvalidRequestError(
                f"the version has {len(version)} characters; 1 to {MAX_NAME_CHARS} are allowed", field="version"
            )
        body = await read_body(headers, receive, self._settings.max_body_bytes)
        request = LoadRequest()
        if body:
            check_media_type(headers)
            request = parse_request(LoadRequest, body, self._settings)
        logger.info("asked to load %s %s, with the key %s", version, "live" if request.live else "beside", key)
        loading = asyncio.ensure_future(self._load_version(version, live=request.live, timeout_s=time_limit_s))
        self._under_way.add(loading)
        loading.add_done_callback(self._end)
        with DisconnectWatch(receive):
            content = await asyncio.shield(loading)
        return Rendered(orjson.dumps(content, option=orjson.OPT_NON_STR_KEYS), JSON, {})

    def _end(self, loading: asyncio.Task[dict[str, Any]]) -> None:
        self._under_way.discard(loading)
        if not loading.cancelled() and (error := loading.exception()) is not None:
            logger.warning("a version was not loaded: %s", error)


def check_method(method: str) -> None:
    """Let POST pass.

    Raises:
        MethodNotAllowedError: for all others.
    """
    if method != "POST":
        raise MethodNotAllowedError(f"{LOAD_ROUTE} does not take {method[:20]}; send POST", allow="POST")
