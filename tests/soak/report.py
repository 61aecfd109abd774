"""The report of a soak for people; for programs it is JSON."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

COUNTS = ("requests", "answered", "refused", "shed", "late", "cut_off", "ended_with_the_worker")


def render(report: Mapping[str, Any]) -> str:
    """Write a report as lines of text."""
    head = f"soak of {report['seconds'] / 60:g} min, {report['model']} ({report['precision']}), seed {report['seed']}"
    lines = [head]
    for leg in report["legs"]:
        counts = ", ".join(f"{leg[name]} {name.replace('_', ' ')}" for name in COUNTS)
        readiness, memory = leg["readiness"], leg["memory"]
        lines += [
            "",
            f"{leg['leg']}: {leg['seconds']:g} s",
            f"  {counts}",
            f"  the worker was ended {leg['workers_ended']} times; green again after {leg['recoveries_s']} s",
            f"  readiness: {readiness['polls']} polls, {readiness['green']} green, {readiness['red']} red, "
            f"{readiness['silent']} silent",
        ]
        if leg["spells"]:
            spells = ", ".join(f"{number} x {spell!r}" for spell, number in sorted(leg["spells"].items()))
            lines.append(f"  faults: {spells}; {leg['blackouts']} times all threads hung")
        if memory["judged"]:
            lines.append(
                f"  memory without files: {memory['first_mb']} MiB, "
                f"at the end {memory['last_mb']} MiB (peak {memory['peak_mb']})"
            )
    lines += ["", "problems:" if report["problems"] else "no wrong vector, no lost or doubled answer, no other problem"]
    return "\n".join([*lines, *(f"  {problem}" for problem in report["problems"])])
