"""What the routes give: models of answers. OpenAI's are in openai.py. They describe; encoder.py and render.py write.

Keys that begin with `x-` in a field's schema are for apidoc.py, and for no one else.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, RootModel, WithJsonSchema

# BentoML's client takes the first of several schemas for the only one: it would take a string apart into letters. So it
# is shown a single loose one; the true ones, under `x-any-of`, are for the OpenAPI document.
NUMBERS, STRINGS = {"type": "array", "items": {"type": "number"}}, {"type": "array", "items": {"type": "string"}}
TABLE = {"type": "array", "items": NUMBERS}
VECTORS = WithJsonSchema({"type": "array", "items": {}, "x-any-of": [TABLE, STRINGS]})
COSINES = WithJsonSchema({"type": "array", "items": {}, "x-any-of": [TABLE, NUMBERS]})
SCORES = WithJsonSchema({"nullable": True, "x-any-of": [TABLE, NUMBERS, {"type": "null"}]})
ANY_NUMBER = WithJsonSchema({"nullable": True, "x-any-of": [{"type": "number"}, {"type": "null"}]})


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
    nested_dims: list[int] = Field([], description="Smaller numbers of dimensions that requests may ask for.")
    spaces: list[str] = Field([], description="Spaces that it answers in, its own first; see `space` of /encode.")


class Workers(BaseModel):
    """The processes of the server, by their ids, and how far each is with a version."""

    model_config = ConfigDict(extra="allow")

    done: list[int] = Field(description="Those that have it.")
    failed: dict[str, str] = Field(description="Those that refused it, and why.")
    missing: list[int] = Field(description="Those that did not say in time.")


class LoadResponse(BaseModel):
    """A version that every worker has."""

    model_config = ConfigDict(extra="allow", protected_namespaces=())

    model: str = Field(description="Its tag.")
    live: bool = Field(description="Whether it is the live version now; else it stands beside it.")
    workers: Workers


class ModelsInfoResponse(BaseModel):
    """What is loaded, followed, refused and shadowed, as the worker that answers sees it."""

    model_config = ConfigDict(extra="allow", protected_namespaces=())

    live: str | None = Field(description="Tag of the version that answers requests that name none.")
    models: list[dict[str, Any]] = Field(description="Every version in memory: names, space, maps, memory, requests.")
    following: dict[str, Any] | None = Field(description="The alias that is followed, and what the last look found.")
    refused: list[dict[str, Any]] = Field(description="Versions that failed their checks, and why.")
    shadow: dict[str, Any] | None = Field(
        None, description="How far the version of EKIBEN_SHADOW is from the live one on the texts asked; else null."
    )
