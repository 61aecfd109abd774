"""Two versions behind the frontend: which one answers, what its answer says of itself, and in which space it is."""

from __future__ import annotations

import asyncio
import base64
import io
import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from pydantic import SecretStr
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from bentos.access import ApiKeys
from bentos.encoder import Encoder
from bentos.errors import BusyError, IncompleteLoadError, RefusedVersionError, UnknownModelError
from bentos.http import Frontend
from bentos.lunchbox import Lunchbox
from bentos.metrics import ServeMetrics
from bentos.pinning import embed_pinned
from bentos.settings import ServeSettings
from bentos.shelf import Shelf
from bentos.vectors import normalize
from tests.bentos.shelves import NESTED_DIM, make_map, make_shelf, open_shared

TEXTS = ["hello", "a fast train", "bread and milk"]
ADMIN_KEY, API_KEY = "an-admin-key-0123456789", "a-callers-key-0123456789"


@pytest.fixture(scope="module")
def old(tiny_lunchbox_path: Path) -> Lunchbox:
    return open_shared(tiny_lunchbox_path)


@pytest.fixture(scope="module")
def new(successor_path: Path) -> Lunchbox:
    return open_shared(successor_path)


@dataclass
class Stage:
    """Version 2 live, version 1 beside it, and a client."""

    client: httpx.AsyncClient
    shelf: Shelf
    metrics: ServeMetrics
    loads: list[Any] = field(default_factory=list)  # what was asked to be loaded
    outcome: Any = None  # of a load: what it answers or raises, or an event to wait for first

    def encoder(self, tag: str) -> Encoder:
        return self.shelf.choose("model", tag)

    def count(self, model: str, space: str) -> float | None:
        return self.metrics.registry.get_sample_value("ekiben_answers_total", {"model": model, "space": space})

    async def load_version(self, version: str, *, live: bool, timeout_s: float) -> dict[str, Any]:
        self.loads.append((version, live, timeout_s))
        if isinstance(self.outcome, asyncio.Event):
            await self.outcome.wait()
            self.loads.append("ended")
            return {}
        if isinstance(self.outcome, Exception):
            raise self.outcome
        return {"model": "ekiben:3-x", "live": live, "workers": {"done": [1], "failed": {}, "missing": []}}


def serve(new: Lunchbox, old: Lunchbox, use: Callable[[Stage], Awaitable[None]], **settings: Any) -> None:
    async def main() -> None:
        limits, metrics = ServeSettings(**settings), ServeMetrics({"/encode", "/models/load/{version}"})
        encoders = [Encoder(box, limits, metrics) for box in (new, old)]
        for encoder in encoders:
            await encoder.start()
        shelf = make_shelf(*encoders, aliases={"champion": new.manifest.tag, "previous": old.manifest.tag})

        async def batch(request: Request) -> JSONResponse:
            await asyncio.sleep(0.05)  # time for a swap
            return JSONResponse(await embed_pinned((await request.json())["texts"], lambda: shelf.live))

        stage = Stage(None, shelf, metrics)  # type: ignore[arg-type]
        app = Frontend(
            Starlette(routes=[Route("/encode_batchable", batch, methods=["POST"])]),
            known_paths={"/encode", "/encode_batchable"},
            get_shelf=lambda: shelf,
            settings=limits,
            keys=ApiKeys(limits),
            metrics=metrics,
            load_version=stage.load_version,
        )
        try:
            async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as stage.client:
                await use(stage)
        finally:
            await shelf.stop()

    asyncio.run(asyncio.wait_for(main(), 300))


def check_names(response: httpx.Response, box: Lunchbox, space: str | None = None) -> None:
    """An answer says of itself that it is of `box`, in its own space or in the one it was mapped into."""
    own = box.manifest.space_id
    assert response.headers["x-ekiben-model"] == box.manifest.tag
    assert response.headers["x-ekiben-space"] == (space or own)
    assert response.headers.get("x-ekiben-adapted-from") == (own if space else None)


def message(response: httpx.Response) -> str:
    return str(response.json()["error"]["message"])


# --- which version answers

DOORS: list[tuple[str, str, dict[str, Any]]] = [
    ("/encode", "model", {"texts": TEXTS}),
    ("/similarity", "model", {"a": TEXTS, "b": TEXTS}),
    ("/rank", "model", {"query": "train", "documents": TEXTS}),
    ("/v1/embeddings", "model", {"input": TEXTS}),
    ("/predict", "model_version", {"text": "train"}),
    ("/predict/similarity", "model_version", {"text_a": "train", "text_b": "bread"}),
]


