"""Prometheus' files: they are valid, every alert is tested and explained, and what they ask for is exposed."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from bentos.doors import DOORS
from tests.deployments.monitored import (
    DEPLOYMENTS,
    OWN,
    ROOT,
    exposed_metrics,
    find_tool,
    promtool,
    read_rules,
)
from tests.deployments.promql import find_faults, read_query

FOLDER = DEPLOYMENTS / "prometheus"
RULES = read_rules()
ALERTS = {rule["alert"]: rule for rule in RULES if "alert" in rule}
RECORDS = {rule["record"]: rule["expr"] for rule in RULES if "record" in rule}
TESTS: list[dict[str, Any]] = yaml.safe_load((FOLDER / "rules_test.yml").read_text(encoding="utf-8"))["tests"]


@pytest.fixture(scope="module")
def exposed(tmp_path_factory: pytest.TempPathFactory, tiny_lunchbox_path: Path) -> dict[str, set[str]]:
    folder = tmp_path_factory.getbasetemp() / "monitored"
    folder.mkdir(exist_ok=True)
    return exposed_metrics(folder, tiny_lunchbox_path)


def recorded(expression: str) -> set[str]:
    """The labels of what a recording rule records: those that it groups by."""
    return {*read_query(expression).grouped} - {"le"}


# --- the files


def test_the_files_are_valid() -> None:
    promtool("check", "config", "prometheus.yml", cwd=FOLDER)
    promtool("check", "rules", "--lint-fatal", "rules.yml", cwd=FOLDER)


def test_the_tests_of_the_rules_pass() -> None:
    promtool("test", "rules", "rules_test.yml", cwd=FOLDER)


@pytest.mark.parametrize("alert", ALERTS)
def test_every_alert_has_a_case_that_fires_and_one_that_does_not(alert: str) -> None:
    cases = [case for test in TESTS for case in test["alert_rule_test"] if case["alertname"] == alert]
    assert any(case["exp_alerts"] for case in cases)
    nearly = [case for test in TESTS[:1] for case in test["alert_rule_test"] if case["alertname"] == alert]
    assert [case["exp_alerts"] for case in nearly] == [[]]
    if "for" in ALERTS[alert]:  # and it waits before it fires
        assert len([case for case in cases if not case["exp_alerts"]]) > len(nearly)


def test_the_world_that_is_nearly_ill_has_all_that_the_alerts_look_at() -> None:
    there = {series["series"].partition("{")[0] for series in TESTS[0]["input_series"]}
    wanted = {name for rule in RULES for name in read_query(rule["expr"]).selected} - set(RECORDS)
    assert wanted <= there


@pytest.mark.parametrize("alert", ALERTS)
def test_every_alert_says_how_bad_it_is_what_to_do_and_where_to_read_on(alert: str) -> None:
    rule = ALERTS[alert]
    assert rule["labels"]["severity"] in ("critical", "warning", "info")
    assert set(rule["annotations"]) == {"summary", "description", "runbook"}
    page, _, anchor = rule["annotations"]["runbook"].partition("#")
    assert anchor == alert.lower()
    assert anchor in anchors((ROOT / page).read_text(encoding="utf-8"))


def test_the_page_explains_no_alert_that_is_gone() -> None:
    page = (ROOT / "docs" / "monitoring.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^#+ (Ekiben[A-Z]\w+)$", page, re.MULTILINE)) == set(ALERTS)


@pytest.mark.parametrize("alert", ALERTS)
def test_the_page_has_the_severity_and_the_wait_of_each_alert(alert: str) -> None:
    page = (ROOT / "docs" / "monitoring.md").read_text(encoding="utf-8")
    row = re.search(rf"^\| \[{alert}\]\(#{alert.lower()}\) \| (\w+) \| ([^|]+) \| ([^|]+) \|$", page, re.MULTILINE)
    assert row is not None
    assert (row[1], row[3].strip()) == (ALERTS[alert]["labels"]["severity"], ALERTS[alert].get("for", "at once"))


def test_every_link_into_a_page_finds_its_heading() -> None:
    docs = ROOT / "docs"
    links = re.findall(r"\]\(([\w.-]*)#([\w-]+)\)", (docs / "monitoring.md").read_text(encoding="utf-8"))
    assert len(links) > len(ALERTS)
    for page, anchor in links:
        assert anchor in anchors((docs / (page or "monitoring.md")).read_text(encoding="utf-8")), (page, anchor)


def anchors(page: str) -> set[str]:
    """The anchors that a Markdown page has, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", page, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


