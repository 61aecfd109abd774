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
import numpy as np
from bentoml.exceptions import BentoMLException
from bentoml.models import BentoModel
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from bentos.access import ApiKeys
from bentos.application import EnvelopedService
from bentos.doors import DOORS_BY_PATH
from bentos.encoder import Encoder
from bentos.envelope import ASKED_PATH, ServeErrors
from bentos.errors import LunchboxError, NotReadyError, ServeError, SettingsError
from bentos.http import MODEL_ROUTE, MODELS_FOLDER, json_response, render_error
from bentos.lunchbox import open_lunchbox
from bentos.machine import settle_memory
from bentos.observer import Observer
from bentos.openai import EmbeddingsRequest, EmbeddingsResponse
from bentos.playground import make_routes
from bentos.render import render
from bentos.schemas import (
    EncodeRequest,
    EncodeResponse,
    PredictRequest,
    PredictResponse,
    PredictSimilarityRequest,
    PredictSimilarityResponse,
    RankRequest,
    RankResponse,
    SimilarityRequest,
    SimilarityResponse,
)
from bentos.settings import ServeSettings
from bentos.tracing import check_tracing

SETTINGS = ServeSettings()
WATCH_EVERY_S = 10.0
MAX_BATCHED_TEXTS = 64  # of BentoML's own batching
logger = logging.getLogger("bentos")


async def get_health(_: Request) -> Response:
    """Say what is served, and whether it may be trusted."""
    service = bentoml.get_current_service()
    content = {} if service.encoder is None else service.encoder.describe()
    if (problem := await service.find_problem()) is None:
        return json_response({"status": "ok", **content})
    error = {"code": NotReadyError.code, "message": problem}
    return json_response({"status": "unavailable", **content, "error": error}, NotReadyError.status)


async def get_models(request: Request) -> Response:
    """List the names of the model, or look one of them up, in OpenAI's shape."""
    asked: str = request.scope.get(ASKED_PATH, request.url.path)
    name = asked.removeprefix(MODELS_FOLDER) if request.path_params else None
    try:
        encoder = bentoml.get_current_service().get_encoder()
        return json_response(encoder.list_models() if name is None else encoder.find_model(name))
    except ServeError as error:
        rendered = render_error(error, request.url.path)
        return Response(rendered.body, error.status, rendered.headers, rendered.media_type)


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
        self.encoder: Encoder | None = None
        self.observer: Observer = SERVICE.observer
        SERVICE.instance = self
        self.refusal = "the model is still loading"
        self.watch: asyncio.Task[None] | None = None

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
        try:
            path = Path(find_model().resolve().path)
            precision = None if SETTINGS.precision == "default" else SETTINGS.precision
            box = open_lunchbox(path, precision=precision, device=SETTINGS.device)
        except (BentoMLException, LunchboxError, OSError) as error:
            self.refusal = str(error)
            logger.error("not ready: %s", error)
            return
        self.encoder = Encoder(box, SETTINGS, self.observer)
        await self.encoder.start()
        self.observer.set_model(box.manifest, box.engine.precision)
        settle_memory()
        logger.info("serving %s in %s, space %s", box.manifest.tag, box.engine.precision, box.manifest.space_id)
        await self.find_problem()  # also tells the metrics
        self.watch = asyncio.create_task(self.keep_watch(), name="ekiben-watch")

    async def keep_watch(self) -> None:
        """Ask the canary now and then, also when nobody asks for readiness: wrong vectors must stop by themselves."""
        while True:
            await asyncio.sleep(WATCH_EVERY_S)
            try:
                await self.find_problem()
            except Exception:  # whatever it is, the next look may find out more
                logger.exception("the server could not be looked after")

    @bentoml.on_shutdown
    async def unload(self) -> None:
        """Finish the batches in flight."""
        if self.watch is not None:
            self.watch.cancel()
        if self.encoder is not None:
            await self.encoder.stop()
        if SERVICE.tracing is not None:
            await asyncio.to_thread(SERVICE.tracing.close)

    def get_encoder(self) -> Encoder:
        """The model that is served.

        Raises:
            NotReadyError: when none is loaded.
        """
        if self.encoder is None:
            raise NotReadyError(self.refusal)
        return self.encoder

    async def find_problem(self) -> str | None:
        """Say why the server is not ready, or None when it is."""
        problem = self.refusal if self.encoder is None else await self.encoder.find_problem()
        self.observer.set_ready(problem is None)
        return problem

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
            vectors: np.ndarray[Any, Any] = await self.get_encoder().embed_texts(texts)
        except ServeError as error:  # BentoML shows the status of its own errors only
            raise BentoMLException(error.message, error_code=HTTPStatus(error.status)) from error
        rows: list[list[float]] = vectors.tolist()
        return rows

    async def _answer(self, path: str, fields: dict[str, Any]) -> Response:
        door = DOORS_BY_PATH[path]
        question = getattr(self.get_encoder(), str(door.method))
        rendered = render(await question(door.request.model_construct(**fields)))
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


SERVICE.settings = SETTINGS
SERVICE.add_asgi_middleware(ServeErrors)
SERVICE.mount_asgi_app(
    Starlette(
        routes=[
            Route("/health", get_health),
            Route("/v1/models", get_models),
            Route(MODEL_ROUTE, get_models),
            *make_routes(),
        ]
    )
)
