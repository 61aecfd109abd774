from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from prefect.client.orchestration import get_client

from flows.core.search import Search
from flows.core.tracking import open_tracker
from flows.errors import ModelNotFoundError, ParamsError
from flows.params import DataParams, EvaluateParams, ReleaseParams, TrainParams, TuneParams
from flows.settings import load_settings
from flows.tune import tune
from tests.flows.support import mlflow_runs

pytestmark = pytest.mark.usefixtures("prefect_server")


def test_every_trial_is_a_nested_run_and_only_the_winner_is_registered(
    data: DataParams, small_train: TrainParams, small_evaluate: EvaluateParams, small_tune: TuneParams
) -> None:
    priced = small_tune.model_copy(update={"costs": ["p95_ms", "bytes_per_vector"]})
    result = tune(data=data, train=small_train, evaluate=small_evaluate, tune=priced)

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

    # Both trials have the same architecture, so the same cost, and the front is the better one.
    costs = [{name: run.data.metrics[f"cost/{name}"] for name in ("p95_ms", "bytes_per_vector")} for run in trials]
    assert costs[0] == costs[1]
    assert costs[0]["bytes_per_vector"] == 128
    assert [row["trial"] for row in result.trials if row["taken"]] == [result.trial]
    assert sum(row["front"] for row in result.trials) == 1
    assert [row["trial"] for row in read_table("front") if row["taken"]] == [result.trial]
    assert {row["trial"] for row in read_table("trials")} == {0, 1}
    kept = tracker.download_artifact(parents[0].info.run_id, "front.json", settings.home_path / "look")
    assert json.loads(kept.read_text())["trials"] == result.trials
    plots = tracker.download_artifact(parents[0].info.run_id, "plots", settings.home_path / "look")
    assert sorted(path.name for path in plots.iterdir()) == ["front.png", "front.svg"]
    assert parents[0].data.tags["taken_run"] == result.run_id


def test_a_finished_study_is_not_trained_again(
    data: DataParams, small_train: TrainParams, small_evaluate: EvaluateParams, small_tune: TuneParams
) -> None:
    first = tune(data=data, train=small_train, evaluate=small_evaluate, tune=small_tune)
    again = tune(data=data, train=small_train, evaluate=small_evaluate, tune=small_tune)

    tracker = open_tracker(load_settings())
    assert (again.run_id, again.version) == (first.run_id, first.version)
    assert len([run for run in mlflow_runs() if run.info.run_name.startswith("trial")]) == 2
    assert len(tracker.versions()) == 1

    other = 1 - first.trial
    chosen = small_tune.model_copy(update={"trials": 9, "policy": f"trial {other}"})
    second = tune(data=data, train=small_train, evaluate=small_evaluate, tune=chosen)
    assert (second.trial, second.ended_by, second.study, second.version) == (other, "policy", first.study, "2")
    assert len([run for run in mlflow_runs() if run.info.run_name.startswith("trial")]) == 2

    more = small_tune.model_copy(update={"trials": 3})
    tune(data=data, train=small_train, evaluate=small_evaluate, tune=more)
    assert len([run for run in mlflow_runs() if run.info.run_name.startswith("trial")]) == 3


@pytest.mark.slow
def test_what_is_over_a_limit_is_not_trained(
    data: DataParams, small_train: TrainParams, small_evaluate: EvaluateParams, small_tune: TuneParams
) -> None:
    space = small_tune.space.model_copy(update={"dimensions": [16]})
    narrow = small_tune.model_copy(update={"trials": 1, "space": space, "max_bytes_per_vector": 64})
    result = tune(data=data, train=small_train, evaluate=small_evaluate, tune=narrow)
    assert result.best_params["dimensions"] == 16
    (trial,) = [run for run in mlflow_runs() if run.info.run_name.startswith("trial")]
    assert trial.data.metrics["cost/bytes_per_vector"] == 64
    assert trial.data.metrics["embedding_dim"] == 16  # it is the one that was registered
    assert [row["state"] for row in read_table("trials")] == ["infeasible", "complete"]

    nothing = narrow.model_copy(update={"max_bytes_per_vector": 32})
    with pytest.raises(ParamsError, match=r"within the limits of cost .*tune\.max_bytes_per_vector"):
        tune(data=data, train=small_train, evaluate=small_evaluate, tune=nothing)


