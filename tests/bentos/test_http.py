"""The frontend over a real encoder with a tiny model, and over one that fails as it is told to."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from pydantic import SecretStr
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse

from bentos.access import ApiKeys
from bentos.encoder import Encoder
from bentos.errors import OverloadedError
from bentos.http import Frontend
from bentos.lunchbox import Canary, Lunchbox, open_lunchbox
from bentos.metrics import ServeMetrics
from bentos.pinning import embed_pinned
from bentos.settings import ServeSettings
from bentos.shelf import Shelf
from tests.bentos.shelves import make_shelf

SETTINGS = ServeSettings(max_body_bytes=1024, max_texts=4)
JSON = {"content-type": "application/json"}
KEY = "0123456789abcdef-the-key"
HELLO = {"texts": ["hello"]}


async def inner(scope: Any, receive: Any, send: Any) -> None:
    """Stands for BentoML's application and its batching."""
    if scope["path"] == "/encode_batchable":
        texts = json.loads(await Request(scope, receive).body())["texts"]
        rows = await embed_pinned(texts, lambda: pytest.fail("every text must be pinned"))
        return await JSONResponse(rows)(scope, receive, send)
    if scope["path"] == "/livez":
        return await PlainTextResponse("", 200)(scope, receive, send)
    return await PlainTextResponse("Not Found", 404)(scope, receive, send)


@pytest.fixture(scope="module")
def box(tiny_lunchbox_path: Path) -> Lunchbox:
    return open_lunchbox(tiny_lunchbox_path)


@pytest.fixture
def metrics() -> Iterator[ServeMetrics]:
    return ServeMetrics({"/encode", "/livez", "/v1/models/{name}"})  # type: ignore[return-value]


Use = Callable[[httpx.AsyncClient, Encoder], Awaitable[None]]


def serve(box: Lunchbox, metrics: ServeMetrics, use: Use, settings: ServeSettings = SETTINGS) -> None:
    """Run `use` with a client of a frontend, and the encoder behind it."""

    async def main() -> None:
        encoder = Encoder(box, settings, metrics)
        await encoder.start()
        shelf = make_shelf(encoder)
        app = Frontend(
            inner,
            known_paths={"/encode", "/encode_batchable", "/livez"},
            get_shelf=lambda: shelf,
            settings=settings,
            keys=ApiKeys(settings),
            metrics=metrics,
        )
        try:
            async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
                await use(client, encoder)
        finally:
            await encoder.stop()

    asyncio.run(main())


def ask(
    box: Lunchbox, metrics: ServeMetrics, method: str, path: str, settings: ServeSettings = SETTINGS, **options: Any
) -> httpx.Response:
    responses: list[httpx.Response] = []

    async def use(client: httpx.AsyncClient, _: Encoder) -> None:
        responses.append(await client.request(method, path, **options))

    serve(box, metrics, use, settings)
    return responses[0]


def count(metrics: ServeMetrics, route: str, code: int) -> float | None:
    return metrics.registry.get_sample_value("ekiben_requests_total", {"route": route, "code": str(code)})


def test_a_door_answers_with_the_headers_and_is_counted(box: Lunchbox, metrics: ServeMetrics) -> None:
    response = ask(box, metrics, "POST", "/encode", json=HELLO, headers={"X-Request-Id": "my-id.1"})
    assert response.status_code == 200
    np.testing.assert_allclose(response.json()["embeddings"], box.engine.embed(["hello"]), atol=1e-5)
    assert response.headers["x-ekiben-model"] == box.manifest.tag
    assert response.headers["x-ekiben-space"] == box.manifest.space_id
    assert response.headers["x-request-id"] == "my-id.1"
    assert count(metrics, "/encode", 200) == 1
    assert metrics.registry.get_sample_value("ekiben_texts_total") == 1


def test_ids_are_made_where_none_or_a_bad_one_came(box: Lunchbox, metrics: ServeMetrics) -> None:
    async def use(client: httpx.AsyncClient, _: Encoder) -> None:
        ids = [(await client.post("/encode", json=HELLO)).headers["x-request-id"] for _ in range(2)]
        bad = await client.post("/encode", json=HELLO, headers={"X-Request-Id": "<script>"})
        assert len({*ids, bad.headers["x-request-id"]}) == 3
        assert "<" not in bad.headers["x-request-id"]

    serve(box, metrics, use)


