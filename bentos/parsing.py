"""A body becomes a request, or an error that names what was found, what is allowed and what to do.

Everything a caller can get wrong inside a body, and that can be seen without the model, is found in `parse_request`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, TypeVar

import orjson
from pydantic import BaseModel, ValidationError

from bentos.errors import InvalidRequestError, MalformedBodyError, TooLargeError
from bentos.schemas import DoorRequest, TextField
from bentos.settings import ServeSettings
from bentos.text import text_problem

MAX_QUOTED_CHARS = 60
MAX_LISTED_ERRORS = 10
READY_MESSAGE = "ready_message"  # type of a validation error whose message needs no more explaining

Request = TypeVar("Request", bound=DoorRequest)


def parse_request(model: type[Request], body: bytes, settings: ServeSettings) -> Request:
    """Turn a body into a checked request.

    Raises:
        MalformedBodyError: not UTF-8, or not JSON.
        InvalidRequestError: JSON, but not what the route takes.
        TooLargeError: too many texts, or one with too many characters.
    """
    try:
        data = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise MalformedBodyError(_explain_malformed(body, error)) from None
    if not isinstance(data, dict):
        raise InvalidRequestError(
            f"the body is {name_value(data)}; it must be an object with {', '.join(_required(model))}"
        )
    try:
        request = model.model_validate(data)
    except ValidationError as error:
        raise _explain_invalid(model, error) from None
    _check_texts(request, settings)
    if (conflict := request.find_conflict()) is not None:
        raise conflict
    return request


def name_value(value: Any) -> str:
    """A value in JSON's words, shortened: `the number 3`, `null`, `a list`."""
    match value:
        case None:
            return "null"
        case bool():
            return "true" if value else "false"
        case int() | float():
            return f"the number {value}"
        case str():
            shown = value if len(value) <= MAX_QUOTED_CHARS else value[:MAX_QUOTED_CHARS] + "..."
            return f"the string {shown!r}"
        case list():
            return "a list" if value else "an empty list"
    return "an object"


def _check_texts(request: DoorRequest, settings: ServeSettings) -> None:
    fields = list(request.text_fields())
    count = sum(len(field.texts) for field in fields)
    if count > settings.max_texts:
        names = " and ".join(f"`{field.name}`" for field in fields)
        raise TooLargeError(
            f"{names} {'has' if len(fields) == 1 else 'have'} {count} items; at most {settings.max_texts} are allowed. "
            "Send several requests, or raise EKIBEN_MAX_TEXTS on the server",
            found=count,
            limit=settings.max_texts,
        )
    for field in fields:
        for row, text in enumerate(field.texts):
            if isinstance(text, str):
                _check_text(field, row, text, settings.max_chars, "EKIBEN_MAX_CHARS")
    for name, prompt in request.literal_prompts():
        if prompt:
            field = TextField(name, [prompt], is_list=False)
            _check_text(field, 0, prompt, settings.max_prompt_chars, "EKIBEN_MAX_PROMPT_CHARS")


def _check_text(field: TextField, row: int, text: str, limit: int, setting: str) -> None:
    if len(text) > limit:
        name = field.label(row)
        raise TooLargeError(
            f"`{name}` has {len(text)} characters; at most {limit} are allowed. "
            f"Split or shorten it, or raise {setting} on the server",
            field=name,
            found=len(text),
            limit=limit,
        )
    if (problem := text_problem(text)) is not None:
        name = field.label(row)
        raise InvalidRequestError(f"`{name}` {problem}; leave it out or repair it", field=name)


def _explain_malformed(body: bytes, error: orjson.JSONDecodeError) -> str:
    if not body:
        return "the body is empty; it must be a JSON object"
    try:
        body.decode("utf-8")
    except UnicodeDecodeError as decode_error:
        return (
            f"the body is not UTF-8: byte {decode_error.start} is {body[decode_error.start]:#04x}; send JSON in UTF-8"
        )
    if re.search(rb"\\u[dD][89a-fA-F]", body) and "surrogate" in str(error):
        return f"the body holds a lone surrogate, which is not valid Unicode text: {error}; repair the text"
    return f"the body is not JSON: {error}"


def _explain_invalid(model: type[BaseModel], error: ValidationError) -> InvalidRequestError:
    """Name field, found and allowed of the first error, and list the others in the details."""
    by_field: dict[str, list[Any]] = {}  # a value that may be one of several types has an error for each of them
    for found in error.errors():
        by_field.setdefault(_field(found["loc"]), []).append(found)
    errors = [{"field": field, "message": _explain_field(model, field, found)} for field, found in by_field.items()]
    others = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
    return InvalidRequestError(f"{errors[0]['message']}{others}", errors=errors[:MAX_LISTED_ERRORS])


def _explain_field(model: type[BaseModel], field: str, errors: Sequence[dict[str, Any]]) -> str:
    name, found = f"`{field}`", errors[0]
    if found["type"] == READY_MESSAGE:
        return f"{name} {found['msg']}"
    match found["type"]:
        case "missing":
            return f"{name} is missing; the required fields are {', '.join(_required(model))}"
        case "extra_forbidden":
            return f"{name} is not a field of this route; its fields are {', '.join(model.model_fields)}"
        case "too_short":
            return f"{name} is an empty list; give at least one text"
    wanted = dict.fromkeys(error["msg"].removeprefix("Input should be ") for error in errors)
    allowed = " or ".join(wanted).replace("greater than or equal to", "at least")
    return f"{name} is {name_value(found['input'])}; it must be {allowed}"


def _field(loc: tuple[int | str, ...]) -> str:
    """`('texts', 3)` -> `texts[3]`; a name behind the first says which type was tried, not where."""
    first = str(loc[0])
    name = first if len(first) <= MAX_QUOTED_CHARS else first[:MAX_QUOTED_CHARS] + "..."
    return name + "".join(f"[{part}]" for part in loc[1:] if isinstance(part, int))


def _required(model: type[BaseModel]) -> list[str]:
    return [f"`{name}`" for name, field in model.model_fields.items() if field.is_required()]
