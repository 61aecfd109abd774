"""The images run: small, as nobody in particular, on a file system that is not written, until they are told to end."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from mlflow import MlflowClient

from bentos.engine import Engine as Onnx
from tests.bentos.shelves import make_successor
from tests.bentos.test_swap_registry import put
from tests.deployments.conftest import ROOT, Images
from tests.deployments.engine import Container, Engine
from tests.processes import find_free_port
from tests.registry import run_mlflow

pytestmark = pytest.mark.container

Serve = Callable[..., Container]
LOCKED_DOWN = ("--read-only", "--tmpfs=/tmp", "--cap-drop=ALL", "--security-opt=no-new-privileges")
TEXTS = ["bread and milk", "a fast train", "the quick brown fox"]
BUILD_TOOLS = ("gcc", "g++", "cc", "c++", "make", "ld", "git", "uv", "curl")
TRAINING = ("torch", "mlflow", "prefect", "flows", "transformers")


@pytest.fixture
def serve(engine: Engine) -> Iterator[Serve]:
    """Start containers on ports of this machine; they are removed after the test."""
    started = []

    def start(image: str, *options: str, **environment: str) -> Container:
        port = find_free_port()
        container = Container(engine, f"ekiben-test-{uuid.uuid4().hex[:12]}", f"http://127.0.0.1:{port}")
        variables = {"BENTOML_HOST": "127.0.0.1", "BENTOML_PORT": str(port), **environment}
        flags = [f"--env={name}={value}" for name, value in variables.items()]
        started.append(container)
        engine.run("run", "--detach", "--name", container.name, "--network=host", *options, *flags, image)
        return container

    yield start
    for container in started:
        container.remove()


def size_mb(engine: Engine, image: str) -> float:
    return engine.inspect(image)["Size"] / 1e6  # type: ignore[no-any-return]


def memory_mb(container: Container) -> float:
    return sum(process.memory_info().rss for process in container.processes()) / 1e6


def test_it_serves_the_same_vectors_locked_down_as_nobody_in_particular(serve: Serve, images: Images) -> None:
    container = serve(images.trimmed, *LOCKED_DOWN)
    container.wait_ready()
    answer = httpx.post(f"{container.url}/encode", json={"texts": TEXTS}, timeout=30)
    assert answer.status_code == 200, answer.text
    assert answer.headers["x-ekiben-model"] == images.manifest.tag
    box = images.home / "models" / f"{images.manifest.name}-model" / images.manifest.bento_version
    expected = Onnx(box, images.manifest).embed(TEXTS)
    np.testing.assert_allclose(answer.json()["embeddings"], expected, rtol=0, atol=1e-6)
    assert {process.uids().real for process in container.processes()} == {10001}
    wrote = container.engine.run("exec", container.name, "sh", "-c", "touch /app/x /opt/ekiben/x", check=False)
    assert wrote.returncode != 0
    assert container.engine.run("exec", container.name, "touch", "/state/x").returncode == 0  # where versions come


def test_the_healthcheck_says_what_readyz_says(serve: Serve, images: Images, engine: Engine) -> None:
    container = serve(images.trimmed)
    image = engine.inspect(images.trimmed)
    command = (image.get("Healthcheck") or image["Config"]["Healthcheck"])["Test"]  # podman's place, docker's place
    assert command[0] == "CMD"
    container.wait_ready()
    assert engine.run("exec", container.name, *command[1:], check=False).returncode == 0
    elsewhere = engine.run("exec", "--env=BENTOML_PORT=1", container.name, *command[1:], check=False)
    assert elsewhere.returncode == 1
    assert "not ready" in elsewhere.stderr


def test_nothing_is_left_of_the_build(engine: Engine, images: Images) -> None:
    found = engine.shell(images.trimmed, f"command -v {' '.join(BUILD_TOOLS)} || true")
    assert found == ""
    assert engine.shell(images.default, "command -v gcc git") != ""  # the question can be answered otherwise
    packages = engine.shell(images.trimmed, "ls /opt/ekiben/lib/python3*/site-packages /app/bento/src").split()
    assert "bentos" in packages
    assert "onnxruntime" in packages
    assert not set(packages) & set(TRAINING)
    stray = r"find / -xdev \( -name .env -o -name .git -o -name '*.db' -o -name '*.key' \) -not -path '/proc/*'"
    assert engine.shell(images.trimmed, stray) == ""


def test_it_is_about_half_as_large_as_bentomls_own_and_starts_as_fast(
    serve: Serve, images: Images, engine: Engine, record_property: Callable[[str, object], None]
) -> None:
    figures: dict[str, dict[str, float]] = {}
    for image in (images.trimmed, images.default):
        seconds, memory = [], []
        for _ in range(3):
            begun = time.monotonic()
            container = serve(image)
            container.wait_ready()
            seconds.append(time.monotonic() - begun)
            memory.append(memory_mb(container))
            container.remove()
        figures[image] = {"size_mb": size_mb(engine, image), "ready_s": min(seconds), "rss_mb": min(memory)}
        record_property(image, figures[image])
    print(figures)  # noqa: T201
    ours, theirs = figures[images.trimmed], figures[images.default]
    assert ours["size_mb"] < 0.6 * theirs["size_mb"], figures
    assert ours["ready_s"] < 2 * theirs["ready_s"], figures
    assert ours["rss_mb"] < 1.2 * theirs["rss_mb"], figures


def test_it_answers_what_it_was_asked_before_it_was_told_to_end(serve: Serve, images: Images, engine: Engine) -> None:
    limits = {"EKIBEN_MAX_TEXTS": "50000", "EKIBEN_QUEUE_TOKENS_BULK": "100000000", "EKIBEN_TIMEOUT_S": "600"}
    container = serve(images.trimmed, *LOCKED_DOWN, EKIBEN_THREADS="1", EKIBEN_BATCH_TEXTS="1", **limits)
    container.wait_ready()
    texts = [f"{number} trains leave the station for the {number} time" for number in range(20_000)]
    answers: list[httpx.Response] = []
    body = {"texts": texts, "encoding": "base64"}
    asking = threading.Thread(
        target=lambda: answers.append(httpx.post(f"{container.url}/encode", json=body, timeout=600))
    )
    with httpx.Client(base_url=container.url, timeout=30) as idle:  # its connection stays open
        asking.start()
        deadline = time.monotonic() + 60
        while 'ekiben_queue_texts{lane="bulk"} 0.0' in (metrics := idle.get("/metrics").text) or (
            'ekiben_queue_texts{lane="bulk"}' not in metrics
        ):
            assert time.monotonic() < deadline, metrics
            assert not answers, "the request ended too early to tell anything"
            time.sleep(0.02)
        engine.run("stop", "--time", "300", container.name)
    asking.join(60)
    assert container.state()["ExitCode"] == 0, container.logs()  # 137: it had to be killed
    assert answers, container.logs()
    assert answers[0].status_code == 200, answers[0].text[:500]
    assert len(answers[0].json()["embeddings"]) == len(texts)


def test_it_ends_within_what_engines_allow_though_clients_stay_connected(
    serve: Serve, images: Images, engine: Engine
) -> None:
    container = serve(images.trimmed, *LOCKED_DOWN)
    container.wait_ready()
    with httpx.Client(base_url=container.url, timeout=30) as idle:
        assert idle.post("/encode", json={"texts": TEXTS}).status_code == 200
        engine.run("stop", container.name)  # 10 s, then it is killed
        assert container.state()["ExitCode"] == 0, container.logs()


def test_it_follows_a_registry_and_keeps_what_it_fetched_in_its_volume(
    serve: Serve, images: Images, tiny_lunchbox_path: Path, mlflow_template: Path, tmp_path: Path
) -> None:
    successor = make_successor(tmp_path / "successor", images.manifest)
    with run_mlflow(mlflow_template, tmp_path / "mlflow") as uri:
        client = MlflowClient(uri)
        experiment = client.create_experiment("images")
        client.create_registered_model("ekiben")
        put(client, experiment, tiny_lunchbox_path, "1", tmp_path)
        two = put(client, experiment, successor, "2", tmp_path).manifest
        client.set_registered_model_alias("ekiben", "champion", "2")
        follow = {"EKIBEN_FOLLOW": "champion", "EKIBEN_FOLLOW_EVERY_S": "0.2", "MLFLOW_TRACKING_URI": uri}
        container = serve(images.trimmed, *LOCKED_DOWN, **follow)
        container.wait_ready()
        deadline = time.monotonic() + 120
        while (answer := httpx.post(f"{container.url}/encode", json={"texts": TEXTS}, timeout=30)).headers[
            "x-ekiben-model"
        ] != two.tag:
            assert time.monotonic() < deadline, container.logs()
            time.sleep(0.1)
    np.testing.assert_allclose(answer.json()["embeddings"], Onnx(successor, two).embed(TEXTS), rtol=0, atol=1e-6)
    assert two.bento_version in container.engine.run("exec", container.name, "ls", "/state").stdout


def test_labels_lead_back_from_the_image(engine: Engine, images: Images) -> None:
    image = engine.inspect(images.trimmed)
    labels: dict[str, Any] = image["Config"]["Labels"]
    manifest = images.manifest
    assert labels["org.opencontainers.image.title"] == manifest.tag
    assert labels["org.opencontainers.image.version"] == manifest.bento_version
    assert labels["org.opencontainers.image.revision"] == (manifest.git_commit or "unknown")
    assert labels["ekiben.space"] == manifest.space_id
    assert labels["ekiben.run"] == manifest.run_id
    assert labels["ekiben.data"] == manifest.data.md5
    assert image["Config"]["User"] == "10001:10001"  # by number: Kubernetes' runAsNonRoot cannot look a name up


def test_options_of_bentoml_serve_and_its_word_are_taken(engine: Engine, images: Images) -> None:
    for words in (["--help"], ["serve", "--help"]):
        assert "bentoml serve [OPTIONS]" in engine.run("run", "--rm", images.trimmed, *words).stdout


def test_every_package_is_of_the_locked_version(engine: Engine, images: Images) -> None:
    lock = (ROOT / "deployments" / "requirements.lock").read_text()
    script = "import importlib.metadata as m; [print(each.name, each.version) for each in m.distributions()]"
    words = ["run", "--rm", "--entrypoint=/opt/ekiben/bin/python", images.trimmed, "-I", "-c", script]
    said = engine.run(*words).stdout.lower().replace("_", "-")
    installed = dict(line.split() for line in said.splitlines())
    assert "bentoml" in installed
    assert len(installed) > 40
    for name, version in installed.items():
        assert f"\n{name}=={version}" in lock.lower().replace("_", "-"), name


def test_only_what_is_named_travels_into_the_images_of_the_project(
    engine: Engine, images: Images, tmp_path: Path
) -> None:
    project = tmp_path / "project"
    tracked = subprocess.run(["git", "-C", str(ROOT), "ls-files", "-z"], capture_output=True, text=True, check=True)
    for name in filter(None, tracked.stdout.split("\0")):
        if (ROOT / name).is_file():
            (project / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, project / name)
    shutil.copy(ROOT / ".dockerignore", project)
    planted = [
        ".env", ".git/config", ".dvc/config.local", ".ekiben/mlflow.db", ".venv/bin/python", "bentos/.env.local",
        "data/pairs.csv", "data/sample/private.parquet", "deployments/k8s/secret.yaml", "deployments/params/tls.key",
        "flows/.env", "flows/core/__pycache__/x.cpython-311.pyc", "keys.txt", "mlflow.db",
    ]  # fmt: skip
    for name in planted:
        (project / name).parent.mkdir(parents=True, exist_ok=True)
        (project / name).write_text("a secret")
    dockerfile = tmp_path / "Dockerfile"
    dockerfile.write_text("FROM python:3.11-slim-bookworm\nCOPY . /context\n")
    engine.run("build", "--file", str(dockerfile), "--tag", "ekiben-context:test", str(project))
    found = set(engine.shell("ekiben-context:test", "cd /context && find . -type f").split())
    assert not {f"./{name}" for name in planted} & found
    needed = {"flows/cli.py", "bentos/service.py", "bentos/ui/index.html", "bentofile.yaml", "pyproject.toml"}
    needed |= {"data/sample/profiles.csv", "deployments/requirements.lock", "deployments/params/quick.yaml"}
    needed |= {"deployments/prefect/setup.py", "deployments/images/mlflow-entrypoint.py"}
    assert {f"./{name}" for name in needed} <= found
    with contextlib.suppress(AssertionError):
        engine.run("rmi", "ekiben-context:test")
