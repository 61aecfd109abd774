"""The limits as they act on a running server whose own are tiny, and the way of each setting to its place."""

from __future__ import annotations

import dataclasses
import json
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from bentos.encoder import _choose_limits
from bentos.machine import count_cores
from bentos.manifest import Manifest
from bentos.settings import ServeSettings
from tests.factories import TINY_MAX_TOKENS
from tests.serving import Server, serve

INTERACTIVE_TEXTS = 400
BODY_BYTES = 2_000_000
SETTINGS = {
    "EKIBEN_THREADS": "1",
    "EKIBEN_INTERACTIVE_TEXTS": str(INTERACTIVE_TEXTS),
    "EKIBEN_INTERACTIVE_WAIT_S": "3600",
    "EKIBEN_QUEUE_TOKENS_INTERACTIVE": "16",
    "EKIBEN_QUEUE_TOKENS_BULK": "17",
    "EKIBEN_MAX_TEXTS": "5000",
    "EKIBEN_MAX_CHARS": "1000",
    "EKIBEN_MAX_TEXT_TOKENS": "100",
    "EKIBEN_MAX_BODY_BYTES": str(BODY_BYTES),
}


@pytest.fixture(scope="module")
def small(built_home: Path, manifest: Manifest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serve(manifest.tag, built_home, tmp_path_factory.mktemp("limits"), SETTINGS) as server:
        yield server


@pytest.fixture
def client(small: Server) -> Iterator[httpx.Client]:
    with small.client() as client:
        yield client


def make_texts(count: int, start: int = 0) -> list[str]:
    """Texts that fill the model, each unlike all others."""
    return [f"{number} {'long ' * 40}" for number in range(start, start + count)]


def read_metric(client: httpx.Client, name: str, **labels: str) -> float:
    families = text_string_to_metric_families(client.get("/metrics").text)
    samples = [sample for family in families for sample in family.samples if sample.name == name]
    return sum(sample.value for sample in samples if labels.items() <= sample.labels.items())


# --- beyond them


@pytest.mark.parametrize(
    ("lane", "texts", "limit"),
    [("INTERACTIVE", INTERACTIVE_TEXTS, 16), ("BULK", INTERACTIVE_TEXTS + 1, 17)],
)
def test_a_full_lane_refuses_names_its_setting_and_says_when_to_come_back(
    client: httpx.Client, lane: str, texts: int, limit: int
) -> None:
    shed = read_metric(client, "ekiben_shed_total", reason="queue")
    with ThreadPoolExecutor(8) as threads:
        asked = [
            threads.submit(client.post, "/encode", json={"texts": make_texts(texts, number * texts)})
            for number in range(16)
        ]
        answers = [each.result() for each in asked]
    refused = [answer for answer in answers if answer.status_code == 429]
    assert {answer.status_code for answer in answers} == {200, 429}
    for answer in refused:
        error = answer.json()["error"]
        assert error["code"] == "overloaded"
        assert f"at most {limit} may wait (EKIBEN_QUEUE_TOKENS_{lane})" in error["message"]
        assert int(answer.headers["retry-after"]) == error["details"]["retry_after_s"] >= 1
    assert read_metric(client, "ekiben_shed_total", reason="queue") == shed + len(refused)


def test_a_request_that_has_too_little_time_is_given_up(client: httpx.Client) -> None:
    answer = client.post("/encode", json={"texts": make_texts(2000)}, headers={"X-Ekiben-Timeout-Ms": "1"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (504, "timeout")
    assert "time limit" in answer.json()["error"]["message"]
    assert client.post("/encode", json={"texts": ["bread"]}).status_code == 200


@pytest.mark.parametrize(
    ("request_fields", "status", "message"),
    [
        ({"texts": ["bread"] * 5001}, 413, "EKIBEN_MAX_TEXTS"),
        ({"texts": ["bread", "a" * 1001]}, 413, "EKIBEN_MAX_CHARS"),
        ({"texts": ["bread", "a " * 99]}, 413, "`texts[1]` has 101 tokens; at most 100 are allowed"),
        ({"texts": ["a"], "prompt_text": " " * BODY_BYTES}, 413, "EKIBEN_MAX_BODY_BYTES"),
        (
            {"texts": ["bread", "a " * 70], "on_overflow": "error"},
            422,
            f"`texts[1]` has 72 tokens; the model takes {TINY_MAX_TOKENS}",
        ),
    ],
    ids=["texts", "characters", "tokens", "bytes", "the model's tokens"],
)
def test_what_is_too_large_is_refused_in_words_that_help(
    client: httpx.Client, request_fields: dict[str, Any], status: int, message: str
) -> None:
    answer = client.post("/encode", json=request_fields)
    assert answer.status_code == status
    assert message in answer.json()["error"]["message"]


def test_texts_of_a_client_that_leaves_are_not_computed(small: Server, client: httpx.Client) -> None:
    count = 5000
    client.post("/encode", json={"texts": make_texts(1, start=-1)})  # the lanes are empty now
    computed = read_metric(client, "ekiben_batch_texts_sum")
    gone = read_metric(client, "ekiben_requests_total", route="/encode", code="499")
    body = json.dumps({"texts": make_texts(count)}).encode()
    host, port = small.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        head = f"POST /encode HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
        connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        wait_for(lambda: read_metric(client, "ekiben_queue_texts", lane="bulk") > 0)
    wait_for(lambda: read_metric(client, "ekiben_requests_total", route="/encode", code="499") == gone + 1)
    wait_for(lambda: read_metric(client, "ekiben_queue_texts", lane="bulk") == 0)
    assert read_metric(client, "ekiben_batch_texts_sum") - computed < count
    assert client.post("/encode", json={"texts": make_texts(INTERACTIVE_TEXTS + 1)}).status_code == 200


def wait_for(condition: Any) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


# --- the way of the settings


def test_each_setting_reaches_its_limit(manifest: Manifest) -> None:
    settings = ServeSettings(
        threads=3,
        batch_tokens=101,
        batch_texts=102,
        interactive_texts=103,
        interactive_wait_s=104.0,
        queue_tokens_interactive=105,
        queue_tokens_bulk=106,
        cache_mb=7,
        stall_s=108.0,
    )
    assert dataclasses.asdict(_choose_limits(settings, manifest)) == {
        "threads": 3,
        "max_tokens": manifest.max_tokens,
        "batch_tokens": 101,
        "batch_texts": 102,
        "interactive_texts": 103,
        "interactive_wait_s": 104.0,
        "queue_tokens": {"interactive": 105, "bulk": 106},
        "cache_bytes": 7 * 1024 * 1024,
        "stall_s": 108.0,
    }


def test_the_threads_are_those_of_the_device_unless_they_are_set(manifest: Manifest) -> None:
    assert _choose_limits(ServeSettings(), manifest).threads == count_cores()
    assert _choose_limits(ServeSettings(device="cuda"), manifest).threads == 1
    assert _choose_limits(ServeSettings(device="cuda", threads=5), manifest).threads == 5
