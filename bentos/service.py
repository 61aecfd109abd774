"""The BentoML service: routes, start and stop, readiness. What a request means is in encoder.py, HTTP in http.py."""
# bentoml's own types are not followed:
# mypy: disable-error-code="misc, untyped-decorator"

from __future__ import annotations

import asyncio
import logging
from http import HTTPStatus
from pathlib import Path
from typing import Any

import bentoml
from bentoml.exceptions import BentoMLException
from bentoml.models import BentoModel
from starlette.applications import Starlette
from starlette.responses import Response

from bentos.access import ApiKeys
from bentos.answers import (
    EncodeResponse,
    PredictResponse,
    PredictSimilarityResponse,
    RankResponse,
    SimilarityResponse,
)
from bentos.application import EnvelopedService
from bentos.crew import open_crew
from bentos.doors import DOORS_BY_PATH
from bentos.encoder import Encoder
from bentos.envelope import ServeErrors
from bentos.errors import LunchboxError, NotReadyError, ServeError, SettingsError
from bentos.keeper import Keeper
from bentos.machine import keep_memory_returnable, settle_memory
from bentos.observer import Observer
from bentos.openai import EmbeddingsRequest, EmbeddingsResponse
from bentos.pinning import embed_pinned
from bentos.playground import make_routes
from bentos.render import render
from bentos.routes import make_model_routes
from bentos.schemas import (
    EncodeRequest,
    PredictRequest,
    PredictSimilarityRequest,
    RankRequest,
    SimilarityRequest,
)
from bentos.settings import ServeSettings
from bentos.shelf import Shelf
from bentos.tracing import check_tracing

SETTINGS = ServeSettings()
MAX_BATCHED_TEXTS = 64  # of BentoML's own batching
logger = logging.getLogger("bentos")