@pytest.mark.parametrize(("path", "name", "body"), DOORS, ids=[door[0] for door in DOORS])
def test_every_name_of_a_version_makes_it_answer(
    new: Lunchbox, old: Lunchbox, path: str, name: str, body: dict[str, Any]
) -> None:
    async def use(stage: Stage) -> None:
        plain = await stage.client.post(path, json=body)
        check_names(plain, new)
        for box, names in ((old, ["previous", "1", "v1"]), (new, ["champion", "2", "ekiben"])):
            manifest = box.manifest
            answers = [
                await stage.client.post(path, json=body | {name: each})
                for each in (*names, manifest.tag, manifest.bento_version, manifest.run_id)
            ]
            for answer in answers:
                assert answer.status_code == 200, answer.text
                check_names(answer, box)
                assert answer.json()["model"] == manifest.tag
                assert answer.json().get("model_version", manifest.version) == manifest.version
                assert answer.json() == answers[0].json()
            assert stage.count(manifest.tag, manifest.space_id) == len(answers) + (box is new)
        for wrong in ("challenger", "ekiben:3-00000000", "ekiben:9", ""):
            refused = await stage.client.post(path, json=body | {name: wrong})
            assert (refused.status_code, refused.json()["error"]["code"]) == (404, "unknown_model")
            assert new.manifest.tag in message(refused)
            assert old.manifest.tag in message(refused)
            check_names(refused, new)

    serve(new, old, use)


def test_the_vectors_are_those_of_the_version_that_is_named(new: Lunchbox, old: Lunchbox) -> None:
    async def use(stage: Stage) -> None:
        for box, name in ((new, None), (old, "v1"), (new, "champion")):
            answer = await stage.client.post("/encode", json={"texts": TEXTS, "model": name})
            np.testing.assert_allclose(answer.json()["embeddings"], box.engine.embed(TEXTS), atol=1e-5)

    serve(new, old, use)


# --- while versions are exchanged


def test_an_answer_is_of_the_version_that_computed_it_whichever_is_live_by_then(new: Lunchbox, old: Lunchbox) -> None:
    async def use(stage: Stage) -> None:
        gate = asyncio.Event()
        encoder = stage.encoder("2")
        encode = encoder.encode

        async def slow(*args: Any) -> Any:
            content = await encode(*args)
            await gate.wait()
            return content

        encoder.encode = slow  # type: ignore[method-assign]
        begun = asyncio.create_task(stage.client.post("/encode", json={"texts": TEXTS}))
        failing = asyncio.create_task(stage.client.post("/encode", json={"texts": TEXTS, "prompt": "none such"}))
        await asyncio.sleep(0.1)
        stage.shelf.flip(old.manifest.tag, 0.0)  # version 2 leaves as soon as nobody holds it
        later = await stage.client.post("/encode", json={"texts": TEXTS})
        check_names(later, old)
        np.testing.assert_allclose(later.json()["embeddings"], old.engine.embed(TEXTS), atol=1e-5)
        assert (await stage.client.post("/encode", json={"texts": TEXTS, "model": "2"})).status_code == 404
        gate.set()
        answer = await begun
        check_names(answer, new)
        assert answer.json()["model"] == new.manifest.tag
        np.testing.assert_allclose(answer.json()["embeddings"], new.engine.embed(TEXTS), atol=1e-5)
        assert stage.count(new.manifest.tag, new.manifest.space_id) == 1
        refused = await failing
        assert refused.status_code == 422
        check_names(refused, new)

    serve(new, old, use)


def test_a_request_that_is_still_on_its_way_gets_the_version_that_is_live_when_it_is_there(
    new: Lunchbox, old: Lunchbox
) -> None:
    async def use(stage: Stage) -> None:
        rest = asyncio.Event()

        async def body() -> Any:
            yield b'{"texts": '
            await rest.wait()
            yield b'["hello"]}'

        headers = {"content-type": "application/json", "x-ekiben-expect-space": old.manifest.space_id}
        begun = asyncio.create_task(stage.client.post("/encode", content=body(), headers=headers))
        await asyncio.sleep(0.05)
        stage.shelf.flip(old.manifest.tag, 0.0)
        rest.set()
        answer = await begun
        assert answer.status_code == 200
        check_names(answer, old)

    serve(new, old, use)


