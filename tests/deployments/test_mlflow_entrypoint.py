"""MLflow's entry point: no server without users, and no password where others can read it."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.deployments.conftest import ROOT

SCRIPT = ROOT / "deployments" / "images" / "mlflow-entrypoint.py"
GOOD = {
    "MLFLOW_ADMIN_USERNAME": "admin",
    "MLFLOW_ADMIN_PASSWORD": "100% of a %(long)s one",
    "MLFLOW_AUTH_DATABASE_URI": "postgresql+psycopg2://mlflow:p%40ss@postgres:5432/mlflow_auth",
    "MLFLOW_FLASK_SERVER_SECRET_KEY": "0123456789abcdef",
}
# Stands in for `mlflow`: tells what it was started with.
SPY = """import json, os, sys
print(json.dumps({"words": sys.argv[1:], "environment": dict(os.environ)}))
"""


@pytest.fixture
def python(tmp_path: Path) -> Path:
    """An interpreter with a stand-in of `mlflow` beside it."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "python").symlink_to(Path(sys.executable).resolve())
    (folder / "mlflow").write_text(f"#!{Path(sys.executable).resolve()}\n{SPY}")
    (folder / "mlflow").chmod(0o755)
    return folder / "python"


def start(python: Path, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": os.environ["PATH"], "TMPDIR": str(python.parent.parent), **variables}
    return subprocess.run(
        [str(python), str(SCRIPT), *words], env=environment, capture_output=True, text=True, check=False
    )


def read_as_mlflow_does(path: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    from mlflow.server.auth.config import read_auth_config

    monkeypatch.setenv("MLFLOW_AUTH_CONFIG_PATH", path)
    return read_auth_config()


def test_mlflow_is_started_with_users(python: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stale = {"MLFLOW_AUTH_ADMIN_PASSWORD": "of MLflow's own variable"}  # it would go before the file
    done = start(python, "--port", "5001", **GOOD, **stale)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["words"] == ["server", "--app-name", "basic-auth", "--port", "5001"]
    assert "MLFLOW_FLASK_SERVER_SECRET_KEY" in said["environment"]
    path = said["environment"]["MLFLOW_AUTH_CONFIG_PATH"]
    config = read_as_mlflow_does(path, monkeypatch)
    assert config.admin_username == "admin"
    assert config.admin_password == GOOD["MLFLOW_ADMIN_PASSWORD"]
    assert config.database_uri == GOOD["MLFLOW_AUTH_DATABASE_URI"]
    assert config.default_permission == "READ"


def test_nobody_else_reads_the_password(python: Path) -> None:
    said = json.loads(start(python, **GOOD).stdout)
    path = Path(said["environment"]["MLFLOW_AUTH_CONFIG_PATH"])
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert GOOD["MLFLOW_ADMIN_PASSWORD"] not in json.dumps(said)
    assert GOOD["MLFLOW_AUTH_DATABASE_URI"] not in json.dumps(said)


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("MLFLOW_ADMIN_USERNAME", "", "MLFLOW_ADMIN_USERNAME is not set"),
        ("MLFLOW_ADMIN_PASSWORD", "", "MLFLOW_ADMIN_PASSWORD is not set: it needs 12"),
        ("MLFLOW_ADMIN_PASSWORD", "elevenchars", "MLFLOW_ADMIN_PASSWORD has 11 characters: it needs 12"),
        ("MLFLOW_AUTH_DATABASE_URI", " ", "MLFLOW_AUTH_DATABASE_URI is not set"),
        ("MLFLOW_FLASK_SERVER_SECRET_KEY", "tooshort", "MLFLOW_FLASK_SERVER_SECRET_KEY has 8 characters"),
        ("MLFLOW_AUTH_DEFAULT_PERMISSION", "ALL", "MLFLOW_AUTH_DEFAULT_PERMISSION is none of READ"),
    ],
)
def test_it_refuses_to_start_without_what_it_needs(python: Path, name: str, value: str, reason: str) -> None:
    done = start(python, **{**GOOD, name: value})
    assert done.returncode == 2
    assert reason in done.stderr
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""
    if value.strip():
        assert value not in done.stderr.replace(reason, "")


def test_the_limit_is_mlflows_own(python: Path) -> None:
    from mlflow.exceptions import MlflowException
    from mlflow.utils.validation import _validate_password

    with pytest.raises(MlflowException):
        _validate_password("x" * 11)
    _validate_password("x" * 12)
