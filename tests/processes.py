"""Ports and processes of the servers that tests start."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterable

import psutil


def find_free_port() -> int:
    """A port of this machine on which nobody listens now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def family_of(pid: int) -> list[psutil.Process]:
    """A process and all that came of it; empty when it has ended."""
    try:
        process = psutil.Process(pid)
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def kill(family: Iterable[psutil.Process]) -> None:
    """End processes at once, and wait until they have; those that had ended already are left out."""
    family = list(family)
    for process in family:
        with contextlib.suppress(psutil.NoSuchProcess):  # psutil knows a process whose id has another owner now
            process.kill()
    psutil.wait_procs(family, timeout=10)
