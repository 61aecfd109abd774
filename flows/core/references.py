"""What a reference means: a version, a run, or a lunchbox that only this machine's store still has. Core layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from bentos.aliases import read_aliases
from bentos.errors import LunchboxError, RegistryError
from bentos.manifest import Manifest, name_release, read_manifest
from flows.core.boxes import MANIFEST_TAG, fetch_manifest
from flows.core.packing import hash_manifest
from flows.core.registry import MIN_PREFIX_LENGTH, Release
from flows.core.tracking import RunRecord, Tracker
from flows.errors import NothingReleasedError

MODEL_SUFFIX = "-model"  # of a lunchbox's name in the model store
SHOWN_RUNS = 10


@dataclass(frozen=True)
class Places:
    """Where to look."""

    tracker: Tracker | None  # None: the registry cannot be had, `no_registry` says why
    no_registry: str
    bento_home: Path
    lunchboxes: Path
    repository: Path
    roots: tuple[Path, ...]  # where relative data addresses may start; absolute
    model_name: str


@dataclass(frozen=True)
class Subject:
    """What a reference means, in the registry, among the runs or in the local store."""

    release: Release | None = None
    run: RunRecord | None = None
    manifest: Manifest | None = None
    box: Path | None = None  # where the manifest was read; None: among the run's artifacts, or nowhere

    @property
    def tags(self) -> dict[str, str]:
        """Tags of run and version, the latter winning."""
        return {**(self.run.tags if self.run else {}), **(self.release.tags if self.release else {})}

    def fact(self, tag: str, of_manifest: Callable[[Manifest], str | None]) -> str:
        """A fact from the registry, else from the manifest, else nothing."""
        return self.tags.get(tag) or (of_manifest(self.manifest) if self.manifest else None) or ""

    def header(self, model_name: str) -> str:
        """The value of X-Ekiben-Model; empty when no server can have sent it."""
        if self.manifest is not None:
            return self.manifest.tag
        tag = self.tags.get("bento_tag", "")
        return tag or (
            f"{model_name}:{name_release(self.release.version, self.release.run_id)}" if self.release else ""
        )


def find_subjects(reference: str, places: Places) -> list[Subject]:
    """What a reference means: in the registry, else among the runs, else in the Bento store of this machine.

    Raises:
        NothingReleasedError: nothing, or more than one run, is meant.
    """
    ref = reference.strip()
    name, colon, version = ref.partition(":")
    if colon and name.endswith(MODEL_SUFFIX):
        ref = f"{name.removesuffix(MODEL_SUFFIX)}:{version}"
    problem = places.no_registry
    if places.tracker is not None:
        releases = [item for item in places.tracker.versions() if item.tags.get("space_id") == ref]
        try:
            releases = releases or [places.tracker.version(ref)]
        except NothingReleasedError as error:
            problem = str(error)
        if releases:
            return [_complete(Subject(release=item), places) for item in releases]
        runs = places.tracker.match_runs(ref.lower()) if len(ref) >= MIN_PREFIX_LENGTH else []
        if len(runs) > 1:
            shown = ", ".join(f"{run.run_id} ({run.name})" for run in runs[:SHOWN_RUNS])
            raise NothingReleasedError(f"{len(runs)} runs begin with {ref!r}: {shown}; give more of the id")
        if runs:
            return [_complete(Subject(run=runs[0]), places)]
    boxes = list(_boxes_named(ref, places))
    if not boxes:
        raise NothingReleasedError(
            f"nothing is known of {reference!r}, neither in the registry ({problem}) nor in the BentoML store "
            f"{places.bento_home}"
        )
    return [_complete(Subject(manifest=manifest, box=box), places) for box, manifest in boxes]


def find_local_box(tag: str, places: Places, *, released: str = "") -> Path | None:
    """The lunchbox of a Bento tag on this machine, in the model store or where releases pack it; None when neither.

    Args:
        tag: Such as `ekiben:3-1f2e3d4c`.
        places: Where to look.
        released: SHA-256 of the manifest that was released: a version may have been packed anew since, for a release
            that was refused. A box with another one is only taken when there is no better.
    """
    name, _, version = tag.partition(":")
    found = []
    for folder in (places.bento_home / "models" / f"{name}{MODEL_SUFFIX}" / version, places.lunchboxes / version):
        with suppress(LunchboxError):
            if version and read_manifest(folder).tag == tag:
                found.append(folder)
    return next((folder for folder in found if hash_manifest(folder) == released), next(iter(found), None))


def _boxes_named(ref: str, places: Places) -> Iterator[tuple[Path, Manifest]]:
    """Boxes of this machine that are meant by a tag, a space, a run or an alias; each tag once."""
    with suppress(RegistryError):
        pointer = read_aliases(places.bento_home, places.model_name).get(ref)
        ref = f"{places.model_name}:{pointer.bento_version}" if pointer else ref
    seen = set()
    folders = [*places.bento_home.glob(f"models/*{MODEL_SUFFIX}/*"), *places.lunchboxes.glob("*")]
    for folder in sorted(folder for folder in folders if folder.is_dir()):
        with suppress(LunchboxError):
            manifest = read_manifest(folder)
            names = {manifest.tag, manifest.bento_version, manifest.space_id, manifest.run_id}
            by_run = len(ref) >= MIN_PREFIX_LENGTH and manifest.run_id.startswith(ref.lower())
            if (ref in names or by_run) and manifest.tag not in seen:
                seen.add(manifest.tag)
                yield folder, manifest


def _complete(subject: Subject, places: Places) -> Subject:
    """Add what the other places know: the run of a version or box, the box of a version."""
    tracker, run, manifest, box = places.tracker, subject.run, subject.manifest, subject.box
    run_id = subject.release.run_id if subject.release else manifest.run_id if manifest else ""
    if run is None and tracker is not None and run_id:
        with suppress(NothingReleasedError):
            run = tracker.find_run(run_id)
    tag = subject.header(places.model_name)
    if manifest is None and tag:
        box = find_local_box(tag, places, released=subject.tags.get(MANIFEST_TAG, ""))
        with suppress(NothingReleasedError, LunchboxError, OSError):  # or of a layout that is not read any more
            if box is not None:
                manifest = read_manifest(box)
            elif tracker is not None and run is not None:
                manifest = fetch_manifest(tracker, run.run_id)
    return Subject(subject.release, run, manifest, box)
