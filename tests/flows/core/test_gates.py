from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flows.core.gates import format_figure, run_gates
from flows.params import ReleaseParams

METRICS = {"eval/spearman": 0.84, "base/spearman": 0.82, "gain/low": 0.01, "gain/high": 0.03}
CERTIFICATE = {"min_cosine": 0.99999, "batch_min_cosine": 0.999999}
scores = st.floats(-1, 1)
gains = st.floats(-1, 1)


def test_a_candidate_above_its_base_model_passes_all_gates() -> None:
    report = run_gates(METRICS, ReleaseParams(), candidate="ekiben:3-1f2e3d4c", certificate=CERTIFICATE)
    assert report.passed
    assert report.refusal == ""
    assert [row["gate"] for row in report.to_rows()] == ["finite", "quality", "parity", "batch_invariance"]
    assert all(row["verdict"] == "passed" and row["cure"] == "" for row in report.to_rows())


def test_without_a_certificate_its_gates_are_left_out() -> None:
    report = run_gates(METRICS, ReleaseParams(), candidate="x")
    assert [verdict.gate for verdict in report.verdicts] == ["finite", "quality"]


def test_a_refusal_says_why_and_what_would_change_it_in_one_line() -> None:
    report = run_gates(METRICS, ReleaseParams(min_gain=0.05), candidate="ekiben:3-1f2e3d4c")
    assert not report.passed
    assert "\n" not in report.refusal
    for part in ("ekiben:3-1f2e3d4c", "0.8400", "0.8200", "+0.0200", "+0.0100 to +0.0300", "release.min_gain"):
        assert part in report.refusal
    markdown = report.to_markdown()
    assert "### ekiben:3-1f2e3d4c: refused" in markdown
    assert "| quality | refused | 0.02 | 0.05 |" in markdown
    assert "What would change it:" in markdown


@given(tuned=scores, base=scores, asked=gains)
def test_quality_passes_exactly_when_the_gain_reaches_what_is_asked(tuned: float, base: float, asked: float) -> None:
    report = run_gates({"eval/spearman": tuned, "base/spearman": base}, ReleaseParams(min_gain=asked), candidate="x")
    if abs(tuned - base - asked) > 1e-6:
        assert report.passed == (tuned - base > asked)


@given(tuned=scores, base=scores, asked=gains, more=st.floats(0, 1))
def test_a_better_candidate_is_never_refused_where_a_worse_one_passes(
    tuned: float, base: float, asked: float, more: float
) -> None:
    params = ReleaseParams(min_gain=asked)
    worse, better = (
        run_gates({"eval/spearman": value, "base/spearman": base}, params, candidate="x")
        for value in (tuned, tuned + more)
    )
    assert better.passed or not worse.passed


@given(cosine=st.floats(0, 1), batch=st.floats(0, 1), asked=st.floats(0.01, 1))
def test_the_certificate_gates_compare_with_min_cosine(cosine: float, batch: float, asked: float) -> None:
    certificate = {"min_cosine": cosine, "batch_min_cosine": batch}
    report = run_gates(METRICS, ReleaseParams(min_cosine=asked), candidate="x", certificate=certificate)
    assert report.passed == (cosine >= asked and batch >= asked)


def test_a_gain_on_the_border_passes_in_spite_of_rounding() -> None:
    metrics = {"eval/spearman": 0.9, "base/spearman": 0.8}
    assert 0.9 - 0.8 < 0.1
    assert run_gates(metrics, ReleaseParams(min_gain=0.1), candidate="x").passed


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["eval/spearman", "base/spearman", "eval/mae"])
def test_a_metric_that_is_no_number_is_refused_however_low_the_bar(name: str, bad: float) -> None:
    report = run_gates({**METRICS, name: bad}, ReleaseParams(min_gain=-2), candidate="x", certificate=CERTIFICATE)
    assert not report.passed
    assert name in report.refusal


INT8: dict[str, Any] = {
    "certified": True,
    "reason": "",
    "quality": [{"metric": "spearman", "loss": 0.0012}, {"metric": "ndcg_at_10", "loss": -0.002}],
    "mean_cosine": 0.998,
    "batch_min_cosine": 0.99999,
    "speed": {"ratio": 2.5},
}


def test_a_certified_int8_shows_its_receipts() -> None:
    report = run_gates(METRICS, ReleaseParams(), candidate="x", certificate=CERTIFICATE | {"int8": INT8})
    verdict = report.verdicts[-1]
    assert (verdict.gate, verdict.value, verdict.threshold, verdict.passed) == ("int8", 0.0012, 0.005, True)
    for part in ("int8 is the default", "spearman -0.0012", "ndcg_at_10 +0.0020", "0.998", "0.99999", "2.50 times"):
        assert part in verdict.reason


@pytest.mark.parametrize(("precision", "passed"), [("auto", True), ("int8", False)])
def test_an_int8_that_is_not_certified_refuses_only_a_release_that_insists(precision: Any, passed: bool) -> None:
    section = {"certified": False, "reason": "it computes 0.80 times the texts of fp32"}
    report = run_gates(
        METRICS, ReleaseParams(precision=precision), candidate="x", certificate=CERTIFICATE | {"int8": section}
    )
    assert report.passed == passed
    assert report.verdicts[-1].reason == "int8 is left out, fp32 serves: it computes 0.80 times the texts of fp32"
    assert ("release.precision" in report.refusal) == (not passed)


@pytest.mark.parametrize("metrics", [{}, {"eval/spearman": 0.9}, {"base/spearman": 0.1}, {"dev/spearman": 0.5}])
def test_a_run_that_was_not_compared_with_its_base_model_is_refused(metrics: dict[str, float]) -> None:
    assert not run_gates(metrics, ReleaseParams(min_gain=-2), candidate="x").passed


@pytest.mark.parametrize("key", ["min_cosine", "batch_min_cosine"])
def test_a_certificate_that_is_no_number_is_refused(key: str) -> None:
    certificate = {**CERTIFICATE, key: math.nan}
    assert not run_gates(METRICS, ReleaseParams(), candidate="x", certificate=certificate).passed


def test_retrieval_data_are_judged_by_ndcg() -> None:
    metrics = {"eval/ndcg_at_10": 0.7, "base/ndcg_at_10": 0.8, "eval/mrr_at_10": 0.9, "base/mrr_at_10": 0.1}
    report = run_gates(metrics, ReleaseParams(), candidate="x")
    assert not report.passed
    assert "ndcg_at_10" in report.refusal


def test_figures_are_rounded_down_so_that_almost_one_does_not_read_as_one() -> None:
    assert format_figure(0.99999999) == "0.999999"
    assert format_figure(1.0) == "1"
    assert format_figure(0.02) == "0.02"
    assert format_figure(-0.02) == "-0.02"
    assert format_figure(math.nan) == "nan"
