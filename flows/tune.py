"""@flow tune: an Optuna study of quality and cost; every trial is a nested MLflow run, and a written policy picks one.

The one that is picked is evaluated on test and registered. Several processes may run this flow on the same study.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from prefect import flow, task
from prefect.artifacts import create_table_artifact
from prefect.cache_policies import NO_CACHE

from flows.core.anchor import Anchor, shorten_anchor
from flows.core.cost import (
    BYTES_PER_NUMBER,
    MACHINE_COSTS,
    CostMeter,
    Costs,
    encode_served,
    export_for_serving,
    identify_machine,
    serving_precision,
)
from flows.core.dataset import Dataset
from flows.core.evaluation import Encode, primary_metric, score_part
from flows.core.models import available_base_models
from flows.core.plots import write_front_plot
from flows.core.samples import spread_texts, thin_out
from flows.core.search import Best, Candidate, Search, study_name
from flows.core.tracking import Tracker, open_tracker
from flows.core.training import Fit
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
    measure_anchor,
    open_anchor,
    own_texts,
    preprocess,
    record,
    score_dev,
    tracked_run,
)
from flows.train import TrainResult

PROBE_TEXTS = 48  # of dev, whose computation is timed
CHECK_PAIRS, CHECK_QUERIES, CHECK_DOCUMENTS = 256, 64, 1024  # of dev, that a check in the middle of a trial scores
WAIT_S = 5.0  # between two looks at what other processes do


class TuneResult(TrainResult):
    """The study, its front, and the trial that was taken."""

    study: str
    study_run_id: str  # the parent of the trials' runs
    finished_trials: int
    hopeless_trials: int
    ended_by: str
    policy: str
    trial: int  # the one that the policy took
    best_params: dict[str, Any]
    costs: list[str]
    trials: list[dict[str, Any]]  # finished ones, cheapest first; see `_finished_rows`


@flow(name="tune")
def tune(
    data: DataParams,
    train: TrainParams = TrainParams(),  # noqa: B008 - frozen; Prefect shows it as the form's default
    evaluate: EvaluateParams = EvaluateParams(),  # noqa: B008
    tune: TuneParams = TuneParams(),  # noqa: B008
) -> TuneResult:
    """Search for the parameters that score best on dev and cost least; a study that was interrupted goes on."""
    settings = load_settings()
    export_environment(settings)
    deadline = time.monotonic() + 60 * tune.minutes
    dataset = preprocess(load(data), data)
    tune = tune.model_copy(update={"space": _available(tune)})
    metric = primary_metric(dataset.dev)
    tracker = open_tracker(settings)
    close_orphans(tracker, settings)
    anchor = open_anchor(tracker, settings, train)
    wanted = {*tune.costs, *tune.cost_limits}
    conditions = [identify_machine()] if wanted.intersection(MACHINE_COSTS) else []
    conditions += [f"anchor {anchor.tag}"] if anchor is not None else []
    with tempfile.TemporaryDirectory(prefix="ekiben-cost-") as scratch:
        meter = CostMeter(spread_texts(dataset.dev, PROBE_TEXTS), wanted, Path(scratch))
        search = Search(
            settings.study_storage or settings.journal_path,
            name=study_name(tune.space, [metric, *tune.costs], dataset.version.md5, train, data, conditions=conditions),
            base=train,
            params=tune,
            measure=partial(measure_cost, meter, anchor),
        )
        _check_runs(search, tracker, settings)
        if search.resumed_trials:
            say(f"[tune] going on with study {search.name}: {search.resumed_trials} trials are done")
        tags = {"study": search.name, "primary_metric": metric, "policy": tune.policy}
        sections = {"data": data, "train": train, "evaluate": evaluate, "tune": tune}
        with tracked_run(tracker, "tune", dataset, sections, tags=tags) as parent_run_id:
            trainer = partial(run_trial, search, dataset, evaluate, tune.pruning_checks, anchor, tracker, settings)
            _run_trials(search, deadline, lambda candidate: trainer(candidate, parent_run_id))
            best = search.best()
            rows = show_front(search, best, metric, tune, tracker, parent_run_id)
            with search.alone(f"finish {best.run_id}"):
                winner = finish_winner(best, dataset, metric, evaluate, tracker, settings, anchor)
            if not search.others_at_work:
                _drop_weights(search, settings, keep=set())
    return TuneResult(
        **winner.model_dump(),
        study=search.name,
        study_run_id=parent_run_id,
        finished_trials=search.finished_trials,
        hopeless_trials=search.hopeless_trials,
        ended_by=search.ended_by,
        policy=tune.policy,
        trial=best.number,
        best_params=best.params.model_dump(include=set(type(tune.space).model_fields)),
        costs=list(tune.costs),
        trials=rows,
    )


def _run_trials(search: Search, deadline: float, train: Callable[[Candidate], None]) -> None:
    """Train candidates until the search ends; then wait for the trials that other processes are busy with.

    Should one of them be killed, its trial is done here.
    """
    waiting = False
    while True:
        candidate = search.next_candidate(deadline - time.monotonic())
        if candidate is not None:
            train(candidate)
            continue
        others = search.others_at_work
        if search.ended_by != "trials" or not others or time.monotonic() >= deadline:
            return
        if not waiting:
            say(f"[tune] waiting for {others} trial{'s' if others > 1 else ''} of other processes")
            waiting = True
        time.sleep(WAIT_S)


def measure_cost(meter: CostMeter, anchor: Anchor | None, params: TrainParams) -> Costs:
    """Measure what a candidate will cost in serving, and say it."""
    costs = meter.measure(params)
    if anchor is not None and "bytes_per_vector" in costs:
        shorten_anchor(anchor, round(costs["bytes_per_vector"] / BYTES_PER_NUMBER))  # refuses what cannot be near it
    if costs:
        parts = [f"{params.layers} layers" if params.layers else "all layers"]
        parts += [f"{params.dimensions} dimensions"] if params.dimensions else []
        parts += [f"{params.max_tokens} tokens", params.precision]
        figures = ", ".join(f"{name} {value:g}" for name, value in costs.items())
        say(f"[cost] {params.base_model}, {', '.join(parts)}: {figures}")
    return costs


def finish_winner(
    best: Best,
    dataset: Dataset,
    metric: str,
    evaluate: EvaluateParams,
    tracker: Tracker,
    settings: FlowSettings,
    anchor: Anchor | None = None,
) -> TrainResult:
    """Evaluate the winner on test and register it, unless an earlier call or another process has done so."""
    registered = next((release for release in tracker.versions() if release.run_id == best.run_id), None)
    if registered is not None:
        say(f"[tune] it is registered already, as version {registered.version}")
        return TrainResult.of(best.run_id, registered.version, metric, tracker.find_run(best.run_id).metrics)
    path = settings.runs_path / best.run_id / MODEL_FOLDER
    if not path.exists():
        say(f"[tune] the weights of trial {best.number} are gone; training it again gives the same")
        again = fit(dataset.train, best.params, f"trial {best.number}", anchor=anchor)
        path = keep_fit(tracker, best.run_id, again, settings)
    evaluation = evaluate_candidate(dataset, path, best.params.base_model, evaluate)
    version = record(tracker, best.run_id, dataset, path, evaluation)
    return TrainResult.of(best.run_id, version, metric, evaluation.flat_metrics())


@task(task_run_name="trial {candidate.number}", cache_policy=NO_CACHE)
def run_trial(
    search: Search,
    dataset: Dataset,
    evaluate: EvaluateParams,
    checks: int,
    anchor: Anchor | None,
    tracker: Tracker,
    settings: FlowSettings,
    candidate: Candidate,
    parent_run_id: str,
) -> None:
    """Train one candidate, giving it up when it is hopeless, and tell the study how it does on dev.

    Its weights are kept only while it is on the front, or the one that the policy takes.
    """
    title = f"trial {candidate.number}"
    metric = primary_metric(dataset.dev)
    tags = {"study": search.name, "trial": str(candidate.number), "primary_metric": metric}
    sections = {"train": candidate.params, "evaluate": evaluate}
    few = thin_out(dataset.dev, pairs=CHECK_PAIRS, queries=CHECK_QUERIES, documents=CHECK_DOCUMENTS)
    seen: list[tuple[int, float]] = []

    def on_check(number: int, encode: Encode) -> bool:
        seen.append((number, score_part(few, encode, evaluate).metrics[metric]))
        return search.check(candidate, *seen[-1])

    try:
        with tracked_run(tracker, title, dataset, sections, parent_run_id=parent_run_id, tags=tags) as run_id:
            tracker.log_metrics(run_id, {f"cost/{name}": cost for name, cost in candidate.costs.items()})
            result = fit(dataset.train, candidate.params, title, on_check=on_check, checks=checks, anchor=anchor)
            path = keep_fit(tracker, run_id, result, settings)
            tracker.log_curve(run_id, f"check/{metric}", seen)
            tracker.set_tags(run_id, {"hopeless": str(result.hopeless).lower()})
            value = None if result.hopeless else score_candidate(dataset, candidate, result, evaluate, metric)
            if value is not None:
                tracker.log_metrics(run_id, {f"dev/{metric}": value})
                measure_anchor(tracker, run_id, dataset.dev, result, anchor, evaluate)
    except DivergedError as error:
        search.fail(candidate, str(error))
        say(f"[tune] {title} is out: {error}")
        return
    except Exception as error:
        search.fail(candidate, str(error))
        raise
    if value is None:
        shutil.rmtree(path.parent)
        say(f"[tune] {title}: {search.give_up(candidate, seconds=result.seconds, run_id=run_id)}")
        return
    search.report(candidate, value, seconds=result.seconds, run_id=run_id, stopped_early=result.stopped_early)
    say(f"[tune] {title}: dev {metric} {value:.4f} in {result.seconds:.0f} s")
    best = search.best_or_none()
    _drop_weights(
        search, settings, keep={*(point.number for point in search.front()), *([best.number] if best else [])}
    )


def score_candidate(
    dataset: Dataset, candidate: Candidate, result: Fit, evaluate: EvaluateParams, metric: str
) -> float:
    """Score a trained candidate on dev, as it will be served: one that asks for int8 by its int8 export."""
    if candidate.params.precision != "int8":
        return score_dev(dataset.dev, result, evaluate, metric)
    with tempfile.TemporaryDirectory(prefix="ekiben-int8-") as scratch:
        exported = export_for_serving(result.model, Path(scratch) / "box", texts=own_texts(dataset.train))
        engine = exported.open(serving_precision(exported, candidate.params))
        return score_part(dataset.dev, partial(encode_served, engine), evaluate).metrics[metric]


def show_front(
    search: Search, best: Best, metric: str, params: TuneParams, tracker: Tracker, run_id: str
) -> list[dict[str, Any]]:
    """Put the trials and the front into Prefect's artifacts and the study's run; return the finished trials."""
    rows = _finished_rows(search, best)
    front = [row for row in rows if row["front"] or row["taken"]]
    names = set(type(params.space).model_fields)
    shown = ", ".join(f"{key} {value}" for key, value in best.params.model_dump(include=names).items())
    priced = "".join(f", {name} {cost:g}" for name, cost in best.costs.items() if name in params.costs)
    say(
        f"[tune] {params.policy} of {search.finished_trials}: trial {best.number}, dev {metric} {best.value:.4f}"
        f"{priced}; {shown}"
    )
    create_table_artifact(search.rows(), key="trials", description=f"Study {search.name}: {metric} on dev")
    described = f"Study {search.name}: best dev {metric} for its cost; {params.policy} takes trial {best.number}"
    create_table_artifact(front, key="front", description=described)
    tracker.log_json(run_id, "front.json", {"metric": metric, "costs": list(params.costs), "trials": rows})
    tracker.log_metrics(run_id, {"front/points": float(len(search.front()))})
    tracker.set_tags(run_id, {"taken_trial": best.number, "taken_run": best.run_id})
    if params.costs and rows:
        with tempfile.TemporaryDirectory() as scratch:
            write_front_plot(rows, metric, params.costs, Path(scratch), limits=params.cost_limits, policy=params.policy)
            tracker.log_folder(run_id, Path(scratch), to="plots")
    return rows


def _finished_rows(search: Search, best: Best) -> list[dict[str, Any]]:
    """The rows of `Search.rows` with a final score, cheapest first, and whether each was `taken`."""
    order = {point.number: place for place, point in enumerate(search.finished())}
    rows = [row | {"taken": row["trial"] == best.number} for row in search.rows() if row["trial"] in order]
    return sorted(rows, key=lambda row: order[row["trial"]])


def _drop_weights(search: Search, settings: FlowSettings, *, keep: set[int]) -> None:
    """Remove the weights of all trials but those that may still be taken."""
    for number, run_id in search.run_ids().items():
        if number not in keep:
            shutil.rmtree(settings.runs_path / run_id, ignore_errors=True)


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
