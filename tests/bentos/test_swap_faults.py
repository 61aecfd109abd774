"""What can go wrong with a version that a real server follows: the one before goes on, and it is said why."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

from bentos.manifest import CANARY_FILE, MANIFEST_FILE, Manifest, read_manifest, sha256_file
from tests.bentos.served import Served, open_server
from tests.bentos.traffic import Traffic

pytestmark = pytest.mark.slow
TEXTS = ["bread and milk", "a fast train", "the quick brown fox", "a window of the house"]


@pytest.fixture(scope="module")
def one(manifest: Manifest) -> str:
    return manifest.tag


@pytest.fixture(scope="module")
def two(successor_path: Path) -> str:
    return read_manifest(successor_path).tag


@pytest.fixture(scope="module")
def served(built_home: Path, successor_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """Two workers that follow the alias in the local store, where version 2 is."""
    folder = tmp_path_factory.mktemp("faults")
    home = Path(shutil.copytree(built_home, folder / "home", symlinks=True))
    shutil.rmtree(home / "models" / "ekiben-model" / "2-ffffffff")
    shutil.copytree(successor_path, home / "models" / "ekiben-model" / read_manifest(successor_path).bento_version)
    with open_server(home, folder / "cwd", "ekiben:1-01234567", workers=2) as served:
        yield served


# --- a version that is broken


def alter(box: Path) -> None:
    path = box / "model.fp32.onnx"
    path.write_bytes(path.read_bytes()[:-1] + b"\0")


def rewrite(box: Path, name: str, change: Callable[[Any], None]) -> None:
    path, manifest_path = box / name, box / MANIFEST_FILE
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    if name != MANIFEST_FILE:
        manifest = json.loads(manifest_path.read_text())
        manifest["files"][name] = sha256_file(path)
        manifest_path.write_text(json.dumps(manifest))


def corrupt(box: Path) -> None:
    (box / "model.fp32.onnx").write_bytes(b"no model")
    digest = sha256_file(box / "model.fp32.onnx")
    rewrite(box, MANIFEST_FILE, lambda manifest: manifest["files"].update({"model.fp32.onnx": digest}))


BROKEN: list[tuple[str, Callable[[Path], None], str]] = [
    ("wrong hash", alter, "model.fp32.onnx"),
    ("corrupt file", corrupt, "model.fp32.onnx cannot be loaded"),
    ("missing file", lambda box: (box / "tokenizer.json").unlink(), "tokenizer.json is missing"),
    ("older layout", lambda box: rewrite(box, MANIFEST_FILE, lambda m: m.update(layout=0)), "layout 0"),
    ("newer layout", lambda box: rewrite(box, MANIFEST_FILE, lambda m: m.update(layout=9)), "layout 9"),
    ("bad canary", lambda box: rewrite(box, CANARY_FILE, lambda c: c["vectors"].reverse()), "canary vectors are wrong"),
    ("another version", lambda box: rewrite(box, MANIFEST_FILE, lambda m: m.update(run_id="a" * 32)), "its run_id is"),
]


@pytest.mark.parametrize(("spoil", "reason"), [row[1:] for row in BROKEN], ids=[row[0] for row in BROKEN])
def test_a_broken_version_is_refused_and_the_one_before_goes_on(
    served: Served, successor_path: Path, one: str, two: str, spoil: Callable[[Path], None], reason: str
) -> None:
    box = served.box(two)
    served.point(one)
    served.wait_live(one)
    pointer_at_two = read_manifest(box)
    try:
        spoil(box)
        with Traffic(served.server.url, TEXTS, connections=4, models=(None, "champion")) as traffic:
            write_pointer(served, pointer_at_two)
            info = served.wait(lambda info: any(each["model"] == two for each in info["refused"]))
            time.sleep(1)
            by_hand = served.load(two)
        assert {(shot.status, shot.model) for shot in traffic.shots} == {(200, one)}
        (refused,) = info["refused"]
        assert reason in refused["reason"]
        assert refused["attempts"] == 1
        assert reason in info["following"]["error"]
        assert by_hand.status_code == 422
        assert by_hand.json()["error"]["code"] == "version_refused"
        assert reason in by_hand.json()["error"]["message"]
        assert f'ekiben_version_refused{{model="{two}"}} 1.0' in served.client.get("/metrics").text
        assert reason in served.server.log.read_text()
        assert served.client.get("/readyz").status_code == 200
    finally:
        shutil.rmtree(box)
        shutil.copytree(successor_path, box)
    served.wait_live(two)  # once it is well, nobody has to do anything
    assert served.info()["refused"] == []


def write_pointer(served: Served, manifest: Manifest) -> None:
    from bentos.aliases import write_alias
    from bentos.sources import point_at

    write_alias(served.home, "ekiben", "champion", point_at(manifest))


def test_a_version_that_is_not_there_is_named(served: Served, one: str) -> None:
    served.load(one)
    manifest = read_manifest(served.box(one))
    write_pointer(served, manifest.model_copy(update={"version": "9", "run_id": "9" * 32}))
    info = served.wait(lambda info: "9-99999999" in str(info["following"]["error"]))
    assert "not in the model store" in info["following"]["error"]
    assert info["live"] == one
    assert served.load("9").json()["error"]["code"] == "unknown_model"
    served.point(one)
    served.wait(lambda info: info["following"]["error"] is None)


# --- a registry that is away, and a disk that is full


@dataclass
class FakeRegistry:
    """As much of MLflow as a server asks; `tests/bentos/test_swap_registry.py` has the real one."""

    box: Path
    version: str = "1"
    away: bool = False
    port: int = 0
    asked: list[str] = field(default_factory=list)

    def answer(self, path: str, query: dict[str, str]) -> tuple[int, bytes]:
        self.asked.append(path)
        if self.away:
            return 503, b"{}"
        if path == "/get-artifact":
            return 200, (self.box / Path(query["path"]).name).read_bytes()
        if path.endswith("artifacts/list"):
            files = [{"path": f"lunchbox/{p.name}", "file_size": p.stat().st_size} for p in self.box.iterdir()]
            return 200, json.dumps({"files": files}).encode()
        manifest = read_manifest(self.box)
        tags = [{"key": "space_id", "value": manifest.space_id}, {"key": "bento_tag", "value": manifest.tag}]
        version = {"version": manifest.version, "run_id": manifest.run_id, "tags": tags}
        if path.endswith("registered-models/get"):
            aliases = [{"alias": "champion", "version": manifest.version}]
            return 200, json.dumps({"registered_model": {"aliases": aliases}}).encode()
        return 200, json.dumps({"model_version": version}).encode()


@contextlib.contextmanager
def run_registry(registry: FakeRegistry) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            url = urlsplit(self.path)
            status, body = registry.answer(url.path, {name: value[0] for name, value in parse_qs(url.query).items()})
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", registry.port), Handler)
    registry.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{registry.port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture
def home(built_home: Path, tmp_path: Path) -> Path:
    """A home that has version 1 only."""
    home = Path(shutil.copytree(built_home, tmp_path / "home", symlinks=True))
    shutil.rmtree(home / "models" / "ekiben-model" / "2-ffffffff")
    return home


def test_a_registry_that_comes_and_goes(home: Path, tmp_path: Path, successor_path: Path, one: str, two: str) -> None:
    registry = FakeRegistry(Path(shutil.copytree(successor_path, tmp_path / "artifacts")))
    with run_registry(registry) as uri:
        pass  # nobody listens there
    with open_server(home, tmp_path / "cwd", one, workers=2, MLFLOW_TRACKING_URI=uri) as served:
        info = served.wait(lambda info: info["following"]["failures"] > 1)
        assert "cannot be used: ConnectError" in info["following"]["error"]
        assert info["live"] == one
        assert served.client.get("/readyz").status_code == 200
        by_hand = served.load("2")
        assert by_hand.status_code == 503
        assert "cannot be looked up" in by_hand.json()["error"]["message"]
        assert "ekiben_follow_failures 0.0" not in served.client.get("/metrics").text
        with run_registry(registry):
            served.wait_live(two)
            info = served.wait(lambda info: info["following"]["error"] is None)
            assert info["following"]["source"] == uri
            assert (home / "ekiben" / f"ekiben-{two.partition(':')[2]}" / MANIFEST_FILE).is_file()
            registry.away = True
            served.wait(lambda info: "answered 503" in str(info["following"]["error"]))
        assert served.client.post("/encode", json={"texts": TEXTS}).headers["x-ekiben-model"] == two
        # what was fetched is there when the registry is away: a worker that is started anew needs nothing else
    with open_server(home, tmp_path / "cwd", one, workers=1, MLFLOW_TRACKING_URI=uri) as served:
        assert served.info()["live"] == two, "it was the champion when it was last served here"
    shutil.rmtree(home / "ekiben" / "last-seen")
    with open_server(home, tmp_path / "cwd", one, workers=1, MLFLOW_TRACKING_URI=uri) as served:
        assert served.info()["live"] == one, "nobody says what the champion is"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount a small disk")
def test_a_disk_that_is_full(home: Path, tmp_path: Path, successor_path: Path, one: str, two: str) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    size = sum(path.stat().st_size for path in successor_path.iterdir()) // 2
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(disk)], check=False)
    if mounted.returncode:
        pytest.skip("no disk can be mounted here")
    try:
        registry = FakeRegistry(successor_path)
        with (
            run_registry(registry) as uri,
            open_server(
                home, tmp_path / "cwd", one, workers=2, MLFLOW_TRACKING_URI=uri, EKIBEN_SHELF_FOLDER=str(disk)
            ) as served,
        ):
            info = served.wait(lambda info: info["following"]["failures"] > 1)
            assert "MiB are free there: make room, or set EKIBEN_SHELF_FOLDER" in info["following"]["error"]
            assert (info["live"], info["refused"]) == (one, [])
            by_hand = served.load("2")
            assert by_hand.status_code == 503
            assert "EKIBEN_SHELF_FOLDER" in by_hand.json()["error"]["message"]
            subprocess.run(["mount", "-o", "remount,size=200m", str(disk)], check=True)
            served.wait_live(two)
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=False)


def test_a_file_that_is_altered_on_its_way(
    home: Path, tmp_path: Path, successor_path: Path, one: str, two: str
) -> None:
    registry = FakeRegistry(Path(shutil.copytree(successor_path, tmp_path / "artifacts")))
    alter(registry.box)
    with (
        run_registry(registry) as uri,
        open_server(home, tmp_path / "cwd", one, workers=1, MLFLOW_TRACKING_URI=uri) as served,
    ):
        info = served.wait(lambda info: info["refused"] != [])
        assert "model.fp32.onnx" in info["refused"][0]["reason"]
        assert "was altered there or on its way" in info["refused"][0]["reason"]
        assert info["live"] == one
        shutil.copy(successor_path / "model.fp32.onnx", registry.box)
        (registry.box / "added-since").touch()  # the listing of the artifacts changes
        served.wait_live(two)
