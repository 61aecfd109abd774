"""A built Bento is asked and measured, beside another when there is one: real Bentos, real servers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from bentos.http import MODEL_HEADER, SPACE_HEADER
from bentos.lunchbox import read_canary
from bentos.manifest import Manifest, read_manifest, sha256_file, write_manifest
from flows.core.measuring import METRIC_NAMES, ROUNDS, Server, Serving, check_answers, measure_bentos
from flows.core.packing import build_bento, store_model, stored_path
from flows.errors import SmokeTestError
from tests.serving import bento_home, copy_lunchbox

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with bento_home(tmp_path_factory.mktemp("bentoml")) as home:
        yield home


@pytest.fixture(autouse=True)
def _in_home(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BENTOML_HOME", str(home))


def build(box: Path, home: Path) -> Manifest:
    manifest = read_manifest(box)
    with bento_home(home):
        store_model(box, manifest)
        build_bento(manifest, root=ROOT)
    return manifest


@pytest.fixture(scope="module")
def built(home: Path, tiny_lunchbox_path: Path) -> Manifest:
    """The manifest of the tiny lunchbox, whose Bento is in the store."""
    return build(tiny_lunchbox_path, home)


@pytest.fixture(scope="module")
def rival(home: Path, tiny_lunchbox_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    box = tmp_path_factory.mktemp("rival") / "box"
    return build(copy_lunchbox(tiny_lunchbox_path, box, version="2", run_id="f" * 32), home)


def test_two_bentos_are_measured_in_turns_whatever_the_users_own_server_is_set_to(
    built: Manifest, rival: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EKIBEN_API_KEYS", "a-key-of-the-users-own-server")
    monkeypatch.setenv("EKIBEN_FOLLOW", "champion")
    log = tmp_path / "serve.log"
    before = find_servers(built.tag) | find_servers(rival.tag)
    ours, theirs = measure_bentos((built.tag, built), (rival.tag, rival), log=log)
    assert theirs is not None
    for found in (ours, theirs):
        assert all(value > 0 for value in vars(found).values())
        assert found.bytes_per_vector == 4 * built.dim
    assert built.tag in log.read_text()
    assert rival.tag in (tmp_path / "serve.champion.log").read_text()
    assert find_servers(built.tag) | find_servers(rival.tag) == before


def test_a_rival_that_cannot_be_served_does_not_keep_the_candidate_from_its_place(
    built: Manifest, tmp_path: Path
) -> None:
    gone = ("ekiben:99-ffffffff", built)
    ours, theirs = measure_bentos((built.tag, built), gone, log=tmp_path / "serve.log")
    assert ours.p95_ms > 0
    assert theirs is None
    with pytest.raises(SmokeTestError, match=r"ekiben:99-ffffffff: .*ended with exit code 1.*not found"):
        measure_bentos(gone, None, log=tmp_path / "serve.log")


def test_a_bento_with_wrong_vectors_is_refused_and_ended(home: Path, built: Manifest, tmp_path: Path) -> None:
    stored = stored_path(built)
    kept = shutil.copytree(stored, home / "kept")
    canary = json.loads((stored / "canary.json").read_text())
    canary["vectors"] = [[-value for value in vector] for vector in canary["vectors"]]
    (stored / "canary.json").write_text(json.dumps(canary))
    files = built.files | {"canary.json": sha256_file(stored / "canary.json")}
    write_manifest(stored, built.model_copy(update={"files": files}))
    before = find_servers(built.tag)
    try:
        with pytest.raises(SmokeTestError, match=r"answered 503.*canary vectors are wrong.*log .* ends: ") as caught:
            measure_bentos((built.tag, built), None, log=tmp_path / "serve.log")
    finally:
        shutil.rmtree(stored)
        kept.rename(stored)
    assert "\n" not in str(caught.value)
    assert find_servers(built.tag) == before


def test_a_rival_that_ends_before_it_is_looked_at_has_no_figures_and_a_candidate_is_blamed(
    built: Manifest, rival: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    summarise = Server.summarise
    gone = rival.tag

    def find_it_gone(server: Server) -> Serving:
        if server.tag == gone:
            raise psutil.NoSuchProcess(server.pid)
        return summarise(server)

    monkeypatch.setattr("flows.core.measuring.ROUNDS", 1)
    monkeypatch.setattr("flows.core.measuring.BATCH_EVERY", 1)
    monkeypatch.setattr(Server, "summarise", find_it_gone)
    ours, theirs = measure_bentos((built.tag, built), (rival.tag, rival), log=tmp_path / "serve.log")
    assert ours.p95_ms > 0
    assert theirs is None
    gone = built.tag
    with pytest.raises(SmokeTestError, match=rf"{built.tag}: NoSuchProcess .*log .* ends: "):
        measure_bentos((built.tag, built), None, log=tmp_path / "serve.log")


@pytest.fixture
def answers(tiny_lunchbox_path: Path) -> dict[str, Any]:
    """What a good server of the tiny lunchbox answers; a test changes one part of it."""
    manifest = read_manifest(tiny_lunchbox_path)
    canary = read_canary(tiny_lunchbox_path, manifest)
    return {
        "headers": {MODEL_HEADER: manifest.tag, SPACE_HEADER: manifest.space_id},
        "embeddings": canary.vectors.tolist(),
        "similarity": [[1.0, 0.3]],
        "empty": (422, {"error": {"code": "invalid_request"}}),
    }


@pytest.fixture
def ask(answers: dict[str, Any], tiny_lunchbox_path: Path) -> Callable[[], None]:
    """Check a server that gives the answers, without a server."""

    def answer(request: httpx.Request) -> httpx.Response:
        body = json.loads(request.content)
        if request.url.path == "/similarity":
            return httpx.Response(200, json={"similarity": answers["similarity"]})
        if not body["texts"]:
            return httpx.Response(answers["empty"][0], json=answers["empty"][1])
        return httpx.Response(200, headers=answers["headers"], json={"embeddings": answers["embeddings"]})

    client = httpx.Client(base_url="http://server", transport=httpx.MockTransport(answer))
    return lambda: check_answers(client, read_manifest(tiny_lunchbox_path), tiny_lunchbox_path)


def test_good_answers_pass(ask: Callable[[], None]) -> None:
    ask()


@pytest.mark.parametrize(
    ("part", "wrong", "message"),
    [
        ("headers", {MODEL_HEADER: "ekiben:1-01234567", SPACE_HEADER: "another"}, "X-Ekiben-Space is 'another'"),
        ("headers", {}, "X-Ekiben-Model is None"),
        ("embeddings", [[1.0] * 32], r"shape \(1, 32\)"),
        ("similarity", [[0.5, 0.3]], "not \\[\\[1, ...\\]\\]"),
        ("similarity", [[1.0]], "not \\[\\[1, ...\\]\\]"),
        ("empty", (200, {}), "answered 200, expected 422"),
        ("empty", (422, {"error": {"code": "other"}}), "expected the code invalid_request"),
    ],
)
def test_a_wrong_answer_is_named(
    ask: Callable[[], None], answers: dict[str, Any], part: str, wrong: Any, message: str
) -> None:
    answers[part] = wrong
    with pytest.raises(SmokeTestError, match=message):
        ask()


@pytest.mark.parametrize("factor", [-1.0, float("nan")])
def test_wrong_canary_vectors_are_named(ask: Callable[[], None], answers: dict[str, Any], factor: float) -> None:
    answers["embeddings"] = [
        [value * factor if factor == factor else 0.0 for value in row] for row in answers["embeddings"]
    ]
    with pytest.raises(SmokeTestError, match="canary vector with cosine"):
        ask()


def test_every_text_is_new_to_the_server_and_the_first_round_does_not_count(tiny_lunchbox_path: Path) -> None:
    seen: list[str] = []

    def answer(request: httpx.Request) -> httpx.Response:
        seen.extend(json.loads(request.content)["texts"])
        return httpx.Response(200, json={})

    client = httpx.Client(base_url="http://server", transport=httpx.MockTransport(answer))
    manifest = read_manifest(tiny_lunchbox_path)
    server = Server("x", manifest, tiny_lunchbox_path, psutil.Process().pid, client, start_s=2.5)
    for number in range(ROUNDS + 1):
        server.run_round(number)
    assert len(set(seen)) == len(seen) > 300
    assert len({len(text) for text in seen}) == 1  # as long for all rivals
    assert (len(server.single_ms), len(server.batch_ms)) == (100, 4)
    assert server.summarise().start_s == 2.5


def test_every_figure_is_a_metric_of_the_run() -> None:
    serving = Serving(p95_ms=1.0, texts_per_s=2.0, start_s=3.0, memory_mb=4.0, bytes_per_vector=5.0)
    metrics = serving.as_metrics()
    assert metrics["serve/rss_mb"] == 4.0
    assert set(metrics) == set(METRIC_NAMES.values())


def find_servers(tag: str) -> set[int]:
    """Processes that serve `tag`, workers included; those of other tests are the same before and after."""
    return {process.pid for process in psutil.process_iter(["cmdline"]) if tag in (process.info["cmdline"] or [])}
