"""What a release leaves with its run."""

from __future__ import annotations

from pathlib import Path

import pytest

from bentos.manifest import read_manifest
from flows.core.boxes import MANIFEST_TAG, check_box
from flows.core.history import read_history
from flows.core.measuring import Serving
from flows.core.receipts import keep_again, keep_refusal, keep_release, read_serving
from flows.core.tracking import Tracker
from flows.core.verdicts import Report, Verdict
from flows.errors import EkibenError
from tests.flows.core.test_registry import register_run
from tests.serving import copy_lunchbox

PASSED = Report("version 1", (Verdict("quality", 0.1, 0.0, True, "fine"),))
REFUSED = Report(
    "version 1", (Verdict("quality", 0.1, 0.0, True, "fine"), Verdict("latency", 9.0, 5.0, False, "slow", "be fast"))
)
FAST, SLOW = Serving(1.0, 2.0, 3.0, 4.0, 5.0), Serving(10.0, 20.0, 30.0, 40.0, 50.0)


def test_a_release_leaves_verdicts_figures_and_the_whole_box(
    tracker: Tracker, tiny_lunchbox_path: Path, tmp_path: Path
) -> None:
    release = register_run(tracker)
    box = copy_lunchbox(tiny_lunchbox_path, tmp_path / "box", version="1", run_id=release.run_id)
    assert read_serving(tracker, release.run_id) == (None, None)
    keep_release(tracker, release.run_id, box, PASSED, FAST, SLOW)
    kept = tracker.download_artifact(release.run_id, "release", tmp_path / "kept")
    assert {path.name for path in kept.iterdir()} == {
        *(name for name in read_manifest(box).files if not name.endswith(".onnx")),
        "manifest.json",
        "gates.md",
        "gates.json",
        "serving.json",
    }
    assert Report.from_json((kept / "gates.json").read_text()) == PASSED
    assert read_serving(tracker, release.run_id) == (FAST, SLOW)
    record = tracker.find_run(release.run_id)
    assert record.metrics == FAST.as_metrics()
    assert record.tags["release_verdict"] == "passed"
    check_box(tracker.download_artifact(release.run_id, "lunchbox", tmp_path / "box of the run"), release)


def test_a_refusal_is_on_record_once_and_goes_away_with_a_release(
    tracker: Tracker, tiny_lunchbox_path: Path, tmp_path: Path
) -> None:
    release = register_run(tracker)
    for _ in range(2):
        keep_refusal(tracker, release, REFUSED, "7")
    (act,) = read_history(tracker)
    assert (act.kind, act.version, act.replaces, act.gates) == ("refusal", "1", "7", ["latency"])
    assert "be fast" in act.reason
    assert tracker.version("1").tags["verdict"] == "refused"
    assert tracker.find_run(release.run_id).tags["release_refusal"] == REFUSED.refusal
    box = copy_lunchbox(tiny_lunchbox_path, tmp_path / "box", version="1", run_id=release.run_id)
    keep_release(tracker, release.run_id, box, PASSED, None, None)
    assert tracker.find_run(release.run_id).tags["release_refusal"] == ""
    kept = tracker.download_artifact(release.run_id, "release/gates.json", tmp_path / "kept")
    assert Report.from_json(kept.read_text()).passed


def test_a_released_version_keeps_the_verdict_by_which_it_was(tracker: Tracker, tmp_path: Path) -> None:
    release = register_run(tracker)
    tracker.set_version_tags("1", {"verdict": "passed", MANIFEST_TAG: "0" * 64})
    keep_refusal(tracker, tracker.version("1"), REFUSED, "")
    assert tracker.version("1").tags["verdict"] == "passed"
    kept = tracker.download_artifact(release.run_id, "release", tmp_path)
    assert [path.name for path in kept.iterdir()] == ["refused"]


def test_a_release_beside_another_champion_leaves_a_record_of_its_own_and_the_box_alone(
    tracker: Tracker, tiny_lunchbox_path: Path, tmp_path: Path
) -> None:
    release = register_run(tracker)
    box = copy_lunchbox(tiny_lunchbox_path, tmp_path / "box", version="1", run_id=release.run_id)
    keep_release(tracker, release.run_id, box, PASSED, FAST, SLOW)
    keep_refusal(tracker, tracker.version("1"), REFUSED, "2")
    keep_again(tracker, release.run_id, PASSED, SLOW, FAST, beside="2")
    keep_again(tracker, release.run_id, PASSED, None, None, beside="3")  # measured before
    assert read_serving(tracker, release.run_id) == (FAST, SLOW)
    assert read_serving(tracker, release.run_id, beside="2") == (SLOW, FAST)
    assert read_serving(tracker, release.run_id, beside="3") == (None, None)
    kept = tracker.download_artifact(release.run_id, "release/beside-2", tmp_path / "kept")
    assert {path.name for path in kept.iterdir()} == {"gates.md", "gates.json", "serving.json"}
    assert tracker.find_run(release.run_id).tags["release_refusal"] == ""


def test_figures_that_cannot_be_read_are_named(tracker: Tracker) -> None:
    release = register_run(tracker)
    tracker.log_json(release.run_id, "release/serving.json", {"candidate": {"speed": 1}})
    with pytest.raises(EkibenError, match=r"serving\.json of run"):
        read_serving(tracker, release.run_id)