def test_other_routes_pass_on_to_bentoml(box: Lunchbox, metrics: ServeMetrics) -> None:
    async def use(client: httpx.AsyncClient, _: Encoder) -> None:
        assert (await client.get("/livez")).headers["x-ekiben-space"] == box.manifest.space_id
        assert (await client.get("/v1/models/x")).status_code == 404
        for number in range(5):
            assert (await client.get(f"/secret-{number}")).json()["error"]["code"] == "not_found"

    serve(box, metrics, use)
    assert count(metrics, "/livez", 200) == 1
    assert count(metrics, "/v1/models/{name}", 404) == 1
    assert count(metrics, "/unknown", 404) == 5


def test_a_door_of_bentoml_is_checked_first_and_gets_its_body(box: Lunchbox, metrics: ServeMetrics) -> None:
    async def use(client: httpx.AsyncClient, _: Encoder) -> None:
        good = await client.post("/encode_batchable", json={"texts": ["a", "ö"]})
        assert good.status_code == 200
        np.testing.assert_allclose(good.json(), box.engine.embed(["a", "ö"]), atol=1e-5)
        bad = await client.post("/encode_batchable", json={"texts": [""]})
        assert bad.status_code == 422

    serve(box, metrics, use)


def test_a_body_in_pieces_is_limited_without_a_declared_length(box: Lunchbox, metrics: ServeMetrics) -> None:
    async def pieces() -> Any:
        for _ in range(30):
            yield b" " * 100

    response = ask(box, metrics, "POST", "/encode", content=pieces(), headers=JSON)
    assert "content-length" not in response.request.headers
    assert response.status_code == 413
    assert "1024" in response.json()["error"]["message"]


def test_a_body_in_pieces_is_put_together(box: Lunchbox, metrics: ServeMetrics) -> None:
    async def pieces() -> Any:
        for byte in b'{"texts": ["a"]}':
            yield bytes([byte])

    assert ask(box, metrics, "POST", "/encode", content=pieces(), headers=JSON).status_code == 200


@pytest.mark.parametrize("size", [5000, 1025])
def test_a_body_declared_too_large_is_refused(box: Lunchbox, metrics: ServeMetrics, size: int) -> None:
    response = ask(box, metrics, "POST", "/encode", content=b"x" * size, headers=JSON)
    assert response.status_code == 413
    assert response.json()["error"]["details"] == {"limit": 1024}


@pytest.mark.parametrize(("declared", "status"), [("10", 413), ("9" * 5000, 413)])
def test_a_lying_content_length_does_not_help(box: Lunchbox, metrics: ServeMetrics, declared: str, status: int) -> None:
    headers = JSON | {"content-length": declared}
    assert ask(box, metrics, "POST", "/encode", content=b"x" * 2000, headers=headers).status_code == status


def test_without_a_key_nothing_but_the_open_routes_answers(box: Lunchbox, metrics: ServeMetrics) -> None:
    settings = ServeSettings(api_keys=SecretStr(KEY))

    async def use(client: httpx.AsyncClient, _: Encoder) -> None:
        refused = await client.post("/encode", json=HELLO)
        assert refused.status_code == 401
        assert refused.headers["www-authenticate"] == "Bearer"
        assert refused.headers["x-ekiben-space"] == box.manifest.space_id
        assert (await client.get("/livez")).status_code == 200
        for shown in ({"Authorization": f"Bearer {KEY}"}, {"X-API-Key": KEY}):
            assert (await client.post("/encode", json=HELLO, headers=shown)).status_code == 200

    serve(box, metrics, use, settings)


def test_a_wrong_space_is_refused(box: Lunchbox, metrics: ServeMetrics) -> None:
    async def use(client: httpx.AsyncClient, _: Encoder) -> None:
        right = {"X-Ekiben-Expect-Space": box.manifest.space_id}
        assert (await client.post("/encode", json=HELLO, headers=right)).status_code == 200
        for path in ("/encode", "/encode_batchable"):
            wrong = await client.post(path, json=HELLO, headers={"X-Ekiben-Expect-Space": "0" * 16})
            assert (wrong.status_code, wrong.json()["error"]["code"]) == (409, "space_mismatch")

    serve(box, metrics, use)


