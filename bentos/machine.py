"""What this process may have of the machine: its cores, as affinity and container allow, and as little memory."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import math
import os
import sys
import threading
from pathlib import Path

QUOTA_FILES = ("cpu.max", "cpu/cpu.cfs_quota_us")  # version 2 and version 1 of control groups
GROUPS = Path("/sys/fs/cgroup")
M_MMAP_THRESHOLD = -3  # of glibc's mallopt(3)
LARGE_BYTES = 2**20


def count_cores(groups: Path = GROUPS) -> int:
    """Cores that this process may use, at least 1; part of a core counts as a whole one."""
    try:
        allowed = len(os.sched_getaffinity(0))
    except AttributeError:  # not on this system
        allowed = os.cpu_count() or 1
    quota = _read_quota(groups)
    return max(1, allowed if quota is None else min(allowed, math.ceil(quota)))


def _read_quota(groups: Path) -> float | None:
    """Cores by the control group's quota; None without one."""
    try:
        quota, period = (groups / QUOTA_FILES[0]).read_text(encoding="ascii").split()
        return None if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError):
        pass
    try:
        limit = int((groups / QUOTA_FILES[1]).read_text(encoding="ascii"))
        return None if limit <= 0 else limit / int((groups / "cpu/cpu.cfs_period_us").read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None


def stand_back(niceness: int) -> None:
    """Let the calling thread stand back for the others (0..19), and all threads that it starts from now on.

    Only Linux knows the niceness of a single thread; there is no way back without a privilege.
    """
    if niceness and sys.platform == "linux":
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), niceness)


def keep_memory_returnable() -> None:
    """Before anything large is loaded: let each large piece of memory be mapped by itself, and so go as it came.

    glibc would raise its threshold with every piece that is freed, and put weights among small things that stay: after
    twelve models of 90 MB had come and gone, 65 MB were left behind; with this, 1 MB.
    """
    if sys.platform == "linux" and (set_option := getattr(ctypes.CDLL(None), "mallopt", None)) is not None:
        set_option(M_MMAP_THRESHOLD, LARGE_BYTES)


def read_memory_mb() -> float:
    """Memory that this process has to itself, in MiB, files that are mapped left out; 0 where Linux does not tell."""
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
        return int(status.partition("RssAnon:")[2].split(maxsplit=1)[0]) / 1024
    except (OSError, IndexError, ValueError):
        return 0.0


def settle_memory() -> None:
    """Once the program is there: give back what that took for a while, and never search what stays for garbage."""
    gc.collect()
    gc.freeze()
    trim_memory()


def release_memory() -> None:
    """After something large has come or gone, while requests are being answered: give back what is not needed."""
    gc.collect()  # quick, after `settle_memory`
    trim_memory()


def trim_memory() -> None:
    """Give free memory back to the system; glibc would keep some 30 MB after a model of 90 MB."""
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
        trim(0)
