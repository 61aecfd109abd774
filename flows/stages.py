"""The Prefect tasks that `train` and `tune` share: load > preprocess > fit > evaluate > record.

Each is a thin skin over `flows.core`: retries where a second try can help (reading over a network), none where the same
input must fail the same way (checks, training, scoring). Nothing is cached: Prefect would hash whole tables for a key.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefect import task
from prefect.cache_policies import NO_CACHE

from flows.core.anchor import Anchor, load_anchor, same_text_cosine
from flows.core.compat import PROBE_FILE, choose_probe_texts
from flows.core.dataset import Dataset, Part, RawData, prepare_dataset, read_data
from flows.core.edge_texts import CANARY_TEXTS
from flows.core.evaluation import Encode, Evaluation, evaluate_model, score_part
from flows.core.evidence import DATA_TIME_TAG, LEAK_METRIC
from flows.core.heldout import CALIBRATION_FILE, EVALUATION_FOLDER, keep_test
from flows.core.leaks import find_leaked_share
from flows.core.models import load_base_model, load_saved_model
from flows.core.nearness import nearness_metrics
from flows.core.plots import write_plots
from flows.core.processes import identify_process, is_alive
from flows.core.provenance import git_commit, lock_sha256
from flows.core.recorded import DATA_FILE, PARAMS_FILE, VECTORS_FILE, embed_canary
from flows.core.splits import SPLITS
from flows.core.tracking import Tracker
from flows.core.training import Fit, fit_model, make_encode, save_model
from flows.params import DataParams, EvaluateParams, Section, TrainParams
from flows.progress import fit_progress, say
from flows.settings import PROJECT_ROOT, FlowSettings

if TYPE_CHECKING:
    from prefect.client.schemas.objects import State, TaskRun
    from prefect.tasks import Task

FIT_TIMEOUT_S = 12 * 3600  # the last resort for a hang in native code; the budget itself is TrainParams.max_minutes
MODEL_FOLDER = "model"
OWN_TEXTS_FILE = "own_texts.json"
OWN_TEXTS = 32  # texts of the test set that join the edge texts in a certificate
PROCESS_TAG = "process"
ANCHOR_TAG = "anchor"
LOSS_METRIC = "train/loss"
DISTILL_METRIC = "train/distill_loss"
ANCHOR_TEXTS = 2000  # of dev, by whose vectors the distance to the champion is told


def is_transient(_task: Task[..., Any], _run: TaskRun, state: State[Any]) -> bool:
    """Tell whether a failed task may succeed when tried again: trouble on the way to the data, not in the data."""
    return isinstance(state.result(raise_on_failure=False), OSError)


@task(retries=2, retry_delay_seconds=[2, 10], retry_condition_fn=is_transient, cache_policy=NO_CACHE)
def load(data: DataParams) -> RawData:
    """Read the files as they are."""
    raw = read_data(data, root=Path.cwd())
    revision = f", revision {raw.version.revision[:12]}" if raw.version.revision else ""
    say(f"[load] {raw.version.path} (md5 {raw.version.md5[:12]}{revision})")
    return raw


@task(cache_policy=NO_CACHE)
def preprocess(raw: RawData, data: DataParams) -> Dataset:
    """Check the rows, turn profiles into `profile_text`, and split by group."""
    dataset = prepare_dataset(raw, data)
    for note in dataset.notes:
        say(f"[preprocess] {note}")
    sizes = (f"{name}: {_size(getattr(dataset, name))}" for name in SPLITS)
    say(f"[preprocess] {', '.join(sizes)}")
    return dataset


def open_anchor(tracker: Tracker, settings: FlowSettings, params: TrainParams) -> Anchor | None:
    """Return the champion's vectors when a fit shall stay near them, and there is a champion."""
    if not params.anchor_weight:
        return None
    anchor = load_anchor(tracker, settings)
    if anchor is None:
        say(f"[fit] there is no champion to stay near yet: train.anchor_weight {params.anchor_weight:g} does nothing")
    return anchor