def test_bentomls_batching_keeps_the_version_that_a_request_was_admitted_for(new: Lunchbox, old: Lunchbox) -> None:
    async def use(stage: Stage) -> None:
        begun = asyncio.create_task(stage.client.post("/encode_batchable", json={"texts": TEXTS}))
        await asyncio.sleep(0.02)
        stage.shelf.flip(old.manifest.tag, 0.0)
        later = await stage.client.post("/encode_batchable", json={"texts": TEXTS})
        for answer, box in ((await begun, new), (later, old)):
            check_names(answer, box)
            np.testing.assert_allclose(answer.json(), box.engine.embed(TEXTS), atol=1e-5)
            assert stage.count(box.manifest.tag, box.manifest.space_id) == 1

    serve(new, old, use)


def test_many_requests_through_many_swaps_never_get_anothers_vectors(new: Lunchbox, old: Lunchbox) -> None:
    async def use(stage: Stage) -> None:
        expected = {box.manifest.tag: box.engine.embed(TEXTS[:1])[0] for box in (new, old)}
        seen: set[str] = set()
        ended = False

        async def ask(path: str) -> None:
            while not ended:
                answer = await stage.client.post(path, json={"texts": TEXTS[:1]})
                assert answer.status_code == 200, answer.text
                tag = answer.headers["x-ekiben-model"]
                rows = answer.json() if isinstance(answer.json(), list) else answer.json()["embeddings"]
                np.testing.assert_allclose(rows[0], expected[tag], atol=1e-5)
                seen.add(tag)

        callers = [asyncio.create_task(ask(path)) for path in ("/encode", "/encode", "/encode_batchable")]
        for number in range(20):
            await asyncio.sleep(0.02)
            stage.shelf.flip((old, new)[number % 2].manifest.tag, 0.0, keep=expected)
        ended = True
        await asyncio.gather(*callers)
        assert seen == set(expected)

    serve(new, old, use)


# --- older spaces


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
@pytest.mark.parametrize("encoding", ["float", "base64"])
def test_vectors_are_mapped_into_an_older_space(new: Lunchbox, old: Lunchbox, dtype: str, encoding: str) -> None:
    async def use(stage: Stage) -> None:
        space = old.manifest.space_id
        asked = {"texts": TEXTS, "space": space, "dtype": dtype, "encoding": encoding}
        answer = await stage.client.post("/encode", json=asked)
        assert answer.status_code == 200, answer.text
        check_names(answer, new, space)
        assert answer.json()["model"] == new.manifest.tag
        kind = {"float32": "<f4", "float16": "<f2", "int8": "<i1"}[dtype]
        rows = answer.json()["embeddings"]
        if encoding == "base64":
            rows = [np.frombuffer(base64.b64decode(row), kind) for row in rows]
        expected = normalize(new.engine.embed(TEXTS, normalize=True) @ make_map())
        np.testing.assert_allclose(normalize(np.array(rows, dtype=np.float64)), expected, atol=0.02)
        if dtype != "int8":
            np.testing.assert_allclose(np.array(rows, dtype=np.float64), expected, atol=2e-3)
        assert stage.count(new.manifest.tag, space) == 1
        binary = await stage.client.post("/encode", json=asked, headers={"accept": "application/x-npy"})
        np.testing.assert_array_equal(np.load(io.BytesIO(binary.content)), np.array(rows, dtype=kind))
        check_names(binary, new, space)

    serve(new, old, use)


def test_openais_door_and_predict_map_as_well(new: Lunchbox, old: Lunchbox) -> None:
    async def use(stage: Stage) -> None:
        space = old.manifest.space_id
        expected = normalize(new.engine.embed(["hello"], normalize=True) @ make_map())
        openai = await stage.client.post("/v1/embeddings", json={"input": "hello", "space": space})
        predicted = await stage.client.post("/predict", json={"text": "hello", "space": space})
        np.testing.assert_allclose(openai.json()["data"][0]["embedding"], expected[0], atol=1e-5)
        np.testing.assert_allclose(predicted.json()["embedding"], expected[0], atol=1e-5)
        for answer in (openai, predicted):
            check_names(answer, new, space)

    serve(new, old, use)