@pytest.mark.parametrize("asked", ["0", "-1", "soon", "1.5", "9" * 30])
def test_a_time_limit_must_be_one(box: Lunchbox, metrics: ServeMetrics, asked: str) -> None:
    response = ask(box, metrics, "POST", "/encode", json=HELLO, headers={"X-Ekiben-Timeout-Ms": asked})
    assert response.status_code == 422
    assert response.json()["error"]["details"] == {"field": "X-Ekiben-Timeout-Ms"}


def block(encoder: Encoder) -> asyncio.Event:
    """Make the encoder wait in /encode until the event is set."""
    gate = asyncio.Event()
    encode = encoder.encode

    async def slow(*args: Any) -> Any:
        await gate.wait()
        return await encode(*args)

    encoder.encode = slow  # type: ignore[method-assign]
    return gate


def test_too_many_requests_at_once_are_refused(box: Lunchbox, metrics: ServeMetrics) -> None:
    settings = ServeSettings(max_requests=2)

    async def use(client: httpx.AsyncClient, encoder: Encoder) -> None:
        gate = block(encoder)
        waiting = [asyncio.create_task(client.post("/encode", json=HELLO)) for _ in range(2)]
        await asyncio.sleep(0.05)
        refused = await client.post("/encode", json=HELLO)
        assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
        assert "at most 2" in refused.json()["error"]["message"]
        assert (await client.get("/livez")).status_code == 200
        gate.set()
        assert [response.status_code for response in await asyncio.gather(*waiting)] == [200, 200]
        assert (await client.post("/encode", json=HELLO)).status_code == 200

    serve(box, metrics, use, settings)


def test_a_body_that_is_still_on_its_way_takes_no_place(box: Lunchbox, metrics: ServeMetrics) -> None:
    async def use(client: httpx.AsyncClient, _: Encoder) -> None:
        rest = asyncio.Event()

        async def slow_body() -> Any:
            yield b'{"texts": '
            await rest.wait()
            yield b'["hello"]}'

        slow = [asyncio.create_task(client.post("/encode", content=slow_body(), headers=JSON)) for _ in range(3)]
        await asyncio.sleep(0.05)
        assert (await client.post("/encode", json=HELLO)).status_code == 200
        rest.set()
        assert [response.status_code for response in await asyncio.gather(*slow)].count(200) >= 1

    serve(box, metrics, use, ServeSettings(max_requests=1))


def test_an_overload_says_when_to_come_back(box: Lunchbox, metrics: ServeMetrics) -> None:
    async def use(client: httpx.AsyncClient, encoder: Encoder) -> None:
        async def overload(*_: Any) -> Any:
            raise OverloadedError("full", retry_after_s=7)

        encoder.encode = overload  # type: ignore[method-assign]
        response = await client.post("/encode", json=HELLO)
        assert (response.status_code, response.headers["retry-after"]) == (429, "7")
        error = {"code": "overloaded", "message": "full", "details": {"retry_after_s": 7}}
        assert response.json()["error"] == error

    serve(box, metrics, use)


def test_what_nobody_foresaw_is_hidden_and_logged(
    box: Lunchbox, metrics: ServeMetrics, caplog: pytest.LogCaptureFixture
) -> None:
    async def use(client: httpx.AsyncClient, encoder: Encoder) -> None:
        async def fail(*_: Any) -> Any:
            raise RuntimeError("password is 1234")

        encoder.encode = fail  # type: ignore[method-assign]
        response = await client.post("/encode", json=HELLO)
        assert (response.status_code, response.json()["error"]["code"]) == (500, "internal")
        assert "1234" not in response.text

    serve(box, metrics, use)
    assert "request failed" in caplog.text
    assert count(metrics, "/encode", 500) == 1


def test_without_a_model_the_doors_say_why(metrics: ServeMetrics) -> None:
    shelf = Shelf()
    shelf.refusal = "model.onnx is missing"
    app = Frontend(
        inner, known_paths=(), get_shelf=lambda: shelf, settings=SETTINGS, keys=ApiKeys(SETTINGS), metrics=metrics
    )

    async def main() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
            return await client.post("/encode", json=HELLO)

    response = asyncio.run(main())
    assert response.status_code == 503
    assert response.json()["error"]["message"] == "model.onnx is missing"
    assert response.headers["x-ekiben-model"] == "unavailable"


