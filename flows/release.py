"""@flow release: best run > cheap gates > lunchbox > relation to the champion's space > Bento > gates > champion.

A release works beside what is served: it packs into the home folder, builds and measures in a BentoML home of its own,
and brings into the real stores only what has passed every gate. Until the last write to the registry the old champion
stands; killed anywhere and given again, the command ends in the same state. One release or rollback is at work at a
time, and none takes the place of a champion that it was not compared with. A version that was released before is judged
again, beside the champion of now, and promoted with the very files that it was released with.
"""

from __future__ import annotations

import json
from contextlib import ExitStack
from dataclasses import replace

from prefect import flow, task
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE
from pydantic import BaseModel

from bentos.errors import LunchboxError
from bentos.manifest import Compat, Manifest, read_manifest
from flows.core.boxes import check_vectors
from flows.core.evidence import Evidence, gather_evidence
from flows.core.folders import scratch_folder
from flows.core.gates import EXPORTED, run_gates
from flows.core.heldout import EVALUATION_FOLDER, read_test
from flows.core.lineage import trace_version
from flows.core.lunchbox import Relation, attach_compat, find_packed, finish_card, pack_lunchbox
from flows.core.measuring import Measured, Serving, measure_bentos
from flows.core.packing import install, put_back, stage_bento
from flows.core.precision import Int8Trial
from flows.core.promotion import carry_out
from flows.core.receipts import keep_again, keep_refusal, keep_release, read_serving
from flows.core.release_job import Job, open_job
from flows.core.release_lock import ReleaseLock
from flows.core.rivals import Champion
from flows.core.tracking import open_tracker
from flows.core.verdicts import Report, Verdict
from flows.errors import (
    CertificationError,
    EkibenError,
    ReleaseRefusedError,
    SmokeTestError,
    UnsupportedModelError,
    one_line,
)
from flows.params import ReleaseParams
from flows.progress import say
from flows.settings import PROJECT_ROOT, export_environment, load_settings
from flows.stages import OWN_TEXTS_FILE


class ReleaseResult(BaseModel):
    """What was released, and what it proved."""

    version: str
    run_id: str
    bento_tag: str
    space_id: str
    alias: str  # that it has now; empty after a dry run
    replaces: str  # version that was champion before; empty: none
    compat: str  # class of its space against that version's; empty: none
    unchanged: bool  # it was released just so already
    gates: list[dict[str, str]]
    metrics: dict[str, float]  # serve/*: measured on the built Bento; empty when it was measured before


@flow(name="release")
def release(
    run: str | None = None,
    release: ReleaseParams = ReleaseParams(),  # noqa: B008 - frozen; Prefect shows it as the form's default
    dry_run: bool = False,
) -> ReleaseResult:
    """Put a registered model through the gates and into a Bento, and make it the champion.

    Args:
        run: An MLflow run or a version; without it, the best version on the data of the newest one.
        release: What the model must prove, and what it becomes: champion or challenger.
        dry_run: Ask all gates, also after one that refuses, and leave nothing behind.
    """
    settings = load_settings()
    export_environment(settings)
    tracker = open_tracker(settings)
    candidate = trace_version(tracker, tracker.best_version().version if run is None else run)
    say(f"[release] version {candidate.version}, run {candidate.run_id}{', a dry run' if dry_run else ''}")
    with ExitStack() as stack:
        lock = None if dry_run else stack.enter_context(ReleaseLock(tracker, f"release of version {candidate.version}"))
        scratch = stack.enter_context(scratch_folder(settings.staging_path, "release"))
        job = open_job(tracker, settings, release, candidate, scratch, lock)
        for note in job.notes:
            say(f"[release] {note}")
        return prove_and_promote(job)


def prove_and_promote(job: Job) -> ReleaseResult:
    """Go from step to step; what a step writes, a later call finds done or does again."""
    evidence = gather(job)
    report = judge(job, evidence, last=False)  # what is known without an export: a refusal costs nothing
    if job.is_released:  # no file of it changes any more: it is taken as it is, or not at all
        manifest = check_vectors(job.box, job.release)
        compat = relate_again(job, manifest)
    else:
        manifest = relate(job, pack(job, report))
        compat = manifest.compat
    evidence = evidence.add(box=job.box, compat=compat)
    report = judge(job, evidence, report, manifest, last=False)
    serving, rival = read_recorded(job, manifest)
    is_measured = serving is None
    if is_measured:
        serving, rival = measure(job, manifest, report)
    evidence = evidence.add(serving=serving, champion_serving=rival)
    report = judge(job, evidence, report, manifest)
    if job.lock is not None:
        if job.is_released:
            restore(job, manifest, report, *((serving, rival) if is_measured else (None, None)))
        else:
            manifest = settle(job, manifest, report, serving, rival)
        promote(job, manifest, compat)
    return _result(job, manifest, report, compat, serving if is_measured else None)


