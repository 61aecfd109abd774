"""Where the lunchbox of a version is: the home folder, the model store, or the artifacts of its run. Core layer.

A box counts only when it is whole and, for a version that was released, the one that was released: its manifest has
the hash in the version's tag. From then on no file of it changes: servers, stores and indexes rely on it, so a released
version is taken as it is or not at all, and never packed anew.
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from bentos.errors import LunchboxError, NotReadyError
from bentos.lunchbox import open_lunchbox
from bentos.manifest import MANIFEST_FILE, Manifest, name_release, read_manifest, verify_files
from flows.core.folders import replaced_folder
from flows.core.packing import find_model, hash_manifest
from flows.core.registry import Release
from flows.core.tracking import Tracker
from flows.errors import EkibenError, NothingReleasedError, one_line

BOX_FOLDER = "lunchbox"  # artifact folder of a run
MANIFEST_TAG = "manifest_sha256"  # of a version that was released, or was a challenger


def box_path(lunchboxes: Path, release: Release) -> Path:
    """Where a release packs the lunchbox of a version."""
    return lunchboxes / name_release(release.version, release.run_id)


def find_box(tracker: Tracker, release: Release, lunchboxes: Path, *, fetch_to: Path | None = None) -> Path:
    """The folder of a version's lunchbox, verified; fetched from its run when it is not on this machine.

    Args:
        tracker: Where the version is registered.
        release: The version.
        lunchboxes: The home's folder of lunchboxes.
        fetch_to: Folder of lunchboxes that a fetched one is put into; default: `lunchboxes`.

    Raises:
        NothingReleasedError: there is none that can be used; says what is wrong with each that was found.
    """
    expected = release.tags.get(MANIFEST_TAG, "")
    problems = []
    for place in _places_here(tracker.model_name, release, lunchboxes):
        try:
            check_box(place, release, expected)
        except LunchboxError as error:
            problems.append(one_line(error))
            continue
        return place
    to = box_path(fetch_to or lunchboxes, release)
    try:
        with replaced_folder(to) as folder:
            fetched = tracker.download_artifact(release.run_id, BOX_FOLDER, folder.parent / "fetched")
            check_box(fetched, release, expected)
            for path in fetched.iterdir():
                path.rename(folder / path.name)
    except (LunchboxError, NothingReleasedError) as error:
        problems.append(one_line(error))
        name = f"version {release.version} of {tracker.model_name!r}"
        cure = (
            f"A released version is not packed anew: put it back to {box_path(lunchboxes, release)}, or train again"
            if expected
            else f"`ekiben release --run {release.version}` packs it"
        )
        raise NothingReleasedError(
            f"the lunchbox of {name} cannot be found whole ({'; '.join(problems)}). {cure}"
        ) from None
    return to


def fetch_manifest(tracker: Tracker, run_id: str) -> Manifest:
    """The manifest of a run's lunchbox, from its artifacts: as it was released, or else as it was packed.

    Raises:
        NothingReleasedError: the run has none.
        LunchboxError: it cannot be read.
    """
    with tempfile.TemporaryDirectory(prefix="ekiben-manifest-") as scratch:
        try:
            found = tracker.download_artifact(run_id, f"release/{MANIFEST_FILE}", Path(scratch))
        except NothingReleasedError:
            found = tracker.download_artifact(run_id, f"{BOX_FOLDER}/{MANIFEST_FILE}", Path(scratch))
        return read_manifest(found.parent)


def keep_box(tracker: Tracker, run_id: str, box: Path) -> None:
    """Put the lunchbox at `box` among the artifacts of a run, for servers and releases on other machines.

    Only files that differ are sent, and the manifest last, which vouches for the others.
    """
    manifest = read_manifest(box)
    with tempfile.TemporaryDirectory(prefix="ekiben-box-") as scratch:
        kept: dict[str, str] = {}
        with contextlib.suppress(NothingReleasedError, LunchboxError):
            found = tracker.download_artifact(run_id, f"{BOX_FOLDER}/{MANIFEST_FILE}", Path(scratch) / "kept")
            kept = read_manifest(found.parent).files
            if hash_manifest(found.parent) == hash_manifest(box):
                return
        changed = Path(scratch) / "changed"
        changed.mkdir()
        for name, digest in manifest.files.items():
            if kept.get(name) != digest:
                (changed / name).symlink_to((box / name).resolve())
        if any(changed.iterdir()):
            tracker.log_folder(run_id, changed, to=BOX_FOLDER)
        last = Path(scratch) / "last"
        last.mkdir()
        shutil.copy(box / MANIFEST_FILE, last)
        tracker.log_folder(run_id, last, to=BOX_FOLDER)


def check_vectors(box: Path, release: Release) -> Manifest:
    """Make sure that the box at `box` computes what it did when it was packed, and return its manifest.

    Raises:
        EkibenError: its canary vectors are not what they were, or it cannot be loaded on this machine.
    """
    try:
        lunchbox = open_lunchbox(box)
        problem = lunchbox.find_deviation(lunchbox.engine.embed(lunchbox.canary.texts))
    except (LunchboxError, NotReadyError) as error:
        problem = one_line(error)
    if problem:
        raise EkibenError(f"version {release.version} cannot be served any more: {problem}; nothing was changed")
    return lunchbox.manifest


def check_box(box: Path, release: Release, expected: str = "") -> None:
    """Make sure that the box at `box` is whole and that of a version.

    Args:
        box: The folder.
        release: The version.
        expected: Hash that its manifest must have; empty: any.

    Raises:
        LunchboxError: it is not.
    """
    manifest = read_manifest(box)
    verify_files(box, manifest)
    if (manifest.version, manifest.run_id) != (release.version, release.run_id):
        raise LunchboxError(f"{box} holds {manifest.tag}, not version {release.version} of run {release.run_id}")
    if expected and hash_manifest(box) != expected:
        raise LunchboxError(f"{box} holds version {release.version} as it was packed another time, not as released")


def _places_here(model_name: str, release: Release, lunchboxes: Path) -> Iterator[Path]:
    path = box_path(lunchboxes, release)
    if (path / MANIFEST_FILE).is_file():
        yield path
    try:
        yield find_model(model_name, name_release(release.version, release.run_id))
    except LunchboxError:
        return
