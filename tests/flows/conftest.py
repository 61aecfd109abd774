"""What the tests of the flows share: one Prefect server a session, small labelled pairs, small parameters."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from flows.params import DataParams, EvaluateParams, ReleaseParams, SearchSpace, TrainParams, TuneParams
from tests.flows.support import write_pairs


@pytest.fixture(scope="session")
def prefect_server() -> Iterator[None]:
    """One temporary Prefect server for all flow tests: its start takes many seconds on a busy machine."""
    from prefect.testing.utilities import prefect_test_harness

    with prefect_test_harness(server_startup_timeout=300):
        yield


@pytest.fixture(autouse=True)
def ready_mlflow(mlflow_template: Path, isolated_environment: Path) -> None:
    """Spare each test the migrations of a new MLflow database."""
    isolated_environment.mkdir(parents=True, exist_ok=True)
    shutil.copy(mlflow_template, isolated_environment / "mlflow.db")


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    return write_pairs(tmp_path / "pairs.csv")


@pytest.fixture
def data(pairs: Path) -> DataParams:
    return DataParams(pairs=str(pairs))


@pytest.fixture
def small_train(tiny_model_path: Path) -> TrainParams:
    return TrainParams(base_model=str(tiny_model_path), steps=4, batch_size=8, max_tokens=32, learning_rate=1e-3)


@pytest.fixture
def small_evaluate() -> EvaluateParams:
    return EvaluateParams(bootstrap_samples=100)


@pytest.fixture
def small_tune(tiny_model_path: Path) -> TuneParams:
    space = SearchSpace(base_model=[str(tiny_model_path)], steps=[2, 6], batch_size=[4, 8], max_tokens=[32])
    return TuneParams(trials=2, minutes=5, space=space, costs=["bytes_per_vector"])  # the one that needs no export


@pytest.fixture
def any_gain() -> ReleaseParams:
    """Gates of quality and speed that let a model of a few steps, and a busy machine, pass."""
    return ReleaseParams(
        min_gain=-2.0, champion_margin=-2.0, slice_max_drop=2.0, max_calibration_error=1.0, max_slowdown=1000.0
    )
