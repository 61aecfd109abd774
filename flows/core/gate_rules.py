"""What is asked of the model: quality, slices, calibration, data, licence, export, space. Core layer, pure.

Each rule turns figures into verdicts, or into none while there are no figures.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import get_args

from bentos.manifest import CompatClass
from flows.core.evidence import NO_ROWS, Evidence
from flows.core.slices import FOUND, Slice
from flows.core.verdicts import ROUNDING, Verdict, format_figure
from flows.params import ReleaseParams

COMPAT_ORDER: tuple[str, ...] = get_args(CompatClass)  # best first
LARGEST_LOSS = {"spearman": 2.0, "ndcg_at_10": 1.0}  # a margin of minus this much asks for nothing
RETRAIN = "train longer or on more data, or run `ekiben tune`"


def judge_rolled_back(evidence: Evidence) -> Iterator[Verdict]:
    """A version that a rollback has left does not become the champion again by itself, as the best one on its data.

    A challenger may be left: servers only shadow it.
    """
    act, allowed = evidence.left_by, evidence.params.allow_rolled_back
    if act is None or evidence.params.alias != "champion":
        return
    reason = f"a rollback to version {act.version} has left it, {act.time}, because of {act.reason!r}"
    cure = "train a better one, or take it all the same: --set release.allow_rolled_back=true"
    yield Verdict("rolled back", "left", None if allowed else "not left", allowed, reason, "" if allowed else cure)


def judge_finite(evidence: Evidence) -> Iterator[Verdict]:
    """Every metric is a number: one NaN means that the training or the evaluation went wrong."""
    bad = sorted(name for name, value in evidence.metrics.items() if not math.isfinite(value))
    if not evidence.metrics:
        reason = "the run has no metrics"
    elif bad:
        reason = f"{len(bad)} of {len(evidence.metrics)} metrics are no finite number: {', '.join(bad[:5])}"
    else:
        reason = f"all {len(evidence.metrics)} metrics are finite"
    passed = bool(evidence.metrics) and not bad
    cure = "train again with a lower train.learning_rate, and look at the data for constant scores"
    yield Verdict("finite", float(len(bad)), 0.0, passed, reason, "" if passed else cure)


def judge_quality(evidence: Evidence) -> Iterator[Verdict]:
    """On test rows that neither was trained on, the candidate beats its base model by more than luck.

    It is the low end of the interval that must reach `release.min_gain`.
    """
    asked, found = evidence.params.min_gain, evidence.versus_base
    if found is None or not math.isfinite(found.gain.low):
        name = evidence.primary_metric
        tuned, base = (evidence.metrics.get(f"{part}/{name}", math.nan) for part in ("eval", "base"))
        reason = f"test {name} is {tuned:.4f}, the base model's {base:.4f}: there is no interval of a gain to compare"
        cure = "train and evaluate again: a run must have finite eval/ and base/ metrics and gain/low"
        yield Verdict("quality", None, asked, False, reason, cure)
        return
    passed = found.gain.low >= asked - ROUNDING
    reason = (
        f"test {found.metric} is {found.ours:.4f}, the base model's {found.theirs:.4f}: a gain of {found.span}; "
        f"asked of its low end {asked:+.4f}"
    )
    cure = f"{RETRAIN}, or set release.min_gain to {_below(found.gain.low)} or less"
    yield Verdict("quality", found.gain.low, asked, passed, reason, "" if passed else cure)


def judge_champion(evidence: Evidence) -> Iterator[Verdict]:
    """On the same test rows, the candidate is not worse than the champion, but for `release.champion_margin`.

    The low end of the interval counts: who would replace the champion must show it. A champion whose lunchbox cannot
    be used refuses, unless the margin is so wide that nothing is asked.
    """
    asked, found, champion = evidence.params.champion_margin, evidence.versus_champion, evidence.champion
    if champion is None:
        return
    if found is None:
        if not evidence.problem:
            return  # it comes with the lunchbox
        least = -LARGEST_LOSS[evidence.primary_metric]
        passed = asked <= least
        cure = (
            "train it again with this version of Ekiben"
            if evidence.problem == NO_ROWS
            else f"restore the champion, or promote without comparing: --set release.champion_margin={least:g}"
        )
        yield Verdict("champion", None, asked, passed, f"unknown: {evidence.problem}", "" if passed else cure)
        return
    passed = found.gain.low >= asked - ROUNDING
    reason = (
        f"test {found.metric} is {found.ours:.4f}, that of {champion.tag} {found.theirs:.4f}: a difference of "
        f"{found.span}; asked of its low end {asked:+.4f}"
        f"{f'; mind that {found.doubt}' if found.doubt else ''}"
    )
    cure = f"{RETRAIN}, keep the champion, or set release.champion_margin to {_below(found.gain.low)} or less"
    yield Verdict("champion", found.gain.low, asked, passed, reason, "" if passed else cure)


def judge_slices(evidence: Evidence) -> Iterator[Verdict]:
    """No slice of the test rows lost more than `release.slice_max_drop`, and none is below its floor.

    Here the burden is the other way round than for the whole: a slice has few rows, and even a better candidate is by
    chance worse on some. So a drop refuses only when it is certain: when the slice has `release.slice_min_rows` rows
    and the whole interval of its difference, widened for the number of slices, lies below -`slice_max_drop`. The
    reference is the champion, and the base model as long as there is none. A floor is the user's own word: a metric
    below it refuses, in a slice that is big enough. A floor of a slice that no row is in, and a column that the rows do
    not have, refuse: they were asked for and cannot be answered. So do slices that the user named when the run kept no
    test rows; those that are asked of everybody are left out then.
    """
    if evidence.problem == NO_ROWS and evidence.params.slices != ReleaseParams().slices:
        for column in evidence.params.slices:
            cure = f"train it again with this version of Ekiben, or take {column!r} out of release.slices"
            yield Verdict(f"slice {column}", None, None, False, f"unknown: {NO_ROWS}", cure)
    for column in evidence.missing_columns:
        reason = f"unknown: the run's test rows have no column {column!r}"
        cure = f"train with data.slice_columns, or take {column!r} out of release.slices ({', '.join(FOUND)} need none)"
        yield Verdict(f"slice {column}", None, None, False, reason, cure)
    for item in evidence.slices:
        yield _judge_drop(item, evidence)
        floor = evidence.params.slice_floors.get(item.name)
        if floor is not None:
            yield _judge_floor(item, floor, evidence)
    names = [item.name for item in evidence.slices]
    answerable = evidence.slices or evidence.problem == NO_ROWS  # else they come with the lunchbox
    for name, floor in evidence.params.slice_floors.items():
        if answerable and name not in names:
            there = ", ".join(names[:12]) or "none"
            cure = f"name one that there is ({there}), or add its column to release.slices"
            yield Verdict(f"floor {name}", None, floor, False, "unknown: no test row is in this slice", cure)


def _judge_drop(item: Slice, evidence: Evidence) -> Verdict:
    gate, most = f"slice {item.name}", evidence.params.slice_max_drop
    metric = evidence.primary_metric
    about = f"{item.units} test rows{f' ({item.meaning})' if item.meaning else ''}: {metric} {item.ours:.4f}"
    if item.theirs is None:
        return Verdict(gate, item.ours, None, True, f"{about}; there is nothing to compare it with, not asked")
    about += f", the {evidence.reference}'s {item.theirs:.4f}"
    if item.gain is None:
        why = "fewer than release.slice_min_rows" if item.units < evidence.params.slice_min_rows else "labels all equal"
        return Verdict(gate, item.ours - item.theirs, -most, True, f"{about}; {why}, so shown and not judged")
    passed = item.gain.high >= -most - ROUNDING
    reason = (
        f"{about}: {item.gain.value:+.4f} ({100 * item.confidence:.4g}% interval {item.gain.low:+.4f} to "
        f"{item.gain.high:+.4f}); asked of its high end {-most:+.4f}"
    )
    cure = (
        f"give more training data like these rows, or raise release.slice_max_drop to {_above(-item.gain.high)} or more"
    )
    return Verdict(gate, item.gain.high, -most, passed, reason, "" if passed else cure)


def _judge_floor(item: Slice, floor: float, evidence: Evidence) -> Verdict:
    about = f"{item.units} test rows: {evidence.primary_metric} {item.ours:.4f}"
    if not item.judged:
        return Verdict(f"floor {item.name}", item.ours, floor, True, f"{about}; too few to judge, so only shown")
    passed = item.ours >= floor - ROUNDING
    cure = "give more training data like these rows, or lower its floor in release.slice_floors"
    return Verdict(f"floor {item.name}", item.ours, floor, passed, f"{about}, asked {floor:g}", "" if passed else cure)


def judge_calibration(evidence: Evidence) -> Iterator[Verdict]:
    """Calibrated scores mean what labels mean, on test rows too."""
    value, asked = evidence.calibration_error, evidence.params.max_calibration_error
    if value is None:
        return
    passed = value <= asked + ROUNDING
    reason = f"calibrated scores are {value:.4f} off the labels, over bins of the test rows; asked {asked:g} at most"
    cure = "give more dev rows, or dev rows that are like the test rows; or raise release.max_calibration_error"
    yield Verdict("calibration", value, asked, passed, reason, "" if passed else cure)


def judge_leakage(evidence: Evidence) -> Iterator[Verdict]:
    """Test texts do not stand in train, not even in other case or punctuation.

    Runs of older versions did not measure it. Exact copies were dropped at their training too, so they pass.
    """
    value, asked = evidence.leaked_share, evidence.params.max_leaked_share
    if value is None:
        reason = "unknown: the run is older than this measurement; exact copies were dropped before its training"
        yield Verdict("leakage", None, asked, True, reason)
        return
    passed = value <= asked + ROUNDING
    reason = f"{value:.2%} of the test texts stand in train but for case and punctuation; asked {asked:.2%} at most"
    cure = "take those rows out of the training file and train again, or raise release.max_leaked_share"
    yield Verdict("leakage", value, asked, passed, reason, "" if passed else cure)


def judge_data_age(evidence: Evidence) -> Iterator[Verdict]:
    """The training data are not older than asked; data of unknown age are, when it is asked."""
    value, asked = evidence.data_age_days, evidence.params.max_data_age_days
    passed = asked is None or (value is not None and value <= asked)
    found = "the age of the training data is unknown" if value is None else f"the data are {value:.1f} days old"
    reason = f"{found}, {'not asked' if asked is None else f'asked {asked:g} days at most'}"
    cure = "train on newer data, or raise release.max_data_age_days"
    yield Verdict("data_age", value, asked, passed, reason, "" if passed else cure)


def judge_licence(evidence: Evidence) -> Iterator[Verdict]:
    """The base model's licence is one of those allowed; an unknown one is none of them."""
    value, allowed = evidence.licence, evidence.params.licences
    asked = ", ".join(allowed) if allowed else None
    passed = not allowed or (value is not None and value.casefold() in {name.casefold() for name in allowed})
    found = "the base model declares no licence" if value is None else f"the base model is under {value}"
    reason = f"{found}, {'not asked' if asked is None else f'allowed are {asked}'}"
    cure = "choose another base model, or add its licence to release.licences when you have read it"
    yield Verdict("licence", value, asked, passed, reason, "" if passed else cure)


