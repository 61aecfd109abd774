"""Each gate: what passes, what is refused and why, and that nothing passes by being unknown or no number."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bentos.manifest import Compat
from flows.core.evaluation import Interval
from flows.core.evidence import NO_ROWS, Champion, Evidence
from flows.core.gates import run_gates
from flows.core.history import Act
from flows.core.measuring import Serving
from flows.core.rivals import Comparison
from flows.core.slices import Slice
from flows.core.verdicts import Report, Verdict
from flows.params import ReleaseParams

CERTIFICATE = {"min_cosine": 0.99999, "batch_min_cosine": 0.999999}
CHAMPION = Champion("ekiben:2-9c1d3b5f", "2", Path("box"))
SERVING = Serving(p95_ms=5.0, texts_per_s=400.0, start_s=4.0, memory_mb=300.0, bytes_per_vector=1536.0)


def gain(low: float, high: float | None = None, **changed: Any) -> Comparison:
    high = low + 0.02 if high is None else high
    middle = (low + high) / 2
    usual = {"metric": "spearman", "ours": 0.82 + middle, "theirs": 0.82, "units": 1000, "confidence": 0.95}
    return Comparison(**usual | {"gain": Interval(middle, low, high)} | changed)


EVIDENCE = Evidence(
    ReleaseParams(),
    {"eval/spearman": 0.84, "base/spearman": 0.82},
    versus_base=gain(0.01),
    calibration_error=0.03,
    leaked_share=0.0,
    data_age_days=2.0,
    licence="apache-2.0",
)


def ask(evidence: Evidence = EVIDENCE, params: dict[str, Any] | None = None, **changed: Any) -> Report:
    asked = ReleaseParams(**(params or {}))
    return run_gates(dataclasses.replace(evidence, **{"params": asked} | changed), candidate="version 3")


def find(report: Report, gate: str) -> Verdict:
    return next(verdict for verdict in report.verdicts if verdict.gate == gate)


def refused(report: Report) -> list[str]:
    return [verdict.gate for verdict in report.verdicts if not verdict.passed]


def test_gates_join_as_their_evidence_does() -> None:
    cheap = ["finite", "quality", "calibration", "leakage", "data_age", "licence"]
    assert [verdict.gate for verdict in ask().verdicts] == cheap
    later = ("parity", "batch_invariance", "int8", "latency", "throughput", "start", "memory")
    assert ask().not_asked == later
    assert ask(params={"precision": "fp32"}, certificate=CERTIFICATE).not_asked == later[3:]
    assert ask(champion=CHAMPION).not_asked == ("champion", *later[:3], "compat", *later[3:])
    everything = ask(
        champion=CHAMPION,
        versus_champion=gain(0.0),
        certificate=CERTIFICATE,
        compat=Compat(kind="breaking", version="2", tag=CHAMPION.tag, space_id="0" * 16),
        serving=SERVING,
        champion_serving=SERVING,
        slices=(Slice("length=short", "", 100, 0.8, True, 0.8, Interval(0.0, -0.01, 0.01), 0.99),),
    )
    assert everything.passed
    assert everything.not_asked == ()
    assert [verdict.gate for verdict in everything.verdicts] == [
        "finite",
        "quality",
        "champion",
        "slice length=short",
        *cheap[2:],
        "parity",
        "batch_invariance",
        "compat",
        "latency",
        "latency_ratio",
        "throughput",
        "throughput_ratio",
        "start",
        "start_ratio",
        "memory",
        "memory_ratio",
    ]
    assert all(verdict.cure == "" for verdict in everything.verdicts)


def test_every_refusal_has_a_reason_and_a_cure() -> None:
    report = ask(
        params={
            "min_gain": 0.5,
            "champion_margin": 0.5,
            "slice_floors": {"length=short": 0.9, "length=huge": 0.1},
            "max_calibration_error": 0.01,
            "max_leaked_share": 0,
            "max_data_age_days": 1,
            "licences": ["mit"],
            "compat": "identical",
            "precision": "int8",
            "max_p95_ms": 1,
            "min_texts_per_s": 1e6,
            "max_start_s": 1,
            "max_memory_mb": 1,
            "max_slowdown": 0.5,
        },
        metrics={"eval/spearman": math.nan},
        champion=CHAMPION,
        versus_champion=gain(0.0),
        slices=(Slice("length=short", "", 100, 0.3, True, 0.8, Interval(-0.5, -0.6, -0.4), 0.99),),
        missing_columns=("region",),
        leaked_share=0.5,
        certificate={"min_cosine": 0.5, "batch_min_cosine": 0.5, "int8": {"certified": False, "reason": "slow"}},
        precision="int8",
        compat=Compat(kind="breaking", version="2", tag=CHAMPION.tag, space_id="0" * 16, reason="it moved"),
        serving=SERVING,
        champion_serving=SERVING,
    )
    assert refused(report) == [verdict.gate for verdict in report.verdicts]
    assert len(report.verdicts) == 23
    for verdict in report.verdicts:
        assert verdict.reason
        assert verdict.cure
        assert f"{verdict.gate}: {verdict.reason}; {verdict.cure}" in report.refusal
    assert "\n" not in report.refusal


@given(low=st.floats(-1, 1), width=st.floats(0, 0.5), asked=st.floats(-1, 1))
def test_quality_goes_by_the_low_end_of_the_interval(low: float, width: float, asked: float) -> None:
    report = ask(params={"min_gain": asked}, versus_base=gain(low, low + width))
    if abs(low - asked) > 1e-6:
        assert report.passed == (low > asked)
    assert find(report, "quality").value == low


@given(low=st.floats(-1, 1), width=st.floats(0, 0.5), asked=st.floats(-1, 1), more=st.floats(0, 1))
def test_a_better_candidate_is_never_refused_where_a_worse_one_passes(
    low: float, width: float, asked: float, more: float
) -> None:
    params = {"min_gain": asked, "champion_margin": asked}
    worse, better = (
        ask(params=params, versus_base=found, champion=CHAMPION, versus_champion=found)
        for found in (gain(low, low + width), gain(low + more, low + width + more))
    )
    assert better.passed or not worse.passed


@given(low=st.floats(-1, 0.5), asked=st.floats(-1, 1))
def test_the_cure_for_a_missing_gain_would_change_the_verdict(low: float, asked: float) -> None:
    found = gain(low)
    report = ask(
        params={"min_gain": asked, "champion_margin": asked},
        versus_base=found,
        champion=CHAMPION,
        versus_champion=found,
    )
    for gate, name in (("quality", "min_gain"), ("champion", "champion_margin")):
        verdict = find(report, gate)
        if not verdict.passed:
            bound = float(verdict.cure.partition(f"release.{name} to ")[2].split()[0])
            again = ask(params={name: bound}, versus_base=found, champion=CHAMPION, versus_champion=found)
            assert find(again, gate).passed


@given(high=st.floats(-2, -1e-4), share=st.floats(0, 0.999))
def test_the_cure_for_a_slice_would_change_the_verdict(high: float, share: float) -> None:
    item = Slice("length=short", "", 100, 0.5, True, 0.5 - high, Interval(high, high - 0.1, high), 0.99)
    report = ask(params={"slice_max_drop": -high * share}, slices=(item,), reference="champion")
    verdict = find(report, "slice length=short")
    if not verdict.passed:
        bound = float(verdict.cure.partition("release.slice_max_drop to ")[2].split()[0])
        again = ask(params={"slice_max_drop": bound}, slices=(item,), reference="champion")
        assert find(again, "slice length=short").passed


def test_a_gain_on_the_border_passes_in_spite_of_rounding() -> None:
    assert 0.9 - 0.8 < 0.1
    assert ask(params={"min_gain": 0.1}, versus_base=gain(0.9 - 0.8)).passed


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["eval/spearman", "base/spearman", "eval/mae"])
def test_a_metric_that_is_no_number_is_refused_however_low_the_bar(name: str, bad: float) -> None:
    report = ask(params={"min_gain": -2}, metrics={**EVIDENCE.metrics, name: bad})
    assert refused(report) == ["finite"]
    assert name in report.refusal


@pytest.mark.parametrize("found", [None, gain(math.nan)])
def test_a_run_without_an_interval_of_its_gain_is_refused(found: Comparison | None) -> None:
    report = ask(params={"min_gain": -2}, versus_base=found)
    assert refused(report) == ["quality"]
    assert find(report, "quality").to_row()["value"] == "unknown"
    assert not run_gates(Evidence(ReleaseParams(), {}), candidate="x").passed


def test_the_champion_is_asked_for_only_when_there_is_one() -> None:
    assert "champion" not in [verdict.gate for verdict in ask().verdicts]
    behind = gain(-0.03, -0.015, doubt="it was trained on other data, which may hold these rows")
    report = ask(champion=CHAMPION, versus_champion=behind)
    assert refused(report) == ["champion"]
    for part in (CHAMPION.tag, "-0.0300 to -0.0150", "-0.0100", "trained on other data", "release.champion_margin"):
        assert part in report.refusal
    assert ask(champion=CHAMPION, versus_champion=gain(-0.009)).passed  # may be a hair worse: a retrain often is


@pytest.mark.parametrize(("margin", "passed"), [(-0.01, False), (-1.9, False), (-2.0, True)])
def test_a_champion_that_cannot_be_compared_refuses_unless_nothing_is_asked(margin: float, passed: bool) -> None:
    for problem, cure in (("its box is gone", "release.champion_margin=-2"), (NO_ROWS, "train it again")):
        report = ask(params={"champion_margin": margin}, champion=CHAMPION, problem=problem)
        assert report.passed == passed
        assert "unknown" in find(report, "champion").reason
        assert (cure in report.refusal) == (not passed)


@given(
    units=st.integers(0, 100),
    high=st.floats(-1, 1),
    drop=st.floats(0, 1),
    certain=st.booleans(),
)
def test_a_slice_refuses_only_when_it_is_big_and_certainly_worse(
    units: int, high: float, drop: float, certain: bool
) -> None:
    judged = units >= 30
    interval = Interval(high - 0.1, high - 0.2, high)
    item = Slice("length=short", "", units, 0.5, judged, 0.5 - interval.value, interval if judged else None, 0.99)
    report = ask(params={"slice_max_drop": drop}, slices=(item,), reference="champion")
    if abs(high + drop) > 1e-6:
        assert report.passed == (not judged or high > -drop)


def test_floors_are_the_users_word() -> None:
    small, big = Slice("lang=fr", "", 10, 0.3, False), Slice("lang=de", "", 100, 0.6, True)
    report = ask(params={"slice_floors": {"lang=fr": 0.9, "lang=de": 0.7, "lang=dee": 0.1}}, slices=(small, big))
    assert refused(report) == ["floor lang=de", "floor lang=dee"]
    assert "name one that there is (lang=fr, lang=de)" in report.refusal
    assert "too few" in find(report, "floor lang=fr").reason
    assert ask(params={"slice_floors": {"lang=de": 0.6}}, slices=(big,)).passed
    assert refused(ask(params={"slice_floors": {"lang=de": 0.1}}, problem=NO_ROWS)) == ["floor lang=de"]


def test_a_column_that_was_asked_for_and_is_not_there_is_refused() -> None:
    report = ask(missing_columns=("region",))
    assert refused(report) == ["slice region"]
    assert "data.slice_columns" in report.refusal


@given(value=st.floats(0, 1), asked=st.floats(0.001, 1))
def test_calibration_and_leakage_compare_with_their_bounds(value: float, asked: float) -> None:
    for gate, figure, bound in (
        ("calibration", "calibration_error", "max_calibration_error"),
        ("leakage", "leaked_share", "max_leaked_share"),
    ):
        report = ask(params={bound: asked}, **{figure: value})
        if abs(value - asked) > 1e-6:
            assert refused(report) == ([gate] if value > asked else [])


def test_what_an_older_run_did_not_record_is_unknown_and_refused_only_when_it_was_asked_for() -> None:
    older = {"leaked_share": None, "data_age_days": None, "licence": None}
    report = ask(**older)
    assert report.passed
    values = {row["gate"]: (row["value"], row["threshold"]) for row in report.to_rows()}
    assert values["leakage"] == ("unknown", "0.01")
    assert values["data_age"] == values["licence"] == ("unknown", "not asked")
    asked = ask(params={"max_data_age_days": 30, "licences": ["mit"]}, **older)
    assert refused(asked) == ["data_age", "licence"]


def test_what_is_not_asked_shows_its_value_all_the_same() -> None:
    report = ask(serving=SERVING)
    rows = {row["gate"]: row for row in report.to_rows()}
    for gate, value in (("data_age", "2"), ("licence", "apache-2.0"), ("latency", "5"), ("throughput", "400")):
        assert (rows[gate]["value"], rows[gate]["threshold"], rows[gate]["verdict"]) == (value, "not asked", "passed")
        assert "not asked" in rows[gate]["reason"]
    assert "champion" not in "".join(rows)


def test_data_and_licences_are_held_against_what_is_asked() -> None:
    assert ask(params={"max_data_age_days": 2, "licences": ["MIT", "Apache-2.0"]}).passed
    report = ask(params={"max_data_age_days": 1.9, "licences": ["mit", "bsd-3-clause"]})
    assert refused(report) == ["data_age", "licence"]
    for part in ("2.0 days old", "under apache-2.0, allowed are mit, bsd-3-clause"):
        assert part in report.refusal


@given(cosine=st.floats(0, 1), batch=st.floats(0, 1), asked=st.floats(0.01, 1))
def test_the_certificate_gates_compare_with_min_cosine(cosine: float, batch: float, asked: float) -> None:
    certificate = {"min_cosine": cosine, "batch_min_cosine": batch}
    report = ask(params={"min_cosine": asked}, certificate=certificate)
    assert report.passed == (cosine >= asked and batch >= asked)


@pytest.mark.parametrize("key", ["min_cosine", "batch_min_cosine"])
def test_a_certificate_that_is_no_number_is_refused(key: str) -> None:
    assert not ask(certificate={**CERTIFICATE, key: math.nan}).passed


INT8: dict[str, Any] = {
    "certified": True,
    "reason": "",
    "quality": [{"metric": "spearman", "loss": 0.0012}, {"metric": "ndcg_at_10", "loss": -0.002}],
    "mean_cosine": 0.998,
    "batch_min_cosine": 0.99999,
    "speed": {"ratio": 2.5},
}


def test_a_certified_int8_shows_its_receipts() -> None:
    verdict = find(ask(certificate=CERTIFICATE | {"int8": INT8}), "int8")
    assert (verdict.value, verdict.threshold, verdict.passed) == (0.0012, 0.005, True)
    for part in ("int8 is the default", "spearman -0.0012", "ndcg_at_10 +0.0020", "0.998", "0.99999", "2.50 times"):
        assert part in verdict.reason


@pytest.mark.parametrize(("precision", "passed"), [("auto", True), ("fp32", True), ("int8", False)])
def test_an_int8_that_is_not_certified_refuses_only_a_release_that_insists(precision: str, passed: bool) -> None:
    section = {"certified": False, "reason": "it computes 0.80 times the texts of fp32"}
    report = ask(certificate=CERTIFICATE | {"int8": section}, precision=precision)
    assert report.passed == passed
    assert find(report, "int8").reason == "int8 is left out, fp32 serves: it computes 0.80 times the texts of fp32"
    assert ("release.precision" in report.refusal) == (not passed)


ORDER = ["identical", "compatible", "adapter", "breaking"]


@pytest.mark.parametrize("kind", ORDER)
@pytest.mark.parametrize("asked", [*ORDER[:3], "any"])
def test_the_space_may_be_as_far_off_as_was_asked(kind: Any, asked: str) -> None:
    compat = Compat(kind=kind, version="2", tag=CHAMPION.tag, space_id="0" * 16, figures={"cosine": 0.91})
    report = ask(params={"compat": asked}, compat=compat)
    assert report.passed == (asked == "any" or ORDER.index(kind) <= ORDER.index(asked))
    row = find(report, "compat").to_row()
    assert (row["value"], row["threshold"]) == (kind, "not asked" if asked == "any" else asked)
    assert "cosine 0.9100" in row["reason"]


BOUNDS = {
    "latency": ("p95_ms", "max_p95_ms", 1),
    "throughput": ("texts_per_s", "min_texts_per_s", -1),
    "start": ("start_s", "max_start_s", 1),
    "memory": ("memory_mb", "max_memory_mb", 1),
}


@given(gate=st.sampled_from(sorted(BOUNDS)), factor=st.floats(0.1, 10))
def test_a_served_figure_is_held_against_its_bound(gate: str, factor: float) -> None:
    figure, bound, direction = BOUNDS[gate]
    value = getattr(SERVING, figure)
    report = ask(params={bound: value * factor}, serving=SERVING)
    if abs(factor - 1) > 1e-6:
        assert report.passed == ((factor - 1) * direction > 0)
    if not report.passed:
        assert refused(report) == [gate]
        assert f"release.{bound}" in report.refusal


@given(gate=st.sampled_from(sorted(BOUNDS)), factor=st.floats(0.1, 10), most=st.floats(0.2, 5))
def test_a_served_figure_is_held_against_the_champions(gate: str, factor: float, most: float) -> None:
    figure, _, direction = BOUNDS[gate]
    ours = dataclasses.replace(SERVING, **{figure: getattr(SERVING, figure) * factor**direction})
    report = ask(
        params={"max_slowdown": most},
        serving=ours,
        champion=CHAMPION,
        champion_serving=SERVING,
        versus_champion=gain(0),
    )
    verdict = find(report, f"{gate}_ratio")
    assert verdict.value == pytest.approx(factor)
    if abs(factor - most) > 1e-6:
        assert verdict.passed == (factor < most)


def test_a_champion_that_could_not_be_measured_slows_nobody_down() -> None:
    report = ask(serving=SERVING, champion=CHAMPION, versus_champion=gain(0))
    assert report.passed
    assert find(report, "latency_ratio").to_row()["value"] == "unknown"


LEFT = Act(at="20261120T091500000000Z", kind="rollback", version="1", replaces="3", reason="slow on short queries")


def test_a_version_that_a_rollback_has_left_comes_back_only_when_it_is_asked_for() -> None:
    report = ask(left_by=LEFT)
    verdict = report.verdicts[0]
    assert (verdict.gate, verdict.passed) == ("rolled back", False)
    assert "2026-11-20T09:15:00+00:00" in verdict.reason
    assert "slow on short queries" in verdict.reason
    assert "--set release.allow_rolled_back=true" in verdict.cure
    assert ask(left_by=LEFT, params={"allow_rolled_back": True}).passed
    assert ask(left_by=LEFT, params={"alias": "challenger"}).passed  # that is only shadowed
    assert "rolled back" not in {verdict.gate for verdict in ask().verdicts}
