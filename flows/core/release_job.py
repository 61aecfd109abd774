"""One release: who is to be released, against whom, under which terms, and where the work is done. Core layer."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from bentos.errors import LunchboxError, NotReadyError
from bentos.manifest import Compat, DataVersion, Manifest, name_release, read_manifest
from flows.core.boxes import MANIFEST_TAG, box_path, find_box
from flows.core.compat import PROBE_FILE, compare_spaces
from flows.core.heldout import EVALUATION_FOLDER, read_calibration
from flows.core.history import Act, find_left, read_history
from flows.core.lineage import Lineage
from flows.core.lunchbox import Relation, ReleaseFacts
from flows.core.packing import hash_manifest
from flows.core.receipts import PASSED
from flows.core.registry import CHALLENGER, CHAMPION, PREVIOUS, Release
from flows.core.relations import list_earlier
from flows.core.release_lock import ReleaseLock
from flows.core.rivals import Champion, open_box
from flows.core.tracking import RunRecord, Tracker
from flows.core.verdicts import Report
from flows.errors import NothingReleasedError, ParamsError, one_line
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
    champion: Champion | None  # that one, with its lunchbox, or with what is wrong with it
    earlier: tuple[Champion, ...]  # champions before, whose indexes that one can still be asked about
    left_by: Act | None  # the rollback that left the candidate, when it was not champion since
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

    @property
    def is_released(self) -> bool:
        """Whether the candidate's files are out, so that none of them changes any more.

        It is released already, or has been a challenger, or was left by a rollback, or its release was killed at the
        very end.
        """
        return MANIFEST_TAG in self.release.tags

    @property
    def log(self) -> Path:
        """File for what the built Bento says; one of a dry run goes with it."""
        return (self.scratch if self.lock is None else self.settings.home_path) / "smoke.log"

    def relate_to(self, rival: Champion) -> Relation:
        """How the candidate's space relates to a rival's, and the map; `breaking` when the rival cannot be loaded.

        Raises:
            LunchboxError: the candidate's own box cannot be loaded.
        """
        try:
            if rival.problem:
                raise LunchboxError(rival.problem)
            return compare_spaces(self.box, rival, self.evaluation / PROBE_FILE, self.params)
        except (LunchboxError, NotReadyError) as error:
            open_box(self.box)  # when it is our own, the rival is not to blame
            reason = f"nothing could be measured: {one_line(error)}"
            space_id = rival.space_id or "unknown"
            return Compat(kind="breaking", version=rival.version, tag=rival.tag, space_id=space_id, reason=reason), None

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

    def act(self, manifest: Manifest, compat: Compat | None) -> Act:
        """What is about to be done, for the history."""
        return Act(
            at="",
            kind="release" if self.params.alias == CHAMPION else "challenger",
            version=self.candidate.version,
            replaces=self.replaces,
            tag=manifest.tag,
            space_id=manifest.space_id,
            compat=compat.kind if compat is not None else "",
        )

    def tags(self, manifest: Manifest, compat: Compat | None) -> dict[str, str | None]:
        """What the version is to carry in the registry; None leaves a tag as it is."""
        candidate = self.candidate
        unknown = None if self.release.tags.get("replaces") == self.replaces else ""
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
            "compat": compat.kind if compat is not None else unknown,
            "compat_space_id": compat.space_id if compat is not None else unknown,
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

    A candidate that is the champion already is compared with the one that it replaced, as it was the first time. One
    that was released before is taken with the box that it was released with, found by its hash.

    Args:
        tracker: MLflow.
        settings: Where everything is kept.
        params: What is asked of the candidate.
        candidate: The version to release.
        scratch: An empty folder that goes when the job ends.
        lock: The release lock, held; None is a dry run, which writes nothing outside `scratch`.

    Raises:
        ParamsError: the champion cannot become the challenger; a released version does not serve the precision that is
            asked for.
        NothingReleasedError: the lunchbox of a candidate that was released is nowhere to be found.
    """
    own = tracker.version(candidate.version)
    if params.alias == CHALLENGER and CHAMPION in own.aliases:
        raise ParamsError(f"version {own.version} is the champion and cannot be its own challenger: name another one")
    run = tracker.find_run(candidate.run_id)
    fetch_to = scratch if lock is None else settings.lunchboxes_path
    notes: list[str] = []

    def find(release: Release) -> Champion:
        box = find_box(tracker, release, settings.lunchboxes_path, fetch_to=fetch_to)
        params = _read_params(tracker, release)
        return Champion(read_manifest(box).tag, release.version, box, release.tags.get("space_id", ""), params=params)

    is_released = MANIFEST_TAG in own.tags
    box = find(own).box if is_released else box_path(settings.lunchboxes_path, own)
    if is_released:
        _check_precision(read_manifest(box), params)
    elif lock is None:
        box = _copy_for_a_dry_run(box, scratch / "candidate")
    asked = run.params.get("train.precision", "auto")
    if params.precision == "auto" and asked != "auto":
        params = ReleaseParams.model_validate(params.model_dump() | {"precision": asked})
    current = tracker.champion()
    replaced = find_replaced(tracker, own)
    champion = None
    if replaced is not None:
        try:
            champion = find(replaced)
        except NothingReleasedError as error:
            notes.append(f"no comparison with version {replaced.version}: {error}")
            if CHAMPION not in own.aliases:
                champion = _miss(tracker.model_name, replaced, scratch, str(error))
    earlier = []
    for relation in [] if is_released or champion is None else _list_earlier(champion, own):
        try:
            earlier.append(find(tracker.version(relation.version)))
        except NothingReleasedError as error:
            notes.append(f"no comparison with the space of {relation.tag}: {error}")
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
        left_by=find_left(read_history(tracker), own.version, "" if current is None else current.version),
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