@bentoml.service(
    name="ekiben",
    service_class=EnvelopedService,
    workers=1,
    traffic={"timeout": SETTINGS.timeout_s},
    logging={"access": {"enabled": False}},  # ours replaces it
)
class EmbeddingService:
    """Texts in, vectors or similarities out. Every answer names the model and the space of its vectors."""

    model = BentoModel(SETTINGS.model_tag)  # the build puts this model into the Bento, by its exact version

    def __init__(self) -> None:
        keep_memory_returnable()
        self.shelf = Shelf()
        self.observer: Observer = SERVICE.observer
        crew = open_crew(shared=SETTINGS.prometheus_folder is not None)  # then `bentoml serve` has started us
        self.keeper = Keeper(self.shelf, crew, SETTINGS, self.observer, find_own_box)
        SERVICE.instance = self

    @bentoml.on_deployment
    @staticmethod
    def check_settings() -> None:
        """Refuse to start with settings that cannot be had: once, before there is any worker."""
        try:
            ApiKeys(SETTINGS)
            check_tracing(SETTINGS)
        except SettingsError as error:
            raise SystemExit(f"refused to start: {error}") from None

    @bentoml.on_startup
    async def load(self) -> None:
        """Open the lunchbox. A bad one does not end the server: it stays up, not ready, and says why."""
        settle_memory()  # before any version, so that each can go again
        await self.keeper.start()
        if (encoder := self.encoder) is None:
            logger.error("not ready: %s", self.shelf.refusal)
            return
        manifest = encoder.manifest
        logger.info("serving %s in %s, space %s", manifest.tag, encoder.box.engine.precision, manifest.space_id)

    @bentoml.on_shutdown
    async def unload(self) -> None:
        """Finish the batches in flight."""
        if SERVICE.shadow is not None:
            await SERVICE.shadow.stop()
        await self.keeper.stop()
        if SERVICE.tracing is not None:
            await asyncio.to_thread(SERVICE.tracing.close)

    @property
    def encoder(self) -> Encoder | None:
        """The model that is served, if there is one."""
        try:
            return self.shelf.live
        except NotReadyError:
            return None

    async def load_version(self, version: str, *, live: bool, timeout_s: float) -> dict[str, Any]:
        """Have all workers load a version, and serve it as the live one or beside it.

        Args:
            version: an alias, a tag, `3-1f2e3d4c`, `3`, `v3`, or a run id.
            live: whether it takes the place of the live version; else it stands beside.
            timeout_s: time for all workers to have it.

        Returns:
            `{"model", "live", "workers": {"done": [pid], "failed": {pid: reason}, "missing": [pid]}}`.

        Raises:
            UnknownModelError: when there is no such version (`field="version"`).
            RefusedVersionError: when a worker refused it (`workers={...}`, `reason`); nothing has changed then.
            IncompleteLoadError: when not all workers had it in time (`workers={...}`); nothing has changed then.
            BusyError: when another load is under way (`model`, `retry_after_s`).
        """
        return await self.keeper.load(version, live=live, timeout_s=timeout_s)

    def describe_models(self) -> dict[str, Any]:
        """What is loaded, what is followed, what was refused: the content of GET /models/info."""
        return self.keeper.describe()

    async def find_problem(self) -> str | None:
        """Say why the server is not ready, or None when it is."""
        return await self.keeper.find_problem()

    async def __is_ready__(self) -> bool:
        if (problem := await self.find_problem()) is not None:
            raise NotReadyError(problem)  # answered 503 with it; returning False would hide the reason
        return True

    # The doors. http.py answers them before BentoML does; here they are declared, for the OpenAPI document, the clients
    # and services that depend on this one.

    @bentoml.api(input_spec=EncodeRequest, output_spec=EncodeResponse)
    async def encode(self, **fields: Any) -> Response:
        """Embed texts: one vector a text, in the order given."""
        return await self._answer("/encode", fields)

    @bentoml.api(input_spec=SimilarityRequest, output_spec=SimilarityResponse)
    async def similarity(self, **fields: Any) -> Response:
        """Compare every text of `a` with every text of `b`, or pair by pair: cosines, and scores when calibrated."""
        return await self._answer("/similarity", fields)

    @bentoml.api(input_spec=RankRequest, output_spec=RankResponse)
    async def rank(self, **fields: Any) -> Response:
        """Put documents in order of likeness to a query."""
        return await self._answer("/rank", fields)

    @bentoml.api(route="/v1/embeddings", input_spec=EmbeddingsRequest, output_spec=EmbeddingsResponse)
    async def openai_embeddings(self, **fields: Any) -> Response:
        """Embed texts, in OpenAI's shape."""
        return await self._answer("/v1/embeddings", fields)

    @bentoml.api(input_spec=PredictRequest, output_spec=PredictResponse)
    async def predict(self, **fields: Any) -> Response:
        """Embed one text."""
        return await self._answer("/predict", fields)

    @bentoml.api(
        route="/predict/similarity", input_spec=PredictSimilarityRequest, output_spec=PredictSimilarityResponse
    )
    async def predict_similarity(self, **fields: Any) -> Response:
        """Compare two texts."""
        return await self._answer("/predict/similarity", fields)

    @bentoml.api(batchable=True, max_batch_size=MAX_BATCHED_TEXTS)
    async def encode_batchable(self, texts: list[str]) -> list[list[float]]:
        """Embed texts by BentoML's own adaptive batching, for comparison with /encode."""
        try:
            return await embed_pinned(texts, lambda: self.shelf.live)
        except ServeError as error:  # BentoML shows the status of its own errors only
            raise BentoMLException(error.message, error_code=HTTPStatus(error.status)) from error

    async def _answer(self, path: str, fields: dict[str, Any]) -> Response:
        door = DOORS_BY_PATH[path]
        request = door.request.model_construct(**fields)
        encoder = self.shelf.choose(*request.asked_model)
        with self.shelf.holding(encoder):
            rendered = render(await getattr(encoder, str(door.method))(request))
        return Response(rendered.body, media_type=rendered.media_type)


SERVICE: Any = EmbeddingService  # the decorator has made it a service; mypy still sees the class


def find_model() -> BentoModel:
    """The model that the served Bento was built with; when served from source, the one that the settings name.

    BentoML pins the exact version in the Bento, but its class attribute would still look up `latest` in the store.
    """
    bento = SERVICE.bento
    if bento is None:
        return SERVICE.inner.model
    return next(info.to_model() for info in bento.info.all_models)


def find_own_box() -> Path:
    """The folder of the served Bento's own lunchbox.

    Raises:
        LunchboxError: when the model is not in the store.
    """
    try:
        return Path(find_model().resolve().path)
    except (BentoMLException, OSError) as error:
        raise LunchboxError(str(error)) from error


SERVICE.settings = SETTINGS
SERVICE.add_asgi_middleware(ServeErrors)
SERVICE.mount_asgi_app(
    Starlette(
        routes=[
            *make_model_routes(SERVICE),
            *make_routes(),
        ]
    )
)
