"""The built Bento over real HTTP: answers, headers, every kind of bad input, readiness."""

from __future__ import annotations

import base64
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from bentos.engine import Engine
from bentos.manifest import Manifest
from tests.bentos.conftest import LIMITS, ROOT
from tests.serving import Server, serve

FORBIDDEN = (
    "torch",
    "transformers",
    "sentence_transformers",
    "mlflow",
    "prefect",
    "optuna",
    "pandas",
    "sklearn",
)
JSON = {"content-type": "application/json"}


@pytest.fixture
def client(server: Server) -> Iterator[httpx.Client]:
    with server.client() as client:
        yield client


@pytest.fixture(scope="session")
def engine(tiny_lunchbox_path: Path, manifest: Manifest) -> Engine:
    return Engine(tiny_lunchbox_path, manifest)


# --- answers


def test_a_served_vector_equals_that_of_sentence_transformers(client: httpx.Client, tiny_model_path: Path) -> None:
    from sentence_transformers import SentenceTransformer

    texts = ["bread", "the quick brown fox", "Größe 東京 🍱", "long " * 300]
    expected = SentenceTransformer(str(tiny_model_path), device="cpu").encode(texts)
    together = client.post("/encode", json={"texts": texts}).json()["embeddings"]
    np.testing.assert_allclose(together, expected, atol=1e-5)
    for text, vector in zip(texts, expected, strict=True):
        (alone,) = client.post("/encode", json={"texts": [text]}).json()["embeddings"]
        np.testing.assert_allclose(alone, vector, atol=1e-5)


def test_many_callers_at_once_get_their_own_vectors(client: httpx.Client, engine: Engine) -> None:
    requests = [[f"{word} {number}" for word in ("bread", "a long journey by train")] for number in range(40)]

    def ask(texts: list[str]) -> Any:
        return client.post("/encode", json={"texts": texts}).json()["embeddings"]

    with ThreadPoolExecutor(8) as callers:
        for texts, vectors in zip(requests, callers.map(ask, requests), strict=True):
            np.testing.assert_allclose(vectors, engine.embed(texts), atol=1e-5)


def test_base64_is_little_endian_float32(client: httpx.Client, engine: Engine) -> None:
    answer = client.post("/encode", json={"texts": ["bread"], "encoding": "base64"}).json()
    vector = np.frombuffer(base64.b64decode(answer["embeddings"][0]), "<f4")
    np.testing.assert_allclose(vector, engine.embed(["bread"])[0], atol=1e-6)


def test_usage_tells_what_was_truncated(client: httpx.Client) -> None:
    answer = client.post("/encode", json={"texts": ["bread", "long " * 300]}).json()
    assert answer["usage"] == {"tokens": [3, 302], "truncated": [1], "total_tokens": 305}


def test_similarity_over_http(client: httpx.Client, engine: Engine) -> None:
    answer = client.post("/similarity", json={"a": ["bread", "milk"], "b": ["bread", "train"], "pairwise": True}).json()
    vectors = engine.embed(["milk", "train"])
    np.testing.assert_allclose(answer["similarity"], [1.0, vectors[0] @ vectors[1]], atol=1e-5)
    assert set(answer) == {"similarity", "scores", "decision_threshold", "model", "usage"}


def test_bentomls_own_client_understands_the_answers(server: Server) -> None:
    import bentoml

    with bentoml.SyncHTTPClient(server.url) as client:
        plain = client.encode(texts=["bread"])["embeddings"][0]
        packed = client.encode(texts=["bread"], encoding="base64")["embeddings"][0]
        np.testing.assert_allclose(np.frombuffer(base64.b64decode(packed), "<f4"), plain, atol=1e-6)
        assert client.similarity(a=["bread"], b=["bread"], pairwise=True)["similarity"] == [pytest.approx(1.0)]


