"""docs/clients.md holds: its blocks are run as they stand, against a real server with keys and one without."""

from __future__ import annotations

import contextlib
import json
import re
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from bentoml.exceptions import BentoMLException

from bentos.engine import Engine
from bentos.manifest import Manifest
from tests.bentos.conftest import ROOT
from tests.serving import Server, serve
from tests.soak.client import render_request
from tests.soak.leg import SOURCE
from tests.soak.spells import HANG_ONCE

PAGE = (ROOT / "docs" / "clients.md").read_text(encoding="utf-8")
KEY = "a-key-for-the-clients-0123"
BLOCKS = [
    (re.findall(r"^#+ (.*)$", PAGE[: block.start()], re.MULTILINE)[-1], block[1], block[2])
    for block in re.finditer(r"^```(python|sh)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
]
PYTHON = [(title, code) for title, language, code in BLOCKS if language == "python"]
SHELL = [code for _, language, code in BLOCKS if language == "sh" and "curl" in code]


@pytest.fixture(scope="module")
def guarded(built_home: Path, manifest: Manifest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The same model with a key, one request at a time, and a word that hangs the thread that computes it."""
    folder = tmp_path_factory.mktemp("guarded")
    settings = {
        "EKIBEN_API_KEYS": KEY,
        "EKIBEN_MAX_REQUESTS": "1",
        "EKIBEN_MODEL_TAG": f"{manifest.name}-model:{manifest.bento_version}",
        "EKIBEN_THREADS": "8",  # each hold hangs one
        "EKIBEN_STALL_S": "8",
        "PYTHONPATH": str(ROOT),
        "SOAK_EVENTS": str(folder / "events.jsonl"),
        "SOAK_HANG_S": "8",
    }
    with serve(SOURCE, built_home, folder, settings) as server:
        yield server


@pytest.fixture(scope="module")
def engine(tiny_lunchbox_path: Path, manifest: Manifest) -> Engine:
    return Engine(tiny_lunchbox_path, manifest)


@pytest.fixture
def point(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Sets what the blocks read from the environment."""

    def set_to(server: Server, key: str | None) -> None:
        monkeypatch.setenv("EKIBEN_URL", server.url)
        monkeypatch.setenv("EKIBEN_API_KEY", key) if key else monkeypatch.delenv("EKIBEN_API_KEY", raising=False)

    return set_to


@contextlib.contextmanager
def kept_busy(server: Server) -> Iterator[None]:
    """Hold the one request that the guarded server takes at a time, with a text that hangs."""
    host, port = server.url.removeprefix("http://").split(":")
    body = json.dumps({"texts": [f"{HANG_ONCE} {time.monotonic_ns()}"]}).encode()
    headers = {"X-API-Key": KEY, "Content-Type": "application/json"}
    with (
        socket.create_connection((host, int(port)), timeout=10) as connection,
        httpx.Client(base_url=server.url, headers=headers) as client,
    ):
        connection.sendall(render_request("POST", "/encode", body, headers))
        deadline = time.monotonic() + 10
        while client.post("/encode", json={"texts": ["bread"]}).status_code != 429:
            assert time.monotonic() < deadline, "the text does not hang"
        yield


def run(code: str) -> dict[str, Any]:
    names: dict[str, Any] = {"__name__": "recipe"}
    exec(compile(code, "docs/clients.md", "exec"), names)
    return names


def test_the_page_has_a_recipe_for_every_client() -> None:
    code = "\n".join(code for _, code in PYTHON)
    for client in ("httpx", "bentoml", "openai", "langchain_openai", "llama_index", "numpy"):
        assert re.search(rf"^(import|from) {client}\b", code, re.MULTILINE), client
    assert len(SHELL) == 1


@pytest.mark.filterwarnings("ignore")  # of the libraries around the clients
@pytest.mark.parametrize("kind", ["open", "guarded"])
@pytest.mark.parametrize(("title", "code"), PYTHON, ids=[f"{title}-{row}" for row, (title, _) in enumerate(PYTHON)])
def test_a_recipe_gives_the_vectors_of_the_model(
    title: str,
    code: str,
    kind: str,
    server: Server,
    guarded: Server,
    engine: Engine,
    point: Any,
    capsys: pytest.CaptureFixture[str],
) -> None:
    point(*((server, None) if kind == "open" else (guarded, KEY)))
    names = run(code)
    assert capsys.readouterr().out.strip(), "it shows something"
    if "vectors" in names:
        np.testing.assert_allclose(names["vectors"], engine.embed(names["texts"]), atol=1e-5)
    else:
        assert "UnprocessableEntityError" in code


@pytest.mark.parametrize("kind", ["open", "guarded"])
def test_curl_gives_the_vectors_of_the_model(
    kind: str, server: Server, guarded: Server, engine: Engine, point: Any
) -> None:
    point(*((server, None) if kind == "open" else (guarded, KEY)))
    (code,) = SHELL
    done = subprocess.run(["bash", "-euo", "pipefail", "-c", code], capture_output=True, timeout=60, check=True)
    vectors = json.loads(done.stdout)["embeddings"]
    np.testing.assert_allclose(vectors, engine.embed(["senior Go developer", "barista"]), atol=1e-5)


def test_the_page_shows_the_servers_own_words(guarded: Server, point: Any, capsys: pytest.CaptureFixture[str]) -> None:
    point(guarded, KEY)
    for _, code in PYTHON:
        if "error" in code and "asyncio" not in code:
            run(code)
    shown = capsys.readouterr().out
    assert "422 invalid_request input[1] `input[1]` is empty" in shown
    assert "422 invalid_request: `texts[1]` is the number 7" in shown
    assert "422" in shown
    assert "`documents` is an empty list" in shown


@pytest.mark.parametrize("client", ["openai-0", "httpx-5", "BentoML-6", "Many texts-7"])
def test_a_recipe_waits_while_the_server_is_full(client: str, guarded: Server, engine: Engine, point: Any) -> None:
    title, _, row = client.rpartition("-")
    assert PYTHON[int(row)][0] == title
    point(guarded, KEY)
    with contextlib.ExitStack() as busy:
        busy.enter_context(kept_busy(guarded))
        timer = threading.Timer(0.5, busy.close)
        timer.start()
        names = run(PYTHON[int(row)][1])
        timer.join()
    np.testing.assert_allclose(names["vectors"], engine.embed(names["texts"]), atol=1e-5)


def test_what_clients_raise_when_they_do_not_wait(guarded: Server) -> None:
    import bentoml

    once = openai.OpenAI(base_url=f"{guarded.url}/v1", api_key=KEY, max_retries=0)
    with bentoml.SyncHTTPClient(guarded.url, token=KEY) as plain, kept_busy(guarded):
        with pytest.raises(openai.RateLimitError, match="EKIBEN_MAX_REQUESTS") as limited:
            once.embeddings.create(model="ekiben", input="bread")
        assert limited.value.response.headers["Retry-After"] == "1"
        with pytest.raises(BentoMLException, match="EKIBEN_MAX_REQUESTS") as refused:
            plain.encode(texts=["bread"])
        assert refused.value.error_code == 429


def test_what_clients_raise_without_a_key(guarded: Server) -> None:
    import bentoml

    with pytest.raises(openai.AuthenticationError, match="no API key that is known here"):
        openai.OpenAI(base_url=f"{guarded.url}/v1", api_key="none").embeddings.create(model="ekiben", input="bread")
    with bentoml.SyncHTTPClient(guarded.url) as client, pytest.raises(BentoMLException, match="no API key") as refused:
        client.encode(texts=["bread"])
    assert refused.value.error_code == 401


def test_langchains_default_is_refused_with_the_cure(server: Server) -> None:
    """It sends the ids of OpenAI's tokenizer; these are of its first words."""
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none")
    with pytest.raises(openai.UnprocessableEntityError, match="check_embedding_ctx_length=False"):
        client.embeddings.create(model="ekiben", input=[[9906, 1917]])
