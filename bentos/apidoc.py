"""The OpenAPI document: what the doors take and give, and every answer that may come instead.

It is made from the table of doors, the models of requests and answers, and the errors, with the limits of the settings
and, once one is loaded, the prompts, names and dimensions of the model. So it cannot say anything else than the code.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from bentos.access import INFO_PATH
from bentos.answers import HealthResponse, LoadResponse, ModelsInfoResponse
from bentos.doors import DOORS, Door
from bentos.errors import (
    BusyError,
    DeadlineExceededError,
    IncompleteLoadError,
    RefusedVersionError,
    ServeError,
    SpaceMismatchError,
    TextTooLongError,
)
from bentos.loads import LOAD_ROUTE, MAX_NAME_CHARS, LoadRequest
from bentos.manifest import Manifest
from bentos.openai import PREFIX, ModelCard, ModelList
from bentos.render import DTYPE_HEADER, JSON, NPY, SHAPE_HEADER, TOTAL_TOKENS_HEADER, TRUNCATED_HEADER
from bentos.rules import list_names
from bentos.schemas import DoorRequest
from bentos.settings import ServeSettings

Schema = dict[str, Any]

API_VERSION = "1"
SCHEMAS = "#/components/schemas/"
TEXT_PATTERN = r"^[^\u0000]*[^\s\u0000][^\u0000]*$"  # something besides white space, and no null byte
PROMPT_PATTERN = r"^$|" + TEXT_PATTERN
INTRO = """\
Texts in, vectors out, and the way back to the model, the data and the code that made them.

- Every answer names the model in `X-Ekiben-Model` and the space of its vectors in `X-Ekiben-Space`. Vectors of two
  spaces must not be compared: send `X-Ekiben-Expect-Space`, and the server answers 409 instead of mixing them.
