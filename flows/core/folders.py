"""Folders and files that appear under their name complete, or not at all. Core layer, no vendor."""

from __future__ import annotations

import ctypes
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import psutil  # type: ignore[import-untyped]

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # <fcntl.h>, <linux/fs.h>


@contextmanager
def replaced_folder(to: Path) -> Iterator[Path]:
    """Give an empty folder beside `to`; when the block ends well it takes the place of `to`, else it vanishes."""
    to.parent.mkdir(parents=True, exist_ok=True)
    _remove_left_behind(to)
    with tempfile.TemporaryDirectory(prefix=f".{to.name}-{os.getpid()}-", dir=to.parent) as scratch:
        new = Path(scratch) / "new"
        new.mkdir()
        yield new
        put_folder(new, to)


@contextmanager
def scratch_folder(parent: Path, name: str) -> Iterator[Path]:
    """Give an empty folder in `parent` that vanishes with the block; those of killed processes vanish before it."""
    parent.mkdir(parents=True, exist_ok=True)
    _remove_left_behind(parent / name)
    with tempfile.TemporaryDirectory(prefix=f".{name}-{os.getpid()}-", dir=parent) as scratch:
        yield Path(scratch)


def put_folder(new: Path, to: Path) -> None:
    """Let the folder `new` take the place of `to`, on the same disk; what stood there is where `new` was afterwards.

    Linux exchanges both at once. Elsewhere there is nothing at `to` for an instant.
    """
    to.parent.mkdir(parents=True, exist_ok=True)
    if not to.exists():
        new.rename(to)
    elif not _exchange(new, to):
        aside = new.with_name(f"{new.name}.old")
        to.rename(aside)
        new.rename(to)
        aside.rename(new)


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two paths by renameat2(2); False where the system or the file system cannot."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):
        return False
    return bool(rename(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0)


def replace_files(folder: Path, contents: Mapping[str, bytes]) -> None:
    """Put files into `folder`, in the given order, each complete or not at all; their bytes are on disk before any is.

    Write last what vouches for the others.
    """
    _remove_left_behind(folder)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-{os.getpid()}-", dir=folder.parent) as scratch:
        for name, content in contents.items():
            with (Path(scratch) / name).open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        for name in contents:
            (Path(scratch) / name).replace(folder / name)


def _remove_left_behind(to: Path) -> None:
    """Remove the scratch folders of processes that were killed while they filled them: a model is large."""
    prefix = f".{to.name}-"
    for path in to.parent.iterdir():
        pid = path.name.removeprefix(prefix).partition("-")[0]
        if path.name.startswith(prefix) and pid.isdecimal() and not psutil.pid_exists(int(pid)):
            shutil.rmtree(path, ignore_errors=True)
