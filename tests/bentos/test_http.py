"""The two middlewares, around applications of a few lines."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from bentos.errors import NotReadyError, OverloadedError
from bentos.http import Envelope, Intake, answer, list_paths
from bentos.schemas import EncodeRequest
from bentos.settings import ServeSettings

SETTINGS = ServeSettings(max_body_bytes=1024, max_texts=4)
JSON = {"content-type": "application/json"}


async def echo(request: Request) -> Response:
    return JSONResponse(json.loads(await request.body()))


async def break_down(_: Request) -> Response:
    return PlainTextResponse("Internal Server Error", 500)


async def refuse(_: Request) -> Response:
    raise NotReadyError("the canary died")


def wrap(inner: Any) -> Envelope:
    return Envelope(Intake(inner, **OPTIONS), {"/encode"}, OPTIONS["identity"])


OPTIONS: dict[str, Any] = {
    "models": {"/encode": EncodeRequest},
    "settings": SETTINGS,
    "identity": lambda: ("ekiben:1", "abc"),
}
ROUTES = [Route("/encode", echo, methods=["POST"]), Route("/broken", break_down), Route("/refused", refuse)]
INNER = Starlette(routes=ROUTES, middleware=[Middleware(Intake, **OPTIONS)])  # as BentoML does it
APP = Envelope(INNER, list_paths(ROUTES), OPTIONS["identity"])


def ask(method: str, path: str, app: Any = APP, **options: Any) -> httpx.Response:
    async def main() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
            return await client.request(method, path, **options)

    return asyncio.run(main())


def test_a_good_request_passes_unchanged_and_gets_the_headers() -> None:
    response = ask("POST", "/encode", json={"texts": ["a", "ö"]})
    assert (response.status_code, response.json()) == (200, {"texts": ["a", "ö"]})
    assert response.headers["x-ekiben-model"] == "ekiben:1"
    assert response.headers["x-ekiben-space"] == "abc"


def test_an_error_of_others_gets_our_shape_and_the_headers() -> None:
    response = ask("GET", "/broken")
    assert response.status_code == 500
    assert response.json()["error"]["code"] == "internal"
    assert int(response.headers["content-length"]) == len(response.content)
    assert response.headers["x-ekiben-space"] == "abc"


def test_an_error_raised_by_any_route_gets_our_shape() -> None:
    response = ask("GET", "/refused")
    assert (response.status_code, response.json()) == (
        503,
        {"error": {"code": "not_ready", "message": "the canary died"}},
    )


def test_unknown_paths_are_one_path_to_the_application_and_named_to_the_caller() -> None:
    seen: list[str] = []

    async def spy(scope: Any, receive: Any, send: Any) -> None:
        seen.append(scope["path"])
        await PlainTextResponse("Not Found", 404)(scope, receive, send)

    for number in range(3):
        response = ask("GET", f"/secret-{number}", wrap(spy))
        assert response.json()["error"]["message"].startswith(f"there is no GET /secret-{number} here")
    assert seen == ["/unknown"] * 3


def test_a_body_in_pieces_is_limited_without_a_declared_length() -> None:
    async def pieces() -> Any:
        for _ in range(30):
            yield b" " * 100

    response = ask("POST", "/encode", content=pieces(), headers=JSON)
    assert "content-length" not in response.request.headers
    assert response.status_code == 413
    assert "1024" in response.json()["error"]["message"]


def test_a_body_in_pieces_is_put_together() -> None:
    async def pieces() -> Any:
        for byte in b'{"texts": ["a"]}':
            yield bytes([byte])

    assert ask("POST", "/encode", content=pieces(), headers=JSON).json() == {"texts": ["a"]}


@pytest.mark.parametrize("declared", ["5000", "1025"])
def test_a_body_declared_too_large_is_refused(declared: str) -> None:
    response = ask("POST", "/encode", content=b"x" * int(declared), headers=JSON)
    assert response.status_code == 413
    assert response.json()["error"]["details"] == {"limit": 1024}


def test_a_lying_content_length_does_not_help() -> None:
    response = ask("POST", "/encode", content=b"x" * 2000, headers=JSON | {"content-length": "10"})
    assert response.status_code == 413


def test_an_overload_says_when_to_come_back() -> None:
    async def overload() -> None:
        raise OverloadedError("full", retry_after_s=7)

    response = asyncio.run(answer(overload()))
    assert (response.status_code, response.headers["retry-after"]) == (429, "7")
    assert json.loads(response.body)["error"] == {
        "code": "overloaded",
        "message": "full",
        "details": {"retry_after_s": 7},
    }


def test_what_nobody_foresaw_is_hidden_and_logged(caplog: pytest.LogCaptureFixture) -> None:
    async def fail() -> None:
        raise RuntimeError("password is 1234")

    response = asyncio.run(answer(fail()))
    assert response.status_code == 500
    assert b"1234" not in response.body
    assert "password is 1234" in caplog.text


def test_work_for_a_client_that_went_away_is_cancelled() -> None:
    cancelled = asyncio.Event()
    started = asyncio.Event()

    async def slow(scope: Any, receive: Any, send: Any) -> None:
        started.set()
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            cancelled.set()
            raise

    body = iter([{"type": "http.request", "body": b'{"texts": ["a"]}', "more_body": False}])
    sent: list[Any] = []

    async def receive() -> Any:
        for message in body:
            return message
        await started.wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "method": "POST",
        "path": "/encode",
        "raw_path": b"/encode",
        "headers": [(b"content-type", b"application/json")],
    }
    asyncio.run(asyncio.wait_for(wrap(slow)(scope, receive, send), 10))
    assert cancelled.is_set()
    assert not sent


def test_a_client_that_leaves_in_the_middle_of_its_body_is_forgotten() -> None:
    async def never(scope: Any, receive: Any, send: Any) -> None:
        raise AssertionError("half a body reached the application")

    messages = iter([{"type": "http.request", "body": b"{", "more_body": True}, {"type": "http.disconnect"}])

    async def receive() -> Any:
        return next(messages)

    scope = {"type": "http", "method": "POST", "path": "/encode", "headers": [(b"content-type", b"application/json")]}
    asyncio.run(wrap(never)(scope, receive, receive))


def test_all_paths_of_an_application_are_listed(tmp_path: Any) -> None:
    (tmp_path / "style.css").touch()
    nested = Starlette(routes=[Route("/health", echo)])
    routes = [Route("/encode", echo), Mount("/", nested), Mount("/static", StaticFiles(directory=tmp_path))]
    assert list_paths(routes) == {"/encode", "/health", "/static/style.css"}
