"""Requests to answers: the meaning of /encode and /similarity, on top of one lunchbox and its batcher. No HTTP here."""

from __future__ import annotations

import asyncio
import base64
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from bentos.batcher import Batcher
from bentos.engine import TokenizedText
from bentos.errors import InvalidRequestError, NotReadyError, TextTooLongError, UnknownModelError
from bentos.lunchbox import Lunchbox
from bentos.manifest import Manifest
from bentos.schemas import EncodeRequest, SimilarityRequest, TextsRequest
from bentos.settings import ServeSettings
from bentos.text import apply_prompt, clean_text
from bentos.vectors import Vectors, cosine_matrix, cosine_pairs, truncate_dimensions

TURN_CHARS = 65_536  # tokenized at a stretch, tens of milliseconds; a single longer text is not divided
CHECK_EVERY_S = 1.0  # readiness checks in between share one result


class Encoder:
    """One lunchbox being served. `start` and `stop` run on the event loop that serves."""

    def __init__(self, box: Lunchbox, settings: ServeSettings) -> None:
        self.box = box
        self.manifest: Manifest = box.manifest
        self._settings = settings
        self._batcher = Batcher(
            lambda token_ids, normalize: box.engine.infer(token_ids, normalize=normalize),
            batch_tokens=settings.batch_tokens,
            queue_texts=settings.queue_texts,
        )
        self._tokenizing = ThreadPoolExecutor(max_workers=1, thread_name_prefix="ekiben-tokenize")
        self._checking = asyncio.Lock()
        self._checked_at = float("-inf")
        self._deviation: str | None = None  # wrong vectors: nothing may be answered
        self._alteration: str | None = None  # files changed after loading: what is in memory is still right

    async def start(self) -> None:
        """Start the batcher and embed the canary texts, which also warms the model up."""
        self._batcher.start()
        await self.find_problem()

    async def stop(self) -> None:
        """Finish the batch in flight and end the threads."""
        await self._batcher.stop()
        self._tokenizing.shutdown(wait=False)

    async def encode(self, request: EncodeRequest) -> dict[str, Any]:
        """Answer /encode; `embeddings` is an array or a list of base64 strings."""
        self._check_request(request)
        dimensions = self._check_dimensions(request.dimensions)
        normalize = self.manifest.normalize if request.normalize is None else request.normalize
        tokens, vectors = await self._embed(request, normalize=normalize)
        if dimensions < self.manifest.dim:
            vectors = truncate_dimensions(vectors, dimensions) if normalize else vectors[:, :dimensions]
        vectors = np.ascontiguousarray(vectors, dtype="<f4")
        embeddings = vectors if request.encoding == "float" else [base64.b64encode(row).decode() for row in vectors]
        return {"embeddings": embeddings, "model": self.manifest.tag, "usage": describe_usage(tokens)}

    async def similarity(self, request: SimilarityRequest) -> dict[str, Any]:
        """Answer /similarity; `similarity` and `scores` are arrays."""
        self._check_request(request)
        tokens, vectors = await self._embed(request, normalize=True)
        rows = len(request.a)
        compare = cosine_pairs if request.pairwise else cosine_matrix
        cosines = np.ascontiguousarray(compare(vectors[:rows], vectors[rows:]))
        calibration = self.manifest.calibration
        return {
            "similarity": cosines,
            "scores": calibration and calibration.apply(cosines).astype(np.float32),
            "decision_threshold": self.manifest.decision_threshold,
            "model": self.manifest.tag,
            "usage": {"a": describe_usage(tokens[:rows]), "b": describe_usage(tokens[rows:])},
        }

    def describe(self) -> dict[str, Any]:
        """Say what is served: where it comes from, and what a caller must know."""
        fields = {"version", "run_id", "space_id", "dim", "max_tokens", "normalize", "prompts", "default_prompt"}
        fields |= {"decision_threshold", "created_at"}
        return {"model": self.manifest.tag, **self.manifest.model_dump(include=fields)}

    async def find_problem(self) -> str | None:
        """Embed the canary texts by the way that every request takes, look at the files, and say what is wrong."""
        async with self._checking:
            if time.monotonic() - self._checked_at > CHECK_EVERY_S:
                self._deviation = await self._find_deviation()
                self._alteration = await asyncio.to_thread(self.box.find_alteration)
                self._checked_at = time.monotonic()
        return self._deviation or self._alteration

    async def _find_deviation(self) -> str | None:
        try:
            tokens = await self._tokenize(self.box.canary.texts)
            vectors = await self._batcher.submit(
                [text.ids for text in tokens], normalize=self.manifest.normalize, urgent=True
            )
        except Exception as error:  # whatever it is, the server is not ready, and must say why
            return f"the canary texts cannot be embedded: {error}"
        return self.box.find_deviation(vectors)

    async def _embed(self, request: TextsRequest, *, normalize: bool) -> tuple[list[TokenizedText], Vectors]:
        """Embed all texts of a request, field after field."""
        prompt = self._choose_prompt(request)
        named = [(name, row, text) for name, texts in request.named_texts() for row, text in enumerate(texts)]
        with self._batcher.reserve(len(named)):
            tokens = await self._tokenize([apply_prompt(clean_text(text), prompt) for _, _, text in named])
        if request.on_overflow == "error":
            for (name, row, _), text in zip(named, tokens, strict=True):
                if text.truncated:
                    raise TextTooLongError(
                        f"`{name}[{row}]` has {text.tokens_total} tokens; the model takes {self.manifest.max_tokens}. "
                        "Shorten or split it, or set `on_overflow` to `truncate`",
                        field=f"{name}[{row}]",
                        found=text.tokens_total,
                        limit=self.manifest.max_tokens,
                    )
        return tokens, await self._batcher.submit([text.ids for text in tokens], normalize=normalize)

    async def _tokenize(self, texts: Sequence[str]) -> list[TokenizedText]:
        """Tokenize in turns of bounded size: a request of megabytes must not make the short ones wait for seconds."""
        loop = asyncio.get_running_loop()
        tokens: list[TokenizedText] = []
        for turn in _take_turns(texts):
            tokens += await loop.run_in_executor(self._tokenizing, self.box.engine.tokenize, turn)
        return tokens

    def _check_request(self, request: TextsRequest) -> None:
        if self._deviation is not None:
            raise NotReadyError(self._deviation)
        manifest = self.manifest
        names = [manifest.tag, manifest.bento_version, manifest.version, f"v{manifest.version}", manifest.run_id]
        if request.model is not None and request.model not in [manifest.name, *names]:
            raise UnknownModelError(
                f"`model` is {request.model!r}, but {manifest.tag} is served here; "
                f"leave `model` out, or name it {' or '.join(map(repr, [manifest.name, *names]))}",
                field="model",
            )

    def _check_dimensions(self, dimensions: int | None) -> int:
        full = self.manifest.dim
        if dimensions is None or dimensions == full:
            return full
        if not self._settings.allow_truncated_dimensions:
            raise InvalidRequestError(
                f"`dimensions` is {dimensions}; this model has {full} and was not declared to be trained for fewer. "
                "Leave `dimensions` out, or set EKIBEN_ALLOW_TRUNCATED_DIMENSIONS=true on the server if it was",
                field="dimensions",
            )
        if dimensions > full:
            raise InvalidRequestError(f"`dimensions` is {dimensions}; 1 to {full} are allowed", field="dimensions")
        return dimensions

    def _choose_prompt(self, request: TextsRequest) -> str | None:
        """The literal one, else the named one, else the model's default."""
        if request.prompt_text is not None:
            return request.prompt_text
        name = request.prompt if request.prompt is not None else self.manifest.default_prompt
        if name is None:
            return None
        if name not in self.manifest.prompts:
            known = ", ".join(map(repr, self.manifest.prompts)) or "none"
            raise InvalidRequestError(
                f"`prompt` is {name!r}; the model's prompts are: {known}. Name one of them, or give the text itself as "
                "`prompt_text`",
                field="prompt",
            )
        return self.manifest.prompts[name]


def _take_turns(texts: Sequence[str]) -> Iterator[list[str]]:
    turn: list[str] = []
    chars = 0
    for text in texts:
        if turn and chars + len(text) > TURN_CHARS:
            yield turn
            turn, chars = [], 0
        turn.append(text)
        chars += len(text)
    if turn:
        yield turn


def describe_usage(tokens: Sequence[TokenizedText]) -> dict[str, Any]:
    """The content of `Usage`."""
    return {
        "tokens": [text.tokens_total for text in tokens],
        "truncated": [row for row, text in enumerate(tokens) if text.truncated],
        "total_tokens": sum(text.tokens_total for text in tokens),
    }
