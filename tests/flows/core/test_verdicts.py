"""One content, whatever the clothes: rows, markdown, JSON, the refusal."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flows.core.verdicts import COLUMNS, Report, Verdict, format_figure

words = st.text(st.characters(codec="utf-8", exclude_categories=("Cs", "Cc")), max_size=20)
figures = (
    st.none()
    | st.floats(allow_nan=False, allow_infinity=False)
    | words.filter(lambda text: text not in ("nan", "inf", "-inf"))
)
verdicts = st.builds(
    Verdict, gate=words, value=figures, threshold=figures, passed=st.booleans(), reason=words, cure=words
)
reports = st.builds(
    Report,
    candidate=words,
    verdicts=st.lists(verdicts, max_size=5).map(tuple),
    not_asked=st.lists(words, max_size=3).map(tuple),
)


@given(reports)
def test_a_report_is_the_same_after_json(report: Report) -> None:
    assert Report.from_json(report.to_json()) == report


@given(reports)
def test_rows_json_and_markdown_say_the_same(report: Report) -> None:
    rows, gates = report.to_rows(), json.loads(report.to_json())["gates"]
    markdown = report.to_markdown()
    assert [tuple(row) for row in rows] == [COLUMNS] * len(rows)
    for row, gate in zip(rows, gates, strict=True):
        assert {name: row[name] for name in ("gate", "verdict", "reason", "cure")} == {
            name: gate[name] for name in ("gate", "verdict", "reason", "cure")
        }
        assert f"| {row['verdict']} | {row['value']}".replace("|", "") in markdown.replace("\\|", "").replace("|", "")
    assert json.loads(report.to_json())["refusal"] == report.refusal
    assert report.passed == (bool(rows) and all(row["verdict"] == "passed" for row in rows))


@given(reports)
def test_a_refusal_is_one_line_with_each_reason_and_cure(report: Report) -> None:
    refused = [verdict for verdict in report.verdicts if not verdict.passed]
    assert bool(report.refusal) == bool(refused)
    for verdict in refused:
        assert f"{verdict.gate}: {verdict.reason}; {verdict.cure}" in report.refusal


def test_what_is_no_number_unknown_or_not_asked_has_its_word() -> None:
    report = Report("x", (Verdict("a", math.nan, None, False, "r", "c"), Verdict("b", None, math.inf, True, "r")))
    assert [(row["value"], row["threshold"]) for row in report.to_rows()] == [("nan", "not asked"), ("unknown", "inf")]
    again = Report.from_json(report.to_json())
    assert math.isnan(again.verdicts[0].value)
    assert again.verdicts[1].threshold == math.inf
    assert "NaN" not in report.to_json()  # which JSON does not have


def test_no_verdict_is_no_pass() -> None:
    assert not Report("x", ()).passed


def test_markdown_shows_the_verdict_and_what_would_change_it() -> None:
    report = Report("ekiben:3-1f2e3d4c", (Verdict("quality", 0.02, 0.05, False, "a | b", "train longer"),))
    markdown = report.to_markdown()
    assert markdown.startswith("### ekiben:3-1f2e3d4c: refused\n")
    assert "| quality | refused | 0.02 | 0.05 | a \\| b |" in markdown
    assert markdown.endswith("What would change it:\n\n- **quality**: train longer\n")


def test_a_refusal_says_which_gates_were_not_asked_and_a_pass_does_not() -> None:
    good, bad = Verdict("a", 1.0, 0.0, True, "r"), Verdict("a", 0.0, 1.0, False, "r", "c")
    refused = Report("x", (bad,), ("parity", "memory"))
    assert refused.unasked == "not asked: parity, memory; it was refused before"
    assert "Not asked: parity, memory; it was refused before.\n" in refused.to_markdown()
    assert json.loads(refused.to_json())["not_asked"] == ["parity", "memory"]
    assert Report("x", (good,), ("parity",)).unasked == ""
    assert "Not asked" not in Report("x", (good,), ("parity",)).to_markdown()
    assert Report.from_json('{"candidate": "x", "gates": []}').not_asked == ()  # written before it was known


def test_one_more_verdict_answers_what_it_stands_for() -> None:
    report = Report("x", (), ("parity", "memory")).add(
        Verdict("certificate", None, 0.9, False, "r", "c"), answers=("parity",)
    )
    assert ([verdict.gate for verdict in report.verdicts], report.not_asked) == (["certificate"], ("memory",))


def test_what_was_refused_on_less_evidence_stays_refused() -> None:
    first, better = Verdict("quality", 0.0, 0.1, False, "r", "c"), Verdict("quality", 0.2, 0.1, True, "r")
    other, gone = Verdict("parity", 1.0, 0.9, True, "r"), Verdict("slice a", 0.0, 0.1, False, "r", "c")
    report = Report("x", (better, other)).keep_refusals(Report("x", (first, gone)))
    assert report.verdicts == (first, other, gone)
    worse = Verdict("quality", -1.0, 0.1, False, "r", "c")
    assert Report("x", (worse,)).keep_refusals(Report("x", (first,))).verdicts == (worse,)


@pytest.mark.parametrize("text", ["[]", "{}", '{"candidate": "x", "gates": [{"gate": "a"}]}', "no json", '"x"'])
def test_what_is_no_report_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"no report|Expecting value"):
        Report.from_json(text)


def test_figures_are_rounded_down_so_that_almost_one_does_not_read_as_one() -> None:
    assert format_figure(0.99999999) == "0.999999"
    assert format_figure(1.0) == "1"
    assert format_figure(0.02) == "0.02"
    assert format_figure(-0.02) == "-0.02"
    assert format_figure(math.nan) == "nan"
    assert format_figure("apache-2.0") == "apache-2.0"