def test_a_bento_serves_the_model_it_was_built_with_even_when_a_newer_one_is_in_the_store(
    client: httpx.Client, manifest: Manifest
) -> None:
    assert client.post("/encode", json={"texts": ["bread"]}).json()["model"] == manifest.tag
    assert client.get("/health").json()["run_id"] == manifest.run_id


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/health", 200),
        ("GET", "/readyz", 200),
        ("GET", "/livez", 200),
        ("GET", "/metrics", 200),
        ("GET", "/models/info", 200),
        ("GET", "/models/load/2", 405),
        ("POST", "/models/load/2", 403),
        ("GET", "/docs.json", 200),
        ("GET", "/", 200),
        ("POST", "/encode", 415),
        ("GET", "/encode", 405),
        ("GET", "/nowhere", 404),
    ],
)
def test_every_answer_names_model_and_space(
    client: httpx.Client, manifest: Manifest, method: str, path: str, status: int
) -> None:
    response = client.request(method, path)
    assert response.status_code == status
    assert response.headers["x-ekiben-model"] == manifest.tag
    assert response.headers["x-ekiben-space"] == manifest.space_id


def test_health_tells_what_is_served(client: httpx.Client, manifest: Manifest) -> None:
    health = client.get("/health").json()
    assert health["status"] == "ok"
    assert {"model": manifest.tag, "space_id": manifest.space_id, "dim": manifest.dim}.items() <= health.items()


def test_an_expected_space_is_compared(client: httpx.Client, manifest: Manifest) -> None:
    body = {"texts": ["bread"]}
    same = client.post("/encode", json=body, headers={"X-Ekiben-Expect-Space": manifest.space_id})
    assert same.status_code == 200


# --- bad input: (name, path, request options, status, code, part of the message)

TEXTS, CHARS, BYTES = (int(value) for value in LIMITS.values())


def body(content: Any) -> dict[str, Any]:
    return {"json": content}


def raw(content: bytes, content_type: str = "application/json", **headers: str) -> dict[str, Any]:
    return {"content": content, "headers": {"content-type": content_type, **headers}}