- Several versions may be loaded: `model` (`model_version`) chooses one, `space` asks for vectors of an older space.
- A text longer than the model takes is cut, and the answer says which; `on_overflow: error` answers 422 instead.
- Errors are `{"error": {"code", "message", "details"?}}`: the message says what was found, what is allowed, what to do.
"""
TAGS = [
    {"name": "texts", "description": "Texts to vectors, similarities, rankings."},
    {"name": "openai", "description": "The same vectors in OpenAI's shape, for the clients that speak it."},
    {"name": "models", "description": "Versions beside each other, and changes without a restart."},
    {"name": "server", "description": "What is served, and how it is."},
]
HEADERS = {
    "X-Ekiben-Model": "Tag of the version that answered, such as `ekiben:3-1f2e3d4c`; that of the live one where none "
    "was chosen, `unavailable` when there is none.",
    "X-Ekiben-Space": "Vectors may be compared only when it is equal; `unavailable` when no version is live.",
    "X-Request-Id": "The request's own, or one made for it; it is in the log too.",
}
ADAPTED_HEADERS = {
    "X-Ekiben-Adapted-From": "The model's own space, when `space` asked for vectors of an older one; else absent."
}
VECTOR_HEADERS = {
    SHAPE_HEADER: "Rows and columns, such as `64,384`.",
    DTYPE_HEADER: "`float32`, `float16` or `int8`.",
    TOTAL_TOKENS_HEADER: "Tokens of all texts.",
    TRUNCATED_HEADER: "Positions of the texts whose end was cut off, such as `3,17`; absent when none was.",
}
PARAMETERS: dict[str, tuple[str, Schema]] = {
    "X-Ekiben-Expect-Space": (
        "Answer 409 unless the vectors are of this space.",
        {"type": "string", "pattern": "^[0-9a-f]{16}$"},
    ),
    "X-Ekiben-Timeout-Ms": (
        "Milliseconds that the answer may take; 504 comes then, or 429 at once when the queue alone takes longer.",
        {"type": "integer", "minimum": 1, "maximum": 999_999_999},
    ),
    "X-Request-Id": (
        "Comes back in the answer and stands in the log, when it is 1 to 128 of `A-Z a-z 0-9 . _ -`; anything else is "
        "replaced.",
        {"type": "string"},
    ),
}
ERROR_FIELDS: Schema = {
    "code": {"type": "string", "description": "Stable name of the kind of error, such as `invalid_request`."},
    "message": {"type": "string", "description": "What was found, what is allowed, what to do."},
    "details": {"type": "object", "description": "The same for programs: field, found, limit, ..."},
}
OPENAI_FIELDS: Schema = {
    "type": {
        "type": "string",
        "description": "OpenAI's kind of error, such as `invalid_request_error`; it and `param` are absent only when "
        "the connection itself is refused.",
    },
    "param": {"type": ["string", "null"], "description": "The field that is wrong, when it is one."},
}
CONNECTION_ERRORS = {  # answered before the request reaches a route, so without the headers of other answers
    408: "`timeout`: The headers or the body came too slowly.",
    431: "`headers_too_large`: The headers are too long.",
    503: "`overloaded`: Too many connections are open.",
}
DOOR_ERRORS = (400, 404, 406, 409, 413, 415, 422, 429, 503, 504)
DOOR_KINDS = (DeadlineExceededError, SpaceMismatchError, TextTooLongError)  # which nobody gets who loads a version
LOAD_KINDS = (BusyError, IncompleteLoadError, RefusedVersionError)  # which nobody else gets
LOAD_ERRORS = (400, 403, 404, 409, 413, 415, 422, 503, 504)


def build_document(
    settings: ServeSettings,
    manifest: Manifest | None = None,
    *,
    names: Collection[str] = (),
    spaces: Collection[str] = (),
) -> dict[str, Any]:
    """Write the OpenAPI 3.1 document of a server.

    Args:
        settings: its limits, and whether it asks for keys.
        manifest: of the live model, when one is loaded.
        names: of all models loaded, the live one's included; none: those of the live one.
        spaces: that they answer in; none: that of the live one.
    """
    secured = settings.api_keys is not None or settings.api_keys_file is not None
    paths: dict[str, Any] = {door.path: {"post": _describe_door(door, secured)} for door in DOORS}
    administered = settings.admin_keys is not None or settings.admin_keys_file is not None
    paths |= _describe_models(secured) | _describe_loads(secured, administered)
    paths |= _describe_server(secured and settings.protect_metrics)
    document: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {"title": "Ekiben", "version": API_VERSION, "description": INTRO},
        "servers": [{"url": "."}],
        "tags": TAGS,
        "paths": paths,
        "components": {
            "schemas": _collect_schemas(settings, _find_limits(settings, manifest, names, spaces)),
            "parameters": {
                name: {"name": name, "in": "header", "description": text, "schema": schema}
                for name, (text, schema) in PARAMETERS.items()
            },
            "headers": {
                name: {"description": text, "schema": {"type": "string"}}
                for name, text in (HEADERS | ADAPTED_HEADERS | VECTOR_HEADERS).items()
            }
            | {"Retry-After": {"description": "Seconds to wait before the next try.", "schema": {"type": "integer"}}},
        },
    }
    if secured or administered:
        document["components"]["securitySchemes"] = {
            "bearer": {"type": "http", "scheme": "bearer"},
            "header": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
        }
    return document


# --- paths


def _describe_door(door: Door, secured: bool) -> dict[str, Any]:
    answer = {JSON: {"schema": {"$ref": f"{SCHEMAS}{door.response.__name__}"}}}
    answer |= {kind: {"schema": {"type": "string", "format": "binary"}} for kind in door.offered[1:]}
    body: dict[str, Any] = {"schema": {"$ref": f"{SCHEMAS}{door.request.__name__}"}, "example": door.example}
    headers = _refer(HEADERS, "headers") | (_refer(VECTOR_HEADERS, "headers") if NPY in door.offered else {})
    headers |= _refer(ADAPTED_HEADERS, "headers") if "space" in door.request.model_fields else {}
    statuses = [status for status in DOOR_ERRORS if status != 404 or door.names_model]
    heard = set(PARAMETERS) - ({"X-Ekiben-Timeout-Ms"} if door.method is None else set())  # BentoML has its own limit
    return {
        "tags": ["openai" if door.path.startswith(PREFIX) else "texts"],
        "operationId": door.method or door.path.strip("/"),
        "summary": door.summary,
        "description": door.description,
        "parameters": [{"$ref": f"#/components/parameters/{name}"} for name in PARAMETERS if name in heard],
        "requestBody": {"required": True, "content": {JSON: body}},
        "responses": {"200": {"description": door.response.__doc__, "headers": headers, "content": answer}}
        | _describe_errors(statuses, secured, openai=door.path.startswith(PREFIX)),
        **_secure(secured),
    }


def _describe_models(secured: bool) -> dict[str, Any]:
    listed = _describe_get("list_models", "List the names of the models that are loaded", "openai", ModelList)
    found = _describe_get("find_model", "Look one name up", "openai", ModelCard)
    listed["responses"] |= _describe_errors([503], secured, openai=True)
    found["responses"] |= _describe_errors([404, 503], secured, openai=True)
    schema = {"type": "string", "minLength": 1}
    found["parameters"].append({"name": "model", "in": "path", "required": True, "schema": schema})
    return {
        f"{PREFIX}models": {"get": listed | _secure(secured)},
        f"{PREFIX}models/{{model}}": {"get": found | _secure(secured)},
    }


def _describe_loads(secured: bool, administered: bool) -> dict[str, Any]:
    info = _describe_get("models_info", "Which versions are loaded, followed, refused", "models", ModelsInfoResponse)
    info["responses"] |= _describe_errors([503], secured)
    load = _describe_get("load_model", "Load a version in all workers", "models", LoadResponse)
    load["description"] = (
        "Fetched, checked and warmed beside the versions that are there; then it takes the place of the live one in "
        "all workers at once, or stands beside it. Answers when every worker has it; else nothing has changed, and the "
        "error says which has not, and why. Needs a key of EKIBEN_ADMIN_KEYS or EKIBEN_ADMIN_KEYS_FILE."
    )
    name = "An alias such as `champion`, a version, a tag or a run's id."
    schema = {"type": "string", "minLength": 1, "maxLength": MAX_NAME_CHARS, "pattern": "^[^/]+$"}
    load["parameters"] += [
        {"name": "version", "in": "path", "required": True, "description": name, "schema": schema},
        {"$ref": "#/components/parameters/X-Ekiben-Timeout-Ms"},
    ]
    load["requestBody"] = {"required": False, "content": {JSON: {"schema": {"$ref": f"{SCHEMAS}LoadRequest"}}}}
    load["responses"] |= _describe_errors(LOAD_ERRORS, administered, loads=True)
    return {
        INFO_PATH: {"get": info | _secure(secured)},
        LOAD_ROUTE: {"post": load | _secure(administered)},
    }


def _describe_server(secured_metrics: bool) -> dict[str, Any]:
    health = _describe_get("health", "What is served, and whether it may be trusted", "server", HealthResponse)
    health["responses"]["503"] = health["responses"]["200"] | {"description": "It may not, for the reason given."}
    live = _describe_get("livez", "Whether the process answers", "server", None)
    ready = _describe_get("readyz", "Whether the vectors are right: the canary texts are embedded", "server", None)
    ready["responses"] |= _describe_errors([503], False)
    metrics = _describe_get("metrics", "Metrics in Prometheus' format", "server", None)
    metrics["responses"] |= _describe_errors([], secured_metrics)
    described = {"/health": health, "/livez": live, "/readyz": ready, "/metrics": metrics | _secure(secured_metrics)}
    return {path: {"get": operation} for path, operation in described.items()}


def _describe_get(name: str, summary: str, tag: str, response: type | None) -> dict[str, Any]:
    """An operation that takes no body and answers JSON, or plain text when there is no model of its answer."""
    content: Schema = {"text/plain": {"schema": {"type": "string"}}}
    if response is not None:
        content = {JSON: {"schema": {"$ref": f"{SCHEMAS}{response.__name__}"}}}
    answer = {"description": summary, "headers": _refer(HEADERS, "headers"), "content": content}
    request_id = {"$ref": "#/components/parameters/X-Request-Id"}
    return {
        "tags": [tag],
        "operationId": name,
        "summary": summary,
        "parameters": [request_id],
        "responses": {"200": answer} | _describe_errors([], False),
    }


def _describe_errors(
    statuses: Iterable[int], secured: bool, *, openai: bool = False, loads: bool = False
) -> dict[str, Any]:
    """The answers to refused requests, as the errors themselves describe them, and to those that always may come."""
    content: Schema = {JSON: {"schema": {"$ref": f"{SCHEMAS}{'OpenAIError' if openai else 'Error'}"}}}
    described: dict[str, Any] = {
        str(status): {"description": text, "content": content} for status, text in CONNECTION_ERRORS.items()
    }
    for status in {*statuses, 500, *([401] if secured else [])}:
        kinds = [kind for kind in _list_kinds(ServeError) if kind.status == status]
        kinds = [kind for kind in kinds if kind not in (DOOR_KINDS if loads else LOAD_KINDS)]
        texts = [f"`{kind.code}`: {_first_line(kind)}" for kind in kinds]
        texts += [CONNECTION_ERRORS[status]] if status in CONNECTION_ERRORS else []
        headers = _refer([*HEADERS, "Retry-After"] if status == 429 else HEADERS, "headers")
        described[str(status)] = {"description": " ".join(texts), "headers": headers, "content": content}
    described["500"]["description"] = "`internal`: An unexpected error; the server's log says more."
    return dict(sorted(described.items()))


def _list_kinds(kind: type[ServeError]) -> Iterator[type[ServeError]]:
    yield kind
    for below in kind.__subclasses__():
        yield from _list_kinds(below)


def _first_line(kind: type) -> str:
    return (kind.__doc__ or "").strip().splitlines()[0]


def _refer(names: Iterable[str], where: str) -> Schema:
    return {name: {"$ref": f"#/components/{where}/{name}"} for name in names}


def _secure(secured: bool) -> dict[str, Any]:
    return {"security": [{"bearer": []}, {"header": []}]} if secured else {}


# --- schemas


def _collect_schemas(settings: ServeSettings, limits: dict[str, tuple[str, Schema]]) -> dict[str, Any]:
    """Every model with what settings and manifest say about its fields."""
    requests: list[type[DoorRequest]] = [door.request for door in DOORS]
    models: list[type[BaseModel]] = [*requests, *(door.response for door in DOORS), ModelList, HealthResponse]
    models += [LoadRequest, LoadResponse, ModelsInfoResponse]
    _, made = models_json_schema([(model, "validation") for model in models], ref_template=SCHEMAS + "{model}")
    schemas: dict[str, Any] = made["$defs"]
    for request in requests:
        if clashes := [_forbid_both(*pair) for pair in request.alternatives]:
            schemas[request.__name__]["allOf"] = clashes
    schemas["Error"] = _describe_error(ERROR_FIELDS, ["code", "message"])
    schemas["OpenAIError"] = _describe_error(ERROR_FIELDS | OPENAI_FIELDS, ["code", "message"])
    return {name: _finish(schema, limits) for name, schema in sorted(schemas.items())}


def _describe_error(fields: Schema, required: list[str]) -> Schema:
    error = {"type": "object", "required": required, "properties": fields}
    return {"type": "object", "required": ["error"], "properties": {"error": error}}


def _forbid_both(name: str, literal: str) -> Schema:
    strings = {field: {"type": "string"} for field in (name, literal)}
    return {"not": {"required": [name, literal], "properties": strings}}


def _find_limits(
    settings: ServeSettings, manifest: Manifest | None, names: Collection[str], spaces: Collection[str]
) -> dict[str, tuple[str, Schema]]:
    """What `x-limit` stands for: the type of the schemas meant, and what is known of them beyond it."""
    limits: dict[str, tuple[str, Schema]] = {
        "text": ("string", {"minLength": 1, "maxLength": settings.max_chars, "pattern": TEXT_PATTERN}),
        "prompt_text": ("string", {"maxLength": settings.max_prompt_chars, "pattern": PROMPT_PATTERN}),
        "texts": ("array", {"maxItems": settings.max_texts}),
    }
    if manifest is not None:
        sizes: Schema = {"enum": sorted({*manifest.nested_dims, manifest.dim})}
        if settings.allow_truncated_dimensions:
            sizes = {"minimum": 1, "maximum": manifest.dim}
        limits["dimensions"] = ("integer", sizes)
        limits["model"] = ("string", {"enum": list(names or list_names(manifest))})
        limits["space"] = ("string", {"enum": list(spaces or [manifest.space_id])})
        limits["tokens"] = ("array", {"maxItems": manifest.max_tokens})
        # with no prompts there is no name that would pass
        limits["prompt"] = ("string", {"enum": list(manifest.prompts)} if manifest.prompts else {"not": {}})
    return limits


def _finish(schema: Any, limits: dict[str, tuple[str, Schema]]) -> Any:
    """Put true schemas and limits where the models left a mark (see schemas.py); drop the titles made of names."""
    if isinstance(schema, list):
        return [_finish(item, limits) for item in schema]
    if not isinstance(schema, dict):
        return schema
    schema = {key: _finish(value, limits) for key, value in schema.items() if key != "title"}
    if (several := schema.pop("x-any-of", None)) is not None:
        for loose in ("type", "items", "nullable"):
            schema.pop(loose, None)
        schema["anyOf"] = several
        if schema.get("default", "") is None and {"type": "null"} not in several:
            del schema["default"]  # the field is absent then
    kind, bounds = limits.get(schema.pop("x-limit", ""), ("", {}))
    for each in (schema, *schema.get("anyOf", ())):
        if each.get("type") == kind:
            each.update(bounds)
    return schema
