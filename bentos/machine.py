"""What this process may have of the machine: its cores, as affinity and container allow, and as little memory."""

from __future__ import annotations

import ctypes
import gc
import math
import os
import sys
from pathlib import Path

QUOTA_FILES = ("cpu.max", "cpu/cpu.cfs_quota_us")  # version 2 and version 1 of control groups
GROUPS = Path("/sys/fs/cgroup")


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


def settle_memory() -> None:
    """Once all is loaded: give back what loading took for a while, and never search what stays for garbage."""
    gc.collect()
    gc.freeze()
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
        trim(0)  # glibc has it: some 30 MB after a model of 90 MB