def pieces(total: int) -> Iterator[bytes]:
    for _ in range(total // 1000):
        yield b" " * 1000


BAD_INPUT: list[tuple[str, str, dict[str, Any], int, str, str]] = [
    ("not JSON", "/encode", raw(b"texts=a"), 400, "malformed_body", "not JSON"),
    ("empty body", "/encode", raw(b""), 400, "malformed_body", "the body is empty"),
    ("NaN", "/encode", raw(b'{"texts": ["a"], "dimensions": NaN}'), 400, "malformed_body", "not JSON"),
    ("deep nesting", "/encode", raw(b"[" * 5000), 400, "malformed_body", "not JSON"),
    ("not UTF-8", "/encode", raw('{"texts": ["é"]}'.encode("latin-1")), 400, "malformed_body", "not UTF-8: byte 12"),
    ("raw surrogate", "/encode", raw(b'{"texts": ["\xed\xa0\x80"]}'), 400, "malformed_body", "not UTF-8"),
    ("escaped surrogate", "/encode", raw(rb'{"texts": ["a\ud800"]}'), 400, "malformed_body", "lone surrogate"),
    ("escaped low surrogate", "/encode", raw(rb'{"texts": ["\udc00"]}'), 400, "malformed_body", "lone surrogate"),
    (
        "null byte",
        "/encode",
        raw(rb'{"texts": ["a\u0000b"]}'),
        422,
        "invalid_request",
        "contains a null byte",
    ),
    ("form", "/encode", {"data": {"texts": "a"}}, 415, "unsupported_media_type", "must be 'application/json'"),
    ("multipart", "/encode", {"files": {"texts": b"a"}}, 415, "unsupported_media_type", "multipart/form-data"),
    ("pickle", "/encode", raw(b"{}", "application/vnd.bentoml+pickle"), 415, "unsupported_media_type", "pickle"),
    ("plain text", "/encode", raw(b'{"texts": ["a"]}', "text/plain"), 415, "unsupported_media_type", "text/plain"),
    ("no type", "/encode", {"content": b'{"texts": ["a"]}'}, 415, "unsupported_media_type", "no Content-Type"),
    ("charset", "/encode", raw(b"{}", "application/json; charset=utf-16"), 415, "unsupported_media_type", "utf-16"),
    (
        "compressed",
        "/encode",
        raw(b"x", **{"content-encoding": "gzip"}),
        415,
        "unsupported_media_type",
        "send the body uncompressed",
    ),
    ("array", "/encode", body(["a"]), 422, "invalid_request", "the body is a list; it must be an object with `texts`"),
    ("null", "/encode", raw(b"null"), 422, "invalid_request", "the body is null"),
    ("empty object", "/encode", body({}), 422, "invalid_request", "`texts` is missing"),
    (
        "a string",
        "/encode",
        body({"texts": "a"}),
        422,
        "invalid_request",
        "`texts` is the string 'a'; it must be",
    ),
    ("a number", "/encode", body({"texts": ["a", 7]}), 422, "invalid_request", "`texts[1]` is the number 7"),
    ("a null text", "/encode", body({"texts": [None]}), 422, "invalid_request", "`texts[0]` is null"),
    ("empty list", "/encode", body({"texts": []}), 422, "invalid_request", "give at least one text"),
    ("empty text", "/encode", body({"texts": ["a", ""]}), 422, "invalid_request", "`texts[1]` is empty"),
    ("blank text", "/encode", body({"texts": [" \n\t"]}), 422, "invalid_request", "`texts[0]` is empty"),
    ("many texts", "/encode", body({"texts": ["a"] * (TEXTS + 1)}), 413, "too_large", f"at most {TEXTS} are allowed"),
    ("long text", "/encode", body({"texts": ["a" * (CHARS + 1)]}), 413, "too_large", f"at most {CHARS} are allowed"),
    (
        "overflow",
        "/encode",
        body({"texts": ["a " * 99], "on_overflow": "error"}),
        422,
        "text_too_long",
        "model takes 64",
    ),
    ("unknown field", "/encode", body({"texts": ["a"], "text": 1}), 422, "invalid_request", "`text` is not a field"),
    ("bool as text", "/encode", body({"texts": ["a"], "normalize": "yes"}), 422, "invalid_request", "`normalize` is"),
    ("encoding", "/encode", body({"texts": ["a"], "encoding": "hex"}), 422, "invalid_request", "'float' or 'base64'"),
    ("dimensions 0", "/encode", body({"texts": ["a"], "dimensions": 0}), 422, "invalid_request", "at least 1"),
    ("dimensions 2.5", "/encode", body({"texts": ["a"], "dimensions": 2.5}), 422, "invalid_request", "integer"),
    ("dimensions 8", "/encode", body({"texts": ["a"], "dimensions": 8}), 422, "invalid_request", "this model has 32"),
    (
        "unknown prompt",
        "/encode",
        body({"texts": ["a"], "prompt": "x"}),
        422,
        "invalid_request",
        "prompts are:",
    ),
    (
        "two prompts",
        "/encode",
        body({"texts": ["a"], "prompt": "x", "prompt_text": "y"}),
        422,
        "invalid_request",
        "give one",
    ),
    ("unknown model", "/encode", body({"texts": ["a"], "model": "ekiben:99"}), 404, "unknown_model", "is served here"),
    ("large body", "/encode", raw(b" " * (BYTES + 1)), 413, "too_large", f"at most {BYTES} are allowed"),
    ("huge body", "/encode", raw(b" " * (BYTES * 50)), 413, "too_large", f"at most {BYTES} are allowed"),
    ("large pieces", "/encode", raw(pieces(BYTES + 3000)), 413, "too_large", f"at most {BYTES}"),  # type: ignore[arg-type]
    ("huge pieces", "/encode", raw(pieces(BYTES * 50)), 413, "too_large", f"at most {BYTES}"),  # type: ignore[arg-type]
    (
        "another space",
        "/encode",
        {"json": {"texts": ["a"]}, "headers": {"X-Ekiben-Expect-Space": "another"}},
        409,
        "space_mismatch",
        "'another'",
    ),
    ("missing b", "/similarity", body({"a": ["a"]}), 422, "invalid_request", "`b` is missing"),
    ("empty a", "/similarity", body({"a": [], "b": ["b"]}), 422, "invalid_request", "`a` is an empty list"),
    (
        "uneven pairs",
        "/similarity",
        body({"a": ["a"], "b": ["b", "c"], "pairwise": True}),
        422,
        "invalid_request",
        "both must have as many",
    ),
    ("many in both", "/similarity", body({"a": ["a"] * TEXTS, "b": ["b"]}), 413, "too_large", f"{TEXTS + 1} items"),
    (
        "not acceptable",
        "/encode",
        {"json": {"texts": ["a"]}, "headers": {"Accept": "text/csv"}},
        406,
        "not_acceptable",
        "application/json, application/octet-stream, application/x-npy",
    ),
    (
        "binary ranking",
        "/rank",
        {"json": {}, "headers": {"Accept": "application/x-npy"}},
        406,
        "not_acceptable",
        "/json",
    ),
    ("small dtype", "/encode", body({"texts": ["a"], "dtype": "int4"}), 422, "invalid_request", "'float16' or 'int8'"),
    ("empty query", "/rank", body({"query": "", "documents": ["a"]}), 422, "invalid_request", "`query` is empty"),
    ("no documents", "/rank", body({"query": "a", "documents": []}), 422, "invalid_request", "`documents` is an empty"),
    (
        "many documents",
        "/rank",
        body({"query": "a", "documents": ["a"] * TEXTS}),
        413,
        "too_large",
        f"{TEXTS + 1} items",
    ),
    ("top_k 0", "/rank", body({"query": "a", "documents": ["a"], "top_k": 0}), 422, "invalid_request", "at least 1"),
    (
        "foreign ids",
        "/v1/embeddings",
        body({"input": [15339, 1917]}),
        422,
        "invalid_request",
        "those of this model are 0 to",
    ),
    ("empty ids", "/v1/embeddings", body({"input": [[]]}), 422, "invalid_request", "an empty list as item 0"),
    ("long input", "/v1/embeddings", body({"input": "a" * (CHARS + 1)}), 413, "too_large", f"{CHARS} are allowed"),
    ("blank predict", "/predict", body({"text": " "}), 422, "invalid_request", "`text` is empty"),
    ("old version", "/predict", body({"text": "a", "model_version": "9"}), 404, "unknown_model", "is served here"),
    ("one text", "/predict/similarity", body({"text_a": "a"}), 422, "invalid_request", "`text_b` is missing"),
    ("batchable null", "/encode_batchable", body({"texts": ["a", None]}), 422, "invalid_request", "`texts[1]` is null"),
    ("unknown route", "/embed", body({"texts": ["a"]}), 404, "not_found", "there is no POST /embed"),
    ("trailing slash", "/encode/", body({"texts": ["a"]}), 404, "not_found", "there is no POST /encode/"),
]


@pytest.mark.parametrize(
    ("path", "options", "status", "code", "message"), [row[1:] for row in BAD_INPUT], ids=[row[0] for row in BAD_INPUT]
)
def test_bad_input_gets_its_clear_error(
    client: httpx.Client, manifest: Manifest, path: str, options: dict[str, Any], status: int, code: str, message: str
) -> None:
    response = client.post(path, **options)
    error = response.json()["error"]
    assert (response.status_code, error["code"]) == (status, code)
    assert message in error["message"]
    assert set(error) <= {"code", "message", "details", *(["type", "param"] if path.startswith("/v1/") else [])}
    assert response.headers["content-type"] == "application/json"
    assert response.headers["x-ekiben-model"] == manifest.tag
    assert client.post("/encode", json={"texts": ["still alive"]}).status_code == 200


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE", "PATCH"])
def test_a_wrong_method_gets_405(client: httpx.Client, method: str) -> None:
    response = client.request(method, "/encode")
    assert response.status_code == 405
    assert response.json()["error"]["code"] == "method_not_allowed"
    assert f"does not take {method}" in response.json()["error"]["message"]
    assert response.headers["allow"] == "POST"


def test_bytes_that_are_not_http_do_not_harm(server: Server, client: httpx.Client) -> None:
    import socket

    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall(b"\x16\x03\x01 hello\r\n\r\n")
        assert b"400" in connection.recv(100)
    assert client.get("/readyz").status_code == 200


def test_unknown_urls_do_not_grow_the_metrics(client: httpx.Client) -> None:
    for number in range(20):
        client.get(f"/probe-{number}.php")
        assert client.get(f"/v1/models/probe-{number}").status_code == 404
    metrics = client.get("/metrics").text
    assert 'endpoint="/unknown"' in metrics
    assert 'endpoint="/v1/models/{name}"' in metrics
    assert "probe-" not in metrics


# --- what runs in the process


def test_importing_the_service_loads_nothing_heavy_and_needs_no_model(tmp_path: Path) -> None:
    code = f"import sys, bentos.service; print([name for name in {FORBIDDEN} if name in sys.modules])"
    environment = {"PATH": "", "BENTOML_HOME": str(tmp_path / "empty"), "BENTOML_DO_NOT_TRACK": "true"}
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=True
    )
    assert result.stdout.strip() == "[]"


