"""Requests to answers: the meaning of each door, on top of one lunchbox and its batcher. No HTTP here."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from bentos.batcher import Batcher, Limits
from bentos.engine import TokenCount
from bentos.errors import NotReadyError
from bentos.lunchbox import Lunchbox
from bentos.machine import count_cores
from bentos.manifest import Manifest
from bentos.observer import Observer
from bentos.openai import EmbeddingsRequest, list_models, write_embeddings, write_model
from bentos.render import Base64Rows, convert_rows
from bentos.rules import ModelRules
from bentos.schemas import (
    DoorRequest,
    EncodeRequest,
    PredictRequest,
    PredictSimilarityRequest,
    RankRequest,
    SimilarityRequest,
)
from bentos.settings import ServeSettings
from bentos.text import apply_prompt, clean_text
from bentos.vectors import FloatArray, Vectors, cosine_matrix, cosine_pairs, truncate_dimensions

CHECK_EVERY_S = 1.0  # readiness checks in between share one result
CHECK_TIMEOUT_S = 20.0


class Encoder:
    """One lunchbox being served. `start` and `stop` run on the event loop that serves."""

    def __init__(self, box: Lunchbox, settings: ServeSettings, observer: Observer | None = None) -> None:
        self.box = box
        self.manifest: Manifest = box.manifest
        self._rules = ModelRules(box.manifest, box.engine, settings)
        self._observer = observer or Observer()
        self._batcher = Batcher(box.engine, _choose_limits(settings, box.manifest), self._observer)
        self._checking = asyncio.Lock()
        self._checked_at = float("-inf")
        self._deviation: str | None = None  # wrong vectors: nothing may be answered
        self._fault: str | None = None  # nothing can be computed, or only by some threads
        self._alteration: str | None = None  # files changed after loading: what is in memory is still right

    async def start(self) -> None:
        """Start the batcher and embed the canary texts, which also warms the model up."""
        self._batcher.start()
        await self.find_problem()

    async def stop(self) -> None:
        """Finish the batches in flight and end the threads."""
        await self._batcher.stop()

    async def encode(self, request: EncodeRequest, deadline: float | None = None) -> dict[str, Any]:
        """Answer /encode; `embeddings` is an array, or `Base64Rows`."""
        self._rules.check_model("model", request.model)
        dimensions = self._rules.check_dimensions(request.dimensions)
        prompt = self._rules.choose_prompt(request.prompt, request.prompt_text)
        vectors, tokens = await self._embed(request, [prompt], deadline)
        unit = self.manifest.normalize if request.normalize is None else request.normalize
        rows = convert_rows(_shape(vectors, dimensions, unit=unit), request.dtype)
        return {
            "embeddings": rows if request.encoding == "float" else Base64Rows(rows),
            "model": self.manifest.tag,
            "usage": describe_usage(tokens),
        }

    async def similarity(self, request: SimilarityRequest, deadline: float | None = None) -> dict[str, Any]:
        """Answer /similarity; `similarity` and `scores` are arrays."""
        self._rules.check_model("model", request.model)
        prompt = self._rules.choose_prompt(request.prompt, request.prompt_text)
        vectors, tokens = await self._embed(request, [prompt, prompt], deadline)
        rows = len(request.a)
        compare = cosine_pairs if request.pairwise else cosine_matrix
        cosines = np.ascontiguousarray(compare(vectors[:rows], vectors[rows:]))
        return {
            "similarity": cosines,
            "scores": self._score(cosines),
            "decision_threshold": self.manifest.decision_threshold,
            "model": self.manifest.tag,
            "usage": {"a": describe_usage(tokens[:rows]), "b": describe_usage(tokens[rows:])},
        }

    async def rank(self, request: RankRequest, deadline: float | None = None) -> dict[str, Any]:
        """Answer /rank: the documents most like the query first, equal ones in the order given."""
        self._rules.check_model("model", request.model)
        choose = self._rules.choose_prompt
        prompts = [
            choose(request.query_prompt, request.query_prompt_text, field="query_prompt", usual="query"),
            choose(request.document_prompt, request.document_prompt_text, field="document_prompt", usual="document"),
        ]
        vectors, tokens = await self._embed(request, prompts, deadline)
        cosines = cosine_matrix(vectors[:1], vectors[1:])[0]
        scores = self._score(cosines)
        results = []
        for index in np.argsort(-cosines, kind="stable")[: request.top_k].tolist():
            named = {} if request.ids is None else {"id": request.ids[index]}
            score = None if scores is None else scores[index]
            results.append({"index": index, **named, "similarity": cosines[index], "score": score})
        usage = {"query": describe_usage(tokens[:1]), "documents": describe_usage(tokens[1:])}
        return {"results": results, "model": self.manifest.tag, "usage": usage}

    async def predict(self, request: PredictRequest, deadline: float | None = None) -> dict[str, Any]:
        """Answer /predict; `embedding` is an array."""
        self._rules.check_model("model_version", request.model_version)
        rows, tokens = await self._embed_plainly(request, deadline)
        return {"embedding": rows[0], **self._name_version(), "usage": describe_usage(tokens)}

    async def predict_similarity(
        self, request: PredictSimilarityRequest, deadline: float | None = None
    ) -> dict[str, Any]:
        """Answer /predict/similarity."""
        self._rules.check_model("model_version", request.model_version)
        rows, tokens = await self._embed_plainly(request, deadline)
        cosines = cosine_pairs(rows[:1], rows[1:])
        scores = self._score(cosines)
        score = None if scores is None else scores[0]
        return {"similarity": cosines[0], "score": score, **self._name_version(), "usage": describe_usage(tokens)}

    async def openai_embeddings(self, request: EmbeddingsRequest, deadline: float | None = None) -> dict[str, Any]:
        """Answer /v1/embeddings."""
        self._rules.check_model("model", request.model)
        dimensions = self._rules.check_dimensions(request.dimensions)
        for field in request.text_fields():
            self._rules.check_ids(field)
        prompt = self._rules.choose_prompt(request.prompt, request.prompt_text)
        vectors, tokens = await self._embed(request, [prompt], deadline)
        rows = convert_rows(_shape(vectors, dimensions, unit=self.manifest.normalize), "float32")
        return write_embeddings(rows, tokens, self.manifest.tag, base64=request.encoding_format == "base64")

    async def embed_texts(self, texts: Sequence[str]) -> Vectors:
        """Embed texts of several callers, which were already checked: those that are too long are cut."""
        self._check_trust()
        prompt = self._rules.choose_prompt()
        embedded = await self._batcher.embed([apply_prompt(clean_text(text), prompt) for text in texts])
        self._check_trust()
        self._record(embedded.texts)
        return convert_rows(_shape(embedded.vectors, self.manifest.dim, unit=self.manifest.normalize), "float32")

    def list_models(self) -> dict[str, Any]:
        """Answer GET /v1/models."""
        return list_models(self.manifest)

    def find_model(self, name: str) -> dict[str, Any]:
        """Answer GET /v1/models/{name}.

        Raises:
            UnknownModelError: when another model is asked for.
        """
        self._rules.check_model("model", name)
        return write_model(self.manifest, name)

    def describe(self) -> dict[str, Any]:
        """Say what is served: where it comes from, and what a caller must know."""
        fields = {"version", "run_id", "space_id", "dim", "max_tokens", "normalize", "prompts", "default_prompt"}
        fields |= {"decision_threshold", "created_at"}
        own = {
            "precision": self.box.engine.precision,
            "allow_truncated_dimensions": self._rules.allows_truncated_dimensions,
        }
        return {"model": self.manifest.tag, **self.manifest.model_dump(include=fields), **own}

    def report_queues(self) -> None:
        """Tell the observer what waits now."""
        self._batcher.report_queues()

    async def find_problem(self) -> str | None:
        """Embed the canary texts by the way that every request takes, look at the files, and say what is wrong."""
        async with self._checking:
            if time.monotonic() - self._checked_at > CHECK_EVERY_S:
                self._fault = await self._ask_canary()
                self._alteration = await asyncio.to_thread(self.box.find_alteration)
                self._checked_at = time.monotonic()
        return self._deviation or self._fault or self._alteration

    async def _ask_canary(self) -> str | None:
        """Embed the canary texts and take note of how far off they are; say what kept them from being embedded."""
        try:
            deadline = time.monotonic() + CHECK_TIMEOUT_S
            embedded = await self._batcher.embed(self.box.canary.texts, urgent=True, deadline=deadline)
        except Exception as error:  # whatever it is, the server is not ready, and must say why
            return f"the canary texts cannot be embedded: {error}"
        self._deviation = self.box.find_deviation(embedded.vectors)
        if self._deviation is not None:
            self._batcher.forget()
        return self._batcher.find_problem()

    async def _embed(
        self, request: DoorRequest, prompts: Sequence[str | None], deadline: float | None
    ) -> tuple[Vectors, list[TokenCount]]:
        """Raw vectors of all texts of a request, field after field, each with its field's prompt before it."""
        self._check_trust()
        fields = list(request.text_fields())
        inputs = [
            apply_prompt(clean_text(text), prompt) if isinstance(text, str) else text
            for field, prompt in zip(fields, prompts, strict=True)
            for text in field.texts
        ]
        inspect = self._rules.make_inspection(fields, refuse_overflow=request.refuses_overflow)
        embedded = await self._batcher.embed(inputs, deadline=deadline, inspect=inspect)
        self._check_trust()
        if inspect is not None:
            inspect(embedded.texts)  # again, with those that were in the cache or under way
        self._record(embedded.texts)
        return embedded.vectors, embedded.texts

    def _record(self, counts: Sequence[TokenCount]) -> None:
        tokens = sum(count.tokens_total for count in counts)
        self._observer.record_texts(len(counts), tokens, sum(count.truncated for count in counts))

    def _check_trust(self) -> None:
        if self._deviation is not None:
            raise NotReadyError(self._deviation)

    async def _embed_plainly(self, request: DoorRequest, deadline: float | None) -> tuple[Vectors, list[TokenCount]]:
        """Finished vectors, with all that may be chosen left at its default."""
        prompts = [self._rules.choose_prompt()] * len(list(request.text_fields()))
        vectors, tokens = await self._embed(request, prompts, deadline)
        return convert_rows(_shape(vectors, self.manifest.dim, unit=self.manifest.normalize), "float32"), tokens

    def _score(self, cosines: FloatArray) -> FloatArray | None:
        """The cosines on the scale of the training labels, when the model was calibrated."""
        calibration = self.manifest.calibration
        return None if calibration is None else calibration.apply(cosines).astype(np.float32)

    def _name_version(self) -> dict[str, str]:
        return {"model": self.manifest.tag, "model_version": self.manifest.version}


