"""Answers that hold no vectors: JSON, and each error in the one shape, `{"error": {"code", "message", "details"?}}`."""

from __future__ import annotations

from typing import Any

import orjson
from starlette.responses import Response

from bentos.errors import ServeError, UnauthorizedError
from bentos.openai import PREFIX, describe_error
from bentos.render import JSON, Rendered


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
    if "allow" in error.details:
        headers["Allow"] = error.details["allow"]
    return Rendered(orjson.dumps({"error": content}), JSON, headers)


def error_response(error: ServeError, path: str) -> Response:
    """`render_error` as an answer of its own."""
    rendered = render_error(error, path)
    return Response(rendered.body, error.status, rendered.headers, rendered.media_type)
