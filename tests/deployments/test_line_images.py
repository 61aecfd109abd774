"""The images of the training line and of MLflow do in containers what docker-compose.yml has them do.

PostgreSQL and S3 run as processes of this machine; MLflow, Prefect, set-up, worker, exporter and encoder run in their
images, with the commands, variables and health checks of the compose file, but with nothing to write to except volumes
and /tmp, as on Kubernetes.
"""

from __future__ import annotations

import collections
import json
import re
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from packaging.utils import canonicalize_name

from deployments.stack_env import read_names, write_env
from tests.deployments.conftest import ROOT, Images
from tests.deployments.engine import Engine
from tests.flows.support import write_pairs
from tests.stack.compose import load_services
from tests.stack.containers import ContainerStack
from tests.stack.line import Encoder, Prefect, quick_pipeline, say
from tests.stack.native import ended, find_missing, make_database
from tests.stack.registry import champion

pytestmark = [pytest.mark.container, pytest.mark.timeout(2400)]

USER = "10001"
COMPILERS = ("gcc", "g++", "cc", "c++", "make", "ld", "git", "curl")
PYTHONS = {"line": "/opt/ekiben/bin/python", "mlflow": "/opt/mlflow/bin/python"}


@dataclass(frozen=True)
class Running:
    """The stack, as its users see it."""

    stack: ContainerStack
    prefect: Prefect
    encoder: Encoder
    parameters: dict[str, object]  # of a short pipeline
    image_tag: str  # of the model in the encoder's image


@pytest.fixture(scope="module")
def running(engine: Engine, images: Images, project_images: dict[str, str]) -> Iterator[Running]:
    """All services, each started when those that it waits for are healthy by their own checks."""
    if missing := find_missing():
        pytest.skip(f"the stack needs {', '.join(missing)}: make stack-tools")
    from tests.factories import make_tiny_model

    root = Path(tempfile.mkdtemp(prefix="ekiben-images-"))
    root.chmod(0o711)  # PostgreSQL and the images do not run as root
    try:
        shared = root / "shared"
        shared.mkdir()
        pairs = write_pairs(shared / "pairs.csv", rows=200)
        tiny_model = make_tiny_model(shared / "tiny-model")
        for path in tiny_model.iterdir():
            path.chmod(0o755 if path.is_dir() else 0o644)  # safetensors writes for its owner alone
        write_env(root / ".env")
        services = load_services(ROOT / "docker-compose.yml", read_names((root / ".env").read_text()))
        stack = ContainerStack(
            services, root, ROOT, ROOT, images.manifest.tag, images.home, number=1, engine=engine, shared=shared
        )
        with ended(stack):
            make_database(stack)
            stack.start("s3", "mlflow", "prefect")
            stack["setup"].run()
            say(f"healthy in containers: {stack.start('worker', 'encoder', 'line-exporter')}")
            parameters = quick_pipeline({"pairs": str(pairs)}, tiny_model, seed=1)
            yield Running(stack, Prefect(stack), Encoder(stack), parameters, images.manifest.tag)
    finally:
        shutil.rmtree(root, ignore_errors=True)


@pytest.fixture(params=sorted(PYTHONS))
def image(request: pytest.FixtureRequest, project_images: dict[str, str]) -> tuple[str, str]:
    """One of the two images, and the Python in it."""
    name: str = request.param
    return project_images[name], PYTHONS[name]


def test_nothing_is_left_of_the_build_and_labels_lead_back(engine: Engine, image: tuple[str, str]) -> None:
    tag, _ = image
    assert engine.shell(tag, f"command -v {' '.join(COMPILERS)} || true") == ""
    stray = r"find / -xdev \( -name '.env*' -o -name .git -o -name '*.db' -o -name '*.key' \) -not -path '/proc/*'"
    assert engine.shell(tag, f"{stray} -not -path '*/site-packages/*'") == ""
    configuration = engine.inspect(tag)["Config"]
    assert configuration["User"] == f"{USER}:{USER}"
    labels = configuration["Labels"]
    assert labels["org.opencontainers.image.title"] == tag.partition(":")[0]
    assert len(labels["org.opencontainers.image.revision"].removesuffix("-dirty")) == 40


def test_every_package_is_of_the_locked_version(engine: Engine, image: tuple[str, str]) -> None:
    tag, python = image
    script = "import importlib.metadata as m; [print(each.name, each.version) for each in m.distributions()]"
    said = engine.run("run", "--rm", f"--entrypoint={python}", tag, "-I", "-c", script).stdout
    installed = {canonicalize_name(name): version for name, version in (line.split() for line in said.splitlines())}
    locked = collections.defaultdict(set)  # a package may stand there once for each range of Pythons
    for line in (ROOT / "deployments" / "requirements.lock").read_text().splitlines():
        if pinned := re.match(r"(\w[\w.-]*)(?:\[.*?\])?==([^\s;]+)", line):
            locked[canonicalize_name(pinned[1])].add(pinned[2])
    assert "mlflow" in installed
    assert len(installed) > 80
    differing = {
        name: version
        for name, version in installed.items()
        if name in locked and version.partition("+")[0] not in locked[name]  # behind the +: which build of torch
    }
    assert not differing
    assert {name for name in installed if name not in locked} <= {"ekiben", "uv"}


def test_mlflow_does_not_start_without_users(engine: Engine, project_images: dict[str, str]) -> None:
    done = engine.run("run", "--rm", "--network=host", project_images["mlflow"], check=False)
    assert done.returncode == 2
    assert "MLFLOW_ADMIN_PASSWORD is not set" in done.stderr


def test_a_pipeline_on_the_worker_makes_a_champion_and_the_encoder_swaps_to_it(running: Running) -> None:
    assert running.encoder.encode()[0] == running.image_tag
    run_id = running.prefect.complete("pipeline/nightly", dict(running.parameters), timeout_s=900)
    tag = champion(running.stack)
    assert tag is not None
    assert tag != running.image_tag
    running.encoder.wait_for_version(tag)
    assert running.prefect.artifact_keys(run_id) >= {"gates"}
    say(f"in containers: {tag} was made, released, and is served")


def test_the_command_line_in_the_workers_image_sees_what_was_released(running: Running) -> None:
    done = running.stack.engine.run("exec", running.stack.containers["worker"], "ekiben", "status", "--json")
    assert champion(running.stack) in json.dumps(json.loads(done.stdout.splitlines()[-1]))


def test_the_exporter_reaches_its_sources_and_names_the_champion(running: Running) -> None:
    metrics = httpx.get(f"{running.stack.url('line-exporter', 9105)}/metrics", timeout=60).text
    up = [line for line in metrics.splitlines() if line.startswith("ekiben_line_up{")]
    assert up
    assert all(line.endswith(" 1.0") for line in up), up
    assert f'model="{champion(running.stack)}"' in metrics


def test_all_of_them_run_as_nobody_in_particular(running: Running) -> None:
    for name in ("mlflow", "prefect", "worker", "line-exporter", "encoder"):
        said = running.stack.engine.run("exec", running.stack.containers[name], "id", "-u").stdout
        assert said.strip() == USER, name


def test_they_end_when_they_are_told_to(running: Running) -> None:
    for name in ("line-exporter", "worker", "encoder", "prefect", "mlflow"):  # the last test: they do not come back
        seconds = running.stack[name].stop()
        assert seconds < 25, f"{name} had to be killed"
