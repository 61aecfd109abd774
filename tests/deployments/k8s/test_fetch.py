"""What a pod fetches before it serves."""

from __future__ import annotations

import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import pytest

from tests.bentos.test_registry_client import Registry
from tests.deployments.k8s.manifests import K8S, ROOT


@pytest.fixture
def registry(tiny_lunchbox_path: Path, tmp_path: Path) -> Iterator[tuple[Registry, str]]:
    """An MLflow server's answers, at an address."""
    answers = Registry(tiny_lunchbox_path, tmp_path / "home")

    class Answers(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            answer = answers.answer(httpx.Request("GET", f"http://registry{self.path}"))
            self.send_response(answer.status_code)
            for name, value in answer.headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(answer.content)

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Answers) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield answers, f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def fetch(image: Path, state: Path, uri: str, follow: str) -> subprocess.CompletedProcess[str]:
    image.mkdir(exist_ok=True)
    environment = {
        "PYTHONPATH": str(ROOT),
        "EKIBEN_FOLLOW": follow,
        "EKIBEN_SHELF_FOLDER": str(state),
        "MLFLOW_TRACKING_URI": uri,
        "BENTOML_HOME": str(image / "home"),
    }
    command = [sys.executable, str(K8S / "base" / "serving" / "fetch.py")]
    return subprocess.run(command, cwd=image, env=environment, capture_output=True, text=True, timeout=120, check=False)


def test_a_pod_fetches_what_it_is_to_serve_before_it_serves(registry: tuple[Registry, str], tmp_path: Path) -> None:
    answers, uri = registry
    done = fetch(tmp_path / "image", tmp_path / "state", uri, "champion")
    assert done.returncode == 0, done.stderr
    place = tmp_path / "state" / f"ekiben-{answers.pointer.bento_version}"
    assert {path.name for path in place.iterdir()} == {path.name for path in answers.box.iterdir() if path.is_file()}
    assert answers.pointer.bento_version in done.stdout


def test_what_the_image_has_is_not_fetched(registry: tuple[Registry, str], tmp_path: Path) -> None:
    answers, uri = registry
    own = tmp_path / "image" / "bento" / "models" / "ekiben-model" / answers.pointer.bento_version
    own.parent.mkdir(parents=True)
    own.symlink_to(answers.box)
    done = fetch(tmp_path / "image", tmp_path / "state", uri, "champion")
    assert done.returncode == 0, done.stderr
    assert not answers.downloads


def test_without_a_champion_or_without_following_the_image_will_do(
    registry: tuple[Registry, str], tmp_path: Path
) -> None:
    _, uri = registry
    for follow, address in (("challenger", uri), ("", "http://127.0.0.1:9")):
        done = fetch(tmp_path / "image", tmp_path / "state", address, follow)
        assert done.returncode == 0, done.stderr
        assert "the image's version will be served" in done.stdout


def test_a_pod_whose_registry_is_away_waits_and_says_why(tmp_path: Path) -> None:
    done = fetch(tmp_path / "image", tmp_path / "state", "http://127.0.0.1:9", "champion")
    assert done.returncode == 1
    assert re.fullmatch(
        r"champion cannot be fetched: the registry http://127.0.0.1:9 cannot be used: .*\n", done.stderr
    )
