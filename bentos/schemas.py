"""What the routes take and give: request and response models. OpenAI's are in openai.py; bodies are read by parsing.py.

A field's description is all that callers learn about it from the OpenAPI page. Keys that begin with `x-` in a field's
schema are for apidoc.py, which puts there what depends on settings and model, and for no one else.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, RootModel, WithJsonSchema
from pydantic.config import JsonDict

from bentos.errors import InvalidRequestError

# BentoML's client takes the first of several schemas for the only one: it would take a string apart into letters. So it
# is shown a single loose one; the true ones, under `x-any-of`, are for the OpenAPI document.
NUMBERS, STRINGS = {"type": "array", "items": {"type": "number"}}, {"type": "array", "items": {"type": "string"}}
TABLE = {"type": "array", "items": NUMBERS}
VECTORS = WithJsonSchema({"type": "array", "items": {}, "x-any-of": [TABLE, STRINGS]})
COSINES = WithJsonSchema({"type": "array", "items": {}, "x-any-of": [TABLE, NUMBERS]})
SCORES = WithJsonSchema({"nullable": True, "x-any-of": [TABLE, NUMBERS, {"type": "null"}]})
ANY_NUMBER = WithJsonSchema({"nullable": True, "x-any-of": [{"type": "number"}, {"type": "null"}]})

Text = Annotated[str, Field(json_schema_extra={"x-limit": "text"})]
Texts = Annotated[list[Text], Field(min_length=1, json_schema_extra={"x-limit": "texts"})]
PROMPT: JsonDict = {"x-limit": "prompt"}
PROMPT_TEXT: JsonDict = {"x-limit": "prompt_text"}


def _read_whole(value: Any) -> Any:
    """To JSON Schema `8.0` is an integer."""
    return int(value) if type(value) is float and value.is_integer() else value


Count = Annotated[int, Field(ge=1), BeforeValidator(_read_whole)]


@dataclass(frozen=True, slots=True)
class TextField:
    """The texts of one field of a request, or lists of token ids in their place."""

    name: str
    texts: Sequence[str | Sequence[int]]
    is_list: bool = True

    def label(self, row: int) -> str:
        """How messages name one of the texts: `texts[3]`, or `query` for a field that holds a single one."""
        return f"{self.name}[{row}]" if self.is_list else self.name


class DoorRequest(BaseModel):
    """What all requests have in common: unknown fields are refused, nothing is converted."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, protected_namespaces=())
    alternatives: ClassVar[tuple[tuple[str, str], ...]] = ()  # pairs of which one may be given: a name and a literal

    def text_fields(self) -> Iterator[TextField]:
        """Every field that holds texts to embed."""
        raise NotImplementedError

    @property
    def refuses_overflow(self) -> bool:
        """Whether a text longer than the model takes is an error."""
        return False

    def literal_prompts(self) -> Iterator[tuple[str, str | None]]:
        """Every prompt that is given as a text, with its field's name."""
        for _, literal in self.alternatives:
            yield literal, getattr(self, literal)

    def find_conflict(self) -> InvalidRequestError | None:
        """Find what no single field shows: fields that contradict each other."""
        for name, literal in self.alternatives:
            if getattr(self, name) is not None and getattr(self, literal) is not None:
                return InvalidRequestError(f"`{name}` and `{literal}` are both given; give one", field=literal)
        return None


class TextsRequest(DoorRequest):
    """A request that may name its model and say what becomes of texts that are too long."""

    on_overflow: Literal["truncate", "error"] = Field(
        "truncate", description="What to do with a text longer than the model takes: cut its end off, or answer 422."
    )
    model: str | None = Field(
        None,
        description="Refuse to answer (404) unless this is the model served: its tag, name, version or run.",
        json_schema_extra={"x-limit": "model"},
    )

    @property
    def refuses_overflow(self) -> bool:
        """Whether a text longer than the model takes is an error."""
        return self.on_overflow == "error"


class PromptedRequest(TextsRequest):
    """A request whose texts all get the same prompt."""

    alternatives = (("prompt", "prompt_text"),)
    prompt: str | None = Field(
        None,
        description="Name of one of the model's prompts, put before each text. Default: the model's default, if any.",
        json_schema_extra=PROMPT,
    )
    prompt_text: str | None = Field(
        None,
        description="Literal text put before each text instead; an empty one switches the default prompt off.",
        json_schema_extra=PROMPT_TEXT,
    )


