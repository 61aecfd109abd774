"""The gates: what a candidate must prove before it ships, and one report that says so. Core layer, pure.

A gate is a function from `Evidence` to verdicts, none while its evidence does not exist yet: the certificate is made
after the gates that need no export have passed, and the Bento is measured after it was built. The rules stand in
gate_rules.py (the model) and serving_rules.py (the built Bento). A new gate is one such function, its name in `GATES`,
and its threshold in `ReleaseParams`.

What is asked of what is not known: a gate that is on by default lets pass what an older run did not record, as long as
something else vouches for it, and says so; a gate that the user switched on, and every comparison of quality, refuses
what it cannot see.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from flows.core.evidence import Evidence
from flows.core.gate_rules import (
    judge_batch_invariance,
    judge_calibration,
    judge_champion,
    judge_compat,
    judge_data_age,
    judge_finite,
    judge_int8,
    judge_leakage,
    judge_licence,
    judge_parity,
    judge_quality,
    judge_rolled_back,
    judge_slices,
)
from flows.core.serving_rules import judge_latency, judge_memory, judge_start, judge_throughput
from flows.core.verdicts import Report, Verdict

Gate = Callable[[Evidence], Iterable[Verdict]]
EXPORTED = ("parity", "batch_invariance")  # gates that judge the export
SERVED = ("latency", "throughput", "start", "memory")  # gates that judge the built Bento

GATES: tuple[Gate, ...] = (
    judge_rolled_back,
    judge_finite,
    judge_quality,
    judge_champion,
    judge_slices,
    judge_calibration,
    judge_leakage,
    judge_data_age,
    judge_licence,
    judge_parity,
    judge_batch_invariance,
    judge_int8,
    judge_compat,
    judge_latency,
    judge_throughput,
    judge_start,
    judge_memory,
)


def run_gates(evidence: Evidence, *, candidate: str) -> Report:
    """Ask every gate about a candidate; the report names those whose evidence is still to come.

    Args:
        evidence: What is known about it.
        candidate: How the report names it, e.g. `ekiben:3-1f2e3d4c`.
    """
    verdicts = tuple(verdict for gate in GATES for verdict in gate(evidence))
    return Report(candidate, verdicts, tuple(_list_unasked(evidence)))


def _list_unasked(evidence: Evidence) -> Iterator[str]:
    """The gates whose evidence does not exist yet."""
    has_champion = evidence.champion is not None
    if evidence.certificate is None:
        if has_champion and evidence.versus_champion is None and not evidence.problem:
            yield "champion"
        yield from EXPORTED
        if evidence.params.precision != "fp32":
            yield "int8"
    if has_champion and evidence.compat is None:
        yield "compat"
    if evidence.serving is None:
        yield from SERVED
