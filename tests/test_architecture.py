"""Imports go one way; what is cheap to import stays cheap. import-linter knows the layers, here and in `make check`."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HEAVY = ("torch", "mlflow", "optuna", "dvc", "bentoml", "sentence_transformers", "prefect", "matplotlib")


def test_the_import_layers_hold() -> None:
    lint = subprocess.run(
        [Path(sys.executable).with_name("lint-imports"), "--no-cache"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert lint.returncode == 0, lint.stdout


def test_the_command_starts_without_the_heavy_packages() -> None:
    code = f"import sys, flows.cli; print([name for name in {HEAVY!r} if name in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


@pytest.mark.parametrize("package", ["flows", "bentos"])
def test_only_the_settings_read_the_environment(package: str) -> None:
    handed_on = {"flows/core/packing.py"}  # gives its child the whole environment, reads nothing of it
    readers = {
        str(path.relative_to(ROOT))
        for path in (ROOT / package).rglob("*.py")
        if re.search(r"os\.environ|os\.getenv|getenv\(", path.read_text(encoding="utf-8"))
    }
    assert readers - handed_on <= {f"{package}/settings.py"}


def test_no_module_is_too_long_to_hold_in_mind() -> None:
    modules = [path for package in ("flows", "bentos") for path in (ROOT / package).rglob("*.py")]
    assert {
        path.name: len(path.read_text().splitlines()) for path in modules if len(path.read_text().splitlines()) > 400
    } == {}


def test_every_module_says_what_it_is_for() -> None:
    for package in ("flows", "bentos"):
        for path in (ROOT / package).rglob("*.py"):
            assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))), path
