from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from flows.core.tracking import open_tracker
from flows.errors import ModelNotFoundError, ParamsError
from flows.params import DataParams, EvaluateParams, TrainParams, TuneParams
from flows.settings import load_settings
from flows.tune import tune
from tests.flows.support import mlflow_runs

pytestmark = pytest.mark.usefixtures("prefect_server")


def test_every_trial_is_a_nested_run_and_only_the_winner_is_registered(
    data: DataParams, small_train: TrainParams, small_evaluate: EvaluateParams, small_tune: TuneParams
) -> None:
    result = tune(data=data, train=small_train, evaluate=small_evaluate, tune=small_tune)

    settings = load_settings()
    tracker = open_tracker(settings)
    runs = mlflow_runs()
    parents = [run for run in runs if run.info.run_name == "tune"]
    trials = [run for run in runs if run.info.run_name.startswith("trial")]
    assert len(parents) == 1
    assert len(trials) == result.finished_trials == 2
    assert {run.data.tags["mlflow.parentRunId"] for run in trials} == {parents[0].info.run_id}
    assert {run.info.status for run in runs} == {"FINISHED"}
    assert [release.run_id for release in tracker.versions()] == [result.run_id]
    best = max(trials, key=lambda run: run.data.metrics["dev/spearman"])
    assert best.info.run_id == result.run_id
    assert result.best_params["steps"] in (2, 4, 6)
    assert list(settings.runs_path.iterdir()) == []  # what MLflow has, and what nobody needs, is not kept twice


def test_a_finished_study_is_not_trained_again(
    data: DataParams, small_train: TrainParams, small_evaluate: EvaluateParams, small_tune: TuneParams
) -> None:
    first = tune(data=data, train=small_train, evaluate=small_evaluate, tune=small_tune)
    again = tune(data=data, train=small_train, evaluate=small_evaluate, tune=small_tune)

    tracker = open_tracker(load_settings())
    assert (again.run_id, again.version) == (first.run_id, first.version)
    assert len([run for run in mlflow_runs() if run.info.run_name.startswith("trial")]) == 2
    assert len(tracker.versions()) == 1

    more = small_tune.model_copy(update={"trials": 3})
    tune(data=data, train=small_train, evaluate=small_evaluate, tune=more)
    assert len([run for run in mlflow_runs() if run.info.run_name.startswith("trial")]) == 3


def test_base_models_that_cannot_be_had_are_left_out(
    data: DataParams, small_train: TrainParams, small_evaluate: EvaluateParams, small_tune: TuneParams
) -> None:
    space = small_tune.space.model_copy(update={"base_model": ["nobody/no-such-model"]})
    with pytest.raises(ModelNotFoundError, match="nobody/no-such-model"):
        tune(data=data, train=small_train, evaluate=small_evaluate, tune=small_tune.model_copy(update={"space": space}))


def test_a_study_whose_runs_are_in_another_mlflow_is_refused_before_any_trial(
    data: DataParams,
    small_train: TrainParams,
    small_evaluate: EvaluateParams,
    small_tune: TuneParams,
    mlflow_template: Path,
) -> None:
    tune(data=data, train=small_train, evaluate=small_evaluate, tune=small_tune.model_copy(update={"trials": 1}))
    shutil.copy(mlflow_template, load_settings().home_path / "mlflow.db")
    with pytest.raises(ParamsError, match=r"journal\.log has a trial whose run .* is not in this MLflow"):
        tune(data=data, train=small_train, evaluate=small_evaluate, tune=small_tune)
    assert mlflow_runs() == []