def test_a_hopeless_trial_ends_within_its_training(
    data: DataParams,
    small_train: TrainParams,
    small_evaluate: EvaluateParams,
    small_tune: TuneParams,
) -> None:
    tune(data=data, train=small_train, evaluate=small_evaluate, tune=small_tune.model_copy(update={"trials": 1}))
    settings, tracker = load_settings(), open_tracker(load_settings())
    name = next(run.data.tags["study"] for run in mlflow_runs() if run.info.run_name == "trial 0")
    search = Search(
        settings.journal_path,
        name=name,
        base=small_train,
        params=small_tune.model_copy(update={"trials": 4}),
        measure=lambda params: {"bytes_per_vector": 128.0},
    )
    for _ in range(3):  # as if others had been trained: as cheap, and far ahead
        candidate = search.next_candidate(1e6)
        assert candidate is not None
        assert not search.check(candidate, 1, 0.98)
        run_id = tracker.start_run(f"trial {candidate.number}")
        tracker.end_run(run_id)
        search.report(candidate, 0.1, seconds=1.0, run_id=run_id)

    result = tune(
        data=data, train=small_train, evaluate=small_evaluate, tune=small_tune.model_copy(update={"trials": 5})
    )
    assert (result.finished_trials, result.hopeless_trials) == (4, 1)
    (given_up,) = [run for run in mlflow_runs() if run.data.tags.get("hopeless") == "true"]
    assert given_up.info.status == "FINISHED"
    assert "dev/spearman" not in given_up.data.metrics
    assert given_up.data.metrics["check/spearman"] < 0.97
    assert given_up.data.metrics["train/steps_done"] < 6
    assert not (settings.runs_path / given_up.info.run_id).exists()
    assert given_up.info.run_id != result.run_id


@pytest.mark.slow
def test_a_study_over_architectures_has_a_front_and_int8_trials_are_scored_in_int8(
    data: DataParams, small_train: TrainParams, small_evaluate: EvaluateParams, small_tune: TuneParams
) -> None:
    wide = {"layers": [None, 1], "dimensions": [None, 8], "precision": ["fp32", "int8"], "batch_size": [8]}
    space = small_tune.space.model_copy(update=wide)
    base = small_train.model_copy(update={"distill_steps": 5, "precision": "fp32"})
    costs = ["p95_ms", "bytes_per_vector", "memory_mb"]
    params = {"space": space, "trials": 8, "minutes": 60, "costs": costs, "policy": "knee"}
    result = tune(data=data, train=base, evaluate=small_evaluate, tune=small_tune.model_copy(update=params))
    trials = {int(run.data.tags["trial"]): run for run in mlflow_runs() if run.info.run_name.startswith("trial")}
    assert len(trials) == result.finished_trials + result.hopeless_trials == 8
    for row in result.trials:
        run = trials[row["trial"]]
        if not row["taken"]:  # the run of the one that is taken has the figures of its fp32 model by now
            assert run.data.metrics["dev/spearman"] == row["value"]
        for cost in costs:
            assert run.data.metrics[f"cost/{cost}"] == row[cost]
    by_architecture: dict[tuple[Any, ...], set[tuple[float, ...]]] = {}
    for row in result.trials:
        key = (row["layers"], row["dimensions"], row["precision"])
        by_architecture.setdefault(key, set()).add(tuple(row[cost] for cost in costs))
    assert all(len(costs) == 1 for costs in by_architecture.values())
    assert {row["precision"] for row in result.trials} == {"fp32", "int8"}
    taken = next(row for row in result.trials if row["taken"])
    assert taken["front"]


@pytest.mark.slow
def test_a_trial_is_scored_in_the_precision_that_it_is_priced_in(
    data: DataParams, small_train: TrainParams, small_evaluate: EvaluateParams, small_tune: TuneParams
) -> None:
    """The point of the front is one that a server delivers: int8 where a release would serve it, else fp32."""
    priced = small_tune.model_copy(update={"costs": ["p95_ms"], "trials": 1})
    lenient = {"int8_max_loss": 1.0, "int8_mean_cosine": 0.5, "int8_min_cosine": 0.1, "int8_min_speedup": 0.001}
    found = {}
    for changed in ({}, {"int8_mean_cosine": 1.0}):  # the second one is missed by any int8
        release = ReleaseParams(**lenient | changed)
        result = tune(data=data, train=small_train, evaluate=small_evaluate, tune=priced, release=release)
        (row,) = result.trials
        run = next(run for run in mlflow_runs() if run.info.run_id == row["run_id"])
        assert run.data.tags["scored_in"] == row["precision"]
        assert run.data.metrics["cost/p95_ms"] == row["p95_ms"]
        assert result.best_params["precision"] == "auto"
        found[row["precision"]] = (result.study, row["value"], run.data.metrics["dev/spearman"])
    assert found.keys() == {"int8", "fp32"}
    assert found["int8"][0] != found["fp32"][0]  # other limits, other values: another study
    assert found["fp32"][1] == pytest.approx(found["fp32"][2])  # that of the evaluation of the winner, in fp32


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


def read_table(key: str) -> list[dict[str, Any]]:
    """The rows of the newest table artifact of that key, as Prefect's server holds it."""
    query = {"artifacts": {"key": {"any_": [key]}}, "sort": "CREATED_DESC", "limit": 1}
    with get_client(sync_client=True) as client:  # its own `read_artifacts` asks what the server refuses
        (artifact,) = client.request("POST", "/artifacts/filter", json=query).json()
    rows: list[dict[str, Any]] = json.loads(artifact["data"])
    return rows
