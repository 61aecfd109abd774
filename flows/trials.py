"""What `tune` does with one candidate: its cost, its training and end, its score, and what is kept of it."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from prefect import task
from prefect.cache_policies import NO_CACHE

from flows.core.anchor import Anchor, shorten_anchor
from flows.core.cost import (
    BYTES_PER_NUMBER,
    CostMeter,
    Costs,
    encode_served,
    export_for_serving,
    serving_precision,
)
from flows.core.dataset import Dataset
from flows.core.evaluation import Encode, primary_metric, score_part
from flows.core.samples import thin_out
from flows.core.search import Candidate, Search
from flows.core.tracking import Tracker
from flows.core.training import Fit
from flows.errors import DivergedError
from flows.params import EvaluateParams, TrainParams
from flows.progress import say
from flows.settings import FlowSettings
from flows.stages import fit, keep_fit, measure_anchor, own_texts, score_dev, tracked_run

CHECK_PAIRS, CHECK_QUERIES, CHECK_DOCUMENTS = 256, 64, 1024  # of dev, that a check in the middle of a trial scores


@dataclass(frozen=True)
class Bench:
    """What all trials of a study share."""

    search: Search
    dataset: Dataset
    evaluate: EvaluateParams
    checks: int  # in the middle of a trial
    tracker: Tracker
    settings: FlowSettings
    scratch: Path  # for exports
    anchor: Anchor | None  # the champion's vectors, when candidates shall stay near them

    @property
    def metric(self) -> str:
        """What candidates are compared by."""
        return primary_metric(self.dataset.dev)


def measure_cost(meter: CostMeter, anchor: Anchor | None, params: TrainParams) -> Costs:
    """Measure what a candidate will cost in serving, and say it.

    Raises:
        ParamsError, UnsupportedModelError: there is no such model, or it cannot be near the anchor.
    """
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


@task(task_run_name="trial {candidate.number}", cache_policy=NO_CACHE)
def run_trial(bench: Bench, candidate: Candidate, parent_run_id: str) -> None:
    """Train one candidate, giving it up when it is hopeless, and tell the study how it does on dev.

    Its weights are kept only while it is on the front, or the one that the policy takes.
    """
    search, tracker, metric, title = bench.search, bench.tracker, bench.metric, f"trial {candidate.number}"
    tags = {"study": search.name, "trial": str(candidate.number), "primary_metric": metric}
    sections = {"train": candidate.params, "evaluate": bench.evaluate}
    few = thin_out(bench.dataset.dev, pairs=CHECK_PAIRS, queries=CHECK_QUERIES, documents=CHECK_DOCUMENTS)
    seen: list[tuple[int, float]] = []

    def on_check(number: int, encode: Encode) -> bool:
        seen.append((number, score_part(few, encode, bench.evaluate).metrics[metric]))
        return search.check(candidate, *seen[-1])

    try:
        with tracked_run(tracker, title, bench.dataset, sections, parent_run_id=parent_run_id, tags=tags) as run_id:
            tracker.log_metrics(run_id, {f"cost/{name}": cost for name, cost in candidate.costs.items()})
            result = fit(
                bench.dataset.train,
                candidate.params,
                title,
                on_check=on_check,
                checks=bench.checks,
                anchor=bench.anchor,
            )
            path = keep_fit(tracker, run_id, result, bench.settings)
            tracker.log_curve(run_id, f"check/{metric}", seen)
            tracker.set_tags(run_id, {"hopeless": str(result.hopeless).lower()})
            value = None if result.hopeless else score_candidate(bench, candidate, result)
            if value is not None:
                tracker.log_metrics(run_id, {f"dev/{metric}": value})
                measure_anchor(tracker, run_id, bench.dataset.dev, result, bench.anchor, bench.evaluate)
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
    keep = {point.number for point in search.front()}
    drop_weights(search, bench.settings, keep=keep if best is None else keep | {best.number})


def score_candidate(bench: Bench, candidate: Candidate, result: Fit) -> float:
    """Score a trained candidate on dev, as it will be served: one that asks for int8 by its int8 export."""
    if candidate.params.precision != "int8":
        return score_dev(bench.dataset.dev, result, bench.evaluate, bench.metric)
    with tempfile.TemporaryDirectory(dir=bench.scratch) as folder:
        exported = export_for_serving(result.model, Path(folder) / "box", texts=own_texts(bench.dataset.train))
        engine = exported.open(serving_precision(exported, candidate.params))
        return score_part(bench.dataset.dev, partial(encode_served, engine), bench.evaluate).metrics[bench.metric]


def drop_weights(search: Search, settings: FlowSettings, *, keep: set[int]) -> None:
    """Remove the weights of all trials but those that may still be taken."""
    for number, run_id in search.run_ids().items():
        if number not in keep:
            shutil.rmtree(settings.runs_path / run_id, ignore_errors=True)
