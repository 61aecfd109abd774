"""What BentoML's application answers for us beside the doors: what is served, under which names, and how it is."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from bentos.access import INFO_PATH
from bentos.application import EnvelopedService
from bentos.catalogue import find_in_catalogue, list_catalogue
from bentos.envelope import ASKED_PATH
from bentos.errors import NotReadyError, ServeError
from bentos.http import MODEL_ROUTE, MODELS_FOLDER, SHOWN_ENCODER
from bentos.responses import error_response, json_response


def make_model_routes(served: EnvelopedService) -> list[Route]:
    """List the routes /health, /v1/models, /v1/models/{name} and /models/info of a service."""

    async def get_health(request: Request) -> Response:
        """Say what is served, and whether it may be trusted."""
        encoder = request.scope.get(SHOWN_ENCODER)  # the one that the headers name
        content = {} if encoder is None else encoder.describe()
        if (problem := await served.instance.find_problem()) is None:
            return json_response({"status": "ok", **content})
        error = {"code": NotReadyError.code, "message": problem}
        return json_response({"status": "unavailable", **content, "error": error}, NotReadyError.status)

    async def get_models(request: Request) -> Response:
        """List the names of all versions, or look one of them up, in OpenAI's shape."""
        asked: str = request.scope.get(ASKED_PATH, request.url.path)
        name = asked.removeprefix(MODELS_FOLDER) if request.path_params else None
        try:
            shelf = served.instance.shelf
            return json_response(list_catalogue(shelf) if name is None else find_in_catalogue(shelf, name))
        except ServeError as error:
            return error_response(error, request.url.path)

    async def get_info(request: Request) -> Response:
        """Say what is loaded, followed, refused and shadowed."""
        try:
            content: dict[str, Any] = served.instance.describe_models()
        except ServeError as error:
            return error_response(error, request.url.path)
        return json_response(content | {"shadow": None if served.shadow is None else served.shadow.describe()})

    return [
        Route("/health", get_health),
        Route("/v1/models", get_models),
        Route(MODEL_ROUTE, get_models),
        Route(INFO_PATH, get_info),
    ]
