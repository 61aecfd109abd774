"""What a release leaves with the run of its model: the verdicts, what was measured, and the lunchbox. Core layer.

```
release/gates.md, gates.json   every gate with its verdict
release/serving.json           what the built Bento, and the champion's beside it, were measured at
release/...                    the small files of the lunchbox: card, certificate, manifest, canary, tokenizer
release/refused/gates.*        of a version that was released before, and would not be now
release/beside-N/gates.*, serving.json   of a version that was released before, and again beside version N
lunchbox/                      the whole box, for other machines
```
"""

from __future__ import annotations

import json
import shutil
import tempfile
from dataclasses import asdict
from pathlib import Path

from flows.core.boxes import MANIFEST_TAG, keep_box
from flows.core.history import Act, begin_act
from flows.core.measuring import Serving
from flows.core.registry import Release
from flows.core.tracking import Tracker
from flows.core.verdicts import Report
from flows.errors import EkibenError, NothingReleasedError

RELEASE_FOLDER = "release"
REFUSED_FOLDER = "release/refused"
SERVING_FILE = "serving.json"
PASSED, REFUSED = "passed", "refused"
LARGE = ".onnx"  # in `lunchbox/` only


def keep_release(
    tracker: Tracker, run_id: str, box: Path, report: Report, serving: Serving | None, rival: Serving | None
) -> None:
    """Write what a release proved, and its lunchbox, to the run.

    Args:
        tracker: MLflow.
        run_id: The run that trained the model.
        box: The finished lunchbox.
        report: Every verdict.
        serving: What the built Bento was measured at.
        rival: The same of the champion's.
    """
    if serving is not None:
        tracker.log_metrics(run_id, serving.as_metrics())
    with tempfile.TemporaryDirectory(prefix="ekiben-receipt-") as scratch:
        folder = Path(scratch)
        for path in box.iterdir():
            if path.suffix != LARGE:
                shutil.copy(path, folder)
        _write_report(folder, report)
        _write_serving(folder, serving, rival)
        tracker.log_folder(run_id, folder, to=RELEASE_FOLDER)
    keep_box(tracker, run_id, box)
    tracker.set_tags(run_id, {"release_verdict": PASSED, "release_refusal": ""})


def keep_again(
    tracker: Tracker, run_id: str, report: Report, serving: Serving | None, rival: Serving | None, *, beside: str
) -> None:
    """Write what a version that was released before has proven again, beside another champion. Its box stays as it is.

    Args:
        tracker: MLflow.
        run_id: The run that trained the model.
        report: Every verdict.
        serving: What its Bento was measured at; None: nothing was measured, and no file is written.
        rival: The same of the champion's.
        beside: Version of that champion; empty: there was none.
    """
    if serving is not None:
        with tempfile.TemporaryDirectory(prefix="ekiben-receipt-") as scratch:
            _write_report(Path(scratch), report)
            _write_serving(Path(scratch), serving, rival)
            tracker.log_folder(run_id, Path(scratch), to=_folder_beside(beside))
    tracker.set_tags(run_id, {"release_verdict": PASSED, "release_refusal": ""})


def keep_refusal(tracker: Tracker, release: Release, report: Report, champion: str) -> None:
    """Write down that a version was refused, and why: to its run, to the version, and in the history.

    A version that was released before keeps the verdict by which it was.

    Args:
        tracker: MLflow.
        release: The version.
        report: The verdicts.
        champion: Version that it would have replaced; empty: none.
    """
    was_released = MANIFEST_TAG in release.tags
    with tempfile.TemporaryDirectory(prefix="ekiben-receipt-") as scratch:
        _write_report(Path(scratch), report)
        tracker.log_folder(release.run_id, Path(scratch), to=REFUSED_FOLDER if was_released else RELEASE_FOLDER)
    tracker.set_tags(release.run_id, {"release_verdict": REFUSED, "release_refusal": report.refusal})
    if not was_released:
        tracker.set_version_tags(release.version, {"verdict": REFUSED})
    begin_act(
        tracker,
        Act(
            at="",
            kind="refusal",
            version=release.version,
            replaces=champion,
            reason=report.refusal,
            gates=[verdict.gate for verdict in report.verdicts if not verdict.passed],
        ),
    )


def read_serving(tracker: Tracker, run_id: str, *, beside: str | None = None) -> tuple[Serving | None, Serving | None]:
    """What the Bento of a run, and the champion's beside it, were measured at; None: they were not.

    Args:
        tracker: MLflow.
        run_id: The run.
        beside: Version of the champion that it was released again beside, empty for none; default: when it was
            released first.
    """
    folder = RELEASE_FOLDER if beside is None else _folder_beside(beside)
    with tempfile.TemporaryDirectory(prefix="ekiben-receipt-") as scratch:
        try:
            path = tracker.download_artifact(run_id, f"{folder}/{SERVING_FILE}", Path(scratch))
        except NothingReleasedError:
            return None, None
        try:
            figures = json.loads(path.read_text(encoding="utf-8"))
            serving, rival = (figures[name] and Serving(**figures[name]) for name in ("candidate", "champion"))
        except (ValueError, KeyError, TypeError) as error:
            raise EkibenError(f"{folder}/{SERVING_FILE} of run {run_id} cannot be used: {error!r}") from None
    return serving, rival


def _write_report(folder: Path, report: Report) -> None:
    (folder / "gates.md").write_text(report.to_markdown(), encoding="utf-8")
    (folder / "gates.json").write_text(report.to_json(), encoding="utf-8")


def _write_serving(folder: Path, serving: Serving | None, rival: Serving | None) -> None:
    figures = {"candidate": serving and asdict(serving), "champion": rival and asdict(rival)}
    (folder / SERVING_FILE).write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


def _folder_beside(champion: str) -> str:
    return f"{RELEASE_FOLDER}/beside-{champion or 'none'}"