def test_the_serving_process_loads_nothing_heavy(built_home: Path, manifest: Manifest, tmp_path: Path) -> None:
    code = f"""
import sys
from bentoml._internal.service.loader import load
from starlette.testclient import TestClient
service = load({manifest.tag!r}, standalone_load=True)
assert "/bentos/ekiben/" in sys.modules["bentos.service"].__file__, "the Bento's own code must run"
with TestClient(service.to_asgi()) as client:
    assert client.get("/readyz").status_code == 200
    assert client.post("/encode", json={{"texts": ["bread"]}}).status_code == 200
    assert client.post("/similarity", json={{"a": ["bread"], "b": ["milk"]}}).status_code == 200
print([name for name in {FORBIDDEN} if name in sys.modules])
"""
    environment = {"PATH": "", "BENTOML_HOME": str(built_home), "BENTOML_DO_NOT_TRACK": "true"}
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip().splitlines()[-1] == "[]"


def test_the_real_worker_has_no_heavy_library_mapped(server: Server) -> None:
    mapped = Path(f"/proc/{server.worker_pid()}/maps").read_text()
    assert "onnxruntime" in mapped
    assert not [
        name for name in ("torch", "pandas", "sklearn", "scipy", "pyarrow") if f"site-packages/{name}" in mapped
    ]


