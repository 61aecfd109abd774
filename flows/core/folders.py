"""Folders that appear under their name complete, or not at all. Core layer, no vendor."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil  # type: ignore[import-untyped]


@contextmanager
def replaced_folder(to: Path) -> Iterator[Path]:
    """Give an empty folder beside `to`; when the block ends well it takes the place of `to`, else it vanishes."""
    to.parent.mkdir(parents=True, exist_ok=True)
    _remove_left_behind(to)
    with tempfile.TemporaryDirectory(prefix=f".{to.name}-{os.getpid()}-", dir=to.parent) as scratch:
        new = Path(scratch) / "new"
        new.mkdir()
        yield new
        if to.exists():
            to.rename(Path(scratch) / "old")
        new.rename(to)


def _remove_left_behind(to: Path) -> None:
    """Remove the scratch folders of processes that were killed while they filled them: a model is large."""
    prefix = f".{to.name}-"
    for path in to.parent.iterdir():
        pid = path.name.removeprefix(prefix).partition("-")[0]
        if path.name.startswith(prefix) and pid.isdecimal() and not psutil.pid_exists(int(pid)):
            shutil.rmtree(path, ignore_errors=True)
