"""The worker processes of one server: how they tell each other apart from the dead, and the folders that they share."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path


def started(pid: int | str) -> str | None:
    """When a process started, as the kernel counts, which no change of the clock moves; None when it has ended.

    Only Linux tells; elsewhere it is None for all.
    """
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text(encoding="latin-1").rpartition(")")[2].split()
    except OSError:
        return None
    return None if state in ("X", "Z") else fields[18]


def name_process(pid: int) -> str | None:
    """A name that no other process of this machine will have until it starts anew; None when it has ended."""
    since = started(pid)
    return None if since is None else f"{pid}-{since}"


def is_alive(name: str) -> bool:
    """Whether the process that `name_process` named still runs."""
    pid, _, since = name.partition("-")
    return started(pid) == since


def open_server_folder(prefix: str) -> Path | None:
    """Make the folder of the server that started this worker, or find it made by another of its workers.

    Those of servers that have ended are removed.

    Args:
        prefix: of the folder's name, ending in `-`.

    Returns:
        The folder, which only this user may enter; None when it cannot be had.
    """
    if (server := name_process(os.getppid())) is None:
        return None
    try:
        prefix = f"{prefix}{Path('/proc/self/ns/pid').stat().st_ino}-"  # other containers may use this folder, too
        folder = Path(tempfile.gettempdir(), f"{prefix}{server}")
        folder.mkdir(mode=0o700, exist_ok=True)
        mine = folder.lstat().st_uid == os.getuid() and not folder.is_symlink()
    except OSError:
        return None
    if not mine:
        return None
    for left in folder.parent.glob(f"{prefix}*-*"):
        if not is_alive(left.name.removeprefix(prefix)):
            shutil.rmtree(left, ignore_errors=True)
    return folder