def test_its_own_space_may_be_named_and_changes_nothing(new: Lunchbox, old: Lunchbox) -> None:
    async def use(stage: Stage) -> None:
        for box, name in ((new, "2"), (old, "1")):
            body = {"texts": TEXTS, "model": name, "normalize": False}
            named = await stage.client.post("/encode", json=body | {"space": box.manifest.space_id})
            assert named.json() == (await stage.client.post("/encode", json=body)).json()
            check_names(named, box)

    serve(new, old, use)


def test_a_space_that_cannot_be_had_is_refused_with_those_that_can(new: Lunchbox, old: Lunchbox) -> None:
    async def use(stage: Stage) -> None:
        for path, name, body in (door for door in DOORS if door[0] in ("/encode", "/v1/embeddings", "/predict")):
            refused = await stage.client.post(path, json=body | {"space": "0" * 16})
            assert (refused.status_code, refused.json()["error"]["code"]) == (409, "space_mismatch")
            assert refused.json()["error"]["details"]["available"] == [new.manifest.space_id, old.manifest.space_id]
            assert old.manifest.space_id in message(refused)
            check_names(refused, new)
            backwards = await stage.client.post(path, json=body | {name: "1", "space": new.manifest.space_id})
            assert backwards.status_code == 409
            assert f"Name `{name}`: {new.manifest.tag!r}, which is loaded here and makes them" in message(backwards)
            check_names(backwards, old)
        unknown = await stage.client.post("/similarity", json={"a": ["a"], "b": ["b"], "space": old.manifest.space_id})
        assert unknown.status_code == 422, "cosines have no space"

    serve(new, old, use)


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"normalize": False}, "`normalize` is false, and vectors that are mapped into the space"),
        ({"dimensions": 8}, "`dimensions` is 8, and vectors of the space .* have 32; mapped vectors are not cut"),
        ({"dimensions": 33}, "`dimensions` is 33, and vectors of the space"),
    ],
)
def test_what_makes_no_sense_with_a_map_is_refused(
    new: Lunchbox, old: Lunchbox, fields: dict[str, Any], problem: str
) -> None:
    async def use(stage: Stage) -> None:
        space = old.manifest.space_id
        refused = await stage.client.post("/encode", json={"texts": TEXTS, "space": space} | fields)
        assert refused.status_code == 422
        assert refused.json()["error"]["details"]["field"] in fields
        assert re.search(problem, message(refused))
        fine = await stage.client.post(
            "/encode", json={"texts": TEXTS, "space": space, "dimensions": 32, "normalize": True}
        )
        assert fine.status_code == 200

    serve(new, old, use, allow_truncated_dimensions=True)


def test_fewer_dimensions_are_given_where_the_model_was_trained_for_them(new: Lunchbox, old: Lunchbox) -> None:
    async def use(stage: Stage) -> None:
        short = await stage.client.post("/encode", json={"texts": TEXTS, "dimensions": NESTED_DIM})
        full = new.engine.embed(TEXTS)
        np.testing.assert_allclose(short.json()["embeddings"], normalize(full[:, :NESTED_DIM]), atol=1e-5)
        refused = await stage.client.post("/encode", json={"texts": TEXTS, "dimensions": 7})
        assert "this model has 32 and was trained for 8 besides" in message(refused)
        other = await stage.client.post("/encode", json={"texts": TEXTS, "dimensions": NESTED_DIM, "model": "1"})
        assert "this model has 32 and was not trained for fewer" in message(other)

    serve(new, old, use)


# --- the space that a caller expects


def expect(space: str) -> dict[str, str]:
    return {"X-Ekiben-Expect-Space": space}


def test_the_space_expected_is_compared_with_that_of_the_answer(new: Lunchbox, old: Lunchbox) -> None:
    async def use(stage: Stage) -> None:
        own, older = new.manifest.space_id, old.manifest.space_id
        for fields, expected, status in (
            ({}, own, 200),
            ({}, older, 409),
            ({"model": "1"}, older, 200),
            ({"model": "1"}, own, 409),
            ({"space": older}, older, 200),
            ({"space": older}, own, 409),
            ({"space": own}, own, 200),
            ({"model": "1", "space": older}, older, 200),
        ):
            answer = await stage.client.post("/encode", json={"texts": TEXTS} | fields, headers=expect(expected))
            assert answer.status_code == status, (fields, answer.text)
            if status == 200:
                assert answer.headers["x-ekiben-space"] == expected

    serve(new, old, use)