def judge_parity(evidence: Evidence) -> Iterator[Verdict]:
    """The exported model gives sentence-transformers' own vectors."""
    return _judge_cosine(evidence, "parity", "min_cosine", "with sentence-transformers' own vectors")


def judge_batch_invariance(evidence: Evidence) -> Iterator[Verdict]:
    """A text's vector does not depend on the texts that share its batch."""
    meaning = "of a text in a batch with the same text alone"
    return _judge_cosine(evidence, "batch_invariance", "batch_min_cosine", meaning)


def _judge_cosine(evidence: Evidence, gate: str, key: str, meaning: str) -> Iterator[Verdict]:
    if evidence.certificate is None:
        return
    value, asked = float(evidence.certificate[key]), evidence.params.min_cosine
    passed = math.isfinite(value) and value >= asked
    reason = f"smallest cosine {meaning} is {format_figure(value)}, asked {format_figure(asked)}"
    cure = "export again; if it stays so, choose another base model"
    yield Verdict(gate, value, asked, passed, reason, "" if passed else cure)


def judge_int8(evidence: Evidence) -> Iterator[Verdict]:
    """int8 is certified, or it is left out and fp32 serves; it refuses only when int8 is what was asked for."""
    section = (evidence.certificate or {}).get("int8")
    asked = evidence.params.int8_max_loss
    if section is None:
        return
    if section["certified"]:
        losses = ", ".join(f"{item['metric']} {-item['loss']:+.4f}" for item in section["quality"])
        reason = (
            f"int8 is the default: {losses}, mean cosine with fp32 {format_figure(section['mean_cosine'])}, of a text "
            f"among others with itself alone {format_figure(section['batch_min_cosine'])}, "
            f"{section['speed']['ratio']:.2f} times the speed"
        )
    else:
        reason = f"int8 is left out, fp32 serves: {section['reason']}"
    loss = max((item["loss"] for item in section.get("quality", ())), default=None)
    passed = section["certified"] or evidence.precision != "int8"
    cure = "set release.precision to auto (or fp32, when train.precision is int8), or lower what it misses"
    yield Verdict("int8", loss, asked, passed, reason, "" if passed else cure)


def judge_compat(evidence: Evidence) -> Iterator[Verdict]:
    """How the space relates to the champion's is no worse than `release.compat` lets pass."""
    compat, asked = evidence.compat, evidence.params.compat
    if compat is None:
        return
    passed = asked == "any" or COMPAT_ORDER.index(compat.kind) <= COMPAT_ORDER.index(asked)
    found = compat.reason or ", ".join(f"{name} {value:.4f}" for name, value in compat.figures.items())
    reason = (
        f"{compat.kind} with the space of {compat.tag}{f': {found}' if found else ''}; "
        f"{'not asked' if asked == 'any' else f'asked {asked} or better'}"
    )
    cure = "train with train.anchor_weight above 0 so that the space stays, or set release.compat to any and re-index"
    yield Verdict("compat", compat.kind, None if asked == "any" else asked, passed, reason, "" if passed else cure)


def _above(value: float) -> str:
    """A bound that this value does not exceed, with three decimals."""
    return f"{math.ceil(value * 1000) / 1000:.3f}"


def _below(value: float) -> str:
    """A bound that this value passes, with three decimals."""
    return f"{math.floor(value * 1000) / 1000:.3f}"