@task(timeout_seconds=FIT_TIMEOUT_S, cache_policy=NO_CACHE, task_run_name="fit {title}")
def fit(
    part: Part,
    params: TrainParams,
    title: str,
    *,
    on_check: Callable[[int, Encode], bool] | None = None,
    checks: int = 0,
    anchor: Anchor | None = None,
) -> Fit:
    """Fine-tune one candidate, showing each step; the keywords are those of `fit_model`."""
    say(
        f"[fit] {title}: {params.base_model}, {params.steps} steps x {params.batch_size} pairs, "
        f"learning rate {params.learning_rate:.1e}, up to {params.max_tokens} tokens"
    )
    with fit_progress(title) as on_progress:
        result = fit_model(part, params, on_progress=on_progress, on_check=on_check, checks=checks, anchor=anchor)
    if result.stopped_early:
        say(f"[fit] {title}: stopped by the time budget after {result.steps_done} of {params.steps} steps")
    return result


@task(cache_policy=NO_CACHE)
def score_dev(part: Part, result: Fit, evaluate: EvaluateParams, metric: str) -> float:
    """Score a candidate on dev: the one figure that a study may choose by."""
    return score_part(part, make_encode(result.model, evaluate.batch_size), evaluate).metrics[metric]


@task(cache_policy=NO_CACHE)
def measure_anchor(
    tracker: Tracker,
    run_id: str,
    part: Part,
    result: Fit,
    anchor: Anchor | None,
    evaluate: EvaluateParams,
    *,
    weight: float,
) -> dict[str, float]:
    """Log how near a candidate is to the champion that it was to stay near, on dev, and return that.

    It is the other half of a trade: `weight` (`train.anchor_weight`) costs quality, which stands beside it.
    """
    if anchor is None:
        return {}
    queries = part.retrieval.queries.values() if part.retrieval else ()
    texts = list(dict.fromkeys([*part.pairs["text_a"], *part.pairs["text_b"], *queries]))[:ANCHOR_TEXTS]
    cosine = same_text_cosine(texts, make_encode(result.model, evaluate.batch_size), anchor)
    metrics = nearness_metrics(cosine, weight=weight, version=anchor.version)
    tracker.log_metrics(run_id, metrics)
    tracker.set_tags(run_id, {ANCHOR_TAG: anchor.tag})
    say(f"[fit] mean cosine of a text's new vector with that of {anchor.tag}: {cosine:.4f}")
    return metrics


@task(cache_policy=NO_CACHE)
def evaluate_candidate(dataset: Dataset, model_path: Path, base_model: str, params: EvaluateParams) -> Evaluation:
    """Score base and candidate on the same held-out rows."""
    say(f"[evaluate] {base_model} as published against the fine-tuned one, on {_size(dataset.test)}")
    base: Encode = make_encode(load_base_model(base_model), params.batch_size)
    tuned: Encode = make_encode(load_saved_model(model_path), params.batch_size)
    evaluation = evaluate_model(dataset, base, tuned, params)
    name, gain = evaluation.primary_metric, evaluation.gain
    base_score, score = evaluation.base.metrics[name], evaluation.tuned.metrics[name]
    say(
        f"[evaluate] test {name}: base {base_score:.4f} -> tuned {score:.4f}, gain {gain.value:+.4f} "
        f"({params.confidence:.0%} interval {gain.low:+.4f} to {gain.high:+.4f})"
    )
    return evaluation


@task(cache_policy=NO_CACHE)
def record(tracker: Tracker, run_id: str, dataset: Dataset, model_path: Path, evaluation: Evaluation) -> str:
    """Put model, metrics, plots and test rows into MLflow, register the model, and return its version."""
    model = load_saved_model(model_path)
    model_id = tracker.log_model(run_id, model, example=own_texts(dataset.test)[:2])
    dataset_key = tracker.log_dataset(run_id, dataset.version, context="training")
    metrics = evaluation.flat_metrics() | profile_metrics(dataset)
    metrics["embedding_dim"] = float(model.get_embedding_dimension() or 0)
    metrics[LEAK_METRIC] = find_leaked_share(dataset.train, dataset.test)
    tracker.log_metrics(run_id, metrics, model_id=model_id, dataset=dataset_key)
    with tempfile.TemporaryDirectory() as scratch:
        write_plots(evaluation, tracker.metric_history(run_id, LOSS_METRIC), Path(scratch) / "plots")
        folder = Path(scratch) / EVALUATION_FOLDER
        folder.mkdir()
        keep_test(dataset.test, evaluation, folder)
        (folder / OWN_TEXTS_FILE).write_text(json.dumps(own_texts(dataset.test)), encoding="utf-8")
        calibration = evaluation.calibration.model_dump() if evaluation.calibration else None
        (folder / CALIBRATION_FILE).write_text(json.dumps(calibration), encoding="utf-8")
        probe = json.dumps(choose_probe_texts(dataset), ensure_ascii=False)
        (folder / PROBE_FILE).write_text(probe, encoding="utf-8")
        tracker.log_folder(run_id, Path(scratch))
    version = tracker.register(run_id, model_id)
    shutil.rmtree(model_path.parent)  # MLflow has the model now
    say(f"[record] registered as version {version} (MLflow run {run_id})")
    return version