class EncodeRequest(PromptedRequest):
    """Texts to embed."""

    texts: Texts = Field(description="The texts, in any language the model knows.")
    normalize: bool | None = Field(
        None, description="Whether vectors have length 1. Default: as the model was trained."
    )
    dimensions: Count | None = Field(
        None,
        description="Keep the first dimensions only; refused unless the model was trained for it.",
        json_schema_extra={"x-limit": "dimensions"},
    )
    dtype: Literal["float32", "float16", "int8"] = Field(
        "float32",
        description="Kind of numbers. `int8`: each vector is scaled so that its largest component is 127; cosines stay "
        "(within a hundredth), lengths do not.",
    )
    encoding: Literal["float", "base64"] = Field(
        "float",
        description="`float`: lists of numbers. `base64`: the little-endian bytes of the vector, less than half the "
        "size. Binary answers (`Accept: application/octet-stream`, `application/x-npy`) have no encoding.",
    )

    def text_fields(self) -> Iterator[TextField]:
        """Every field that holds texts to embed."""
        yield TextField("texts", self.texts)


class BatchableRequest(DoorRequest):
    """Texts to embed by BentoML's own adaptive batching."""

    texts: Texts = Field(description="The texts; the model's default prompt is put before each.")

    def text_fields(self) -> Iterator[TextField]:
        """Every field that holds texts to embed."""
        yield TextField("texts", self.texts)


class SimilarityRequest(PromptedRequest):
    """Texts to compare."""

    a: Texts = Field(description="Texts; one row of the matrix each.")
    b: Texts = Field(description="Texts; one column of the matrix each.")
    pairwise: bool = Field(False, description="Compare only a[i] with b[i]; then both lists have the same length.")

    def text_fields(self) -> Iterator[TextField]:
        """Every field that holds texts to embed."""
        yield TextField("a", self.a)
        yield TextField("b", self.b)

    def find_conflict(self) -> InvalidRequestError | None:
        """Find what no single field shows: fields that contradict each other."""
        if self.pairwise and len(self.a) != len(self.b):
            return InvalidRequestError(
                f"`a` has {len(self.a)} texts and `b` has {len(self.b)}; with `pairwise` both must have as many",
                field="b",
            )
        return super().find_conflict()


class RankRequest(TextsRequest):
    """A query, and the documents to put in order of likeness to it."""

    alternatives = (("query_prompt", "query_prompt_text"), ("document_prompt", "document_prompt_text"))
    query: Text = Field(description="What is looked for.")
    documents: Texts = Field(description="What is looked at.")
    ids: list[str | int] | None = Field(
        None, description="Your names of the documents, as many as documents; each result carries its own back."
    )
    top_k: Count | None = Field(None, description="How many results at most. Default: all documents.")
    query_prompt: str | None = Field(
        None,
        description="Name of the prompt put before the query. Default: the model's prompt `query`, else its default.",
        json_schema_extra=PROMPT,
    )
    query_prompt_text: str | None = Field(
        None, description="Literal text put before the query instead; may be empty.", json_schema_extra=PROMPT_TEXT
    )
    document_prompt: str | None = Field(
        None,
        description="Name of the prompt put before each document. Default: the model's prompt `document`, else its "
        "default.",
        json_schema_extra=PROMPT,
    )
    document_prompt_text: str | None = Field(
        None,
        description="Literal text put before each document instead; may be empty.",
        json_schema_extra=PROMPT_TEXT,
    )

    def text_fields(self) -> Iterator[TextField]:
        """Every field that holds texts to embed."""
        yield TextField("query", [self.query], is_list=False)
        yield TextField("documents", self.documents)

    def find_conflict(self) -> InvalidRequestError | None:
        """Find what no single field shows: fields that contradict each other."""
        if self.ids is not None and len(self.ids) != len(self.documents):
            return InvalidRequestError(
                f"`ids` has {len(self.ids)} items and `documents` has {len(self.documents)}; give one id a document, "
                "or leave `ids` out",
                field="ids",
            )
        return super().find_conflict()


class VersionedRequest(DoorRequest):
    """A request that may name the version it expects."""

    model_version: str | None = Field(
        None,
        description="Refuse to answer (404) unless this is the version served: `3`, `v3`, its run or its tag.",
        json_schema_extra={"x-limit": "model"},
    )


