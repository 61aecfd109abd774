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
from flows.core.cost import BYTES_PER_NUMBER, CostMeter, Costs, encode_served, export_for_serving
from flows.core.dataset import Dataset
from flows.core.evaluation import Encode, primary_metric, score_part
from flows.core.precision import Int8Trial, find_misses
from flows.core.samples import thin_out
from flows.core.search import Candidate, Search
from flows.core.tracking import Tracker
from flows.core.training import Fit
from flows.errors import DivergedError, UnsupportedModelError, one_line
from flows.params import EvaluateParams, ReleaseParams, TrainParams
from flows.progress import say
from flows.settings import FlowSettings
from flows.stages import fit, keep_fit, measure_anchor, own_texts, score_dev, tracked_run

MEMORY_WORDS = ("out of memory", "not enough memory", "can't allocate memory")  # of torch and onnxruntime
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
    release: ReleaseParams  # what is asked of int8

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
            value = None
            if not result.hopeless:
                candidate, value = score_candidate(bench, candidate, result)
                costs = {f"cost/{name}": cost for name, cost in candidate.costs.items()}
                tracker.log_metrics(run_id, costs | {f"dev/{metric}": value})
                tracker.set_tags(run_id, {"scored_in": candidate.precision})
                weight = candidate.params.anchor_weight
                measure_anchor(tracker, run_id, bench.dataset.dev, result, bench.anchor, bench.evaluate, weight=weight)
    except (DivergedError, UnsupportedModelError) as error:  # it would be the same again
        search.fail(candidate, str(error), again=0)
        say(f"[tune] {title} is out: {error}")
        return
    except Exception as error:
        if is_out_of_memory(error):  # another program may have had it
            search.fail(candidate, str(error) or "out of memory", again=1)
            say(f"[tune] {title} is out: there was not enough memory ({one_line(error)})")
            return
        search.fail(candidate, str(error))
        raise
    if value is None:
        shutil.rmtree(path.parent)
        say(f"[tune] {title}: {search.give_up(candidate, seconds=result.seconds, run_id=run_id)}")
        return
    search.report(candidate, value, seconds=result.seconds, run_id=run_id, stopped_early=result.stopped_early)
    say(f"[tune] {title}: dev {metric} {value:.4f} in {result.seconds:.0f} s")
    drop_weights(search, bench.settings)


def is_out_of_memory(error: Exception) -> bool:
    """Whether a trial failed for want of memory; torch and onnxruntime say it in their own ways."""
    return isinstance(error, MemoryError) or any(words in str(error).lower() for words in MEMORY_WORDS)


def score_candidate(bench: Bench, candidate: Candidate, result: Fit) -> tuple[Candidate, float]:
    """Score a trained candidate on dev as it would be served, and return it with the costs of that.

    What is priced in int8 is scored by its int8 export. When that misses what a release asks of int8, here on dev rows,
    a candidate that asks for `auto` is served in fp32: it gets the quality and the costs of fp32.
    """
    if candidate.precision == "int8":
        with tempfile.TemporaryDirectory(dir=bench.scratch) as folder:
            texts = own_texts(bench.dataset.train)
            exported = export_for_serving(result.model, Path(folder) / "box", texts=texts)
            misses = ["it cannot be made of the trained model"]
            if "int8" in exported.manifest.precisions:
                asked = Int8Trial(bench.release, bench.dataset.dev)
                misses = find_misses(exported.box, exported.manifest, asked, extra_texts=texts)
            elif candidate.params.precision == "int8":
                raise UnsupportedModelError(f"{candidate.params.base_model} cannot be served in int8: {misses[0]}")
            if misses:
                say(f"[tune] trial {candidate.number}: a release would not serve its int8: {'; '.join(misses)}")
            if not misses or candidate.params.precision == "int8":
                encode = partial(encode_served, exported.open("int8"))
                return candidate, score_part(bench.dataset.dev, encode, bench.evaluate).metrics[bench.metric]
        candidate = bench.search.reprice(candidate, "fp32")
    return candidate, score_dev(bench.dataset.dev, result, bench.evaluate, bench.metric)


def drop_weights(search: Search, settings: FlowSettings, *, at_end: bool = False) -> None:
    """Remove the weights of trials that will not be taken; what another process is finishing is left to it.

    Args:
        search: The study.
        settings: Where weights lie.
        at_end: This process needs no weights any more: also those of the front go, but for trials of other processes.
    """
    trained = search.run_ids(of_others=not at_end)  # read first: what ends after this is not among them
    best = None if at_end else search.best_or_none()
    keep = set() if at_end else {point.number for point in search.front()}
    keep |= {best.number} if best is not None else set()
    for number, run_id in trained.items():
        if number in keep or not (folder := settings.runs_path / run_id).exists():
            continue
        with search.alone(finish_name(run_id), wait=False) as is_ours:
            if is_ours:
                shutil.rmtree(folder, ignore_errors=True)


def finish_name(run_id: str) -> str:
    """What one process at a time does with the run of a winner; see `Search.alone`."""
    return f"finish {run_id}"
