"""One release: who is to be released, against whom, under which terms, and where the work is done. Core layer."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from pathlib import Path

from bentos.manifest import DataVersion, Manifest, read_manifest
from flows.core.boxes import MANIFEST_TAG, box_path, find_box
from flows.core.heldout import EVALUATION_FOLDER, read_calibration
from flows.core.history import Act
from flows.core.lineage import Lineage
from flows.core.lunchbox import ReleaseFacts
from flows.core.packing import bento_exists, hash_manifest, is_stored
from flows.core.receipts import PASSED
from flows.core.registry import CHALLENGER, CHAMPION, PREVIOUS, Release
from flows.core.relations import list_earlier
from flows.core.release_lock import ReleaseLock
from flows.core.rivals import Champion
from flows.core.tracking import RunRecord, Tracker
from flows.core.verdicts import Report
from flows.errors import NothingReleasedError, ParamsError
from flows.params import ReleaseParams
from flows.settings import FlowSettings

MAX_EARLIER = 3  # champions before the champion that a candidate's space is compared with, too


@dataclass(frozen=True)
class Job:
    """One release, from its first step to its last."""

    tracker: Tracker
    settings: FlowSettings
    params: ReleaseParams
    candidate: Lineage
    release: Release  # the candidate in the registry
    run: RunRecord
    replaces: str  # version of the champion that it is to replace, or has replaced; empty: none
    champion: Champion | None  # that one, with its lunchbox
    earlier: tuple[Champion, ...]  # champions before, whose indexes that one can still be asked about
    box: Path  # the candidate's lunchbox
    scratch: Path  # a folder that goes when the job ends
    lock: ReleaseLock | None  # None in a dry run
    notes: list[str] = field(default_factory=list)  # what the user should hear

    @property
    def name(self) -> str:
        """The candidate, as reports name it."""
        return f"version {self.candidate.version}"

    @property
    def evaluation(self) -> Path:
        """What the run kept for later judges, once it was fetched."""
        return self.scratch / EVALUATION_FOLDER

    @property
    def staging(self) -> Path:
        """BentoML home folder in which it builds and measures."""
        return self.scratch / "bentoml"

    @property
    def has_alias(self) -> bool:
        """Whether the candidate is what it is to become already."""
        return self.params.alias in self.release.aliases

    def is_proven(self, manifest: Manifest) -> bool:
        """Whether the candidate has passed every gate just as it is packed, beside the same champion.

        Then everything but the aliases is in its place: it is released already, or has been a challenger, or was left
        by a rollback, or its release was killed at the very end.
        """
        tags, compat = self.release.tags, manifest.compat
        return (
            tags.get("verdict") == PASSED
            and tags.get(MANIFEST_TAG) == hash_manifest(self.box)
            and (compat.version if compat is not None else "") == self.replaces
            and bento_exists(manifest.tag)
            and is_stored(manifest)
        )

    def facts(self, report: Report) -> ReleaseFacts:
        """What the lunchbox is to say of the candidate."""
        candidate, run = self.candidate, self.run
        return ReleaseFacts(
            name=self.settings.model_name,
            version=candidate.version,
            run_id=run.run_id,
            data=DataVersion(path=candidate.data_path, md5=candidate.data_md5, revision=candidate.data_rev or None),
            base_model=candidate.base_model,
            git_commit=candidate.git_commit or None,
            lock_sha256=candidate.lock_sha256 or None,
            metrics=run.metrics,
            params={name: value for name, value in run.params.items() if name.startswith("train.")},
            calibration=read_calibration(self.evaluation),
            decision_threshold=run.metrics.get("decision_threshold"),
            report=report,
        )

    def act(self, manifest: Manifest) -> Act:
        """What is about to be done, for the history."""
        return Act(
            at="",
            kind="release" if self.params.alias == CHAMPION else "challenger",
            version=self.candidate.version,
            replaces=self.replaces,
            tag=manifest.tag,
            space_id=manifest.space_id,
            compat=manifest.compat.kind if manifest.compat is not None else "",
        )

    def tags(self, manifest: Manifest) -> dict[str, str]:
        """What the version is to carry in the registry."""
        candidate, compat = self.candidate, manifest.compat
        return {
            "bento_tag": manifest.tag,
            "space_id": manifest.space_id,
            "run_id": candidate.run_id,
            "data_path": candidate.data_path,
            "data_md5": candidate.data_md5,
            "data_rev": candidate.data_rev,
            "git_commit": candidate.git_commit,
            "lock_sha256": candidate.lock_sha256,
            "base_model": candidate.base_model,
            "compat": compat.kind if compat is not None else "",
            "compat_space_id": compat.space_id if compat is not None else "",
            "verdict": PASSED,
            MANIFEST_TAG: hash_manifest(self.box),
        }


def open_job(
    tracker: Tracker,
    settings: FlowSettings,
    params: ReleaseParams,
    candidate: Lineage,
    scratch: Path,
    lock: ReleaseLock | None,
) -> Job:
    """Find out whom the candidate is compared with, and where everything is.

    A candidate that is the champion already is compared with the one that it replaced, as it was the first time.

    Args:
        tracker: MLflow.
        settings: Where everything is kept.
        params: What is asked of the candidate.
        candidate: The version to release.
        scratch: An empty folder that goes when the job ends.
        lock: The release lock, held; None is a dry run, which writes nothing outside `scratch`.

    Raises:
        ParamsError: the champion cannot become the challenger.
        NothingReleasedError: the champion's lunchbox is nowhere to be found.
    """
    own = tracker.version(candidate.version)
    if params.alias == CHALLENGER and CHAMPION in own.aliases:
        raise ParamsError(f"version {own.version} is the champion and cannot be its own challenger: name another one")
    run = tracker.find_run(candidate.run_id)
    asked = run.params.get("train.precision", "auto")
    if params.precision == "auto" and asked != "auto":
        params = ReleaseParams.model_validate(params.model_dump() | {"precision": asked})
    fetch_to = scratch if lock is None else settings.lunchboxes_path
    notes: list[str] = []

    def open_box(release: Release) -> Champion:
        box = find_box(tracker, release, settings.lunchboxes_path, fetch_to=fetch_to)
        return Champion(read_manifest(box).tag, release.version, box)

    replaced = find_replaced(tracker, own)
    champion, earlier = None, []
    if replaced is not None:
        try:
            champion = open_box(replaced)
        except NothingReleasedError as error:
            if CHAMPION not in own.aliases:
                raise
            notes.append(f"no comparison with version {replaced.version}: {error}")
    if champion is not None:
        for relation in list_earlier(read_manifest(champion.box))[:MAX_EARLIER]:
            try:
                earlier.append(open_box(tracker.version(relation.version)))
            except NothingReleasedError as error:
                notes.append(f"no comparison with the space of {relation.tag}: {error}")
    box = box_path(settings.lunchboxes_path, own)
    if lock is None:
        box = _copy_for_a_dry_run(box, scratch / "candidate")
    return Job(
        tracker=tracker,
        settings=settings,
        params=params,
        candidate=candidate,
        release=own,
        run=run,
        replaces="" if replaced is None else replaced.version,
        champion=champion,
        earlier=tuple(earlier),
        box=box,
        scratch=scratch,
        lock=lock,
        notes=notes,
    )


def find_replaced(tracker: Tracker, own: Release) -> Release | None:
    """The version that `own` is to replace as champion, or has replaced; None when it is, or was, the first."""
    champion = tracker.champion()
    if champion is None or champion.version != own.version:
        return champion
    replaced = own.tags.get("replaces")
    if replaced is None:  # released by an older Ekiben, which did not record it
        others = (item for item in tracker.versions() if item.version != own.version)
        return next((item for item in others if PREVIOUS in item.aliases), None)
    return tracker.version(replaced) if replaced else None


def _copy_for_a_dry_run(box: Path, to: Path) -> Path:
    """Take along what was packed before: its export and certificate need not be made again."""
    if box.is_dir():
        shutil.copytree(box, to)
    return to