@pytest.mark.parametrize("headers", [{}, {"X-Ekiben-Timeout-Ms": "60000"}])
def test_the_servers_time_limit_is_the_longest(box: Lunchbox, metrics: ServeMetrics, headers: dict[str, str]) -> None:
    many = {"texts": [f"{number} hello" for number in range(256)]}
    response = ask(box, metrics, "POST", "/encode", ServeSettings(timeout_s=1e-6), json=many, headers=headers)
    assert (response.status_code, response.json()["error"]["code"]) == (504, "timeout")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_lane_that_is_down_stops_its_own_requests_and_wrong_vectors_stop_all(
    box: Lunchbox, metrics: ServeMetrics, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bentos.batcher.SUPERVISE_EVERY_S", 3600)
    monkeypatch.setattr("bentos.encoder.CHECK_EVERY_S", -1)
    infer = box.engine.infer

    def die_in_bulk(*ids: Any, **options: Any) -> Any:
        if threading.current_thread().name == "ekiben-bulk":
            raise SystemExit
        return infer(*ids, **options)

    async def use(client: httpx.AsyncClient, encoder: Encoder) -> None:
        long = await client.post("/encode", json={"texts": ["a", "b"]}, headers={"X-Ekiben-Timeout-Ms": "200"})
        assert long.status_code == 504
        assert await encoder.find_problem() == "a thread of the lane bulk is dead"
        assert (await client.post("/encode", json=HELLO)).status_code == 200
        monkeypatch.setattr(box, "canary", Canary(box.canary.texts, -box.canary.vectors))
        assert "canary vectors are wrong" in (await encoder.find_problem() or "")
        refused = await client.post("/encode", json=HELLO)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "not_ready")
        assert "canary vectors are wrong" in refused.json()["error"]["message"]

    monkeypatch.setattr(box.engine, "infer", die_in_bulk)
    serve(box, metrics, use, ServeSettings(threads=1, interactive_texts=1))


def make_scope(path: str = "/encode") -> dict[str, Any]:
    headers = [(b"content-type", b"application/json")]
    return {"type": "http", "method": "POST", "path": path, "raw_path": path.encode(), "headers": headers}


def test_work_for_a_client_that_went_away_is_given_up(box: Lunchbox, metrics: ServeMetrics) -> None:
    async def use(client: httpx.AsyncClient, encoder: Encoder) -> None:
        app: Any = client._transport.app  # type: ignore[attr-defined]
        cancelled = asyncio.Event()

        async def slow(*_: Any) -> Any:
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                cancelled.set()
                raise

        encoder.encode = slow  # type: ignore[method-assign]
        body = iter([{"type": "http.request", "body": b'{"texts": ["a"]}', "more_body": False}])
        sent: list[Any] = []

        async def receive() -> Any:
            return next(body, {"type": "http.disconnect"})

        async def send(message: Any) -> None:
            sent.append(message)

        await asyncio.wait_for(app(make_scope(), receive, send), 10)
        assert cancelled.is_set()
        assert not sent

    serve(box, metrics, use)
    assert count(metrics, "/encode", 499) == 1


def test_a_client_that_leaves_in_the_middle_of_its_body_is_forgotten(box: Lunchbox, metrics: ServeMetrics) -> None:
    async def use(client: httpx.AsyncClient, _: Encoder) -> None:
        app: Any = client._transport.app  # type: ignore[attr-defined]
        messages = iter([{"type": "http.request", "body": b"{", "more_body": True}, {"type": "http.disconnect"}])

        async def receive() -> Any:
            return next(messages)

        async def send(_: Any) -> None:
            raise AssertionError("nobody is there")

        await app(make_scope(), receive, send)

    serve(box, metrics, use)


def test_the_access_log_is_off_until_it_is_asked_for(
    box: Lunchbox, metrics: ServeMetrics, caplog: pytest.LogCaptureFixture
) -> None:
    ask(box, metrics, "POST", "/encode", json=HELLO)
    assert not [record for record in caplog.records if record.name == "bentos.access"]
    settings = ServeSettings(access_log=True)
    ask(box, metrics, "POST", "/encode", settings, json={"texts": ["hello", "secret words"]})
    ask(box, metrics, "POST", "/v1/embeddings", settings, json={"input": "hello", "model": "ekiben"})
    records = [vars(record)["fields"] for record in caplog.records if record.name == "bentos.access"]
    assert [(record["code"], record["texts"], record["tokens"] > 2) for record in records] == [
        (200, 2, True),
        (200, 1, True),
    ]
    assert "secret" not in str(records)
