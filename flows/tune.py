"""@flow tune: an Optuna study; every trial is a nested MLflow run, the winner is evaluated on test and registered."""

from __future__ import annotations

import shutil
import time
from typing import Any

from prefect import flow, task
from prefect.artifacts import create_table_artifact
from prefect.cache_policies import NO_CACHE

from flows.core.dataset import Dataset
from flows.core.evaluation import primary_metric
from flows.core.models import available_base_models
from flows.core.search import Best, Candidate, Search, study_name
from flows.core.tracking import Tracker, open_tracker
from flows.errors import DivergedError, ModelNotFoundError, NothingReleasedError, ParamsError, hide_password
from flows.params import DataParams, EvaluateParams, SearchSpace, TrainParams, TuneParams
from flows.progress import say
from flows.settings import FlowSettings, export_environment, load_settings
from flows.stages import (
    MODEL_FOLDER,
    close_orphans,
    evaluate_candidate,
    fit,
    keep_fit,
    load,
    preprocess,
    record,
    score_dev,
    tracked_run,
)
from flows.train import TrainResult


class TuneResult(TrainResult):
    """The study and its winner."""

    study: str
    study_run_id: str  # the parent of the trials' runs
    finished_trials: int
    ended_by: str
    best_params: dict[str, Any]


@flow(name="tune")
def tune(
    data: DataParams,
    train: TrainParams = TrainParams(),  # noqa: B008 - frozen; Prefect shows it as the form's default
    evaluate: EvaluateParams = EvaluateParams(),  # noqa: B008
    tune: TuneParams = TuneParams(),  # noqa: B008
) -> TuneResult:
    """Search for the parameters that score best on dev, within a budget; a study that was interrupted goes on."""
    settings = load_settings()
    export_environment(settings)
    deadline = time.monotonic() + 60 * tune.minutes
    dataset = preprocess(load(data), data)
    tune = tune.model_copy(update={"space": _available(tune)})
    metric = primary_metric(dataset.dev)
    tracker = open_tracker(settings)
    close_orphans(tracker, settings)
    search = Search(
        settings.study_storage or settings.journal_path,
        name=study_name(tune.space, metric, dataset.version.md5, train, data),
        base=train,
        params=tune,
    )
    _check_runs(search, tracker, settings)
    if search.resumed_trials:
        say(f"[tune] going on with study {search.name}: {search.resumed_trials} trials are done")
    tags = {"study": search.name, "primary_metric": metric}
    sections = {"data": data, "train": train, "evaluate": evaluate, "tune": tune}
    with tracked_run(tracker, "tune", dataset, sections, tags=tags) as parent_run_id:
        while (candidate := search.next_candidate(deadline - time.monotonic())) is not None:
            run_trial(search, candidate, dataset, evaluate, tracker, settings, parent_run_id)
        best = search.best()
        create_table_artifact(search.rows(), key="trials", description=f"Study {search.name}: {metric} on dev")
        best_params = best.params.model_dump(include=set(type(tune.space).model_fields))
        shown = ", ".join(f"{key} {value}" for key, value in best_params.items())
        say(f"[tune] best of {search.finished_trials}: trial {best.number}, dev {metric} {best.value:.4f}; {shown}")
        winner = finish_winner(best, dataset, metric, evaluate, tracker, settings)
    return TuneResult(
        **winner.model_dump(),
        study=search.name,
        study_run_id=parent_run_id,
        finished_trials=search.finished_trials,
        ended_by=search.ended_by,
        best_params=best_params,
    )


def finish_winner(
    best: Best, dataset: Dataset, metric: str, evaluate: EvaluateParams, tracker: Tracker, settings: FlowSettings
) -> TrainResult:
    """Evaluate the winner on test and register it, unless an earlier call has done so."""
    registered = next((release for release in tracker.versions() if release.run_id == best.run_id), None)
    if registered is not None:
        say(f"[tune] it is registered already, as version {registered.version}")
        return TrainResult.of(best.run_id, registered.version, metric, tracker.find_run(best.run_id).metrics)
    path = settings.runs_path / best.run_id / MODEL_FOLDER
    if not path.exists():
        say(f"[tune] the weights of trial {best.number} are gone; training it again gives the same")
        path = keep_fit(tracker, best.run_id, fit(dataset.train, best.params, f"trial {best.number}"), settings)
    evaluation = evaluate_candidate(dataset, path, best.params.base_model, evaluate)
    version = record(tracker, best.run_id, dataset, path, evaluation)
    return TrainResult.of(best.run_id, version, metric, evaluation.flat_metrics())


@task(task_run_name="trial {candidate.number}", cache_policy=NO_CACHE)
def run_trial(
    search: Search,
    candidate: Candidate,
    dataset: Dataset,
    evaluate: EvaluateParams,
    tracker: Tracker,
    settings: FlowSettings,
    parent_run_id: str,
) -> None:
    """Train one candidate and tell the study how it does on dev; keep its weights only while it leads."""
    title = f"trial {candidate.number}"
    metric = primary_metric(dataset.dev)
    tags = {"study": search.name, "trial": str(candidate.number), "primary_metric": metric}
    sections = {"train": candidate.params, "evaluate": evaluate}
    try:
        with tracked_run(tracker, title, dataset, sections, parent_run_id=parent_run_id, tags=tags) as run_id:
            result = fit(dataset.train, candidate.params, title)
            path = keep_fit(tracker, run_id, result, settings)
            value = score_dev(dataset.dev, result, evaluate, metric)
            tracker.log_metrics(run_id, {f"dev/{metric}": value})
    except DivergedError as error:
        search.fail(candidate, str(error))
        say(f"[tune] {title} is out: {error}")
        return
    except Exception as error:
        search.fail(candidate, str(error))
        raise
    leader = search.best_or_none()
    search.report(candidate, value, seconds=result.seconds, run_id=run_id, stopped_early=result.stopped_early)
    say(f"[tune] {title}: dev {metric} {value:.4f} in {result.seconds:.0f} s")
    if search.best().run_id != run_id:
        shutil.rmtree(path.parent)
    elif leader is not None:
        shutil.rmtree(settings.runs_path / leader.run_id, ignore_errors=True)


def _check_runs(search: Search, tracker: Tracker, settings: FlowSettings) -> None:
    """A study that goes on must find the runs of its trials: told now, not after its last trial."""
    leader = search.best_or_none()
    if leader is None:
        return
    try:
        tracker.find_run(leader.run_id)
    except NothingReleasedError:
        kept = "EKIBEN_STUDY_STORAGE" if settings.study_storage else settings.journal_path
        raise ParamsError(
            f"study {search.name} in {kept} has a trial whose run {leader.run_id} is not in this MLflow "
            f"({hide_password(settings.mlflow_uri)}): go back to the MLflow that it was made with, or move the study "
            "storage away to start a new one"
        ) from None


def _available(tune: TuneParams) -> SearchSpace:
    """The search space without the base models that cannot be had here; each of them is named once."""
    names, missing = available_base_models(tune.space.base_model)
    for reason in missing:
        say(f"[tune] left out: {reason}")
    if not names:
        raise ModelNotFoundError(
            f"none of the base models of the search space can be had: {'; '.join(missing)}; name others with "
            "--set tune.space.base_model=[FOLDER]"
        )
    return tune.space.model_copy(update={"base_model": names})