def _shape(vectors: Vectors, dimensions: int, *, unit: bool) -> FloatArray:
    """The first `dimensions` of raw vectors, at length 1 when `unit`."""
    return truncate_dimensions(vectors, dimensions) if unit else vectors[:, :dimensions]


def describe_usage(tokens: Sequence[TokenCount]) -> dict[str, Any]:
    """The content of `Usage`."""
    return {
        "tokens": [text.tokens_total for text in tokens],
        "truncated": [row for row, text in enumerate(tokens) if text.truncated],
        "total_tokens": sum(text.tokens_total for text in tokens),
    }


def _choose_limits(settings: ServeSettings, manifest: Manifest) -> Limits:
    """The batcher's share of the settings; a GPU computes one batch at a time."""
    return Limits(
        threads=settings.threads or (count_cores() if settings.device == "cpu" else 1),
        max_tokens=manifest.max_tokens,
        batch_tokens=settings.batch_tokens,
        batch_texts=settings.batch_texts,
        interactive_texts=settings.interactive_texts,
        interactive_wait_s=settings.interactive_wait_s,
        queue_tokens={"interactive": settings.queue_tokens_interactive, "bulk": settings.queue_tokens_bulk},
        cache_bytes=settings.cache_mb * 2**20,
        stall_s=settings.stall_s,
    )
