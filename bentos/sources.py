"""Where versions come from: aliases, references, and the folder that holds a version's lunchbox on this machine.

Here is the local one, the BentoML store of this machine and the alias file beside it; registry_client.py has the
other, an MLflow server. All methods may take long, and belong into a thread.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

from bentos.aliases import Pointer, alias_path, read_aliases
from bentos.errors import LunchboxError, RegistryError
from bentos.manifest import Manifest, read_manifest, verify_files

RUN_DIGITS = 8  # of a run's id in the name of a version


class Source(Protocol):
    """A place that knows aliases and versions."""

    @property
    def name(self) -> str:
        """Where it is, for people; without any password."""

    def look(self, alias: str) -> Pointer | None:
        """The version that an alias names now; None when it names none.

        Raises:
            RegistryError: when the source cannot be reached or understood.
        """

    def list_aliases(self) -> dict[str, Pointer]:
        """Every alias and the version that it names.

        Raises:
            RegistryError: when the source cannot be reached or understood.
        """

    def find(self, reference: str) -> Pointer:
        """The version that an alias, a tag, `3-1f2e3d4c`, `3`, `v3` or a run id means.

        Raises:
            UnknownVersionError: when there is none, or more than one.
            UnreadableVersionError: when it is there and cannot be used.
            RegistryError: when the source cannot be reached or understood.
        """

    def find_here(self, pointer: Pointer) -> Path | None:
        """The folder of a version that is on this machine already, unverified; None when there is none."""

    def fetch(self, pointer: Pointer) -> Path:
        """The folder of a version, fetched when it is not here yet.

        Raises:
            RegistryError: when it cannot be fetched.
            LunchboxError: when what was fetched is not whole, or not that version.
        """

    def remember(self, alias: str, pointer: Pointer) -> None:
        """Keep what an alias named when that version was served, for a start while the source cannot be reached.

        Raises:
            OSError: when it cannot be written.
        """

    def recall(self, alias: str) -> Pointer | None:
        """What was remembered; None when nothing was, or it cannot be read."""

    def fingerprint(self, pointer: Pointer) -> str:
        """Something that changes when the version's files may have changed.

        Raises:
            RegistryError: when the source cannot be reached or understood.
        """


class UnknownVersionError(RegistryError):
    """The reference names no version, or more than one."""


class UnreadableVersionError(LunchboxError):
    """The reference names a version whose manifest cannot be read, so that nothing more is known of it."""

    def __init__(self, bento_version: str, problem: LunchboxError) -> None:
        """Say which version, and what is wrong with it."""
        super().__init__(str(problem))
        self.bento_version = bento_version


class LocalSource:
    """The BentoML store of this machine, and the alias file that releases on this machine write."""

    def __init__(self, home: Path, model_name: str, *, own: Path | None = None) -> None:
        """Prepare a source.

        Args:
            home: BentoML's home folder.
            model_name: name of the model, `ekiben`.
            own: folder of the Bento's own lunchbox, which need not be in the store.
        """
        self._home = home
        self._model_name = model_name
        self._own = own

    @property
    def name(self) -> str:
        """The alias file."""
        return str(alias_path(self._home, self._model_name))

    def look(self, alias: str) -> Pointer | None:
        """The version that an alias names now."""
        return self.list_aliases().get(alias)

    def list_aliases(self) -> dict[str, Pointer]:
        """Every alias and the version that it names."""
        return read_aliases(self._home, self._model_name)

    def find(self, reference: str) -> Pointer:
        """The version that a reference means."""
        aliases = self.list_aliases()
        if reference in aliases:
            return aliases[reference]
        wanted = reference.removeprefix(f"{self._model_name}:")
        found = {folder.name: folder for folder in self._folders() if _may_mean(wanted, folder.name)}
        if self._own is not None and (point := _point_at(self._own)) and _may_mean(wanted, point.bento_version):
            found[point.bento_version] = self._own
        if not found:
            there = ", ".join(sorted({*aliases, *(folder.name for folder in self._folders())})) or "none"
            raise UnknownVersionError(
                f"{reference[:200]!r} is no version or alias here; there are: {there}. Release it on this machine, or "
                "copy it into the BentoML store"
            )
        if len(found) > 1:
            raise UnknownVersionError(f"{reference[:200]!r} may be {' or '.join(sorted(found))}: name one of them")
        ((bento_version, folder),) = found.items()
        try:
            pointer = point_at(read_manifest(folder))
            if pointer.bento_version != bento_version:
                problem = f"its run_id is {pointer.run_id!r} and its version {pointer.version!r}: release it again"
                raise LunchboxError(f"{folder} should hold {bento_version}, but {problem}")
        except LunchboxError as error:
            raise UnreadableVersionError(bento_version, error) from None
        return pointer

    def remember(self, alias: str, pointer: Pointer) -> None:
        """Nothing is to be done: the alias file is on this machine."""

    def recall(self, alias: str) -> Pointer | None:
        """None: a file that cannot be read has no better copy."""

    def find_here(self, pointer: Pointer) -> Path | None:
        """The folder of a version, in the store or in the Bento."""
        folder = self._store / pointer.bento_version
        if folder.is_dir():
            return folder
        if self._own is not None and (point := _point_at(self._own)) and point.bento_version == pointer.bento_version:
            return self._own
        return None

    def fetch(self, pointer: Pointer) -> Path:
        """The folder of a version; nothing is fetched from anywhere."""
        folder = self.find_here(pointer)
        if folder is None:
            raise RegistryError(
                f"{self.name} names {pointer.bento_version}, which is not in the model store {self._store}: release "
                "it again on this machine"
            )
        check_box(folder, pointer)
        return folder

    def fingerprint(self, pointer: Pointer) -> str:
        """A hash of the pointer and of size, time and inode of every file."""
        return fingerprint_folder(pointer, self.find_here(pointer))

    @property
    def _store(self) -> Path:
        return self._home / "models" / f"{self._model_name}-model"

    def _folders(self) -> Iterable[Path]:
        try:
            return [folder for folder in self._store.iterdir() if folder.is_dir()]
        except OSError:
            return []


def point_at(manifest: Manifest) -> Pointer:
    """The pointer to the version of a manifest."""
    return Pointer(
        version=manifest.version,
        bento_version=manifest.bento_version,
        run_id=manifest.run_id,
        space_id=manifest.space_id,
    )


def check_box(folder: Path, pointer: Pointer, *, hashes: bool = False) -> None:
    """Let a folder pass that holds the version of a pointer; with `hashes`, only when it is whole.

    Raises:
        LunchboxError: says what is wrong with it.
    """
    manifest = read_manifest(folder)
    for field in ("version", "run_id", "space_id"):
        found, expected = getattr(manifest, field), getattr(pointer, field)
        if found != expected:
            raise LunchboxError(
                f"{folder} should hold {pointer.bento_version}, but its {field} is {found!r}, not {expected!r}: "
                "release it again"
            )
    if hashes:
        verify_files(folder, manifest)


def fingerprint_folder(pointer: Pointer, folder: Path | None) -> str:
    """A hash of a pointer and of name, size, time and inode of every file of a folder."""
    parts = [pointer.model_dump_json()]
    if folder is not None and folder.is_dir():
        for path in sorted(folder.iterdir()):
            try:
                status = path.stat()
            except OSError:
                continue
            parts.append(f"{path.name} {status.st_size} {status.st_mtime_ns} {status.st_ino}")
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def mark_used(folder: Path) -> None:
    """Say that a version is in use, so that no server on this machine removes it."""
    with contextlib.suppress(OSError):
        os.utime(folder)


def _point_at(folder: Path) -> Pointer | None:
    try:
        return point_at(read_manifest(folder))
    except LunchboxError:
        return None


def _may_mean(wanted: str, bento_version: str) -> bool:
    """Whether a reference that is no alias means the version of this name, e.g. `3-1f2e3d4c`."""
    version, _, run = bento_version.rpartition("-")
    if wanted in (bento_version, version, f"v{version}"):
        return True
    return bool(re.fullmatch(r"[0-9a-f]{32}", wanted)) and wanted[:RUN_DIGITS] == run
