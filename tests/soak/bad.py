"""Requests that must be refused, each with the statuses that it may get."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tests.soak.client import render_request

JSON = {"Content-Type": "application/json"}
UNKNOWN_KEY = {"Authorization": "Bearer not-a-key-of-this-server-0123"}


@dataclass(frozen=True)
class Refusal:
    """A request in bytes, and what must come of it."""

    kind: str
    request: bytes
    statuses: tuple[int, ...]
    is_http: bool = True  # else its answer may lack our headers


def _post(path: str, content: Any, headers: Mapping[str, str]) -> bytes:
    body = content if isinstance(content, bytes) else json.dumps(content).encode()
    return render_request("POST", path, body, {**JSON, **headers})


def make_refusals(
    key: Mapping[str, str], request_id: str, *, max_texts: int, max_chars: int, max_bytes: int, dim: int
) -> list[Refusal]:
    """Every kind of bad request once.

    Args:
        key: the header that shows the key, or nothing.
        request_id: for `X-Request-Id`.
        max_texts: limit of the server, like the next two.
        max_chars: likewise.
        max_bytes: likewise.
        dim: dimensions of the model.
    """
    own = {**key, "X-Request-Id": request_id}
    encode: list[tuple[str, Any, int]] = [
        ("not JSON", b"texts=a", 400),
        ("empty body", b"", 400),
        ("half a body of JSON", b'{"texts": ["a', 400),
        ("deep nesting", b"[" * 3000, 400),
        ("not UTF-8", '{"texts": ["é"]}'.encode("latin-1"), 400),
        ("lone surrogate", rb'{"texts": ["a\ud800"]}', 400),
        ("null byte", rb'{"texts": ["a\u0000b"]}', 422),
        ("array", ["a"], 422),
        ("no texts", {}, 422),
        ("empty list", {"texts": []}, 422),
        ("blank text", {"texts": ["a", " \n"]}, 422),
        ("a number", {"texts": ["a", 7]}, 422),
        ("unknown field", {"texts": ["a"], "text": "b"}, 422),
        ("unknown prompt", {"texts": ["a"], "prompt": "no such prompt"}, 422),
        ("too few dimensions", {"texts": ["a"], "dimensions": dim - 1}, 422),
        ("a text that overflows", {"texts": ["bread " * (max_chars // 6)], "on_overflow": "error"}, 422),
        ("too many texts", {"texts": ["a"] * (max_texts + 1)}, 413),
        ("too long text", {"texts": ["a" * (max_chars + 1)]}, 413),
        ("too large body", b" " * (max_bytes + 1), 413),
        ("huge body", b" " * (max_bytes * 5), 413),
        ("another model", {"texts": ["a"], "model": "another"}, 404),
    ]
    refusals = [Refusal(kind, _post("/encode", content, own), (status,)) for kind, content, status in encode]
    good = {"texts": ["bread"]}
    with_headers: list[tuple[str, dict[str, str], int]] = [
        ("form", {"Content-Type": "application/x-www-form-urlencoded"}, 415),
        ("compressed", {"Content-Encoding": "gzip"}, 415),
        ("not acceptable", {"Accept": "text/csv"}, 406),
        ("another space", {"X-Ekiben-Expect-Space": "0" * 16}, 409),
        ("no time", {"X-Ekiben-Timeout-Ms": "0"}, 422),
        ("unknown key", UNKNOWN_KEY, 401 if key else 200),
    ]
    refusals += [Refusal(kind, _post("/encode", good, own | more), (status,)) for kind, more, status in with_headers]
    refusals += [
        Refusal("no key", _post("/encode", good, {"X-Request-Id": request_id}), (401 if key else 200,)),
        Refusal("unknown route", render_request("GET", "/wp-login.php", headers=own), (404,)),
        Refusal("wrong method", render_request("DELETE", "/encode", headers=own), (405,)),
        Refusal("ids of another tokenizer", _post("/v1/embeddings", {"input": [99_999_999]}, own), (422,)),
        Refusal("uneven pairs", _post("/similarity", {"a": ["a"], "b": ["b", "c"], "pairwise": True}, own), (422,)),
        Refusal("no documents", _post("/rank", {"query": "a", "documents": []}, own), (422,)),
        Refusal("an old version", _post("/predict", {"text": "a", "model_version": "0"}, own), (404,)),
        Refusal("no HTTP", b"\x16\x03\x01\x02\x00 hello\r\n\r\n", (400,), is_http=False),
        Refusal("huge headers", _post("/encode", good, own | {"X-Long": "a" * 70_000}), (400, 431), is_http=False),
    ]
    return refusals
