"""The stack of docker-compose.yml, started once for all tests of this folder, from an empty folder on."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from bentos.manifest import read_manifest
from deployments.stack_env import read_names, write_env
from tests.flows.support import write_pairs
from tests.serving import bento_home
from tests.stack.compose import load_services
from tests.stack.line import Callers, Encoder, Prefect, quick_pipeline, quick_train, say
from tests.stack.native import NativeStack, copy_image_files, ended, find_missing, make_database
from tests.stack.project import ROOT, clone, commit, copy_working_tree, dvc

LOGS = ROOT / "build" / "stack-logs"
PAIRS = "data/team/pairs.csv"
ORDER = ("test_life", "test_outages", "test_secrets", "test_backup")  # each begins with what the one before has left


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the tests of the stack in the order of its life, after or before all others as they come."""
    ours = [item for item in items if item.path.parent.name == "stack" and item.path.stem in ORDER]
    places = [number for number, item in enumerate(items) if item in ours]
    for place, item in zip(places, sorted(ours, key=lambda item: ORDER.index(item.path.stem)), strict=True):
        items[place] = item


@dataclass
class Line:
    """The running stack and what the tests know of it."""

    stack: NativeStack
    team: Path  # the checkout in which data are added
    data_rev: str  # commit that has the team's data
    secrets: dict[str, str]  # of .env
    tiny_model: Path
    image_tag: str  # of the Bento that stands for the encoder's image
    prefect: Prefect
    encoder: Encoder
    callers: Callers | None = None
    known: dict[str, Any] = field(default_factory=dict)  # what a test leaves for the next one

    @property
    def data(self) -> dict[str, Any]:
        return {"pairs": str(self.stack.project / PAIRS), "data_rev": self.data_rev}

    def train(self, seed: int = 1, steps: int = 4) -> dict[str, Any]:
        return quick_train(self.tiny_model, seed, steps)

    def pipeline(self, seed: int) -> dict[str, Any]:
        return quick_pipeline(self.data, self.tiny_model, seed)


@pytest.fixture(scope="session")
def line(tiny_lunchbox_path: Path) -> Iterator[Line]:
    """PostgreSQL, S3, MLflow, Prefect, worker, encoder, exporter and Prometheus, set up as `make stack-up` does."""
    if missing := find_missing():
        # Where all is tested, a stack that cannot be had is no reason to be green.
        (pytest.fail if os.environ.get("CI") else pytest.skip)(
            f"the stack needs {', '.join(missing)}: make stack-tools"
        )
    from flows.core.packing import build_bento, store_model
    from tests.factories import make_tiny_model

    root = Path(tempfile.mkdtemp(prefix="ekiben-stack-"))
    root.chmod(0o711)  # PostgreSQL does not run as root: its user must come through
    try:
        team = copy_working_tree(root / "team")
        project = clone(team, root / "checkout")
        app = copy_image_files(project, root / "app")
        write_env(root / ".env")
        secrets = read_names((root / ".env").read_text())
        services = load_services(project / "docker-compose.yml", secrets)
        manifest = read_manifest(tiny_lunchbox_path)
        with bento_home(root / "bentoml") as home:
            store_model(tiny_lunchbox_path, manifest)
            build_bento(manifest, root=project)
        stack = NativeStack(services, root, project, app, manifest.tag, home)
        with ended(stack):
            make_database(stack)
            took = {"postgres": stack["postgres"].wait_healthy(), **stack.start("s3", "mlflow", "prefect")}
            say("healthy, by the health checks of the compose file: " + _show(took))
            (team / PAIRS).parent.mkdir(parents=True)
            write_pairs(team / PAIRS, rows=200)
            dvc(team, stack["worker"].environment, "add", PAIRS)
            data_rev = commit(team, "The team's pairs")
            stack["setup"].run()
            say("set up: users, pools, deployments, automations")
            say("healthy: " + _show(stack.start("worker", "encoder", "line-exporter", "prometheus")))
            yield Line(
                stack,
                team,
                data_rev,
                secrets,
                make_tiny_model(root / "tiny-model"),
                manifest.tag,
                Prefect(stack),
                Encoder(stack),
            )
    finally:
        LOGS.mkdir(parents=True, exist_ok=True)
        for log in root.glob("*.log"):
            shutil.copy(log, LOGS)
        say(f"logs: {LOGS}")
        shutil.rmtree(root, ignore_errors=True)


def _show(took: dict[str, float]) -> str:
    return ", ".join(f"{name} after {seconds:.0f} s" for name, seconds in took.items())
