"""@flow release: best run > export > certify > int8 > gates > lunchbox > Bento > smoke test > champion.

Until the last step nothing that anybody uses has changed: a refusal or a crash leaves the old champion serving, and the
same command may be given again.
"""

from __future__ import annotations

import json
import math
import shutil
import tempfile
from pathlib import Path

from prefect import flow, task
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE
from pydantic import BaseModel

from bentos.manifest import Calibration, DataVersion, Manifest, name_release
from flows.core.gates import Report, run_gates
from flows.core.lineage import Lineage, trace_version
from flows.core.lunchbox import ReleaseFacts, pack_lunchbox, read_certificate
from flows.core.packing import bento_exists, build_bento, is_stored, remove_bento, smoke_test, store_model
from flows.core.precision import Int8Trial
from flows.core.tracking import RunRecord, Tracker, open_tracker
from flows.errors import ReleaseRefusedError
from flows.params import ReleaseParams
from flows.progress import say
from flows.settings import PROJECT_ROOT, FlowSettings, export_environment, load_settings
from flows.stages import CALIBRATION_FILE, EVALUATION_FOLDER, OWN_TEXTS_FILE, read_test


class ReleaseResult(BaseModel):
    """What was released, and what it proved."""

    version: str
    run_id: str
    bento_tag: str
    space_id: str
    unchanged: bool  # it was the champion already
    gates: list[dict[str, str]]
    metrics: dict[str, float]  # serve/*: measured on the built Bento; empty when unchanged


@flow(name="release")
def release(run: str | None = None, release: ReleaseParams = ReleaseParams()) -> ReleaseResult:  # noqa: B008 - frozen
    """Put a registered model through the gates and into a Bento, and make it the champion.

    `run` is an MLflow run or a version; without it, the best version on the data of the newest one.
    """
    settings = load_settings()
    export_environment(settings)
    tracker = open_tracker(settings)
    candidate = trace_version(tracker, tracker.best_version().version if run is None else run)
    version = candidate.version
    record = tracker.find_run(candidate.run_id)
    say(f"[release] version {version}, run {candidate.run_id}")

    report = judge(record, release, version)  # what is known without an export: a refusal costs nothing
    box = settings.lunchboxes_path / name_release(version, candidate.run_id)
    manifest = pack(tracker, candidate, record, settings, release, report, box)
    report = judge(record, release, version, box)
    released = candidate.is_champion and candidate.bento_tag == manifest.tag and bento_exists(manifest.tag)
    unchanged = released and is_stored(manifest)
    measured = {} if unchanged else build_and_test(manifest, box, settings)
    if unchanged:
        say(f"[release] {manifest.tag} is the champion already")
    else:
        promote(tracker, candidate, manifest, report, measured, box)
    return ReleaseResult(
        version=version,
        run_id=candidate.run_id,
        bento_tag=manifest.tag,
        space_id=manifest.space_id,
        unchanged=unchanged,
        gates=report.to_rows(),
        metrics=measured,
    )


@task(cache_policy=NO_CACHE)
def judge(run: RunRecord, params: ReleaseParams, version: str, box: Path | None = None) -> Report:
    """Ask the gates; the certificate's ones join in once there is a box.

    Raises:
        ReleaseRefusedError: with every reason and what would change it.
    """
    undefined = [name for name in run.tags.get("undefined_metrics", "").split(", ") if name]
    report = run_gates(
        run.metrics | dict.fromkeys(undefined, math.nan),
        params,
        candidate=f"version {version}",
        certificate=None if box is None else read_certificate(box),
    )
    if box is not None or not report.passed:
        create_markdown_artifact(report.to_markdown(), key="gates", description=f"Gates of version {version}")
        for row in report.to_rows():
            say(f"[gates] {row['gate']}: {row['verdict']}, {row['reason']}")
    if not report.passed:
        raise ReleaseRefusedError(report.refusal)
    return report


@task(cache_policy=NO_CACHE)
def pack(
    tracker: Tracker,
    candidate: Lineage,
    run: RunRecord,
    settings: FlowSettings,
    params: ReleaseParams,
    report: Report,
    box: Path,
) -> Manifest:
    """Export, certify, try int8 and pack the lunchbox, or find it packed by an earlier call."""
    with tempfile.TemporaryDirectory() as scratch:
        model = tracker.download_model(run.run_id, Path(scratch) / "model")
        evaluation = tracker.download_artifact(run.run_id, EVALUATION_FOLDER, Path(scratch))
        calibration = json.loads((evaluation / CALIBRATION_FILE).read_text(encoding="utf-8"))
        facts = ReleaseFacts(
            name=settings.model_name,
            version=candidate.version,
            run_id=run.run_id,
            data=DataVersion(path=candidate.data_path, md5=candidate.data_md5, revision=candidate.data_rev or None),
            base_model=candidate.base_model,
            git_commit=candidate.git_commit or None,
            lock_sha256=candidate.lock_sha256 or None,
            metrics=run.metrics,
            params={name: value for name, value in run.params.items() if name.startswith("train.")},
            calibration=Calibration.model_validate(calibration) if calibration else None,
            decision_threshold=run.metrics.get("decision_threshold"),
            report=report,
        )
        say("[pack] exporting to ONNX and comparing with sentence-transformers")
        own_texts = json.loads((evaluation / OWN_TEXTS_FILE).read_text(encoding="utf-8"))
        int8 = None if params.precision == "fp32" else Int8Trial(params, read_test(evaluation, run.metrics))
        return pack_lunchbox(model, box, facts, min_cosine=params.min_cosine, extra_texts=own_texts, int8=int8)


@task(cache_policy=NO_CACHE)
def build_and_test(manifest: Manifest, box: Path, settings: FlowSettings) -> dict[str, float]:
    """Build the Bento and ask it over HTTP; one that fails is removed, so that `latest` never means it."""
    store_model(box, manifest)
    is_new = not bento_exists(manifest.tag)
    tag = build_bento(manifest, root=PROJECT_ROOT)
    say(f"[pack] built {tag}; starting it for a test")
    try:
        measured = smoke_test(tag, manifest, log=settings.home_path / "smoke.log")
    except BaseException:
        if is_new:
            remove_bento(tag)
        raise
    say(
        f"[pack] {tag} answers: p95 {measured['serve/p95_ms']:.1f} ms for one short text, "
        f"{measured['serve/texts_per_s']:.0f} texts/s, {measured['serve/rss_mb']:.0f} MiB"
    )
    return measured


@task(cache_policy=NO_CACHE)
def promote(
    tracker: Tracker, candidate: Lineage, manifest: Manifest, report: Report, measured: dict[str, float], box: Path
) -> None:
    """Write what the Bento proved to its run, then tags, then the aliases: `champion` is the very last write."""
    tracker.log_metrics(candidate.run_id, measured)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        (folder / "gates.md").write_text(report.to_markdown(), encoding="utf-8")
        for path in box.iterdir():
            if path.suffix != ".onnx":  # large, and in the Bento
                shutil.copy(path, folder)
        tracker.log_folder(candidate.run_id, folder, to="release")
    tracker.promote(
        candidate.version,
        tags={
            "bento_tag": manifest.tag,
            "space_id": manifest.space_id,
            "run_id": candidate.run_id,
            "data_path": candidate.data_path,
            "data_md5": candidate.data_md5,
            "data_rev": candidate.data_rev,
            "git_commit": candidate.git_commit,
            "lock_sha256": candidate.lock_sha256,
            "base_model": candidate.base_model,
        },
    )
    say(f"[release] {manifest.tag} is the champion")
