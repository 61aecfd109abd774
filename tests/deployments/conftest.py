"""An engine and the images under test, made once a session."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from bentos.manifest import Manifest, read_manifest
from tests.deployments.engine import Engine, NoEngineError, find_engine
from tests.serving import bento_home

ROOT = Path(__file__).parents[2]
BUILD = ROOT / "deployments" / "images" / "build.py"


@dataclass(frozen=True)
class Images:
    """The image that the project builds of a Bento, and the one that BentoML builds of it."""

    home: Path  # BentoML's
    manifest: Manifest
    trimmed: str
    default: str


@pytest.fixture(scope="session")
def engine() -> Engine:
    cache = Path(os.environ.get("EKIBEN_TEST_CACHE", Path.home() / ".cache" / "ekiben-tests"))
    cache.mkdir(parents=True, exist_ok=True)
    try:
        return find_engine(cache.resolve())
    except NoEngineError as error:
        pytest.skip(f"no image can be run here: {error}")


@pytest.fixture(scope="session")
def images(engine: Engine, tmp_path_factory: pytest.TempPathFactory, tiny_lunchbox_path: Path) -> Images:
    """Both images of the Bento of the tiny lunchbox."""
    from flows.core.packing import build_bento, store_model

    manifest = read_manifest(tiny_lunchbox_path)
    with bento_home(tmp_path_factory.mktemp("images") / "home") as home:
        store_model(tiny_lunchbox_path, manifest)
        build_bento(manifest, root=ROOT)
    environment = os.environ | engine.environment | {"BENTOML_HOME": str(home)}
    default = "ekiben-default:test"
    options = ["--backend", engine.name, "--image-tag", default, "--opt", "network=host"]
    for command in (
        [str(BUILD), "encoder", "--bento", manifest.tag, "--engine", engine.name, "--", "--network=host"],
        ["-m", "bentoml", "containerize", manifest.tag, *options],
    ):
        built = subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, check=False)
        assert built.returncode == 0, built.stdout + built.stderr
    return Images(home, manifest, f"ekiben-encoder:{manifest.bento_version}", default)


@pytest.fixture(scope="session")
def project_images(engine: Engine) -> dict[str, str]:
    """The images that are made of the project itself: `line` and `mlflow`, with what their services run."""
    options = ["--network=host"]
    asked = subprocess.run(
        [sys.executable, "-m", "pip", "config", "get", "global.find-links"], capture_output=True, text=True, check=False
    )
    if wheels := asked.stdout.strip():  # as the Makefile does: a folder of local wheels, when pip knows one
        options += [f"--volume={wheels}:/wheels:ro", "--build-arg=UV_FIND_LINKS=/wheels", "--build-arg=TORCH_BACKEND="]
    command = [sys.executable, str(BUILD), "line", "mlflow", "--engine", engine.name, "--", *options]
    built = subprocess.run(command, env=os.environ | engine.environment, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stdout + built.stderr
    return {"line": "ekiben-line:latest", "mlflow": "ekiben-mlflow:latest"}
