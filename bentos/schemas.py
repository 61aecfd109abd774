"""What the routes take and give: the request and response models, and the one function that checks a body.

Everything a caller can get wrong inside a body is found in `parse_request`, and named with what was found, what is
allowed and what to do.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Annotated, Any, Literal, TypeVar

import orjson
from pydantic import BaseModel, ConfigDict, Field, ValidationError, WithJsonSchema

from bentos.errors import InvalidRequestError, MalformedBodyError, TooLargeError
from bentos.settings import ServeSettings
from bentos.text import text_problem

MAX_QUOTED_CHARS = 60
MAX_LISTED_ERRORS = 10

# BentoML's client takes the first of several schemas for the only one: it would take a string apart into letters.
EITHER = WithJsonSchema({"type": "array", "items": {}})
EITHER_OR_NULL = WithJsonSchema({"nullable": True})
Texts = Annotated[list[str], Field(min_length=1)]


class TextsRequest(BaseModel):
    """What all requests with texts have in common."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    prompt: str | None = Field(
        None,
        description="Name of one of the model's prompts, put before each text. Default: the model's default, if any.",
    )
    prompt_text: str | None = Field(
        None, description="Literal text put before each text instead; an empty one switches the default prompt off."
    )
    on_overflow: Literal["truncate", "error"] = Field(
        "truncate", description="What to do with a text longer than the model takes: cut its end off, or answer 422."
    )
    model: str | None = Field(
        None, description="Refuse to answer (404) unless this is the model served: its tag, name, version or run."
    )

    def named_texts(self) -> Iterator[tuple[str, list[str]]]:
        """Every list of texts with its field's name."""
        raise NotImplementedError


class EncodeRequest(TextsRequest):
    """Texts to embed."""

    texts: Texts = Field(description="The texts, in any language the model knows.")
    normalize: bool | None = Field(
        None, description="Whether vectors have length 1. Default: as the model was trained."
    )
    dimensions: int | None = Field(
        None, ge=1, description="Keep the first dimensions only; refused unless the model was trained for it."
    )
    encoding: Literal["float", "base64"] = Field(
        "float", description="`float`: lists of numbers. `base64`: little-endian float32, half the size."
    )

    def named_texts(self) -> Iterator[tuple[str, list[str]]]:
        """Every list of texts with its field's name."""
        yield "texts", self.texts


class SimilarityRequest(TextsRequest):
    """Texts to compare."""

    a: Texts = Field(description="Texts; one row of the matrix each.")
    b: Texts = Field(description="Texts; one column of the matrix each.")
    pairwise: bool = Field(False, description="Compare only a[i] with b[i]; then both lists have the same length.")

    def named_texts(self) -> Iterator[tuple[str, list[str]]]:
        """Every list of texts with its field's name."""
        yield "a", self.a
        yield "b", self.b


class Usage(BaseModel):
    """What the texts cost, and what was lost."""

    tokens: list[int] = Field(description="Tokens of each text before any cut, special tokens and prompt included.")
    truncated: list[int] = Field(description="Positions of the texts whose end was cut off.")
    total_tokens: int = Field(description="Sum of `tokens`.")


class EncodeResponse(BaseModel):
    """The vectors, in the order of the texts."""

    embeddings: Annotated[list[list[float]] | list[str], EITHER] = Field(
        description="Numbers, or base64 of little-endian float32."
    )
    model: str = Field(description="Tag of the model that made them, e.g. `ekiben:3-1f2e3d4c`.")
    usage: Usage


class SimilarityResponse(BaseModel):
    """How alike the texts are."""

    similarity: Annotated[list[list[float]] | list[float], EITHER] = Field(
        description="Cosines in -1..1: a matrix, or a list when pairwise."
    )
    scores: Annotated[list[list[float]] | list[float] | None, EITHER_OR_NULL] = Field(
        description="The same on the scale of the training labels, 0..1; null when the model was not calibrated."
    )
    decision_threshold: float | None = Field(
        description="Cosine at or above which two texts count as similar; null when the model has none."
    )
    model: str = Field(description="Tag of the model that made them.")
    usage: dict[Literal["a", "b"], Usage]


RequestModel = TypeVar("RequestModel", bound=TextsRequest)


def parse_request(model: type[RequestModel], body: bytes, settings: ServeSettings) -> RequestModel:
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
            f"the body is {_name_type(data)}; it must be an object with {', '.join(_required(model))}"
        )
    try:
        request = model.model_validate(data)
    except ValidationError as error:
        raise _explain_invalid(model, error) from None
    _check_texts(request, settings)
    if isinstance(request, SimilarityRequest) and request.pairwise and len(request.a) != len(request.b):
        raise InvalidRequestError(
            f"`a` has {len(request.a)} texts and `b` has {len(request.b)}; with `pairwise` both must have as many",
            field="b",
        )
    if request.prompt is not None and request.prompt_text is not None:
        raise InvalidRequestError("`prompt` and `prompt_text` are both given; give one", field="prompt_text")
    return request


def _check_texts(request: TextsRequest, settings: ServeSettings) -> None:
    lists = list(request.named_texts())
    count = sum(len(texts) for _, texts in lists)
    if count > settings.max_texts:
        names = " and ".join(f"`{name}`" for name, _ in lists)
        raise TooLargeError(
            f"{names} {'has' if len(lists) == 1 else 'have'} {count} items; at most {settings.max_texts} are allowed. "
            "Send several requests, or raise EKIBEN_MAX_TEXTS on the server",
            found=count,
            limit=settings.max_texts,
        )
    for name, texts in [*lists, ("prompt_text", [request.prompt_text] if request.prompt_text else [])]:
        for position, text in enumerate(texts):
            field = f"{name}[{position}]" if name != "prompt_text" else name
            if len(text) > settings.max_chars:
                raise TooLargeError(
                    f"`{field}` has {len(text)} characters; at most {settings.max_chars} are allowed. "
                    "Split the text, or raise EKIBEN_MAX_CHARS on the server",
                    field=field,
                    found=len(text),
                    limit=settings.max_chars,
                )
            if (problem := text_problem(text)) is not None:
                raise InvalidRequestError(f"`{field}` {problem}; leave it out or repair it", field=field)


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
    errors = [
        {"field": _field(found["loc"]), "message": _explain_field(model, dict(found))} for found in error.errors()
    ]
    others = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
    return InvalidRequestError(f"{errors[0]['message']}{others}", errors=errors[:MAX_LISTED_ERRORS])


def _explain_field(model: type[BaseModel], found: dict[str, Any]) -> str:
    name = f"`{_field(found['loc'])}`"
    match found["type"]:
        case "missing":
            return f"{name} is missing; the required fields are {', '.join(_required(model))}"
        case "extra_forbidden":
            return f"{name} is not a field of this route; its fields are {', '.join(model.model_fields)}"
        case "too_short":
            return f"{name} is an empty list; give at least one text"
    allowed = found["msg"].removeprefix("Input should be ").replace("greater than or equal to", "at least")
    return f"{name} is {_name_type(found['input'])}; it must be {allowed}"


def _field(loc: tuple[int | str, ...]) -> str:
    """`('texts', 3)` -> `texts[3]`."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in loc).lstrip(".")


def _name_type(value: Any) -> str:
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
            return "a list"
    return "an object"


def _required(model: type[BaseModel]) -> list[str]:
    return [f"`{name}`" for name, field in model.model_fields.items() if field.is_required()]
