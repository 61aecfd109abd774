"""What is known about a candidate when the gates are asked: gathered from its run, its lunchbox and the champion's.

Core layer. Gathering reads files and embeds test rows, which takes seconds to minutes; the gates only compare figures.
A release gathers once, asks the gates that need no export, and then adds what it learns: the lunchbox, the relation to
the champion's space, what the built Bento was measured at. Figures that are not there yet are None.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from bentos.errors import LunchboxError, NotReadyError
from bentos.manifest import Calibration, Compat, verify_files
from flows.core.calibration import calibration_error
from flows.core.card import find_licence
from flows.core.evaluation import Array, Interval
from flows.core.heldout import FrozenTest, read_calibration, read_frozen
from flows.core.history import Act
from flows.core.lunchbox import read_certificate
from flows.core.measuring import Serving
from flows.core.rivals import MAX_PAIRS, Champion, Comparison, compare, open_box, score_units
from flows.core.slices import Slice, slice_tests
from flows.core.tracking import RunRecord
from flows.errors import one_line
from flows.params import EvaluateParams, ReleaseParams

__all__ = ["Champion", "Evidence", "gather_evidence"]

PRIMARY_METRICS = ("spearman", "ndcg_at_10")  # the first that the run has
LEAK_METRIC = "data/leaked_share"
DATA_TIME_TAG = "data_time"  # ISO 8601: when the newest of the training data was written
NO_ROWS = "the run kept no test rows to compare on"
READING = ("columns", "profile_template", "duplicates", "leaks")  # of data.*: what becomes of the rows of the files
SPLITTING = ("split_seed", "dev_fraction", "test_fraction")  # of data.*: which rows are test rows, without a test file


@dataclass(frozen=True)
class Evidence:
    """Figures about a candidate, under the thresholds that they are held against; None is not known (yet)."""

    params: ReleaseParams
    metrics: Mapping[str, float]  # of the run, under their names in MLflow; undefined ones are NaN
    versus_base: Comparison | None = None
    champion: Champion | None = None
    versus_champion: Comparison | None = None
    slices: tuple[Slice, ...] = ()
    reference: str = ""  # what the slices are compared with: `champion`, `base model` or nothing
    calibration_error: float | None = None  # 0..1
    leaked_share: float | None = None  # 0..1
    data_age_days: float | None = None
    licence: str | None = None
    certificate: Mapping[str, Any] | None = None  # as `certify` returns it
    precision: str = "auto"  # what the release is asked to serve: `release.precision`, or else `train.precision`
    compat: Compat | None = None
    serving: Serving | None = None
    champion_serving: Serving | None = None
    left_by: Act | None = None  # the rollback that left the candidate, when it was not champion since
    missing_columns: tuple[str, ...] = ()  # of `release.slices`, that the test rows do not have
    problem: str = ""  # why nothing, or not the champion, can be compared on the test rows
    _material: _Material | None = field(default=None, repr=False, compare=False)

    @property
    def primary_metric(self) -> str:
        """The metric that candidates are compared by."""
        return next((name for name in PRIMARY_METRICS if f"eval/{name}" in self.metrics), PRIMARY_METRICS[0])

    def add(
        self,
        *,
        box: Path | None = None,
        compat: Compat | None = None,
        serving: Serving | None = None,
        champion_serving: Serving | None = None,
    ) -> Evidence:
        """Return the evidence with what was learned since; what the champion made of the rows is kept.

        Args:
            box: The candidate's lunchbox: its certificate joins, and the test rows are embedded again as it serves.
            compat: Relation to the champion's space.
            serving: What the built Bento was measured at.
            champion_serving: The same of the champion, beside it.

        Raises:
            LunchboxError: the box cannot be read or loaded.
        """
        new: dict[str, Any] = {"compat": compat, "serving": serving, "champion_serving": champion_serving}
        evidence = replace(self, **{name: value for name, value in new.items() if value is not None})
        if box is None or self._material is None:
            return evidence
        material = self._material.through(box)
        return replace(evidence, certificate=read_certificate(box), _material=material, **material.figures(self.params))


@dataclass(frozen=True)
class _Material:
    """Test rows and what each model made of them: one figure a unit, see `FrozenTest`."""

    test: FrozenTest | None
    ours: Array | None  # (units,) by the lunchbox when there is one, else as scored at training
    theirs: Array | None  # (units,) of the champion
    calibration: Calibration | None
    recorded: Comparison | None  # with the base model, from the run's metrics
    metric: str
    params: EvaluateParams
    doubt: str  # about the champion's figures
    licence: str | None
    ours_are_served: bool = False

    def through(self, box: Path) -> _Material:
        """Return the same with the candidate's figures by its lunchbox."""
        manifest, encode = open_box(box)
        licence = manifest.licence or self.licence
        if self.test is None:
            return replace(self, licence=licence)
        return replace(self, ours=score_units(self.test, encode), ours_are_served=True, licence=licence)

    def figures(self, params: ReleaseParams) -> dict[str, Any]:
        """Return the comparisons, slices and calibration, as fields of `Evidence`."""
        found: dict[str, Any] = {"versus_base": self.recorded, "licence": self.licence}
        if self.test is None or self.ours is None:
            return found
        base = self.test.base
        if base is not None and (self.ours_are_served or self.recorded is None):
            found["versus_base"] = compare(self.test, self.ours, base, self.params, metric=self.metric)
        if self.theirs is not None:
            found["versus_champion"] = compare(
                self.test, self.ours, self.theirs, self.params, metric=self.metric, doubt=self.doubt
            )
        rival = base if self.theirs is None else self.theirs
        slices, missing = slice_tests(
            self.test, params.slices, self.ours, rival, self.params, min_units=params.slice_min_rows
        )
        found |= {"slices": tuple(slices), "missing_columns": tuple(missing)}
        found["reference"] = "" if rival is None else "base model" if self.theirs is None else "champion"
        if self.calibration is not None and self.test.labels is not None:
            found["calibration_error"] = calibration_error(self.calibration, self.ours, self.test.labels)
        return found


