"""BentoML's application made ours: the envelope around all of it, and an OpenAPI document that tells the truth."""

# bentoml's own types are not followed:
# mypy: disable-error-code="misc"

from __future__ import annotations

from typing import Any

import bentoml
import yaml
from bentoml.exceptions import BentoMLException
from starlette.types import ASGIApp

from bentos.access import ApiKeys, add_cors
from bentos.apidoc import build_document
from bentos.catalogue import list_all_names, list_all_spaces
from bentos.connections import guard_connections
from bentos.envelope import list_paths
from bentos.errors import NotReadyError
from bentos.http import MODEL_ROUTE, Frontend
from bentos.loads import LOAD_ROUTE
from bentos.logs import configure_logging
from bentos.metrics import open_metrics
from bentos.observer import Observer
from bentos.settings import ServeSettings
from bentos.shadow import Shadow
from bentos.shelf import Shelf
from bentos.tracing import Tracing, open_tracing


class EnvelopedService(bentoml.Service[Any]):
    """A service whose doors are answered by the frontend, before all of BentoML's application."""

    settings: ServeSettings
    observer: Observer = Observer()  # of a process that does not serve, such as a build
    tracing: Tracing | None = None
    shadow: Shadow | None = None
    instance: Any = None  # of the service in this process, once BentoML has made it

    def to_asgi(self, is_main: bool = True) -> ASGIApp:
        """Build the application that the server process runs."""
        configure_logging(self.settings)
        app = super().to_asgi(is_main)
        paths = list_paths(app.routes)
        metrics = open_metrics(self.settings, {*paths, MODEL_ROUTE, LOAD_ROUTE})
        guard = guard_connections(self.settings, metrics.record_refused_connection)
        self.observer, self.tracing = metrics, open_tracing(self.settings, str(self.bento.tag) if self.bento else "")

        if self.settings.shadow and self.settings.shadow_share:
            self.shadow = Shadow(self._get_shelf, self.settings, metrics)

        def bring_up_to_date() -> None:
            metrics.forget_dead_workers()
            metrics.set_connections(guard.connections)
            if self.instance is not None:
                self.instance.keeper.observe()

        frontend = Frontend(
            app,
            known_paths=paths,
            get_shelf=self._get_shelf,
            settings=self.settings,
            keys=ApiKeys(self.settings),
            metrics=metrics,
            load_version=self._load_version,
            shadow=self.shadow,
            tracing=self.tracing,
            before_metrics=bring_up_to_date,
        )
        return add_cors(frontend, self.settings)

    def _get_shelf(self) -> Shelf:
        """The versions that are loaded; asked for every request, so BentoML's own look-up is too slow.

        Raises:
            NotReadyError: while the service is still starting.
        """
        if self.instance is None:
            raise NotReadyError("the server is still starting")
        shelf: Shelf = self.instance.shelf
        return shelf

    async def _load_version(self, version: str, *, live: bool, timeout_s: float) -> dict[str, Any]:
        self._get_shelf()  # or say that it is still starting
        content: dict[str, Any] = await self.instance.load_version(version, live=live, timeout_s=timeout_s)
        return content

    @property
    def openapi_spec(self) -> Any:
        """Our document in the place of BentoML's, which knows neither the limits nor the errors."""
        try:
            shelf = bentoml.get_current_service().shelf
            live = shelf.live.manifest
        except (BentoMLException, NotReadyError):  # at the build, and while no model is loaded
            return Document(build_document(self.settings))
        names, spaces = list_all_names(shelf), list_all_spaces(shelf)
        return Document(build_document(self.settings, live, names=names, spaces=spaces))


class Document:
    """An OpenAPI document as BentoML handles one: the server asks for a dictionary, the build writes YAML."""

    def __init__(self, content: dict[str, Any]) -> None:
        self.content = content

    def asdict(self) -> dict[str, Any]:
        """The document itself."""
        return self.content


yaml.add_representer(Document, lambda dumper, document: dumper.represent_dict(document.asdict()))
