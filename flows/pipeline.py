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
    """Search for the best candidate on the data, then put it through the gates and into a Bento.

    Args:
        data: Which texts and labels, and how they are split: `pairs`, `retrieval`, or `profiles` with `judgements`.
        train: The first candidate; what the search space does not name stays so in all of them.
        evaluate: How the candidate that is taken is scored on the held-out rows.
        tune: Budget and space of the search, the costs it minimises, and the policy that takes one of the trials.
        release: What the candidate must prove, and what it becomes: champion or challenger.
    """
    study = tune_flow(data=data, train=train, evaluate=evaluate, tune=tune, release=release)
    shipped = release_flow(run=study.run_id, release=release)
    return PipelineResult(tune=study, release=shipped)