def gather_evidence(
    run: RunRecord,
    params: ReleaseParams,
    *,
    evaluation: Path,
    champion: Champion | None = None,
    now: datetime | None = None,
) -> Evidence:
    """Gather what is known about the candidate that `run` trained.

    Args:
        run: Its MLflow run.
        params: The thresholds.
        evaluation: The folder `evaluation/` of the run's artifacts.
        champion: The version that it would replace: another one, or None. One whose box cannot be loaded is no error:
            the evidence says so in `problem`.
        now: For the age of the data; default: now.
    """
    undefined = [name for name in run.tags.get("undefined_metrics", "").split(", ") if name]
    metrics = run.metrics | dict.fromkeys(undefined, math.nan)
    test = read_frozen(evaluation, metrics)
    test = None if test is None else test.limit(MAX_PAIRS)
    evidence = Evidence(params, metrics)
    theirs, doubt, problem = _score_champion(test, champion, run)
    base_model = run.params.get("train.base_model", "")
    evaluate = _evaluate_params(run)
    material = _Material(
        test=test,
        ours=None if test is None else test.tuned,
        theirs=theirs,
        calibration=read_calibration(evaluation),
        recorded=_recorded_gain(metrics, evidence.primary_metric, evaluate),
        metric=evidence.primary_metric,
        params=evaluate,
        doubt=doubt,
        licence=find_licence(None, base_model) if base_model else None,
    )
    asked = params.precision if params.precision != "auto" else run.params.get("train.precision", "auto")
    return replace(
        evidence,
        champion=champion,
        problem=problem,
        leaked_share=metrics.get(LEAK_METRIC),
        data_age_days=_age_days(run.tags.get(DATA_TIME_TAG, ""), now or datetime.now(UTC)),
        precision=asked,
        _material=material,
        **material.figures(params),
    )


def _score_champion(
    test: FrozenTest | None, champion: Champion | None, run: RunRecord
) -> tuple[Array | None, str, str]:
    """Return the figures of the champion, what makes them doubtful, and why there are none."""
    if test is None:
        return None, "", NO_ROWS
    if champion is None:
        return None, "", ""
    if champion.problem:
        return None, "", champion.problem
    try:
        manifest, encode = open_box(champion.box)
        verify_files(champion.box, manifest)  # figures of an altered model would be nobody's
        theirs = score_units(test, encode)
    except (LunchboxError, NotReadyError) as error:
        return None, "", f"the lunchbox of {champion.tag} cannot be used: {one_line(error)}"
    same_data = manifest.data.md5 == run.tags.get("data_md5")
    doubt = _doubt_split(run, champion) if same_data else "it was trained on other data, which may hold these rows"
    return theirs, doubt, ""


def _doubt_split(run: RunRecord, champion: Champion) -> str:
    """What is doubtful about a champion of the same files: other rows of them may have been its test rows."""
    if champion.params is None:
        return "its run is gone, so nobody knows whether it was trained on some of these rows"
    names = READING if run.params.get("data.test", "null") != "null" else (*READING, *SPLITTING)
    other = [f"data.{name}" for name in names if run.params.get(f"data.{name}") != champion.params.get(f"data.{name}")]
    if not other:
        return ""
    return f"it was trained on the same files split otherwise ({', '.join(other)}), perhaps on some of these rows"


def _recorded_gain(metrics: Mapping[str, float], metric: str, params: EvaluateParams) -> Comparison | None:
    """The comparison with the base model that was made at training, on all test rows; None when it was not recorded."""
    names = (f"eval/{metric}", f"base/{metric}", "gain/low", "gain/high")
    ours, theirs, low, high = (metrics.get(name, math.nan) for name in names)
    if not all(map(math.isfinite, (ours, theirs, low, high))):
        return None
    return Comparison(metric, ours, theirs, Interval(ours - theirs, low, high), 0, params.confidence)


def _evaluate_params(run: RunRecord) -> EvaluateParams:
    """The run's own resamples and confidence, as far as it recorded them."""
    kept = {
        name: run.params[f"evaluate.{name}"]
        for name in ("bootstrap_samples", "confidence")
        if f"evaluate.{name}" in run.params
    }
    try:
        return EvaluateParams.model_validate(kept)
    except ValidationError:
        return EvaluateParams()


def _age_days(data_time: str, now: datetime) -> float | None:
    """Days since `data_time` (ISO 8601, UTC when it names no zone), at least 0; None when it is no time."""
    try:
        written = datetime.fromisoformat(data_time)
    except ValueError:
        return None
    if written.tzinfo is None:
        written = written.replace(tzinfo=UTC)
    return max((now - written).total_seconds() / 86_400, 0.0)
