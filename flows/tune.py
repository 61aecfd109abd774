"""@flow tune: an Optuna study of quality and cost; every trial is a nested MLflow run, and a written policy picks one.

The one that is picked is evaluated on test and registered. Several processes may run this flow on the same study.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from prefect import flow
from prefect.artifacts import create_table_artifact

from flows.core.cost import MACHINE_COSTS, CostMeter, identify_machine, open_scratch
from flows.core.evaluation import primary_metric
from flows.core.models import available_base_models
from flows.core.plots import write_front_plot
from flows.core.precision import Int8Trial
from flows.core.samples import spread_texts
from flows.core.search import Best, Candidate, Search, study_name
from flows.core.tracking import Tracker, open_tracker
from flows.errors import ModelNotFoundError, NothingReleasedError, ParamsError, hide_password
from flows.params import DataParams, EvaluateParams, ReleaseParams, SearchSpace, TrainParams, TuneParams
from flows.progress import say
from flows.settings import FlowSettings, export_environment, load_settings
from flows.stages import (
    MODEL_FOLDER,
    close_orphans,
    evaluate_candidate,
    fit,
    keep_fit,
    load,
    open_anchor,
    preprocess,
    record,
    tracked_run,
)
from flows.train import TrainResult
from flows.trials import Bench, drop_weights, finish_name, measure_cost, run_trial

PROBE_TEXTS = 48  # of dev, whose computation is timed
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
    release: ReleaseParams = ReleaseParams(),  # noqa: B008
) -> TuneResult:
    """Search for the parameters that score best on dev and cost least; a study that was interrupted goes on.

    Args:
        data: Which texts and labels, and how they are split: `pairs`, `retrieval`, or `profiles` with `judgements`.
        train: The first candidate; what the search space does not name stays so in all of them.
        evaluate: How the candidate that is taken is scored on the held-out rows.
        tune: Budget and space of the search, the costs it minimises, and the policy that takes one of the trials.
        release: Only what it asks of int8 counts: candidates of the precision `auto` are scored by it as they would be
            served.
    """
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
    conditions = []
    if wanted.intersection(MACHINE_COSTS):
        int8_limits = Int8Trial(release, None).limits
        conditions = [identify_machine(), f"as served, int8 within {json.dumps(int8_limits, sort_keys=True)}"]
    conditions += [f"anchor {anchor.tag}"] if anchor is not None else []
    with open_scratch(settings.runs_path) as scratch:
        meter = CostMeter(spread_texts(dataset.dev, PROBE_TEXTS), wanted, scratch)
        search = Search(
            settings.study_storage or settings.journal_path,
            name=study_name(tune.space, [metric, *tune.costs], dataset.version.md5, train, data, conditions=conditions),
            base=train,
            params=tune,
            measure=partial(measure_cost, meter, anchor),
            min_speedup=release.int8_min_speedup,
        )
        _check_runs(search, tracker, settings)
        if search.resumed_trials:
            say(f"[tune] going on with study {search.name}: {search.resumed_trials} trials are done")
        tags = {"study": search.name, "primary_metric": metric, "policy": tune.policy}
        sections = {"data": data, "train": train, "evaluate": evaluate, "tune": tune}
        bench = Bench(search, dataset, evaluate, tune.pruning_checks, tracker, settings, scratch, anchor, release)
        with tracked_run(tracker, "tune", dataset, sections, tags=tags) as parent_run_id:
            _run_trials(search, deadline, lambda candidate: run_trial(bench, candidate, parent_run_id))
            best = search.best()
            rows = show_front(search, best, metric, tune, tracker, parent_run_id)
            with search.alone(finish_name(best.run_id)):
                winner = finish_winner(best, bench)
            if not search.others_at_work:
                drop_weights(search, settings, at_end=True)
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


def finish_winner(best: Best, bench: Bench) -> TrainResult:
    """Evaluate the winner on test and register it, unless an earlier call or another process has done so."""
    dataset, tracker, settings = bench.dataset, bench.tracker, bench.settings
    registered = next((release for release in tracker.versions() if release.run_id == best.run_id), None)
    if registered is not None:
        say(f"[tune] it is registered already, as version {registered.version}")
        return TrainResult.of(best.run_id, registered.version, bench.metric, tracker.find_run(best.run_id).metrics)
    path = settings.runs_path / best.run_id / MODEL_FOLDER
    if not path.exists():
        say(f"[tune] the weights of trial {best.number} are gone; training it again gives the same")
        again = fit(dataset.train, best.params, f"trial {best.number}", anchor=bench.anchor)
        path = keep_fit(tracker, best.run_id, again, settings)
    evaluation = evaluate_candidate(dataset, path, best.params.base_model, bench.evaluate)
    version = record(tracker, best.run_id, dataset, path, evaluation)
    near = {name: value for name, value in tracker.find_run(best.run_id).metrics.items() if name.startswith("anchor/")}
    return TrainResult.of(best.run_id, version, bench.metric, evaluation.flat_metrics() | near)


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