def own_texts(part: Part) -> list[str]:
    """A few of the user's own texts, in the order of the data."""
    queries = list(part.retrieval.queries.values()) if part.retrieval else []
    return list(dict.fromkeys([*map(str, part.pairs["text_a"]), *queries]))[:OWN_TEXTS]


def profile_metrics(dataset: Dataset) -> dict[str, float]:
    """Size of the profile table, when there is one."""
    if dataset.profiles is None:
        return {}
    return {
        "num_profiles": float(dataset.profiles.num_profiles),
        "avg_profile_length": dataset.profiles.avg_profile_length,
    }


@contextmanager
def tracked_run(
    tracker: Tracker,
    name: str,
    dataset: Dataset,
    params: dict[str, Section],
    *,
    parent_run_id: str | None = None,
    tags: dict[str, str] | None = None,
) -> Iterator[str]:
    """Open an MLflow run with everything that leads back to its origin, and close it with the right status."""
    version = dataset.version
    origin = {
        PROCESS_TAG: json.dumps(identify_process()),
        "data_path": version.path,
        "data_md5": version.md5,
        "data_rev": version.revision or "",
        DATA_TIME_TAG: dataset.modified_at.isoformat(timespec="seconds") if dataset.modified_at else "",
        "git_commit": git_commit(PROJECT_ROOT) or "",
        "lock_sha256": lock_sha256(PROJECT_ROOT) or "",
    }
    run_id = tracker.start_run(name, parent_run_id=parent_run_id, tags=origin | (tags or {}))
    try:
        tracker.log_params(run_id, params)
        if isinstance(train := params.get("train"), TrainParams):  # the names that people look for first
            tracker.log_params(run_id, {"model_name": train.base_model, "batch_size": train.batch_size})
        facts = version.model_dump() | {"files": dataset.files, "notes": list(dataset.notes), "root": str(Path.cwd())}
        tracker.log_json(run_id, DATA_FILE, facts)
        exact = {name: section.model_dump(mode="json") for name, section in params.items()}
        tracker.log_json(run_id, PARAMS_FILE, exact)
        yield run_id
    except BaseException as error:
        tracker.end_run(run_id, "FAILED" if isinstance(error, Exception) else "KILLED")
        raise
    tracker.end_run(run_id)


def close_orphans(tracker: Tracker, settings: FlowSettings) -> None:
    """End the runs of processes that were killed, and clear away the weights that they left."""
    for run in tracker.running_runs():
        mark = run.tags.get(PROCESS_TAG)
        if mark is not None and not is_alive(json.loads(mark)):
            tracker.end_run(run.run_id, "KILLED")
            shutil.rmtree(settings.runs_path / run.run_id, ignore_errors=True)


def keep_fit(tracker: Tracker, run_id: str, result: Fit, settings: FlowSettings) -> Path:
    """Log how the fit went, write its weights to the scratch space of the run, and return that folder."""
    tracker.log_curve(run_id, LOSS_METRIC, result.losses)
    tracker.log_curve(run_id, DISTILL_METRIC, result.distill_losses)
    tracker.log_metrics(run_id, {"train/seconds": result.seconds, "train/steps_done": float(result.steps_done)})
    tracker.set_tags(run_id, {"stopped_early": str(result.stopped_early).lower(), "loss": result.loss_name})
    tracker.log_json(run_id, VECTORS_FILE, embed_canary(make_encode(result.model, len(CANARY_TEXTS))))
    path = settings.runs_path / run_id / MODEL_FOLDER
    save_model(result.model, path)
    return path


def _size(part: Part) -> str:
    sizes = [f"{len(part.pairs)} pairs"] if part.has_pairs else []
    if part.retrieval is not None:
        sizes.append(f"{len(part.retrieval.queries)} queries over {len(part.retrieval.corpus)} documents")
    return " and ".join(sizes) or "nothing"
