"""The doors: every POST route that takes texts, in one table that HTTP, the service and the OpenAPI document share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from bentos.answers import (
    EncodeResponse,
    PredictResponse,
    PredictSimilarityResponse,
    RankResponse,
    SimilarityResponse,
    VectorList,
)
from bentos.openai import EmbeddingsRequest, EmbeddingsResponse
from bentos.render import JSON, VECTOR_TYPES
from bentos.schemas import (
    BatchableRequest,
    DoorRequest,
    EncodeRequest,
    PredictRequest,
    PredictSimilarityRequest,
    RankRequest,
    SimilarityRequest,
)


@dataclass(frozen=True)
class Door:
    """One route: what it takes, who answers, what it gives."""

    path: str
    request: type[DoorRequest]
    response: type[BaseModel]
    method: str | None  # of the encoder; None: BentoML calls the service itself, after its own batching
    summary: str
    description: str
    example: Mapping[str, Any]  # a good body
    offered: tuple[str, ...] = (JSON,)  # media types of the answer; the first one unless `Accept` says otherwise

    @property
    def names_model(self) -> bool:
        """Whether a request may say which model it expects."""
        return bool({"model", "model_version"} & set(self.request.model_fields))


DOORS = (
    Door(
        "/encode",
        EncodeRequest,
        EncodeResponse,
        "encode",
        "Embed texts",
        "One vector a text, in the order given. With `Accept: application/octet-stream` the bare rows, with "
        "`Accept: application/x-npy` a file that `numpy.load` reads: smaller and faster for bulk work.",
        {"texts": ["fresh bread", "a slow train"]},
        VECTOR_TYPES,
    ),
    Door(
        "/similarity",
        SimilarityRequest,
        SimilarityResponse,
        "similarity",
        "Compare texts",
        "Every text of `a` with every text of `b`, or pair by pair: cosines, and scores when the model was calibrated.",
        {"a": ["fresh bread"], "b": ["warm rolls", "a slow train"]},
    ),
    Door(
        "/rank",
        RankRequest,
        RankResponse,
        "rank",
        "Put documents in order of likeness to a query",
        "The documents most like the query first, equal ones in the order given.",
        {"query": "something to eat", "documents": ["a slow train", "fresh bread"], "top_k": 1},
    ),
    Door(
        "/v1/embeddings",
        EmbeddingsRequest,
        EmbeddingsResponse,
        "openai_embeddings",
        "Embed texts, in OpenAI's shape",
        "For the `openai` client and all that is built on it. Beyond OpenAI's fields it takes `prompt`, `prompt_text` "
        "and `on_overflow`.",
        {"input": ["fresh bread", "a slow train"], "model": "ekiben"},
    ),
    Door(
        "/predict",
        PredictRequest,
        PredictResponse,
        "predict",
        "Embed one text",
        "The vector of one text, as the model was trained to give it.",
        {"text": "fresh bread"},
    ),
    Door(
        "/predict/similarity",
        PredictSimilarityRequest,
        PredictSimilarityResponse,
        "predict_similarity",
        "Compare two texts",
        "The cosine of two texts, and their score when the model was calibrated.",
        {"text_a": "fresh bread", "text_b": "warm rolls"},
    ),
    Door(
        "/encode_batchable",
        BatchableRequest,
        VectorList,
        None,
        "Embed texts by BentoML's adaptive batching",
        "The same vectors by the way that BentoML has built in, for comparison; /encode is faster and takes options.",
        {"texts": ["fresh bread", "a slow train"]},
    ),
)
DOORS_BY_PATH = {door.path: door for door in DOORS}