class PredictRequest(VersionedRequest):
    """One text to embed."""

    text: Text = Field(description="The text; the model's default prompt is put before it.")

    def text_fields(self) -> Iterator[TextField]:
        """Every field that holds texts to embed."""
        yield TextField("text", [self.text], is_list=False)


class PredictSimilarityRequest(VersionedRequest):
    """Two texts to compare."""

    text_a: Text = Field(description="One text; the model's default prompt is put before it.")
    text_b: Text = Field(description="The other, likewise.")

    def text_fields(self) -> Iterator[TextField]:
        """Every field that holds texts to embed."""
        yield TextField("text_a", [self.text_a], is_list=False)
        yield TextField("text_b", [self.text_b], is_list=False)


class Usage(BaseModel):
    """What the texts cost, and what was lost."""

    tokens: list[int] = Field(description="Tokens of each text before any cut, special tokens and prompt included.")
    truncated: list[int] = Field(description="Positions of the texts whose end was cut off.")
    total_tokens: int = Field(description="Sum of `tokens`.")


class Answer(BaseModel):
    """What all answers have in common."""

    model_config = ConfigDict(protected_namespaces=())

    model: str = Field(description="Tag of the model that made the vectors, e.g. `ekiben:3-1f2e3d4c`.")


class EncodeResponse(Answer):
    """The vectors, in the order of the texts."""

    embeddings: Annotated[list[list[float]] | list[str], VECTORS] = Field(
        description="A list of numbers a text, or a base64 string a text."
    )
    usage: Usage


class SimilarityResponse(Answer):
    """How alike the texts are."""

    similarity: Annotated[list[list[float]] | list[float], COSINES] = Field(
        description="Cosines in -1..1: a matrix, or a list when pairwise."
    )
    scores: Annotated[list[list[float]] | list[float] | None, SCORES] = Field(
        description="The same on the scale of the training labels, 0..1; null when the model was not calibrated."
    )
    decision_threshold: Annotated[float | None, ANY_NUMBER] = Field(
        description="Cosine at or above which two texts count as similar; null when the model has none."
    )
    usage: dict[Literal["a", "b"], Usage]


class RankedDocument(BaseModel):
    """One document in its place."""

    index: int = Field(description="Position in `documents`.")
    id: Any = Field(
        None,
        description="Its own of the `ids`; absent when none were given.",
        json_schema_extra={"x-any-of": [{"type": "string"}, {"type": "integer"}]},
    )
    similarity: float = Field(description="Cosine with the query, -1..1.")
    score: Annotated[float | None, ANY_NUMBER] = Field(
        description="The same on the scale of the training labels, 0..1; null when the model was not calibrated."
    )


class RankResponse(Answer):
    """The documents, most alike first; equal ones in the order given."""

    results: list[RankedDocument]
    usage: dict[Literal["query", "documents"], Usage]


class PredictResponse(Answer):
    """The vector of one text."""

    embedding: list[float]
    model_version: str = Field(description="Version in the model registry, e.g. `3`.")
    usage: Usage


class PredictSimilarityResponse(Answer):
    """How alike two texts are."""

    similarity: float = Field(description="Cosine, -1..1.")
    score: Annotated[float | None, ANY_NUMBER] = Field(
        description="The same on the scale of the training labels, 0..1; null when the model was not calibrated."
    )
    model_version: str = Field(description="Version in the model registry, e.g. `3`.")
    usage: Usage


class VectorList(RootModel[list[list[float]]]):
    """One vector a text, in the order given."""


class Problem(BaseModel):
    """Why the server is not ready."""

    code: str
    message: str


class HealthResponse(BaseModel):
    """What is served, and whether it may be trusted; only `status` and `error` are there while no model is loaded."""

    model_config = ConfigDict(extra="allow", protected_namespaces=())

    status: Literal["ok", "unavailable"]
    error: Annotated[Problem, Field(description="Why it is unavailable.")] | None = None
    model: str = Field("", description="Tag of the model served.")
    version: str = Field("", description="Its version in the model registry.")
    run_id: str = Field("", description="The run that trained it.")
    space_id: str = Field("", description="Vectors may be compared only when it is equal.")
    precision: str = Field("", description="Which of the model's precisions computes, such as `fp32` or `int8`.")
    dim: int = Field(0, description="Dimensions of a vector.")
    max_tokens: int = Field(0, description="Tokens of a text that the model sees; the rest is cut off.")
