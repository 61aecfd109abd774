"""The BentoML service: routes, start and stop, readiness. What a request means is in encoder.py, HTTP in http.py."""
# bentoml's own types are not followed:
# mypy: disable-error-code="misc, untyped-decorator"

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import bentoml
from bentoml.exceptions import BentoMLException
from bentoml.models import BentoModel
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from bentos.application import EnvelopedService, identify
from bentos.encoder import Encoder
from bentos.errors import LunchboxError, NotReadyError
from bentos.http import Intake, answer, json_response
from bentos.lunchbox import open_lunchbox
from bentos.schemas import EncodeRequest, EncodeResponse, SimilarityRequest, SimilarityResponse
from bentos.settings import ServeSettings

SETTINGS = ServeSettings()
logger = logging.getLogger("bentos")


async def get_health(_: Request) -> Response:
    """Say what is served, and whether it may be trusted."""
    service = bentoml.get_current_service()
    content = {} if service.encoder is None else service.encoder.describe()
    if (problem := await service.find_problem()) is None:
        return json_response({"status": "ok", **content})
    error = {"code": NotReadyError.code, "message": problem}
    return json_response({"status": "unavailable", **content, "error": error}, NotReadyError.status)


@bentoml.service(name="ekiben", service_class=EnvelopedService, workers=1, traffic={"timeout": 60})
class EmbeddingService:
    """Texts in, vectors or similarities out. Every answer names the model and the space of its vectors."""

    model = BentoModel(SETTINGS.model_tag)  # the build puts this model into the Bento, by its exact version

    def __init__(self) -> None:
        self.encoder: Encoder | None = None
        self.refusal = "the model is still loading"

    @bentoml.on_startup
    async def load(self) -> None:
        """Open the lunchbox. A bad one does not end the server: it stays up, not ready, and says why."""
        try:
            path = Path(find_model().resolve().path)
            self.encoder = Encoder(open_lunchbox(path, threads=SETTINGS.threads), SETTINGS)
        except (BentoMLException, LunchboxError, OSError) as error:
            self.refusal = str(error)
            logger.error("not ready: %s", error)
            return
        await self.encoder.start()

    @bentoml.on_shutdown
    async def unload(self) -> None:
        """Finish the batch in flight."""
        if self.encoder is not None:
            await self.encoder.stop()

    async def find_problem(self) -> str | None:
        """Say why the server is not ready, or None when it is."""
        return self.refusal if self.encoder is None else await self.encoder.find_problem()

    async def __is_ready__(self) -> bool:
        if (problem := await self.find_problem()) is not None:
            raise NotReadyError(problem)  # Intake answers 503 with it; returning False would hide the reason
        return True

    @bentoml.api(input_spec=EncodeRequest, output_spec=EncodeResponse)
    async def encode(self, **fields: Any) -> Response:
        """Embed texts: one vector a text, in the order given."""
        return await answer(self._ask(Encoder.encode, EncodeRequest.model_construct(**fields)))

    @bentoml.api(input_spec=SimilarityRequest, output_spec=SimilarityResponse)
    async def similarity(self, **fields: Any) -> Response:
        """Compare every text of `a` with every text of `b`, or pair by pair: cosines, and scores when calibrated."""
        return await answer(self._ask(Encoder.similarity, SimilarityRequest.model_construct(**fields)))

    async def _ask(self, question: Callable[[Encoder, Any], Awaitable[Any]], request: Any) -> Any:
        if self.encoder is None:
            raise NotReadyError(self.refusal)
        return await question(self.encoder, request)


SERVICE: Any = EmbeddingService  # the decorator has made it a service; mypy still sees the class


def find_model() -> BentoModel:
    """The model that the served Bento was built with; when served from source, the one that the settings name.

    BentoML pins the exact version in the Bento, but its class attribute would still look up `latest` in the store.
    """
    bento = SERVICE.bento
    if bento is None:
        return SERVICE.inner.model
    return next(info.to_model() for info in bento.info.all_models)


SERVICE.add_asgi_middleware(
    Intake,
    models={"/encode": EncodeRequest, "/similarity": SimilarityRequest},
    settings=SETTINGS,
    identity=identify,
)
SERVICE.mount_asgi_app(Starlette(routes=[Route("/health", get_health)]))
