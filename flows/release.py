"""@flow release: best run > cheap gates > lunchbox > relation to the champion's space > Bento > gates > champion.

A release works beside what is served: it packs into the home folder, builds and measures in a BentoML home of its own,
and brings into the real stores only what has passed every gate. Until the last write to the registry the old champion
stands; killed anywhere and given again, the command ends in the same state. One release or rollback is at work at a
time, and none takes the place of a champion that it was not compared with.
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
from bentos.manifest import Manifest, read_manifest
from flows.core.compat import PROBE_FILE, compare_spaces
from flows.core.evidence import Evidence, gather_evidence
from flows.core.folders import scratch_folder
from flows.core.gates import run_gates
from flows.core.heldout import EVALUATION_FOLDER, read_test
from flows.core.lineage import trace_version
from flows.core.lunchbox import attach_compat, find_packed, finish_card, pack_lunchbox
from flows.core.measuring import Serving, measure_bentos
from flows.core.packing import install, stage_bento
from flows.core.precision import Int8Trial
from flows.core.promotion import carry_out
from flows.core.receipts import keep_refusal, keep_release, read_serving
from flows.core.release_job import Job, open_job
from flows.core.release_lock import ReleaseLock
from flows.core.tracking import open_tracker
from flows.core.verdicts import Report, Verdict
from flows.errors import CertificationError, EkibenError, ReleaseRefusedError, one_line
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
    metrics: dict[str, float]  # serve/*: measured on the built Bento; empty when unchanged


@flow(name="release")
def release(
    run: str | None = None,
    release: ReleaseParams = ReleaseParams(),  # noqa: B008 - frozen; Prefect shows it as the form's default
    dry_run: bool = False,
) -> ReleaseResult:
    """Put a registered model through the gates and into a Bento, and make it the champion.

    `run` is an MLflow run or a version; without it, the best version on the data of the newest one. A dry run asks all
    gates and leaves nothing behind.
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
    judge(job, evidence, last=False)  # what is known without an export: a refusal costs nothing
    manifest = pack(job, evidence)
    if job.is_proven(manifest):  # nothing is measured again, and no file is touched
        serving, rival = read_serving(job.tracker, job.run.run_id)
        evidence = evidence.add(box=job.box, compat=manifest.compat, serving=serving, champion_serving=rival)
        report = judge(job, evidence)
        if job.lock is not None:
            promote(job, manifest)
        return _result(job, manifest, report, unchanged=job.has_alias)
    manifest = relate(job, manifest)
    evidence = evidence.add(box=job.box, compat=manifest.compat)
    judge(job, evidence, last=False)
    serving, rival = measure(job, manifest)
    report = judge(job, evidence.add(serving=serving, champion_serving=rival))
    if job.lock is not None:
        manifest = settle(job, manifest, report, serving, rival)
        promote(job, manifest)
    return _result(job, manifest, report, serving=serving)


@task(cache_policy=NO_CACHE)
def gather(job: Job) -> Evidence:
    """Read what the run kept, and let the champion embed the same test rows."""
    job.tracker.download_artifact(job.run.run_id, EVALUATION_FOLDER, job.scratch)
    return gather_evidence(job.run, job.params, evaluation=job.evaluation, champion=job.champion)


@task(cache_policy=NO_CACHE)
def judge(job: Job, evidence: Evidence, *, last: bool = True) -> Report:
    """Ask the gates; the verdicts are shown when they are the last ones, or refuse.

    Raises:
        ReleaseRefusedError: with every reason and what would change it; the refusal is on record.
    """
    report = run_gates(evidence, candidate=job.name)
    if last or not report.passed:
        _show(job, report)
    if not report.passed:
        raise _refuse(job, report)
    return report


@task(cache_policy=NO_CACHE)
def pack(job: Job, evidence: Evidence) -> Manifest:
    """Export, certify, try int8 and pack the lunchbox, or find it packed by an earlier call."""
    report = run_gates(evidence, candidate=job.name)
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
    except CertificationError as error:
        cure = "export again; if it stays so, choose another base model"
        verdict = Verdict("certificate", None, job.params.min_cosine, False, str(error), cure)
        refused = replace(report, verdicts=(*report.verdicts, verdict))
        _show(job, refused)
        raise _refuse(job, refused) from error