# --- what they ask for


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.get("alert") or rule.get("record"))
def test_each_rule_asks_for_metrics_and_labels_that_are_exposed(
    rule: dict[str, Any], exposed: dict[str, set[str]]
) -> None:
    records = {name: recorded(expression) for name, expression in RECORDS.items()}
    assert find_faults(rule["expr"], exposed | OWN | records) == []


@pytest.mark.parametrize("test", TESTS, ids=lambda test: test["name"])
def test_the_worlds_of_the_tests_are_made_of_metrics_that_are_exposed(
    test: dict[str, Any], exposed: dict[str, set[str]]
) -> None:
    for series in test["input_series"]:
        assert find_faults(series["series"], exposed | OWN) == []


def test_the_rules_count_the_doors_and_nothing_else() -> None:
    doors = "|".join(door.path for door in DOORS)
    asked = re.findall(r'route=~"([^"]+)"', (FOLDER / "rules.yml").read_text(encoding="utf-8"))
    assert set(asked) == {doors}


def test_the_rules_know_the_jobs_by_their_names() -> None:
    config = yaml.safe_load((FOLDER / "prometheus.yml").read_text(encoding="utf-8"))
    jobs = {job["job_name"] for job in config["scrape_configs"]}
    asked = set(re.findall(r'job="(\w+)"', (FOLDER / "rules.yml").read_text(encoding="utf-8")))
    assert asked == {"encoder", "line"}
    assert asked < jobs


def test_the_key_for_protected_metrics_is_two_signs_away(tmp_path: Path) -> None:
    text = (FOLDER / "prometheus.yml").read_text(encoding="utf-8")
    opened = re.sub(r"^    # (authorization:)\n    # (  credentials_file)", r"    \1\n    \2", text, flags=re.MULTILINE)
    config = yaml.safe_load(opened)
    encoder = next(job for job in config["scrape_configs"] if job["job_name"] == "encoder")
    assert encoder["authorization"] == {"credentials_file": "secrets/encoder.key"}
    find_tool("promtool")
    (tmp_path / "prometheus.yml").write_text(opened)
    (tmp_path / "rules.yml").write_text((FOLDER / "rules.yml").read_text())
    (tmp_path / "secrets").mkdir()
    (tmp_path / "secrets" / "encoder.key").write_text("x")
    promtool("check", "config", "prometheus.yml", cwd=tmp_path)


# --- the reader that the tests above trust


def test_the_reader_finds_metrics_labels_and_groupings() -> None:
    query = read_query(
        'sum by (job, le) (rate(a_bucket{x=~"b|{c}", y!="z"}[5m])) / on (job) group_left (q) b offset 5m > bool 0.5'
    )
    assert query.selected == {"a_bucket": {"x", "y"}, "b": frozenset()}
    assert query.grouped == {"job", "le", "q"}


@pytest.mark.parametrize(
    ("expression", "faults"),
    [
        ("a{x='1'}".replace("'", '"'), []),
        ("nowhere", ["no metric nowhere"]),
        ('a{z="1"}', ["a has no label z"]),
        ("sum by (z) (a)", ["nothing there has the label z"]),
        ("time() - a > 3 * 86400", []),
    ],
)
def test_the_reader_finds_faults(expression: str, faults: list[str]) -> None:
    assert find_faults(expression, {"a": {"x", "y"}}) == faults
