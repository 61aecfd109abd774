"""The OpenAPI document: it is whole, it follows settings and model, and real answers are as it says."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from jsonschema import Draft202012Validator, ValidationError

from bentos.apidoc import build_document
from bentos.doors import DOORS, Door
from bentos.manifest import Manifest
from bentos.openai import EmbeddingsRequest
from bentos.settings import ServeSettings
from tests.bentos.conftest import LIMITS, ROOT
from tests.serving import Server

KEY = "0123456789abcdef0123456789abcdef"
DEFAULTS = ServeSettings.model_construct()
SERVED = ServeSettings.model_construct(**{name.removeprefix("EKIBEN_").lower(): int(LIMITS[name]) for name in LIMITS})


def walk(value: Any) -> Iterator[Any]:
    yield value
    for below in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from walk(below)


def accepts(document: dict[str, Any], schema: dict[str, Any], value: Any) -> bool:
    """Whether `value` is what a schema of the document says."""
    return bool(Draft202012Validator({**schema, "components": document["components"]}).is_valid(value))


def request_schema(path: str, document: dict[str, Any]) -> dict[str, Any]:
    schema: dict[str, Any] = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
    return schema


def test_every_reference_leads_somewhere_and_no_mark_is_left() -> None:
    for settings in (DEFAULTS, DEFAULTS.model_copy(update={"api_keys": KEY})):
        document = build_document(settings)
        for schema in document["components"]["schemas"].values():
            Draft202012Validator.check_schema(schema)
        for value in walk(document):
            if isinstance(value, dict):
                assert not [key for key in value if key in ("x-limit", "x-any-of")]
                if "$ref" in value:
                    place: Any = document
                    for part in value["$ref"].removeprefix("#/").split("/"):
                        place = place[part]


def test_names_of_operations_are_unique() -> None:
    operations = [operation for path in build_document(DEFAULTS)["paths"].values() for operation in path.values()]
    names = [operation["operationId"] for operation in operations]
    assert len(set(names)) == len(names) > len(DOORS)


@pytest.mark.parametrize("door", DOORS, ids=lambda door: door.path)
def test_the_example_of_every_door_is_good_and_shorter_or_longer_ones_are_not(door: Door, manifest: Manifest) -> None:
    document = build_document(SERVED, manifest)
    schema = request_schema(door.path, document)
    door.request.model_validate(door.example)
    assert accepts(document, schema, dict(door.example))
    assert not accepts(document, schema, {})
    assert not accepts(document, schema, {**door.example, "colour": "red"})
    for name, value in door.example.items():
        if name in ("model", "top_k"):
            continue
        for text in ("", " \n", "a\0", "x" * (SERVED.max_chars + 1)):
            bad = text if isinstance(value, str) else [text]
            assert not accepts(document, schema, {**door.example, name: bad}), (name, bad)
        if isinstance(value, list):
            assert accepts(document, schema, {**door.example, name: ["x"] * SERVED.max_texts})
            assert not accepts(document, schema, {**door.example, name: ["x"] * (SERVED.max_texts + 1)})
            assert not accepts(document, schema, {**door.example, name: []})


def test_the_forms_of_openais_input_are_all_told() -> None:
    document = build_document(DEFAULTS)
    schema = request_schema("/v1/embeddings", document)
    for value in ("a", ["a"], [1], [[1]]):
        EmbeddingsRequest.model_validate({"input": value})
        assert accepts(document, schema, {"input": value})
    for value in (None, 1, [], [[]], [None], ["a", 1], {}):
        assert not accepts(document, schema, {"input": value})


def test_the_model_says_which_prompts_names_and_dimensions_pass(manifest: Manifest) -> None:
    prompted = manifest.model_copy(update={"prompts": {"query": "find: "}})
    document = build_document(DEFAULTS, prompted)
    schema = request_schema("/encode", document)

    def passes(**fields: Any) -> bool:
        return accepts(document, schema, {"texts": ["a"], **fields})

    assert passes(prompt="query", prompt_text=None, model=prompted.tag, dimensions=prompted.dim)
    assert passes(space=prompted.space_id)
    assert not passes(space="0" * 16)
    assert passes(prompt=None, prompt_text="", model="ekiben", dimensions=None)
    for wrong in ({"prompt": "x"}, {"prompt": "query", "prompt_text": ""}, {"model": "x"}, {"dimensions": 8}):
        assert not passes(**wrong)
    document = build_document(DEFAULTS.model_copy(update={"allow_truncated_dimensions": True}), manifest)
    assert passes(dimensions=8)
    assert not passes(dimensions=prompted.dim + 1)
    assert not passes(prompt="query"), "a model without prompts knows no name of one"
    assert passes(prompt=None)


def test_all_versions_that_are_loaded_give_their_names_and_spaces(manifest: Manifest) -> None:
    trained = manifest.model_copy(update={"nested_dims": [8, 16]})
    names, spaces = ["ekiben", "champion", "previous"], [manifest.space_id, "f" * 16]
    document = build_document(DEFAULTS, trained, names=names, spaces=spaces)
    schema = request_schema("/encode", document)
    for passes, fields in (
        (True, {"model": "previous"}),
        (True, {"space": "f" * 16}),
        (True, {"dimensions": 16}),
        (True, {"dimensions": manifest.dim}),
        (False, {"model": "challenger"}),
        (False, {"space": "0" * 16}),
        (False, {"dimensions": 12}),
    ):
        assert accepts(document, schema, {"texts": ["a"], **fields}) == passes, fields
    predict = request_schema("/predict", document)
    assert accepts(document, predict, {"text": "a", "model_version": "champion", "space": spaces[1]})


def test_a_version_is_loaded_by_admins_whether_others_have_keys_or_not() -> None:
    for callers in ({}, {"api_keys": KEY}):
        for source in ({"admin_keys": KEY}, {"admin_keys_file": Path("keys")}):
            document = build_document(DEFAULTS.model_copy(update={**callers, **source}))
            load = document["paths"]["/models/load/{version}"]["post"]
            assert ("security" in load, "401" in load["responses"]) == (True, True)
            assert "bearer" in document["components"]["securitySchemes"]
            assert ("security" in document["paths"]["/encode"]["post"]) == bool(callers)
    told = {status: answer["description"] for status, answer in load["responses"].items()}
    assert ("`busy`" in told["409"], "`version_refused`" in told["422"], "`load_incomplete`" in told["504"]) == (
        True,
    ) * 3
    assert "space_mismatch" not in told["409"]
    encode = document["paths"]["/encode"]["post"]["responses"]
    assert "busy" not in encode["409"]["description"]
    assert "X-Ekiben-Adapted-From" in encode["200"]["headers"]


def test_keys_are_asked_for_only_when_there_are_keys() -> None:
    open_document = build_document(DEFAULTS)
    assert "securitySchemes" not in open_document["components"]
    assert all("security" not in value for value in walk(open_document) if isinstance(value, dict))
    for source in ({"api_keys": KEY}, {"api_keys_file": Path("keys")}):
        paths = build_document(DEFAULTS.model_copy(update=source))["paths"]
        for path, operations in paths.items():
            for operation in operations.values():
                protected = path not in ("/health", "/livez", "/readyz", "/metrics", "/models/load/{version}")
                assert ("security" in operation) == ("401" in operation["responses"]) == protected, path


def test_errors_of_openais_doors_have_type_and_param() -> None:
    paths = build_document(DEFAULTS)["paths"]
    for path, operations in paths.items():
        for operation in operations.values():
            for status, answer in operation["responses"].items():
                if status >= "400" and (path, status) != ("/health", "503"):
                    name = "OpenAIError" if path.startswith("/v1/") else "Error"
                    schema = answer["content"]["application/json"]["schema"]
                    assert schema == {"$ref": f"#/components/schemas/{name}"}


# --- the served document, and real answers


@pytest.fixture
def client(server: Server) -> Iterator[httpx.Client]:
    with server.client() as client:
        yield client


@pytest.fixture(scope="session")
def document(manifest: Manifest) -> dict[str, Any]:
    return build_document(SERVED, manifest)


def check_answer(document: dict[str, Any], path: str, method: str, response: httpx.Response) -> None:
    """Compare one answer with what the document says of it: status, media type, body, headers."""
    answers = document["paths"][path][method.lower()]["responses"]
    assert str(response.status_code) in answers, (path, response.text)
    told = answers[str(response.status_code)]
    media_type = response.headers["content-type"].split(";")[0]
    assert media_type in told["content"], (path, media_type)
    if media_type == "application/json":
        schema = told["content"][media_type]["schema"]
        validator = Draft202012Validator({**schema, "components": document["components"]})
        try:
            validator.validate(response.json())
        except ValidationError as error:
            pytest.fail(f"{method} {path} {response.status_code}: {error.message}")
    for name in ("X-Ekiben-Model", "X-Ekiben-Space", "X-Request-Id"):
        assert name in told["headers"]
        assert response.headers.get(name), (path, name)


def test_the_served_document_is_this_one(client: httpx.Client, document: dict[str, Any]) -> None:
    assert client.get("/docs.json").json() == document


@pytest.mark.parametrize("door", DOORS, ids=lambda door: door.path)
def test_good_and_bad_requests_are_answered_as_told(client: httpx.Client, document: dict[str, Any], door: Door) -> None:
    path = door.path
    good = dict(door.example)
    statuses = []
    for options in (
        {"json": good},
        *({"json": good, "headers": {"accept": offered}} for offered in door.offered),
        {"json": good, "headers": {"accept": "text/csv"}},
        {"json": good, "headers": {"x-ekiben-expect-space": "0" * 16}},
        {"json": {}},
        {"content": b"{", "headers": {"content-type": "application/json"}},
        {"content": b"a", "headers": {"content-type": "text/plain"}},
        {"json": good | {"model" if "model" in door.request.model_fields else "model_version": "nobody"}},
        {"content": b" " * 30_000, "headers": {"content-type": "application/json"}},
    ):
        response = client.post(path, **options)  # type: ignore[arg-type]
        check_answer(document, path, "POST", response)
        statuses.append(response.status_code)
    named = 404 if door.names_model else 422
    assert statuses == [200] * (1 + len(door.offered)) + [406, 409, 422, 400, 415, named, 413]


@pytest.mark.parametrize(
    ("path", "asked", "status"),
    [
        ("/v1/models", "/v1/models", 200),
        ("/v1/models/{model}", "/v1/models/ekiben", 200),
        ("/v1/models/{model}", "/v1/models/nobody", 404),
        ("/models/info", "/models/info", 200),
        ("/health", "/health", 200),
        ("/livez", "/livez", 200),
        ("/readyz", "/readyz", 200),
        ("/metrics", "/metrics", 200),
    ],
)
def test_the_other_routes_are_answered_as_told(
    client: httpx.Client, document: dict[str, Any], path: str, asked: str, status: int
) -> None:
    response = client.get(asked)
    assert response.status_code == status
    check_answer(document, path, "GET", response)


@pytest.mark.parametrize(("body", "status"), [(None, 403), ({"live": False}, 403)])
def test_without_admin_keys_no_version_is_loaded(
    client: httpx.Client, document: dict[str, Any], body: Any, status: int
) -> None:
    response = client.post("/models/load/2", **({} if body is None else {"json": body}))
    assert response.status_code == status
    check_answer(document, "/models/load/{version}", "POST", response)


REQUEST = re.compile(r"3000(/\S+)(.*?) -d '(.*?)'", re.DOTALL)
EXAMPLE = re.compile(r"```sh\n(curl .*?)```\n(?:```json\n(.*?)```)?", re.DOTALL)


def list_names(value: Any) -> set[str]:
    return {name for each in walk(value) if isinstance(each, dict) for name in each}


def test_the_requests_of_the_page_are_answered_with_the_fields_that_it_shows(client: httpx.Client) -> None:
    seen = set()
    for command, shown in EXAMPLE.findall((ROOT / "docs" / "api.md").read_text(encoding="utf-8")):
        found = REQUEST.search(command)
        assert found, command
        path, options, body = found.groups()
        headers = dict(re.findall(r"-H '(\S+): (\S+)'", options))
        response = client.post(path, content=body, headers=headers)
        assert response.status_code == 200, (command, response.text)
        seen.add(path)
        if shown:
            assert set(re.findall(r'"(\w+)":', shown)) == list_names(response.json()), path
        else:
            assert np.load(io.BytesIO(response.content)).dtype == np.float16
    assert seen == {door.path for door in DOORS if door.method is not None}


def test_the_openapi_page_is_served(client: httpx.Client) -> None:
    assert "swagger" in client.get("/").text
