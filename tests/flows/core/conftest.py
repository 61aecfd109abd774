"""MLflow on a database of one's own, as a copy of one made once a session, and a lunchbox of every kind of model."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from flows.core.tracking import Tracker
from tests.factories import VARIANTS, make_tiny_lunchbox


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


@pytest.fixture(scope="session")
def variants(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Pack a lunchbox of each of `VARIANTS`; its model lies beside it. Copy it before altering anything."""
    folder = tmp_path_factory.mktemp("variants")
    return {
        name: make_tiny_lunchbox(folder / str(number), **options)
        for number, (name, options) in enumerate(VARIANTS.items())
    }
