"""The envelope around an application of a few lines."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from bentos.envelope import UNKNOWN_PATH, ServeErrors, list_paths, run_enveloped
from bentos.errors import NotReadyError, OverloadedError

HEADERS = [(b"x-ekiben-model", b"ekiben:1"), (b"x-ekiben-space", b"abc")]


async def greet(_: Request) -> Response:
    return JSONResponse({"hello": "world"}, headers={"X-Ekiben-Space": "forged"})


async def break_down(_: Request) -> Response:
    return PlainTextResponse("Internal Server Error", 500)


async def refuse(_: Request) -> Response:
    raise NotReadyError("the canary died")


async def exhaust(_: Request) -> Response:
    raise OverloadedError("the queue is full", retry_after_s=7)


async def overload(_: Request) -> Response:
    """As BentoML answers what is raised in an api."""
    return JSONResponse([{"error": "the queue is full"}], 429)


ROUTES = [
    Route("/overloaded", overload),
    Route("/hello", greet),
    Route("/broken", break_down),
    Route("/refused", refuse),
    Route("/exhausted", exhaust),
]
APP = Starlette(routes=ROUTES, middleware=[Middleware(ServeErrors)])  # inside, as in BentoML's application


def ask(method: str, path: str, app: Any = APP) -> httpx.Response:
    statuses: list[int] = []

    async def enveloped(scope: Any, receive: Any, send: Any) -> None:
        route = path if path in list_paths(ROUTES) else UNKNOWN_PATH
        statuses.append(await run_enveloped(app, scope, receive, send, route=route, headers=HEADERS))

    async def main() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(enveloped), base_url="http://test") as client:
            return await client.request(method, path)

    response = asyncio.run(main())
    assert statuses == [response.status_code]
    return response


def test_a_good_answer_passes_and_gets_the_headers() -> None:
    response = ask("GET", "/hello")
    assert (response.status_code, response.json()) == (200, {"hello": "world"})
    assert response.headers["x-ekiben-model"] == "ekiben:1"
    assert response.headers.get_list("x-ekiben-space") == ["abc"]


def test_an_error_of_others_gets_our_shape_and_the_headers() -> None:
    response = ask("GET", "/broken")
    assert response.status_code == 500
    assert response.json()["error"]["code"] == "internal"
    assert int(response.headers["content-length"]) == len(response.content)
    assert response.headers["x-ekiben-space"] == "abc"


def test_an_error_of_ours_raised_by_any_route_is_shown() -> None:
    response = ask("GET", "/refused")
    assert (response.status_code, response.json()) == (
        503,
        {"error": {"code": "not_ready", "message": "the canary died"}},
    )


def test_an_error_of_ours_raised_by_any_route_says_all_that_it_says_elsewhere() -> None:
    response = ask("GET", "/exhausted")
    assert response.json()["error"]["details"] == {"retry_after_s": 7}
    assert response.headers["retry-after"] == "7"


def test_openais_clients_find_what_they_look_for_also_where_there_is_no_route() -> None:
    error = ask("GET", "/v1/nothing").json()["error"]
    assert (error["code"], error["type"], error["param"]) == ("not_found", "invalid_request_error", None)


def test_an_error_that_bentoml_tells_in_its_own_way_is_told_in_ours() -> None:
    response = ask("GET", "/overloaded")
    assert response.json() == {"error": {"code": "overloaded", "message": "the queue is full"}}
    assert response.headers["retry-after"] == "1"


@pytest.mark.parametrize("method", ["POST", "DELETE"])
def test_a_method_that_a_route_does_not_take_is_said(method: str) -> None:
    response = ask(method, "/hello")
    assert response.status_code == 405
    assert response.json()["error"]["message"].startswith(f"/hello does not take {method}")
    assert set(response.headers["allow"].split(", ")) == {"GET", "HEAD"}


def test_unknown_paths_are_one_path_to_the_application_and_named_to_the_caller() -> None:
    seen: list[str] = []

    async def spy(scope: Any, receive: Any, send: Any) -> None:
        seen.append(scope["path"])
        await PlainTextResponse("Not Found", 404)(scope, receive, send)

    for number in range(3):
        response = ask("GET", f"/secret-{number}", spy)
        assert response.json()["error"]["message"].startswith(f"there is no GET /secret-{number} here")
    assert seen == ["/unknown"] * 3


def test_all_paths_of_an_application_are_listed(tmp_path: Any) -> None:
    (tmp_path / "style.css").touch()
    nested = Starlette(routes=[Route("/health", greet)])
    routes = [Route("/encode", greet), Mount("/", nested), Mount("/static", StaticFiles(directory=tmp_path))]
    assert list_paths(routes) == {"/encode", "/health", "/static/style.css"}
