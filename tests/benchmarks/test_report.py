"""The page of results written by hand: three rounds in which Ekiben wins W1 and loses W4 to the seed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.benchmarks.report import OURS, PAGE, TARGETS, Figures, Target, render_page, write_page

FIXTURE = Path(__file__).with_name("results.fixture.json")


@pytest.fixture
def results() -> dict[str, Any]:
    read: dict[str, Any] = json.loads(FIXTURE.read_text(encoding="utf-8"))
    return read


def test_a_ratio_is_that_of_the_medians_with_those_of_each_round_beside_it(results: dict[str, Any]) -> None:
    found = Figures(results).evaluate(Target("W1", OURS, "texts_per_s", 3.0, over="infinity"))
    assert found == (3.0, [3.0, 3.0, 3.375])


def test_the_ceiling_is_the_best_batch_size_of_each_round(results: dict[str, Any]) -> None:
    figures = Figures(results)
    assert figures.list_values("ceiling-fp32", "W1", "texts_per_s") == [400.0, 410.0, 420.0]
    found = figures.evaluate(Target("W1", OURS, "texts_per_s", 0.65, over="ceiling-fp32"))
    assert found is not None
    assert found[0] == pytest.approx(300 / 410)


def test_one_bad_round_breaks_a_promise_that_holds_for_every_round(results: dict[str, Any]) -> None:
    target = next(target for target in TARGETS if target.metric == "server_errors")
    found = Figures(results).evaluate(target)
    assert found is not None
    assert found[0] == 1
    assert not target.is_met(found[0])


def test_what_was_not_measured_has_no_value(results: dict[str, Any]) -> None:
    figures = Figures(results)
    assert figures.evaluate(Target("W2", OURS, "texts_per_s", 1.5, over="infinity")) is None
    assert figures.evaluate(Target("W1", "ekiben-int8", "texts_per_s", 3.5, over="infinity")) is None
    assert figures.find_median("infinity", "W5", "goodput_share") is None


@pytest.mark.parametrize(
    ("at_least", "value", "met"), [(True, 2.0, True), (True, 1.9, False), (False, 2.0, True), (False, 2.1, False)]
)
def test_a_target_is_met_up_to_its_limit(at_least: bool, value: float, met: bool) -> None:
    assert Target("W1", OURS, "texts_per_s", 2.0, at_least=at_least).is_met(value) is met


def test_the_page_says_met_and_not_met_and_where_another_server_is_ahead(results: dict[str, Any]) -> None:
    page = render_page(results)
    lines = page.splitlines()
    ratio = next(line for line in lines if "texts/s / infinity" in line and line.startswith("| W1 | ekiben-fp32"))
    assert ratio == "| W1 | ekiben-fp32: texts/s / infinity | ≥ 3 | 3 | 3 to 3.38 | met |"
    assert any("5xx" in line and "**not met**" in line for line in lines)
    losses = page.split("## Where we lose")[1].split("\n## ")[0]
    assert "- W5: target missed: ekiben-fp32: 5xx is 1, wanted ≤ 0." in losses
    assert "- W4, p50 ms: FastAPI + sentence-transformers 7.0, Ekiben fp32 9.0." in losses
    assert "ekiben-batchable could not be measured: POST /encode_batchable answered 404" in losses
    assert "W1" not in losses


def test_the_page_shows_medians_with_their_range_and_leaves_out_what_was_not_run(results: dict[str, Any]) -> None:
    page = render_page(results)
    assert "| Ekiben fp32 | 300.0 (270.0 to 330.0) | 90.0 |" in page
    assert "### W2" not in page
    assert "W6" not in page.split("## Where we lose")[0]
    for fact in ("Test CPU", "avx512_vnni", "15.4 (6 to 26)", "onnxruntime 1.32.0", "at most\n  9 % of one core"):
        assert fact in page


def test_the_page_warns_when_the_machine_was_not_quiet(results: dict[str, Any]) -> None:
    assert "ratios are uncertain" not in render_page(results)
    results["runs"][0]["foreign_share"] = 0.4
    assert "Other programs took up to 40 % of the cores" in render_page(results)


def test_the_written_page_has_its_pictures_and_comes_out_the_same_again(
    results: dict[str, Any], tmp_path: Path
) -> None:
    page = write_page(results, tmp_path / "one")
    assert page.name == PAGE
    pictures = sorted(page.parent.glob("*.svg"))
    assert len(pictures) == 2
    assert all(f"]({picture.name})" in page.read_text(encoding="utf-8") for picture in pictures)
    write_page(results, tmp_path / "two")
    for path in page.parent.iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()
