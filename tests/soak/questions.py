"""Requests that must be answered, of every door and shape, each with the check of its answer."""

from __future__ import annotations

import base64
import io
import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tests.soak.client import Answer
from tests.soak.reference import Reference

INT8_COSINE = 0.999
Check = Callable[[Answer], str | None]  # says what is wrong


@dataclass(frozen=True)
class Question:
    """A request, and what must come back."""

    kind: str
    path: str
    body: Mapping[str, Any]
    check: Check
    headers: Mapping[str, str] = field(default_factory=dict)


class Questions:
    """Makes random questions about the texts of a reference."""

    def __init__(self, reference: Reference, generator: random.Random, *, max_texts: int) -> None:
        self._reference = reference
        self._random = generator
        self._max_texts = max_texts
        self._makers = {
            self._single: 30,
            self._few: 12,
            self._bulk: 8,
            self._binary: 8,
            self._similarity: 8,
            self._rank: 8,
            self._openai: 14,
            self._openai_ids: 4,
            self._predict: 6,
            self._batchable: 4,
        }

    def make(self) -> Question:
        """A question of any kind."""
        (maker,) = self._random.choices(list(self._makers), list(self._makers.values()))
        return maker()

    def make_bulk(self, most: int | None = None) -> Question:
        """A question with many texts, whose answer is long."""
        return self._encode("bulk", self._rows(most or self._max_texts, least=8))

    def _rows(self, most: int, least: int = 1) -> list[int]:
        """Some texts: often the same few, and sometimes one twice in a request."""
        pool = 30 if self._random.random() < 0.4 else len(self._reference.texts)
        return [self._random.randrange(pool) for _ in range(self._random.randint(least, most))]

    def _texts(self, rows: Sequence[int]) -> list[str]:
        return [self._reference.texts[row] for row in rows]

    def _single(self) -> Question:
        return self._encode("single", self._rows(1))

    def _few(self) -> Question:
        return self._encode("few", self._rows(6))

    def _bulk(self) -> Question:
        return self.make_bulk()

    def _encode(self, kind: str, rows: list[int]) -> Question:
        body: dict[str, Any] = {"texts": self._texts(rows)}
        encoding = self._random.choice(["float", "float", "base64"])
        dtype = self._random.choice(["float32", "float32", "float32", "float16", "int8"])
        if encoding != "float" or self._random.random() < 0.1:
            body["encoding"] = encoding
        if dtype != "float32":
            body["dtype"] = dtype
        if self._random.random() < 0.1:
            body["normalize"] = self._random.random() < 0.5

        def check(answer: Answer) -> str | None:
            content = json.loads(answer.body)
            given = content["embeddings"]
            if encoding == "base64":
                kinds = {"float32": "<f4", "float16": "<f2", "int8": "i1"}
                given = [np.frombuffer(base64.b64decode(row), kinds[dtype]) for row in given]
            return self._check_usage(rows, content["usage"]) or self._check_rows(rows, np.array(given), dtype)

        return Question(f"{kind} {encoding} {dtype}", "/encode", body, check)

    def _binary(self) -> Question:
        rows = self._rows(self._max_texts)
        media_type = self._random.choice(["application/octet-stream", "application/x-npy"])
        dtype = self._random.choice(["float32", "float16", "int8"])

        def check(answer: Answer) -> str | None:
            if answer.headers["content-type"] != media_type:
                return f"the answer is {answer.headers['content-type']}, expected {media_type}"
            shape = tuple(map(int, answer.headers["x-ekiben-shape"].split(",")))
            if media_type.endswith("npy"):
                given = np.load(io.BytesIO(answer.body), allow_pickle=False)
            else:
                given = np.frombuffer(answer.body, answer.headers["x-ekiben-dtype"]).reshape(shape)
            if given.dtype != dtype or given.shape != shape:
                return f"{given.dtype} {given.shape} does not fit the headers"
            total = sum(self._reference.tokens[row] for row in rows)
            if answer.headers["x-ekiben-total-tokens"] != str(total):
                return f"{answer.headers['x-ekiben-total-tokens']} tokens, expected {total}"
            return self._check_rows(rows, given, dtype)

        body = {"texts": self._texts(rows), "dtype": dtype}
        return Question(f"{media_type} {dtype}", "/encode", body, check, {"Accept": media_type})

    def _similarity(self) -> Question:
        a, b = self._rows(self._max_texts // 4), self._rows(self._max_texts // 4)
        pairwise = self._random.random() < 0.4
        if pairwise:
            a, b = a[: len(b)], b[: len(a)]
        vectors = self._reference.vectors

        def check(answer: Answer) -> str | None:
            content = json.loads(answer.body)
            expected = vectors[a] @ vectors[b].T
            wrong = self._check_cosines(content["similarity"], np.diag(expected) if pairwise else expected)
            usage = content["usage"]
            return wrong or self._check_usage(a, usage["a"]) or self._check_usage(b, usage["b"])

        body = {"a": self._texts(a), "b": self._texts(b), "pairwise": pairwise}
        return Question("pairs" if pairwise else "matrix", "/similarity", body, check)

    def _rank(self) -> Question:
        (query,), documents = self._rows(1), self._rows(self._max_texts // 2)
        top_k = self._random.randint(1, len(documents))
        names = [f"d{place}-{row}" for place, row in enumerate(documents)]
        expected = self._reference.vectors[documents] @ self._reference.vectors[query]

        def check(answer: Answer) -> str | None:
            results = json.loads(answer.body)["results"]
            places = [result["index"] for result in results]
            if len(set(places)) != len(places) or [result["id"] for result in results] != [names[at] for at in places]:
                return f"the places are {places}, the ids {[result['id'] for result in results]}"
            given = np.array([result["similarity"] for result in results])
            if (np.diff(given) > 0).any():
                return "the results are not in order"
            best = np.sort(expected)[::-1][:top_k]
            return self._check_cosines(given, expected[places]) or self._check_cosines(given, best)

        texts = self._texts(documents)
        body = {"query": self._texts([query])[0], "documents": texts, "ids": names, "top_k": top_k}
        return Question("rank", "/rank", body, check)

    def _openai(self) -> Question:
        rows = self._rows(8)
        texts = self._texts(rows)
        body: dict[str, Any] = {"input": texts[0] if len(rows) == 1 else texts, "model": self._reference.manifest.name}
        if packed := self._random.random() < 0.5:
            body["encoding_format"] = "base64"
        return Question("openai", "/v1/embeddings", body, lambda answer: self._check_openai(rows, answer, packed))

    def _openai_ids(self) -> Question:
        rows = self._rows(4)
        ids = [self._reference.ids[row] for row in rows]
        body = {"input": ids[0] if len(rows) == 1 else ids, "model": self._reference.manifest.tag}
        return Question("openai ids", "/v1/embeddings", body, lambda answer: self._check_openai(rows, answer, False))

    def _check_openai(self, rows: list[int], answer: Answer, packed: bool) -> str | None:
        data = json.loads(answer.body)["data"]
        if [item["index"] for item in data] != list(range(len(rows))):
            return f"the positions are {[item['index'] for item in data]}"
        given = [item["embedding"] for item in data]
        if packed:
            given = [np.frombuffer(base64.b64decode(row), "<f4") for row in given]
        return self._check_rows(rows, np.array(given), "float32")

    def _predict(self) -> Question:
        rows = self._rows(1)
        if self._random.random() < 0.5:

            def check(answer: Answer) -> str | None:
                content = json.loads(answer.body)
                wrong = self._check_rows(rows, np.array([content["embedding"]]), "float32")
                return wrong or self._check_usage(rows, content["usage"])

            return Question("predict", "/predict", {"text": self._texts(rows)[0]}, check)
        a, b = self._rows(1)[0], self._rows(1)[0]
        expected = self._reference.vectors[a] @ self._reference.vectors[b]
        text_a, text_b = self._texts([a, b])
        return Question(
            "predict pair",
            "/predict/similarity",
            {"text_a": text_a, "text_b": text_b},
            lambda answer: self._check_cosines(json.loads(answer.body)["similarity"], expected),
        )

    def _batchable(self) -> Question:
        rows = self._rows(8)
        body = {"texts": self._texts(rows)}
        return Question(
            "batchable",
            "/encode_batchable",
            body,
            lambda answer: self._check_rows(rows, np.array(json.loads(answer.body)), "float32"),
        )

    def _check_rows(self, rows: list[int], given: Any, dtype: str) -> str | None:
        least = {"min_cosine": INT8_COSINE} if dtype == "int8" else {}
        return self._reference.find_wrong_vectors(rows, given, **least)

    def _check_cosines(self, given: Any, expected: Any) -> str | None:
        given = np.asarray(given)
        if given.shape != np.shape(expected):
            return f"cosines of shape {given.shape}, expected {np.shape(expected)}"
        far = float(np.abs(given - expected).max())
        return None if far <= self._reference.slack else f"a cosine is off by {far:.6f}"

    def _check_usage(self, rows: list[int], usage: Mapping[str, Any]) -> str | None:
        tokens = [self._reference.tokens[row] for row in rows]
        cut = [place for place, row in enumerate(rows) if self._reference.truncated[row]]
        expected = {"tokens": tokens, "truncated": cut, "total_tokens": sum(tokens)}
        return None if usage == expected else f"the usage is {usage}, expected {expected}"
