"""Requests to answers: the meaning of each door, on top of one lunchbox and its batcher. No HTTP here."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from bentos.adapter import Adapter
from bentos.batcher import Batcher, Input, Limits
from bentos.engine import TokenCount
from bentos.errors import NotReadyError
from bentos.lunchbox import Lunchbox
from bentos.machine import count_cores
from bentos.manifest import Manifest
from bentos.observer import Observer
from bentos.openai import EmbeddingsRequest, write_embeddings
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
from bentos.spaces import choose_adapter, list_spaces
from bentos.text import apply_prompt, clean_text
from bentos.vectors import FloatArray, Vectors, cosine_matrix, cosine_pairs, truncate_dimensions

CHECK_EVERY_S = 1.0  # readiness checks in between share one result
CHECK_TIMEOUT_S = 20.0

Watch = Callable[[DoorRequest, Vectors], None]  # shown the raw vectors of a request's texts; must neither fail nor wait


class Encoder:
    """One lunchbox being served. `start` and `stop` run on the event loop that serves."""

    def __init__(self, box: Lunchbox, settings: ServeSettings, observer: Observer | None = None) -> None:
        self.box = box
        self.manifest: Manifest = box.manifest
        self.tag = box.manifest.tag
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

    async def warm_up(self, rounds: int) -> None:
        """Embed the canary texts so often: the first batches are slow, and the lanes learn their speed from them."""
        for _ in range(rounds):
            await self._ask_canary()

    async def stop(self) -> None:
        """Finish the batches in flight and end the threads."""
        await self._batcher.stop()

    async def encode(
        self, request: EncodeRequest, deadline: float | None = None, watch: Watch | None = None
    ) -> dict[str, Any]:
        """Answer /encode; `embeddings` is an array, or `Base64Rows`."""
        adapter = self.find_adapter(request)
        dimensions = self._rules.check_dimensions(request.dimensions, adapter)
        unit = self._rules.check_normalize(request.normalize, adapter)
        vectors, tokens = await self._embed(request, deadline, watch)
        rows = convert_rows(_shape(vectors, dimensions, unit=unit, adapter=adapter), request.dtype)
        return {
            "embeddings": rows if request.encoding == "float" else Base64Rows(rows),
            "model": self.tag,
            "usage": describe_usage(tokens),
        }

    async def similarity(
        self, request: SimilarityRequest, deadline: float | None = None, watch: Watch | None = None
    ) -> dict[str, Any]:
        """Answer /similarity; `similarity` and `scores` are arrays."""
        vectors, tokens = await self._embed(request, deadline, watch)
        rows = len(request.a)
        compare = cosine_pairs if request.pairwise else cosine_matrix
        cosines = np.ascontiguousarray(compare(vectors[:rows], vectors[rows:]))
        return {
            "similarity": cosines,
            "scores": self._score(cosines),
            "decision_threshold": self.manifest.decision_threshold,
            "model": self.tag,
            "usage": {"a": describe_usage(tokens[:rows]), "b": describe_usage(tokens[rows:])},
        }

    async def rank(
        self, request: RankRequest, deadline: float | None = None, watch: Watch | None = None
    ) -> dict[str, Any]:
        """Answer /rank: the documents most like the query first, equal ones in the order given."""
        vectors, tokens = await self._embed(request, deadline, watch)
        cosines = cosine_matrix(vectors[:1], vectors[1:])[0]
        scores = self._score(cosines)
        results = []
        for index in np.argsort(-cosines, kind="stable")[: request.top_k].tolist():
            named = {} if request.ids is None else {"id": request.ids[index]}
            score = None if scores is None else scores[index]
            results.append({"index": index, **named, "similarity": cosines[index], "score": score})
        usage = {"query": describe_usage(tokens[:1]), "documents": describe_usage(tokens[1:])}
        return {"results": results, "model": self.tag, "usage": usage}

    async def predict(
        self, request: PredictRequest, deadline: float | None = None, watch: Watch | None = None
    ) -> dict[str, Any]:
        """Answer /predict; `embedding` is an array."""
        adapter = self.find_adapter(request)
        vectors, tokens = await self._embed(request, deadline, watch)
        (row,) = self._finish(vectors, adapter)
        return {"embedding": row, **self._name_version(), "usage": describe_usage(tokens)}

    async def predict_similarity(
        self, request: PredictSimilarityRequest, deadline: float | None = None, watch: Watch | None = None
    ) -> dict[str, Any]:
        """Answer /predict/similarity."""
        vectors, tokens = await self._embed(request, deadline, watch)
        rows = self._finish(vectors)
        cosines = cosine_pairs(rows[:1], rows[1:])
        scores = self._score(cosines)
        score = None if scores is None else scores[0]
        return {"similarity": cosines[0], "score": score, **self._name_version(), "usage": describe_usage(tokens)}

    async def openai_embeddings(
        self, request: EmbeddingsRequest, deadline: float | None = None, watch: Watch | None = None
    ) -> dict[str, Any]:
        """Answer /v1/embeddings."""
        adapter = self.find_adapter(request)
        dimensions = self._rules.check_dimensions(request.dimensions, adapter)
        for field in request.text_fields():
            self._rules.check_ids(field)
        vectors, tokens = await self._embed(request, deadline, watch)
        rows = convert_rows(_shape(vectors, dimensions, unit=self.manifest.normalize, adapter=adapter), "float32")
        return write_embeddings(rows, tokens, self.tag, base64=request.encoding_format == "base64")

    async def embed_texts(self, texts: Sequence[str]) -> Vectors:
        """Embed texts of several callers, which were already checked: those that are too long are cut."""
        self._check_trust()
        prompt = self._rules.choose_prompt()
        embedded = await self._batcher.embed([apply_prompt(clean_text(text), prompt) for text in texts])
        self._check_trust()
        self._record(embedded.texts)
        return self._finish(embedded.vectors)

    async def embed_aside(self, request: DoorRequest, rows: Sequence[int]) -> Vectors:
        """Raw vectors of some texts of another model's request, by the bulk lane and uncounted; see shadow.py.

        Args:
            request: any door's; its texts get this model's prompts.
            rows: positions among all of its texts, field after field.

        Raises:
            ServeError: when this model has no prompt that is asked for, or no room.
        """
        self._check_trust()
        inputs = self._prepare(request)
        embedded = await self._batcher.embed([inputs[row] for row in rows], lane="bulk")
        self._check_trust()
        return embedded.vectors

    def find_adapter(self, request: DoorRequest) -> Adapter | None:
        """The map into the space that a request asks for; None when it is the model's own.

        Raises:
            SpaceMismatchError: when this model cannot answer in that space.
        """
        return None if request.asked_space is None else choose_adapter(self.box, request)

    @property
    def waiting_texts(self) -> int:
        """Texts that wait to be computed."""
        return self._batcher.waiting_texts

    def describe(self) -> dict[str, Any]:
        """Say what is served: where it comes from, and what a caller must know."""
        fields = {"version", "run_id", "space_id", "dim", "max_tokens", "normalize", "prompts", "default_prompt"}
        fields |= {"decision_threshold", "created_at", "nested_dims"}
        own = {
            "precision": self.box.engine.precision,
            "allow_truncated_dimensions": self._rules.allows_truncated_dimensions,
            "spaces": list_spaces(self.box),
        }
        return {"model": self.tag, **self.manifest.model_dump(include=fields), **own}

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
        self, request: DoorRequest, deadline: float | None, watch: Watch | None
    ) -> tuple[Vectors, list[TokenCount]]:
        """Raw vectors of all texts of a request, field after field, each with its field's prompt before it."""
        self._check_trust()
        inputs = self._prepare(request)
        inspect = self._rules.make_inspection(list(request.text_fields()), refuse_overflow=request.refuses_overflow)
        embedded = await self._batcher.embed(inputs, deadline=deadline, inspect=inspect)
        self._check_trust()
        if inspect is not None:
            inspect(embedded.texts)  # again, with those that were in the cache or under way
        self._record(embedded.texts)
        if watch is not None:
            watch(request, embedded.vectors)
        return embedded.vectors, embedded.texts

    def _prepare(self, request: DoorRequest) -> list[Input]:
        """Every text of a request as the model takes it, or its token ids."""
        return [
            apply_prompt(clean_text(text), prompt) if isinstance(text, str) else text
            for field, prompt in zip(request.text_fields(), self._rules.choose_prompts(request), strict=True)
            for text in field.texts
        ]

    def _record(self, counts: Sequence[TokenCount]) -> None:
        tokens = sum(count.tokens_total for count in counts)
        self._observer.record_texts(len(counts), tokens, sum(count.truncated for count in counts))

    def _check_trust(self) -> None:
        if self._deviation is not None:
            raise NotReadyError(self._deviation)

    def _finish(self, vectors: Vectors, adapter: Adapter | None = None) -> FloatArray:
        """Vectors as they are given when nothing is asked of them but, perhaps, another space."""
        shaped = _shape(vectors, self.manifest.dim, unit=self.manifest.normalize, adapter=adapter)
        rows: FloatArray = convert_rows(shaped, "float32")
        return rows

    def _score(self, cosines: FloatArray) -> FloatArray | None:
        """The cosines on the scale of the training labels, when the model was calibrated."""
        calibration = self.manifest.calibration
        return None if calibration is None else calibration.apply(cosines).astype(np.float32)

    def _name_version(self) -> dict[str, str]:
        return {"model": self.tag, "model_version": self.manifest.version}


def _shape(vectors: Vectors, dimensions: int, *, unit: bool, adapter: Adapter | None = None) -> FloatArray:
    """The first `dimensions` of raw vectors, at length 1 when `unit`; or all of them, mapped, at length 1."""
    if adapter is not None:
        return adapter.apply(vectors)
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
