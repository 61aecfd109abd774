"""A small Ekiben that is watched: a real server, a real exporter, made-up Prefect and MLflow servers."""

from __future__ import annotations

import contextlib
import shutil
import socket
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from bentos.manifest import read_manifest
from tests.bentos.served import Served, open_server
from tests.flows.line_servers import Line, busy_line, serve_line
from tests.flows.test_exporter import Exporter, run_exporter
from tests.serving import bento_home, copy_lunchbox

ROOT = Path(__file__).parents[2]
DEPLOYMENTS = ROOT / "deployments"
TARGET_LABELS = {"job", "instance"}  # that Prometheus adds
OWN = {"up": TARGET_LABELS, "ALERTS": {"alertname", "alertstate", "severity"}}  # Prometheus' own metrics
BROKEN = "ekiben:7-77777777"


@dataclass
class Monitored:
    """What is watched."""

    served: Served
    exporter: Exporter
    line: Line
    model: str  # that is live, and the champion

    def scrape(self) -> str:
        """What both tell."""
        answer = httpx.get(f"{self.served.server.url}/metrics", timeout=30)
        answer.raise_for_status()
        return answer.text + self.exporter.scrape()

    def ask(self, path: str, body: Any, **headers: str) -> int:
        url = f"{self.served.server.url}{path}"
        return httpx.post(url, json=body, headers=headers, timeout=60).status_code


@contextlib.contextmanager
def monitored_line(folder: Path, box: Path) -> Iterator[Monitored]:
    """All of it, with something of everything behind it: answers, errors, refusals, a version that fails its checks."""
    from flows.core.packing import build_bento, store_model

    manifest = read_manifest(box)
    broken = copy_lunchbox(box, folder / "broken", version="7", run_id="7" * 32)
    with bento_home(folder / "home") as home:
        store_model(box, manifest)
        build_bento(manifest, root=ROOT)
        store_model(broken, read_manifest(broken))
    line = busy_line(manifest.tag, manifest.space_id)
    with (
        serve_line(line) as url,
        run_exporter(PREFECT_API_URL=f"{url}/api", MLFLOW_TRACKING_URI=url) as exporter,
        open_server(home, folder / "elsewhere", manifest.tag, workers=1, EKIBEN_CACHE_MB="1") as served,
    ):
        with (served.box(BROKEN) / "canary.json").open("a") as canary:
            canary.write(" ")  # its hash is wrong now
        monitored = Monitored(served, exporter, line, manifest.tag)
        exporter.wait_up("prefect", "mlflow")
        _exercise(monitored)
        yield monitored


def _exercise(monitored: Monitored) -> None:
    """Let each event happen that has a metric which does not exist before."""
    served = monitored.served
    for text in ("fresh bread", "fresh bread", "a slow train"):
        assert monitored.ask("/encode", {"texts": [text]}) == 200
    assert monitored.ask("/similarity", {"a": ["a"], "b": ["b"]}) == 200
    assert monitored.ask("/encode", {"texts": ["a"]}, **{"X-Ekiben-Expect-Space": "0" * 16}) == 409
    many = [f"text {number} " * 50 for number in range(200)]
    assert monitored.ask("/encode", {"texts": many}, **{"X-Ekiben-Timeout-Ms": "1"}) == 504
    host, _, port = served.server.url.removeprefix("http://").partition(":")
    with socket.create_connection((host, int(port)), timeout=30) as raw:
        raw.sendall(b"this is no HTTP\r\n\r\n")
        while raw.recv(4096):
            pass
    served.point(BROKEN)
    served.wait(lambda info: bool(info["refused"]))


@cache
def exposed_metrics(folder: Path, box: Path) -> dict[str, set[str]]:
    """Every metric that a server and the exporter expose, with its labels; started once for all who ask."""
    with monitored_line(folder, box) as monitored:
        return read_metrics(monitored.scrape())


def read_metrics(text: str) -> dict[str, set[str]]:
    """Sample names in a text of metrics, with all labels that their series have."""
    found: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found.setdefault(sample.name, set(TARGET_LABELS)).update(sample.labels)
    return found


def read_rules() -> list[dict[str, Any]]:
    groups = yaml.safe_load((DEPLOYMENTS / "prometheus" / "rules.yml").read_text(encoding="utf-8"))["groups"]
    return [rule for group in groups for rule in group["rules"]]


def find_tool(name: str) -> str:
    """Where `promtool` or `prometheus` is; skips the test when it is nowhere."""
    path = shutil.which(name)
    if path is None:
        pytest.skip(f"no {name} here; Debian: apt-get install --no-install-recommends prometheus")
    return path


def promtool(*arguments: str, cwd: Path, text: str | None = None) -> str:
    """Run promtool; return what it says. It must be content."""
    run = subprocess.run(
        [find_tool("promtool"), *arguments], cwd=cwd, input=text, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout
