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

from collections.abc import Callable, Iterable

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
    judge_slices,
)
from flows.core.serving_rules import judge_latency, judge_memory, judge_start, judge_throughput
from flows.core.verdicts import Report, Verdict

Gate = Callable[[Evidence], Iterable[Verdict]]

GATES: tuple[Gate, ...] = (
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
    """Ask every gate about a candidate.

    Args:
        evidence: What is known about it.
        candidate: How the report names it, e.g. `ekiben:3-1f2e3d4c`.
    """
    return Report(candidate, tuple(verdict for gate in GATES for verdict in gate(evidence)))