@task(cache_policy=NO_CACHE)
def gather(job: Job) -> Evidence:
    """Read what the run kept, and let the champion embed the same test rows."""
    job.tracker.download_artifact(job.run.run_id, EVALUATION_FOLDER, job.scratch)
    evidence = gather_evidence(job.run, job.params, evaluation=job.evaluation, champion=job.champion)
    return replace(evidence, left_by=job.left_by)


@task(cache_policy=NO_CACHE)
def judge(
    job: Job, evidence: Evidence, before: Report | None = None, manifest: Manifest | None = None, *, last: bool = True
) -> Report:
    """Ask the gates; the verdicts are shown when they are the last ones, or refuse.

    A dry run goes on to the end, so that all gates are asked; what was refused `before` stays so.

    Raises:
        ReleaseRefusedError: with every reason and what would change it; the refusal is on record.
    """
    report = run_gates(evidence, candidate=job.name)
    if before is not None:
        report = report.keep_refusals(before)
    goes_on = report.passed or (job.lock is None and not last)
    if not goes_on:
        raise _refuse(job, report, manifest, evidence.serving)
    if last:
        _show(job, report)
    return report


@task(cache_policy=NO_CACHE)
def pack(job: Job, report: Report) -> Manifest:
    """Export, certify, try int8 and pack the lunchbox, or find it packed by an earlier call.

    Raises:
        ReleaseRefusedError: the model cannot be exported, or the export is not the trained model.
    """
    facts, least = job.facts(report), job.params.min_cosine
    int8 = None
    if job.params.precision != "fp32":
        int8 = Int8Trial(job.params, read_test(job.evaluation, job.run.metrics))
    packed = find_packed(job.box, facts, min_cosine=least, int8=int8)
    if packed is not None:
        return packed
    say("[pack] exporting to ONNX and comparing with sentence-transformers")
    model = job.tracker.download_model(job.run.run_id, job.scratch / "model")
    own_texts = json.loads((job.evaluation / OWN_TEXTS_FILE).read_text(encoding="utf-8"))
    try:
        return pack_lunchbox(model, job.box, facts, min_cosine=least, extra_texts=own_texts, int8=int8)
    except (CertificationError, UnsupportedModelError) as error:
        cure = "choose another base model"
        if isinstance(error, CertificationError):
            cure = "export again; if it stays so, choose another base model"
        verdict = Verdict("certificate", None, least, False, str(error), cure)
        raise _refuse(job, report.add(verdict, answers=EXPORTED)) from error


@task(cache_policy=NO_CACHE)
def relate(job: Job, manifest: Manifest) -> Manifest:
    """Compare the candidate's space with the champion's; the map into it ships when it has proven itself."""
    if job.champion is None:
        return attach_compat(job.box, manifest, None, None)
    compat, adapter = _compare(job, job.champion)
    earlier = []
    for rival in job.earlier:
        relation, matrix = _compare(job, rival)
        if relation.figures or relation.kind != "breaking":  # of one that cannot be loaded nothing is known
            earlier.append((relation, matrix))
    return attach_compat(job.box, manifest, compat, adapter, earlier=earlier)


@task(cache_policy=NO_CACHE)
def relate_again(job: Job, manifest: Manifest) -> Compat | None:
    """How the space of a released version relates to the champion's: as its box says, or else measured now."""
    recorded = {relation.version: relation for relation in manifest.relations}
    if job.replaces in recorded:
        return recorded[job.replaces]
    return None if job.champion is None else _compare(job, job.champion)[0]


@task(cache_policy=NO_CACHE)
def read_recorded(job: Job, manifest: Manifest) -> tuple[Serving | None, Serving | None]:
    """What a released version and the same champion were measured at; None: they were not measured together."""
    if not job.is_released:
        return None, None
    found = read_serving(job.tracker, job.run.run_id, beside=job.replaces)
    if found[0] is None and job.replaces == (manifest.compat.version if manifest.compat is not None else ""):
        found = read_serving(job.tracker, job.run.run_id)
    return found


