"""MLflow on a database of one's own: the schema is made once a session, each test works on a copy."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from flows.core.tracking import Tracker


@pytest.fixture
def open_tracker(mlflow_template: Path, tmp_path: Path) -> Callable[[], Tracker]:
    """Return a function that opens the test's own MLflow; each call is like a new process on the same database."""
    folder = tmp_path / "a home"  # with a space, as folders have
    folder.mkdir()
    shutil.copy(mlflow_template, folder / "mlflow.db")
    return lambda: Tracker(
        f"sqlite:///{folder / 'mlflow.db'}",
        experiment="ekiben",
        model_name="ekiben",
        artifact_root=folder / "mlartifacts",
    )


@pytest.fixture
def tracker(open_tracker: Callable[[], Tracker]) -> Tracker:
    """Open the test's own MLflow."""
    return open_tracker()