def _check_precision(manifest: Manifest, params: ReleaseParams) -> None:
    """Refuse to be asked for another precision than the one that a released version serves.

    Raises:
        ParamsError: says which one it is, and how to get another one.
    """
    served = manifest.default_precision
    if params.precision not in ("auto", served):
        raise ParamsError(
            f"release.precision is {params.precision}, but {manifest.tag} was released with {served}, and a released "
            "version does not change: leave release.precision out, or train again and release the new version"
        )


def _read_params(tracker: Tracker, release: Release) -> Mapping[str, str] | None:
    """The parameters of a version's run; None when the run is gone."""
    try:
        return tracker.find_run(release.run_id).params
    except NothingReleasedError:
        return None


def _miss(model_name: str, release: Release, scratch: Path, problem: str) -> Champion:
    """A champion whose lunchbox cannot be found: the gates say what that means."""
    tag = release.tags.get("bento_tag") or f"{model_name}:{name_release(release.version, release.run_id)}"
    nowhere = scratch / f"no-box-of-{release.version}"
    return Champion(tag, release.version, nowhere, release.tags.get("space_id", ""), problem)


def _list_earlier(champion: Champion, own: Release) -> list[Compat]:
    """The relations of a champion whose spaces the candidate is compared with too: others' ones, each once."""
    try:
        relations = list_earlier(read_manifest(champion.box))
    except LunchboxError:
        return []
    seen = {champion.space_id}
    chosen = []
    for relation in relations:
        if relation.version != own.version and relation.space_id not in seen:
            seen.add(relation.space_id)
            chosen.append(relation)
    return chosen[:MAX_EARLIER]


def _copy_for_a_dry_run(box: Path, to: Path) -> Path:
    """Take along what was packed before: its export and certificate need not be made again.

    A release that is at work may change it at the same time; what is not whole afterwards is not used.
    """
    if box.is_dir():
        try:
            shutil.copytree(box, to)
        except OSError:
            shutil.rmtree(to, ignore_errors=True)
    return to
