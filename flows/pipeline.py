"""@flow pipeline: tune, then release the winner, and nothing else."""

from __future__ import annotations

from prefect import flow
from pydantic import BaseModel

from flows.params import DataParams, EvaluateParams, ReleaseParams, TrainParams, TuneParams
from flows.release import ReleaseResult
from flows.release import release as release_flow
from flows.tune import TuneResult
from flows.tune import tune as tune_flow


class PipelineResult(BaseModel):
    """The study and what came of it."""

    tune: TuneResult
    release: ReleaseResult


@flow(name="pipeline")
def pipeline(
    data: DataParams,
    train: TrainParams = TrainParams(),  # noqa: B008 - frozen; Prefect shows it as the form's default
    evaluate: EvaluateParams = EvaluateParams(),  # noqa: B008
    tune: TuneParams = TuneParams(),  # noqa: B008
    release: ReleaseParams = ReleaseParams(),  # noqa: B008
) -> PipelineResult:
    """Search for the best candidate on the data, then put it through the gates and into a Bento."""
    study = tune_flow(data=data, train=train, evaluate=evaluate, tune=tune, release=release)
    shipped = release_flow(run=study.run_id, release=release)
    return PipelineResult(tune=study, release=shipped)