def test_a_mismatch_says_what_would_help(new: Lunchbox, old: Lunchbox) -> None:
    async def use(stage: Stage) -> None:
        own, older = new.manifest.space_id, old.manifest.space_id
        by_map = f"Send `space`: {older!r}, and they are mapped into it until your index is rebuilt"
        for path, name, body in DOORS:
            by_version = f"Name `{name}`: {old.manifest.tag!r}, which is loaded here and makes them"
            refused = await stage.client.post(path, json=body, headers=expect(older))
            assert refused.status_code == 409
            assert (by_map in message(refused)) == (path in ("/encode", "/v1/embeddings", "/predict"))
            assert by_version in message(refused)
            details = refused.json()["error"]["details"]
            assert details == {"expected": older, "found": own, "available": [own, older]}
            lost = await stage.client.post(path, json=body, headers=expect("f" * 16))
            assert "Embed your texts again, or ask the server that made the old vectors" in message(lost)
        batched = await stage.client.post("/encode_batchable", json={"texts": TEXTS}, headers=expect(older))
        assert "Embed your texts again" in message(batched), "it takes neither field"
        mixed = await stage.client.post("/encode", json={"texts": TEXTS, "space": older}, headers=expect(own))
        assert f"`space` asks for vectors of space {older!r}. Leave `space` out" in message(mixed)
        long = await stage.client.post("/encode", json={"texts": TEXTS}, headers=expect("x" * 5000))
        assert (long.status_code, len(long.text) < 2000) == (409, True)

    serve(new, old, use)


# --- POST /models/load/{version}


def admin(**headers: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {ADMIN_KEY}", **headers}


KEYS = {"admin_keys": SecretStr(ADMIN_KEY), "api_keys": SecretStr(API_KEY)}


@pytest.mark.parametrize(("body", "live"), [(None, True), ({}, True), ({"live": True}, True), ({"live": False}, False)])
def test_an_admin_has_a_version_loaded(new: Lunchbox, old: Lunchbox, body: Any, live: bool) -> None:
    async def use(stage: Stage) -> None:
        content = {} if body is None else {"json": body}
        answer = await stage.client.post("/models/load/ekiben:3-x", headers=admin(), **content)
        assert answer.status_code == 200, answer.text
        assert answer.json() == {
            "model": "ekiben:3-x",
            "live": live,
            "workers": {"done": [1], "failed": {}, "missing": []},
        }
        assert stage.loads == [("ekiben:3-x", live, 600.0)]
        check_names(answer, new)
        count = {"route": "/models/load/{version}", "code": "200"}
        assert stage.metrics.registry.get_sample_value("ekiben_requests_total", count) == 1

    serve(new, old, use, **KEYS)


@pytest.mark.parametrize(
    ("settings", "shown", "status", "problem"),
    [
        ({}, None, 403, "the server has no admin keys. Set EKIBEN_ADMIN_KEYS_FILE"),
        ({}, ADMIN_KEY, 403, "the server has no admin keys"),
        ({"api_keys": SecretStr(API_KEY)}, API_KEY, 403, "the server has no admin keys"),
        (KEYS, None, 401, "the request shows no admin key"),
        (KEYS, "nobodys-key-0123456789", 401, "no admin key that is known here"),
        (KEYS, API_KEY, 403, "the key shown is an API key, which may embed but not load models"),
    ],
)
def test_nobody_else_may(
    new: Lunchbox, old: Lunchbox, settings: dict[str, Any], shown: str | None, status: int, problem: str
) -> None:
    async def use(stage: Stage) -> None:
        headers = {} if shown is None else {"X-API-Key": shown}
        refused = await stage.client.post("/models/load/3", headers=headers)
        assert refused.status_code == status
        assert problem in message(refused)
        assert ("www-authenticate" in refused.headers) == (status == 401)
        assert stage.loads == []
        if shown == API_KEY and "admin_keys" in settings:
            assert (await stage.client.post("/encode", json={"texts": TEXTS}, headers=headers)).status_code == 200

    serve(new, old, use, **settings)


def test_an_admins_key_is_no_api_key(new: Lunchbox, old: Lunchbox) -> None:
    async def use(stage: Stage) -> None:
        assert (await stage.client.post("/encode", json={"texts": TEXTS}, headers=admin())).status_code == 401
        assert (await stage.client.get("/models/info", headers=admin())).status_code == 404, "here nobody answers it"

    serve(new, old, use, **KEYS)


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (UnknownModelError("no such version", field="version"), 404, "unknown_model"),
        (
            RefusedVersionError("ekiben:2-fedcba98", "the canary differs", {"failed": {"7": "canary"}}),
            422,
            "version_refused",
        ),
        (IncompleteLoadError("worker 7 is missing", workers={"missing": [7]}), 504, "load_incomplete"),
        (BusyError("one at a time", retry_after_s=3), 409, "busy"),
        (RuntimeError("secret"), 500, "internal"),
    ],
)
def test_what_becomes_of_a_load_is_told(new: Lunchbox, old: Lunchbox, error: Exception, status: int, code: str) -> None:
    async def use(stage: Stage) -> None:
        stage.outcome = error
        refused = await stage.client.post("/models/load/3", headers=admin())
        assert (refused.status_code, refused.json()["error"]["code"]) == (status, code)
        assert "secret" not in refused.text
        assert refused.json()["error"].get("details", {}) == getattr(error, "details", {})
        check_names(refused, new)

    serve(new, old, use, **KEYS)