# --- readiness


def wait_for_status(client: httpx.Client, path: str, status: int) -> httpx.Response:
    deadline = time.monotonic() + 20
    while (response := client.get(path)).status_code != status and time.monotonic() < deadline:
        time.sleep(0.2)
    assert response.status_code == status
    return response


def test_a_tampered_model_file_turns_readyz_red(
    client: httpx.Client, server: Server, built_home: Path, manifest: Manifest, tmp_path: Path
) -> None:
    path = built_home / "models" / f"{manifest.name}-model" / manifest.bento_version / "model.fp32.onnx"
    content = path.read_bytes()
    altered = bytearray(content)
    altered[len(altered) // 2] ^= 1
    path.write_bytes(altered)
    try:
        # after the start: not ready, but what is in memory is right and goes on answering
        refused = wait_for_status(client, "/readyz", 503).json()["error"]
        assert refused["code"] == "not_ready"
        assert "model.fp32.onnx was altered" in refused["message"]
        assert client.get("/health").json()["status"] == "unavailable"
        assert client.post("/encode", json={"texts": ["bread"]}).status_code == 200
        # before the start: the server is up and says why it does not answer
        with serve(manifest.tag, built_home, tmp_path) as second, second.client() as late:
            assert late.get("/livez").status_code == 200
            for response in (
                late.get("/readyz"),
                late.get("/health"),
                late.post("/encode", json={"texts": ["bread"]}),
                late.post("/similarity", json={"a": ["bread"], "b": ["milk"]}),
                late.post("/encode_batchable", json={"texts": ["bread"]}),
                late.get("/v1/models"),
            ):
                assert (response.status_code, response.json()["error"]["code"]) == (503, "not_ready")
                assert "model.fp32.onnx" in response.json()["error"]["message"]
                assert response.headers["x-ekiben-model"] == "unavailable"
            assert late.post("/encode", content=b"{", headers=JSON).status_code == 400
    finally:
        path.write_bytes(content)
    wait_for_status(client, "/readyz", 200)
