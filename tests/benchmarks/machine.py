"""What the figures were measured on."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

import psutil

from bentos.machine import count_cores

# Instructions that decide how fast matrices are multiplied.
TOLD_FLAGS = (
    "avx2",
    "avx_vnni",
    "avx512f",
    "avx512_vnni",
    "avx512_bf16",
    "amx_int8",
    "amx_bf16",
    "asimd",
    "sve",
    "i8mm",
)


def describe_machine() -> dict[str, Any]:
    """CPU, cores, memory, flags, kernel and Python of this machine."""
    cpu = _read_cpuinfo()
    flags = set(cpu.get("flags", cpu.get("Features", "")).split())
    return {
        "cpu": cpu.get("model name", platform.processor() or platform.machine()),
        "cpu_family": "/".join(cpu.get(name, "?") for name in ("cpu family", "model", "stepping")),
        "cores": count_cores(),
        "ram_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "flags": [flag for flag in TOLD_FLAGS if flag in flags],
        "kernel": platform.release(),
        "python": platform.python_version(),
    }


def read_busy_s() -> float:
    """Seconds that this machine's cores have worked so far, summed over cores and programs."""
    times = psutil.cpu_times()
    return float(times.user + times.nice + times.system)  # `guest` is part of `user`


def read_steal_s() -> float:
    """Seconds that the hypervisor kept from this machine's cores so far, summed over cores."""
    return float(getattr(psutil.cpu_times(), "steal", 0.0))


def _read_cpuinfo() -> dict[str, str]:
    """The first processor of /proc/cpuinfo, field by field."""
    facts: dict[str, str] = {}
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").split("\n\n")[0].splitlines():
        name, _, value = line.partition(":")
        facts[name.strip()] = value.strip()
    return facts
