"""@flow train: load > preprocess > fit > evaluate > record; one candidate, one MLflow run, one registered version."""

from __future__ import annotations

from prefect import flow
from pydantic import BaseModel

from flows.core.evaluation import primary_metric
from flows.core.tracking import open_tracker
from flows.params import DataParams, EvaluateParams, TrainParams
from flows.settings import export_environment, load_settings
from flows.stages import (
    close_orphans,
    evaluate_candidate,
    fit,
    keep_fit,
    load,
    measure_anchor,
    open_anchor,
    preprocess,
    record,
    tracked_run,
)


class TrainResult(BaseModel):
    """What a finished training leaves behind."""

    run_id: str
    version: str
    primary_metric: str
    base_score: float
    score: float
    metrics: dict[str, float]

    @classmethod
    def of(cls, run_id: str, version: str, metric: str, metrics: dict[str, float]) -> TrainResult:
        """Take the figures from the metrics of a run."""
        return cls(
            run_id=run_id,
            version=version,
            primary_metric=metric,
            base_score=metrics[f"base/{metric}"],
            score=metrics[f"eval/{metric}"],
            metrics=metrics,
        )


@flow(name="train")
def train(
    data: DataParams,
    train: TrainParams = TrainParams(),  # noqa: B008 - frozen; Prefect shows it as the form's default
    evaluate: EvaluateParams = EvaluateParams(),  # noqa: B008
) -> TrainResult:
    """Fine-tune one base model on labelled texts, score it against that base model, and register it.

    Args:
        data: Which texts and labels, and how they are split: `pairs`, `retrieval`, or `profiles` with `judgements`.
        train: The base model and how it is fine-tuned.
        evaluate: How the model is scored on the held-out rows.
    """
    settings = load_settings()
    export_environment(settings)
    dataset = preprocess(load(data), data)
    tracker = open_tracker(settings)
    close_orphans(tracker, settings)
    anchor = open_anchor(tracker, settings, train)
    params = {"data": data, "train": train, "evaluate": evaluate}
    metric = primary_metric(dataset.dev)
    with tracked_run(tracker, "train", dataset, params, tags={"primary_metric": metric}) as run_id:
        result = fit(dataset.train, train, "train", anchor=anchor)
        path = keep_fit(tracker, run_id, result, settings)
        near = measure_anchor(tracker, run_id, dataset.dev, result, anchor, evaluate, weight=train.anchor_weight)
        evaluation = evaluate_candidate(dataset, path, train.base_model, evaluate)
        version = record(tracker, run_id, dataset, path, evaluation)
    return TrainResult.of(run_id, version, metric, evaluation.flat_metrics() | near)
