"""OpenAI's embeddings API: its request, its answers and its errors, as the official clients expect them.

Beyond OpenAI's fields, requests may hold `prompt`, `prompt_text`, `on_overflow` and `space`; an answer says in
`usage.truncated` which inputs were cut, when any was. Nothing here computes: encoder.py does.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PlainValidator, WithJsonSchema
from pydantic_core import PydanticCustomError

from bentos.answers import NUMBERS
from bentos.engine import TokenCount
from bentos.errors import InvalidRequestError, ServeError
from bentos.manifest import Manifest
from bentos.parsing import READY_MESSAGE, name_value
from bentos.render import encode_base64
from bentos.schemas import Dimensions, PromptedRequest, Space, TextField
from bentos.vectors import Vectors

PREFIX = "/v1/"
OWNER = "ekiben"
FORMS = "a text, a list of texts, a list of token ids, or a list of such lists"
TEXT = {"type": "string", "x-limit": "text"}
TEXTS = {"type": "array", "minItems": 1, "items": TEXT, "x-limit": "texts"}
IDS = {"type": "array", "minItems": 1, "items": {"type": "integer", "minimum": 0}, "x-limit": "tokens"}
INPUT = WithJsonSchema({"x-any-of": [TEXT, TEXTS, IDS, {**TEXTS, "items": IDS}]})
VECTOR = WithJsonSchema({"x-any-of": [NUMBERS, {"type": "string"}]})


def check_input(value: Any) -> str | list[str] | list[int] | list[list[int]]:
    """Let OpenAI's four forms of `input` pass.

    Raises:
        PydanticCustomError: names the first thing that is none of them.
    """
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise _odd(f"is {name_value(value)}; it must be {FORMS}")
    if not value:
        raise _odd("is an empty list; give at least one text")
    kind = type(value[0])
    if kind not in (str, int, list) or set(map(type, value)) != {kind}:
        row = next((row for row, item in enumerate(value) if type(item) is not kind), 0)
        raise _odd(f"has {name_value(value[row])} as item {row}; it must be {FORMS}")
    if kind is list:
        for row, ids in enumerate(value):
            if not ids:
                raise _odd(f"has an empty list as item {row}; give at least one token id a text")
            if set(map(type, ids)) != {int}:
                odd = next(part for part in ids if type(part) is not int)
                raise _odd(f"has {name_value(odd)} in item {row}; a list inside the list holds token ids only")
    return value


def _odd(problem: str) -> PydanticCustomError:
    return PydanticCustomError(READY_MESSAGE, "{problem}", {"problem": problem})


class EmbeddingsRequest(PromptedRequest):
    """Texts to embed, in OpenAI's shape."""

    input: Annotated[str | list[str] | list[int] | list[list[int]], PlainValidator(check_input), INPUT] = Field(
        description="One text or several; or token ids of this model's own tokenizer, special tokens included, which "
        "are taken as they are, without any prompt."
    )
    encoding_format: Literal["float", "base64"] | None = Field(
        None, description="`float` (default): lists of numbers. `base64`: little-endian float32."
    )
    dimensions: Dimensions = None
    space: Space = None
    user: str | None = Field(None, description="Taken for OpenAI's sake, and not used.")

    @property
    def asked_space(self) -> str | None:
        """The space that the vectors shall be in, when not in the model's own."""
        return self.space

    def text_fields(self) -> Iterator[TextField]:
        """Every field that holds texts to embed."""
        given: Any = self.input
        single = isinstance(given, str) or isinstance(given[0], int)
        yield TextField("input", [given] if single else given, is_list=not single)

    def find_conflict(self) -> InvalidRequestError | None:
        """Find what no single field shows: fields that contradict each other."""
        given = next((name for name in ("prompt", "prompt_text") if getattr(self, name) is not None), None)
        if given is not None and not isinstance(self.input, str) and not isinstance(self.input[0], str):
            return InvalidRequestError(
                f"`{given}` is given and `input` holds token ids; a prompt can only be put before texts. Leave it out, "
                "or send texts",
                field=given,
            )
        return super().find_conflict()


class Embedding(BaseModel):
    """One vector."""

    object: Literal["embedding"]
    index: int = Field(description="Position of its text in `input`.")
    embedding: Annotated[list[float] | str, VECTOR]


class OpenAIUsage(BaseModel):
    """What the texts cost."""

    prompt_tokens: int = Field(description="Tokens of all texts before any cut, special tokens and prompts included.")
    total_tokens: int = Field(description="The same.")
    truncated: list[int] = Field([], description="Positions of the texts whose end was cut off; absent when none was.")


class EmbeddingsResponse(BaseModel):
    """The vectors, in the order of the texts."""

    object: Literal["list"]
    data: list[Embedding]
    model: str = Field(description="Tag of the model that made them, e.g. `ekiben:3-1f2e3d4c`.")
    usage: OpenAIUsage


class ModelCard(BaseModel):
    """One name under which a model can be asked for, and what it stands for now."""

    model_config = ConfigDict(protected_namespaces=())

    id: str = Field(description="The name, an alias such as `champion`, or a tag.")
    object: Literal["model"]
    created: int = Field(description="Seconds since 1970.")
    owned_by: str
    model: str = Field(description="Tag of the version meant, e.g. `ekiben:3-1f2e3d4c`.")
    space_id: str = Field(description="Space of its vectors.")


class ModelList(BaseModel):
    """The names under which the models that are loaded can be asked for."""

    object: Literal["list"]
    data: list[ModelCard]


def write_embeddings(vectors: Vectors, tokens: Sequence[TokenCount], model: str, *, base64: bool) -> dict[str, Any]:
    """The content of an `EmbeddingsResponse`."""
    rows: Iterable[Any] = encode_base64(vectors) if base64 else vectors
    total = sum(text.tokens_total for text in tokens)
    usage: dict[str, Any] = {"prompt_tokens": total, "total_tokens": total}
    if truncated := [row for row, text in enumerate(tokens) if text.truncated]:
        usage["truncated"] = truncated
    data = [{"object": "embedding", "index": index, "embedding": row} for index, row in enumerate(rows)]
    return {"object": "list", "data": data, "model": model, "usage": usage}


def list_models(named: Mapping[str, Manifest]) -> dict[str, Any]:
    """The content of a `ModelList`, of names and what each stands for now."""
    return {"object": "list", "data": [write_model(manifest, name) for name, manifest in named.items()]}


def write_model(manifest: Manifest, name: str) -> dict[str, Any]:
    """The content of a `ModelCard`, for one of the names of the model."""
    created = datetime.fromisoformat(manifest.created_at)
    created = created if created.tzinfo else created.replace(tzinfo=UTC)
    return {
        "id": name,
        "object": "model",
        "created": int(created.timestamp()),
        "owned_by": OWNER,
        "model": manifest.tag,
        "space_id": manifest.space_id,
    }


def describe_error(error: ServeError) -> dict[str, Any]:
    """What an error says besides `code` and `message`: the official clients show `type` and `param`."""
    param = error.details.get("field")
    if param is None and error.details.get("errors"):
        param = error.details["errors"][0]["field"]
    if error.status == 429:
        kind = "rate_limit_error"
    elif error.status == 401:
        kind = "authentication_error"
    else:
        kind = "server_error" if error.status >= 500 else "invalid_request_error"
    return {"type": kind, "param": param}