@task(cache_policy=NO_CACHE)
def relate(job: Job, manifest: Manifest) -> Manifest:
    """Compare the candidate's space with the champion's; the map into it ships when it has proven itself."""
    relations = []
    for rival in (*([job.champion] if job.champion else []), *job.earlier):
        compat, adapter = compare_spaces(job.box, rival, job.evaluation / PROBE_FILE, job.params)
        say(f"[compat] {compat.kind} with {compat.tag}: {compat.reason}")
        relations.append((compat, adapter))
    if not relations:
        return attach_compat(job.box, manifest, None, None)
    (compat, adapter), *earlier = relations
    return attach_compat(job.box, manifest, compat, adapter, earlier=earlier)


@task(cache_policy=NO_CACHE)
def measure(job: Job, manifest: Manifest) -> tuple[Serving, Serving | None]:
    """Build the Bento in a store of its own, serve it beside the champion's, check its answers and measure both."""
    candidate = (stage_bento(job.box, manifest, root=PROJECT_ROOT, home=job.staging), manifest)
    rival = None
    if job.champion is not None:
        theirs = read_manifest(job.champion.box)
        try:
            rival = (stage_bento(job.champion.box, theirs, root=PROJECT_ROOT, home=job.staging), theirs)
        except (EkibenError, LunchboxError) as error:
            say(f"[pack] {theirs.tag} cannot be measured beside it: {one_line(error)}")
    say(f"[pack] built {manifest.tag}; starting it for a test")
    log = job.settings.home_path / "smoke.log"
    serving, champion_serving = measure_bentos(candidate, rival, log=log, home=job.staging)
    say(
        f"[pack] {manifest.tag} answers: p95 {serving.p95_ms:.1f} ms for one short text, "
        f"{serving.texts_per_s:.0f} texts/s, {serving.memory_mb:.0f} MiB"
    )
    return serving, champion_serving


@task(cache_policy=NO_CACHE)
def settle(job: Job, manifest: Manifest, report: Report, serving: Serving, rival: Serving | None) -> Manifest:
    """Finish the card, bring box and Bento into the stores that are served from, and write all to the run."""
    if job.lock is not None:
        job.lock.check()
    manifest = finish_card(job.box, manifest, report, serving)
    install(job.box, manifest, staged=job.staging)
    keep_release(job.tracker, job.run.run_id, job.box, report, serving, rival)
    return manifest


@task(cache_policy=NO_CACHE)
def promote(job: Job, manifest: Manifest) -> None:
    """Write the tags, then the aliases: what servers follow is the very last write to the registry."""
    assert job.lock is not None
    home = job.settings.bento_store_path
    carry_out(job.tracker, job.lock, job.act(manifest), tags=job.tags(manifest), previous=job.replaces, home=home)
    say(f"[release] {manifest.tag} is the {job.params.alias}")


def _show(job: Job, report: Report) -> None:
    create_markdown_artifact(report.to_markdown(), key="gates", description=f"Gates of {job.name}")
    for row in report.to_rows():
        say(f"[gates] {row['gate']}: {row['verdict']}, {row['reason']}")


def _refuse(job: Job, report: Report) -> ReleaseRefusedError:
    """Put a refusal on record, unless it is a dry run; the champion stays as it is."""
    if job.lock is not None:
        job.lock.check()
        keep_refusal(job.tracker, job.release, report, job.replaces)
    return ReleaseRefusedError(report.refusal)


def _result(
    job: Job, manifest: Manifest, report: Report, *, serving: Serving | None = None, unchanged: bool = False
) -> ReleaseResult:
    if unchanged:
        say(f"[release] {manifest.tag} is the {job.params.alias} already")
    return ReleaseResult(
        version=job.candidate.version,
        run_id=job.candidate.run_id,
        bento_tag=manifest.tag,
        space_id=manifest.space_id,
        alias="" if job.lock is None else job.params.alias,
        replaces=job.replaces,
        compat=manifest.compat.kind if manifest.compat is not None else "",
        unchanged=unchanged,
        gates=report.to_rows(),
        metrics={} if serving is None else serving.as_metrics(),
    )