@task(cache_policy=NO_CACHE)
def measure(job: Job, manifest: Manifest, report: Report) -> tuple[Serving, Serving | None]:
    """Build the Bento in a store of its own, serve it beside the champion's, check its answers and measure both.

    Raises:
        ReleaseRefusedError: it does not answer as it must.
    """
    candidate = (stage_bento(job.box, manifest, root=PROJECT_ROOT, home=job.staging), manifest)
    rival = _stage_rival(job)
    say(f"[pack] built {manifest.tag}; starting it for a test")
    try:
        serving, champion_serving = measure_bentos(candidate, rival, log=job.log, home=job.staging)
    except SmokeTestError as error:
        cure = "look at what the log says, and release again; a machine that is too busy may be the reason"
        verdict = Verdict("answers", None, None, False, str(error), cure)
        raise _refuse(job, report.add(verdict), manifest) from error
    say(
        f"[pack] {manifest.tag} answers: p95 {serving.p95_ms:.1f} ms for one short text, "
        f"{serving.texts_per_s:.0f} texts/s, {serving.memory_mb:.0f} MiB"
    )
    return serving, champion_serving


@task(cache_policy=NO_CACHE)
def settle(job: Job, manifest: Manifest, report: Report, serving: Serving | None, rival: Serving | None) -> Manifest:
    """Finish the card, bring box and Bento into the stores that are served from, and write all to the run."""
    if job.lock is not None:
        job.lock.check()
    manifest = finish_card(job.box, manifest, report, serving)
    install(job.box, manifest, staged=job.staging)
    keep_release(job.tracker, job.run.run_id, job.box, report, serving, rival)
    return manifest


@task(cache_policy=NO_CACHE)
def restore(job: Job, manifest: Manifest, report: Report, serving: Serving | None, rival: Serving | None) -> None:
    """Bring a released version back into the stores where they have lost it; its box and its record stay as they are.

    Args:
        job: The release.
        manifest: Of the released box.
        report: Every verdict.
        serving: What was measured now; None: it was measured before.
        rival: The same of the champion's.
    """
    assert job.lock is not None
    job.lock.check()
    if put_back(job.box, manifest, root=PROJECT_ROOT, staging=job.staging):
        say(f"[release] {manifest.tag} was not in the Bento store any more: it is there again")
    keep_again(job.tracker, job.run.run_id, report, serving, rival, beside=job.replaces)


@task(cache_policy=NO_CACHE)
def promote(job: Job, manifest: Manifest, compat: Compat | None) -> None:
    """Write the tags, then the aliases: what servers follow is the very last write to the registry."""
    assert job.lock is not None
    act, tags, home = job.act(manifest, compat), job.tags(manifest, compat), job.settings.bento_store_path
    carry_out(job.tracker, job.lock, act, tags=tags, previous=job.replaces, home=home)
    say(f"[release] {manifest.tag} is the {job.params.alias}")


def _compare(job: Job, rival: Champion) -> Relation:
    compat, adapter = job.relate_to(rival)
    say(f"[compat] {compat.kind} with {compat.tag}: {compat.reason}")
    return compat, adapter


def _stage_rival(job: Job) -> Measured | None:
    """Bring the champion's Bento beside the candidate's; None when it cannot be had, for which no candidate can."""
    if job.champion is None:
        return None
    try:
        manifest = read_manifest(job.champion.box)
        return stage_bento(job.champion.box, manifest, root=PROJECT_ROOT, home=job.staging), manifest
    except (EkibenError, LunchboxError, OSError) as error:
        say(f"[pack] {job.champion.tag} cannot be measured beside it: {one_line(error)}")
        return None


def _show(job: Job, report: Report) -> None:
    create_markdown_artifact(report.to_markdown(), key="gates", description=f"Gates of {job.name}")
    for row in report.to_rows():
        say(f"[gates] {row['gate']}: {row['verdict']}, {row['reason']}")
    if report.unasked:
        say(f"[gates] {report.unasked}")


def _refuse(
    job: Job, report: Report, manifest: Manifest | None = None, serving: Serving | None = None
) -> ReleaseRefusedError:
    """Show a refusal and put it on record, unless it is a dry run; the champion stays as it is.

    `manifest` is given when the candidate is packed: the card of a box that was never released says what refused it.
    """
    _show(job, report)
    if job.lock is not None:
        job.lock.check()
        if manifest is not None and not job.is_released:
            finish_card(job.box, manifest, report, serving)
        keep_refusal(job.tracker, job.release, report, job.replaces)
    return ReleaseRefusedError(report.refusal)


def _result(
    job: Job, manifest: Manifest, report: Report, compat: Compat | None, serving: Serving | None
) -> ReleaseResult:
    unchanged = job.is_released and job.has_alias
    if unchanged:
        say(f"[release] {manifest.tag} is the {job.params.alias} already")
    return ReleaseResult(
        version=job.candidate.version,
        run_id=job.candidate.run_id,
        bento_tag=manifest.tag,
        space_id=manifest.space_id,
        alias="" if job.lock is None else job.params.alias,
        replaces=job.replaces,
        compat=compat.kind if compat is not None else "",
        unchanged=unchanged,
        gates=report.to_rows(),
        metrics={} if serving is None else serving.as_metrics(),
    )
