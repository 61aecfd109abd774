"""What a Bento holds: exactly the server's modules, the tested versions, the labels that lead back."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from bentos.manifest import Manifest
from tests.bentos.conftest import ROOT


@pytest.fixture
def bentofile() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "bentofile.yaml").read_text())  # type: ignore[no-any-return]


@pytest.fixture
def bento_path(built_home: Path, manifest: Manifest) -> Path:
    return built_home / "bentos" / manifest.name / manifest.bento_version


def normalize(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def pins(lines: list[str]) -> dict[str, str]:
    """Package -> version, for Python 3.11."""
    found = {}
    for line in lines:
        if match := re.match(r"([A-Za-z0-9._-]+)==([^\s;\\]+)\s*(?:;\s*(.*?))?\s*\\?$", line):
            name, version, marker = match.groups()
            if not marker or "python_full_version >= '3.12'" not in marker:
                found[normalize(name)] = version
    return found


def test_a_bento_holds_the_servers_modules_and_nothing_else(bento_path: Path) -> None:
    source = bento_path / "src"
    packed = {path.relative_to(source).as_posix() for path in source.rglob("*") if path.is_file()}
    packed = {path for path in packed if "__pycache__" not in path}  # left by the servers of other tests
    server = [*(ROOT / "bentos").glob("*.py"), *(ROOT / "bentos" / "ui").iterdir()]
    assert packed == {"bentofile.yaml", *(path.relative_to(ROOT).as_posix() for path in server)}


def test_every_version_is_the_one_that_was_tested(bentofile: dict[str, Any]) -> None:
    lock = pins((ROOT / "deployments" / "requirements.lock").read_text().splitlines())
    packed = pins(bentofile["python"]["packages"])
    assert len(packed) == len(bentofile["python"]["packages"])
    assert packed == {name: lock[name] for name in packed}


def test_the_packages_are_those_of_the_serve_extra(bentofile: dict[str, Any]) -> None:
    extra = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["serve"]
    names = {normalize(re.split(r"[><=;\[ ]", requirement)[0]) for requirement in extra}
    assert set(pins(bentofile["python"]["packages"])) == names


def test_the_image_installs_no_training_package(bento_path: Path, bentofile: dict[str, Any]) -> None:
    lines = (bento_path / "env" / "python" / "requirements.txt").read_text().split()
    assert set(lines) == set(bentofile["python"]["packages"])


def test_a_bento_names_its_model_by_exact_version(bento_path: Path, manifest: Manifest) -> None:
    bento = yaml.safe_load((bento_path / "bento.yaml").read_text())
    models = [model["tag"] for service in bento["services"] for model in service["models"]]
    assert models == [f"ekiben-model:{manifest.bento_version}"]


def test_labels_lead_back_to_run_data_and_code(bento_path: Path, manifest: Manifest) -> None:
    labels = yaml.safe_load((bento_path / "bento.yaml").read_text())["labels"]
    assert labels == {
        "project": "ekiben",
        "run_id": manifest.run_id,
        "version": manifest.version,
        "data_md5": manifest.data.md5,
        "git_commit": manifest.git_commit or "unknown",
        "space_id": manifest.space_id,
    }
