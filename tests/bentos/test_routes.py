"""Two versions in a real server: brought by POST, listed, chosen, asked in the older space, and shadowed."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from bentos.aliases import Pointer, write_alias
from bentos.engine import Engine
from bentos.manifest import Manifest, read_manifest
from bentos.vectors import normalize
from tests.bentos.conftest import ROOT
from tests.bentos.shelves import make_map
from tests.bentos.test_apidoc import check_answer
from tests.serving import Server, bento_home, serve

ADMIN = {"Authorization": "Bearer an-admin-key-0123456789"}
TEXTS = ["bread", "a fast train"]


@pytest.fixture(scope="module")
def served(
    tiny_lunchbox_path: Path, successor_path: Path, manifest: Manifest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    """Version 1, from the source, with version 2 in the store; `challenger` is 2, and shadowed."""
    from flows.core.packing import store_model

    folder = tmp_path_factory.mktemp("routes")
    successor = read_manifest(successor_path)
    with bento_home(folder / "home") as home:
        store_model(successor_path, successor)
        store_model(tiny_lunchbox_path, manifest)
    fields = {name: getattr(successor, name) for name in Pointer.model_fields}
    write_alias(home, "ekiben", "challenger", Pointer(**fields))
    settings = {
        "EKIBEN_ADMIN_KEYS": ADMIN["Authorization"].removeprefix("Bearer "),
        "EKIBEN_MODEL_TAG": f"{manifest.name}-model:{manifest.bento_version}",
        "EKIBEN_SHADOW": "challenger",
        "EKIBEN_SHADOW_SHARE": "1",
        "EKIBEN_FOLLOW_EVERY_S": "0.2",
        "PYTHONPATH": str(ROOT),
    }
    with serve("bentos.service:EmbeddingService", home, folder, settings) as server:
        yield server


@pytest.fixture
def client(served: Server) -> Iterator[httpx.Client]:
    with served.client() as client:
        yield client


@pytest.fixture(scope="module")
def new(successor_path: Path) -> Engine:
    return Engine(successor_path, read_manifest(successor_path))


@pytest.fixture(scope="module")
def old(tiny_lunchbox_path: Path, manifest: Manifest) -> Engine:
    return Engine(tiny_lunchbox_path, manifest)


def wait_for(client: httpx.Client, condition: Any) -> Any:
    """The content of /models/info once it fulfils a condition."""
    deadline = time.monotonic() + 300
    while not condition(info := client.get("/models/info").json()) and time.monotonic() < deadline:
        client.post("/encode", json={"texts": [f"{time.monotonic_ns()} trains"]})
        time.sleep(0.05)
    assert condition(info), info
    return info


def encode(client: httpx.Client, **fields: Any) -> httpx.Response:
    response = client.post("/encode", json={"texts": TEXTS, **fields})
    assert response.status_code == 200, response.text
    return response


def test_the_shadow_is_loaded_and_told_of(client: httpx.Client, new: Engine, old: Engine) -> None:
    info = wait_for(client, lambda info: (info["shadow"]["requests"]["compared"] or 0) >= 5)
    shadow = info["shadow"]
    assert (shadow["model"], shadow["beside"]) == (new.manifest.tag, old.manifest.tag)
    assert (shadow["relation"], shadow["problem"]) == ("mapped", None)
    assert -1 <= shadow["cosine"]["min"] <= shadow["cosine"]["mean"] <= 1
    metrics = client.get("/metrics").text
    assert re.search(r'ekiben_shadow_requests_total{outcome="compared"} [1-9]', metrics)
    assert f'ekiben_shadow_cosine_count{{model="{new.manifest.tag}"}}' in metrics


def test_both_versions_are_loaded_listed_and_chosen(client: httpx.Client, new: Engine, old: Engine) -> None:
    loaded = client.post("/models/load/2", json={"live": False}, headers=ADMIN)
    assert loaded.status_code == 200, loaded.text
    assert (loaded.json()["model"], loaded.json()["live"]) == (new.manifest.tag, False)
    assert len(loaded.json()["workers"]["done"]) == 1
    assert loaded.headers["x-ekiben-model"] == old.manifest.tag
    document = client.get("/docs.json").json()
    check_answer(document, "/models/load/{version}", "POST", loaded)
    check_answer(document, "/models/info", "GET", client.get("/models/info"))
    names = document["components"]["schemas"]["EncodeRequest"]["properties"]["model"]["anyOf"][0]["enum"]
    assert {"ekiben", "1", "2", "challenger", new.manifest.tag, old.manifest.tag} <= set(names)
    cards = {card["id"]: card for card in client.get("/v1/models").json()["data"]}
    assert {name: card["model"] for name, card in cards.items()} == {
        "ekiben": old.manifest.tag,
        "challenger": new.manifest.tag,
        old.manifest.tag: old.manifest.tag,
        new.manifest.tag: new.manifest.tag,
    }
    for engine, name in ((old, None), (new, "2"), (new, "challenger"), (old, "v1")):
        answer = encode(client, model=name)
        assert answer.headers["x-ekiben-space"] == engine.manifest.space_id
        np.testing.assert_allclose(answer.json()["embeddings"], engine.embed(TEXTS), atol=1e-5)
    info = client.get("/models/info").json()
    assert {model["model"] for model in info["models"]} == {old.manifest.tag, new.manifest.tag}


def test_an_index_of_the_old_version_is_asked_on_after_the_change(
    client: httpx.Client, new: Engine, old: Engine, served: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = (ROOT / "docs" / "clients.md").read_text(encoding="utf-8")
    (recipe,) = re.findall(r"^```python\n((?:(?!```).)*def embed_for.*?)^```$", page, re.MULTILINE | re.DOTALL)
    monkeypatch.setenv("EKIBEN_URL", served.url)
    names: dict[str, Any] = {}
    exec(recipe, names)
    embed_for, space = names["embed_for"], old.manifest.space_id
    assert client.post("/models/load/1", json={"live": False}, headers=ADMIN).status_code == 200  # it shall stay
    changed = client.post("/models/load/2", headers=ADMIN)
    assert changed.status_code == 200, changed.text
    assert encode(client).headers["x-ekiben-model"] == new.manifest.tag
    answer = embed_for(client, space, TEXTS)
    assert (answer.headers["x-ekiben-model"], answer.headers["x-ekiben-space"]) == (new.manifest.tag, space)
    assert answer.headers["x-ekiben-adapted-from"] == new.manifest.space_id
    mapped = normalize(new.embed(TEXTS, normalize=True) @ make_map())
    np.testing.assert_allclose(answer.json()["embeddings"], mapped, atol=1e-5)
    exact = encode(client, model="1")
    np.testing.assert_allclose(exact.json()["embeddings"], old.embed(TEXTS), atol=1e-5)
    health = client.get("/health")
    assert health.json()["spaces"] == [new.manifest.space_id, space]
    assert health.headers["x-ekiben-model"] == health.json()["model"] == new.manifest.tag
    metrics = client.get("/metrics").text
    assert f'ekiben_answers_total{{model="{new.manifest.tag}",space="{space}"}}' in metrics
    back = client.post("/models/load/v1", headers=ADMIN)
    assert back.status_code == 200, back.text
    np.testing.assert_allclose(encode(client).json()["embeddings"], old.embed(TEXTS), atol=1e-5)


@pytest.mark.parametrize(
    ("version", "status", "code"), [("9", 404, "unknown_model"), ("no such thing", 404, "unknown_model")]
)
def test_a_version_that_is_nowhere_is_told_so(client: httpx.Client, version: str, status: int, code: str) -> None:
    refused = client.post(f"/models/load/{version}", headers=ADMIN)
    assert (refused.status_code, refused.json()["error"]["code"]) == (status, code)
    check_answer(client.get("/docs.json").json(), "/models/load/{version}", "POST", refused)


def test_these_routes_ask_for_their_keys(client: httpx.Client) -> None:
    assert client.post("/models/load/2").status_code == 401
    assert client.get("/models/info").status_code == 200, "this server asks nobody for an API key"
