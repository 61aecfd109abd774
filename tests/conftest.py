"""What every test may use: an isolated environment, and a tiny model and lunchbox made once a session."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
from hypothesis import settings

# Read once, when the libraries are imported: these must be set before any test module is.
QUIET_ENVIRONMENT = {
    "BENTOML_DO_NOT_TRACK": "true",
    "DO_NOT_TRACK": "1",
    "DVC_NO_ANALYTICS": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_OFFLINE": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MPLBACKEND": "Agg",
    "NO_COLOR": "1",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_OFFLINE": "1",
}
# Addresses and folders of the developer's own stack: a test must never write there.
OWN_STACK = (
    "EKIBEN_ANCHOR_BOX",
    "EKIBEN_EXPERIMENT",
    "EKIBEN_MODEL_NAME",
    "EKIBEN_STUDY_STORAGE",
    "MLFLOW_EXPERIMENT_ID",
    "MLFLOW_EXPERIMENT_NAME",
    "MLFLOW_REGISTRY_URI",
    "MLFLOW_RUN_ID",
    "MLFLOW_TRACKING_URI",
    "PREFECT_API_DATABASE_CONNECTION_URL",
    "PREFECT_API_KEY",
    "PREFECT_API_URL",
    "PREFECT_PROFILE",
)
settings.register_profile("ekiben", deadline=None)  # a busy machine is no failure
settings.load_profile("ekiben")
os.environ.update(QUIET_ENVIRONMENT)
for _name in OWN_STACK:
    os.environ.pop(_name, None)


@pytest.fixture(scope="session", autouse=True)
def session_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """State that a tool keeps for the whole session (BentoML and Prefect read their home folders once)."""
    home = tmp_path_factory.mktemp("home")
    os.environ["BENTOML_HOME"] = str(home / "bentoml")
    os.environ["PREFECT_HOME"] = str(home / "prefect")
    return home


@pytest.fixture(autouse=True)
def isolated_environment(tmp_path: Path, session_home: Path) -> Iterator[Path]:
    """Give the test its own home folders, and none of the developer's addresses; return its EKIBEN_HOME.

    Whatever the test or what it calls writes into the environment is gone after it: commands that run in this process
    hand settings on to MLflow and BentoML that way.
    """
    home = tmp_path / "ekiben-home"
    with mock.patch.dict(os.environ, QUIET_ENVIRONMENT):
        for name in OWN_STACK:
            os.environ.pop(name, None)
        os.environ["EKIBEN_HOME"] = str(home)
        os.environ["BENTOML_HOME"] = str(home / "bentoml")
        os.environ["PREFECT_HOME"] = str(session_home / "prefect")
        yield home


@pytest.fixture(scope="session")
def tiny_model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a sentence-transformers folder: 2 layers, 32 dimensions, mean pooling, normalised. Do not write into it."""
    from tests.factories import make_tiny_model

    return make_tiny_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="session")
def tiny_lunchbox_path(tmp_path_factory: pytest.TempPathFactory, tiny_model_path: Path) -> Path:
    """Pack the lunchbox of `tiny_model_path`. Copy it before altering anything."""
    from tests.factories import make_tiny_lunchbox

    return make_tiny_lunchbox(tmp_path_factory.mktemp("tiny") / "lunchbox", model_path=tiny_model_path)


@pytest.fixture(scope="session")
def mlflow_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make an MLflow database without any run: all of MLflow's migrations, which take seconds."""
    from flows.core.mlflow_client import open_client

    path = tmp_path_factory.mktemp("mlflow") / "template.db"
    open_client(f"sqlite:///{path}")
    return path
