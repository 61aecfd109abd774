"""BentoML's application made ours: the envelope around all of it, and an OpenAPI document that tells the truth."""

# bentoml's own types are not followed:
# mypy: disable-error-code="misc"

from __future__ import annotations

from typing import Any

import bentoml

from bentos.http import UNAVAILABLE, Envelope, list_paths

JSON_ERROR = {"content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}}
ERROR_SCHEMA = {
    "type": "object",
    "title": "Error",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["code", "message"],
            "properties": {
                "code": {"type": "string", "description": "Stable name of the kind of error, e.g. `invalid_request`."},
                "message": {"type": "string", "description": "What was found, what is allowed, what to do."},
                "details": {"type": "object", "description": "The same for programs: field, found, limit, ..."},
            },
        }
    },
}


def identify() -> tuple[str, str]:
    """Model tag and space id of what is served, for the headers of every answer."""
    encoder = bentoml.get_current_service().encoder
    return (UNAVAILABLE, UNAVAILABLE) if encoder is None else (encoder.manifest.tag, encoder.manifest.space_id)


class EnvelopedService(bentoml.Service[Any]):
    """A service whose whole application, BentoML's own routes and errors included, is wrapped in the envelope."""

    def to_asgi(self, is_main: bool = True) -> Envelope:
        """Build the application that the server process runs."""
        app = super().to_asgi(is_main)
        return Envelope(app, list_paths(app.routes), identify)

    @property
    def openapi_spec(self) -> Any:
        """BentoML's document, with the errors that are really answered instead of those of BentoML."""
        spec = super().openapi_spec
        errors = {"4XX": {"description": "The caller's error", **JSON_ERROR}}
        errors |= {"5XX": {"description": "The server's error", **JSON_ERROR}}
        for api in self.apis.values():
            operation = spec.paths[api.route].post
            operation["responses"] = {200: operation["responses"][200], **errors}
        for unused in ("InvalidArgument", "NotFound", "InternalServerError", "TaskStatusResponse"):
            spec.components["schemas"].pop(unused, None)
        spec.components["schemas"]["Error"] = ERROR_SCHEMA
        return spec