@pytest.mark.parametrize(
    ("path", "options", "status", "problem"),
    [
        ("/models/load/3", {"json": {"alive": True}}, 422, "`alive` is not a field of this route"),
        ("/models/load/3", {"json": {"live": "yes"}}, 422, "`live` is the string 'yes'; it must be"),
        ("/models/load/3", {"json": ["live"]}, 422, "the body is a list"),
        ("/models/load/3", {"content": b"{", "headers": {"content-type": "application/json"}}, 400, "not JSON"),
        ("/models/load/3", {"content": b"live=true"}, 415, "there is no Content-Type"),
        ("/models/load/" + "3" * 201, {}, 422, "the version has 201 characters"),
        ("/models/load/", {}, 422, "the version has 0 characters"),
        ("/models/load/3", {"headers": {"x-ekiben-timeout-ms": "soon"}}, 422, "X-Ekiben-Timeout-Ms is 'soon'"),
    ],
)
def test_a_wrong_order_is_refused(
    new: Lunchbox, old: Lunchbox, path: str, options: dict[str, Any], status: int, problem: str
) -> None:
    async def use(stage: Stage) -> None:
        refused = await stage.client.post(path, **options | {"headers": admin(**options.get("headers", {}))})
        assert refused.status_code == status
        assert problem in message(refused)
        assert stage.loads == []

    serve(new, old, use, **KEYS)


def test_other_methods_are_told_to_post(new: Lunchbox, old: Lunchbox) -> None:
    async def use(stage: Stage) -> None:
        refused = await stage.client.get("/models/load/3")
        assert (refused.status_code, refused.headers["allow"]) == (405, "POST")
        assert refused.json()["error"]["code"] == "method_not_allowed"

    serve(new, old, use)


def test_less_time_may_be_given(new: Lunchbox, old: Lunchbox) -> None:
    async def use(stage: Stage) -> None:
        for asked, given in (("1500", 1.5), ("999999999", 600.0)):
            await stage.client.post("/models/load/3", headers=admin(**{"X-Ekiben-Timeout-Ms": asked}))
            assert stage.loads[-1] == ("3", True, given)

    serve(new, old, use, **KEYS)


def test_a_load_goes_on_when_who_asked_for_it_goes_away(new: Lunchbox, old: Lunchbox) -> None:
    async def use(stage: Stage) -> None:
        stage.outcome = asyncio.Event()
        messages = [{"type": "http.request", "body": b"", "more_body": False}, {"type": "http.disconnect"}]

        async def receive() -> Any:
            if len(messages) == 1:
                await asyncio.sleep(0.05)
            return messages.pop(0)

        async def send(_: Any) -> None:
            raise AssertionError("nobody is there")

        headers = [(b"authorization", f"Bearer {ADMIN_KEY}".encode())]
        scope = {"type": "http", "method": "POST", "path": "/models/load/3", "headers": headers}
        app: Any = stage.client._transport.app  # type: ignore[attr-defined]
        await app(scope, receive, send)
        assert stage.loads == [("3", True, 600.0)]
        stage.outcome.set()
        await asyncio.sleep(0.05)
        assert stage.loads[-1] == "ended"

    serve(new, old, use, **KEYS)
