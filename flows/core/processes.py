"""Who is at work: the mark that a process leaves on what it has begun, and whether it still lives. Core layer."""

from __future__ import annotations

import os
import socket
from typing import Any

START_TOLERANCE_S = 5  # a clock that is being corrected moves the start of a process a little


def identify_process() -> dict[str, Any]:
    """Mark of this process: host, process id, and when it started (a process id is used again)."""
    import psutil  # type: ignore[import-untyped]

    return {"host": socket.gethostname(), "pid": os.getpid(), "started": psutil.Process().create_time()}


def is_alive(mark: dict[str, Any]) -> bool:
    """Whether the process that left `mark` still runs; of another host it cannot be known, so it counts as alive."""
    import psutil

    if mark["host"] != socket.gethostname():
        return True
    try:
        process = psutil.Process(mark["pid"])
        same = abs(process.create_time() - mark["started"]) < START_TOLERANCE_S
        return bool(same and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
    except psutil.AccessDenied:
        return True
