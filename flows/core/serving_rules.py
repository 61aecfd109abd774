"""What is asked of the built Bento: by itself, and beside the champion's that was measured in the same minutes.

Core layer, pure. A bound of its own says what users can live with on this machine; the ratio to the champion says what
a release may cost them. Each is a verdict, so that a report shows which one refused.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

from flows.core.evidence import Evidence
from flows.core.measuring import Serving
from flows.core.verdicts import ROUNDING, Verdict

FASTER = "serve fewer layers or dimensions, or int8"


def judge_latency(evidence: Evidence) -> Iterator[Verdict]:
    """How long one short text takes, in 95 of 100 requests."""
    yield from _judge_most(evidence, "latency", "p95_ms", "max_p95_ms", "ms for one short text at p95", FASTER)


def judge_throughput(evidence: Evidence) -> Iterator[Verdict]:
    """How many short texts a second one caller gets, 64 a request."""
    serving, asked = evidence.serving, evidence.params.min_texts_per_s
    if serving is None:
        return
    value = serving.texts_per_s
    passed = asked is None or value >= asked - ROUNDING
    reason = f"{value:.0f} texts a second, {'not asked' if asked is None else f'asked {asked:g} at least'}"
    yield Verdict(
        "throughput", value, asked, passed, reason, "" if passed else f"{FASTER}, or lower release.min_texts_per_s"
    )
    yield from _judge_ratio(evidence, "throughput", lambda figures: 1000 / figures.texts_per_s, "ms a text")


def judge_start(evidence: Evidence) -> Iterator[Verdict]:
    """How long the Bento takes from its start to readiness."""
    yield from _judge_most(
        evidence, "start", "start_s", "max_start_s", "s from start to readiness", "choose a smaller base model"
    )


def judge_memory(evidence: Evidence) -> Iterator[Verdict]:
    """How much memory the serving worker holds."""
    yield from _judge_most(
        evidence, "memory", "memory_mb", "max_memory_mb", "MiB in the worker", "choose a smaller base model, or int8"
    )


def _judge_most(evidence: Evidence, gate: str, figure: str, bound: str, meaning: str, cure: str) -> Iterator[Verdict]:
    """Hold a figure of which less is better against its bound, and against the champion's."""
    serving: Serving | None = evidence.serving
    if serving is None:
        return
    value, asked = float(getattr(serving, figure)), getattr(evidence.params, bound)
    passed = asked is None or value <= asked + ROUNDING
    reason = f"{value:.1f} {meaning}, {'not asked' if asked is None else f'asked {asked:g} at most'}"
    yield Verdict(gate, value, asked, passed, reason, "" if passed else f"{cure}, or raise release.{bound}")
    yield from _judge_ratio(evidence, gate, lambda figures: float(getattr(figures, figure)), meaning)


def _judge_ratio(evidence: Evidence, gate: str, cost: Callable[[Serving], float], meaning: str) -> Iterator[Verdict]:
    """Hold a cost against the champion's; one that could not be measured refuses nobody, as a bound still may."""
    serving, rival, champion = evidence.serving, evidence.champion_serving, evidence.champion
    if serving is None or champion is None:
        return
    name, asked = f"{gate}_ratio", evidence.params.max_slowdown
    if rival is None:
        yield Verdict(name, None, asked, True, f"unknown: {champion.tag} could not be measured beside it")
        return
    ours, theirs = cost(serving), cost(rival)
    ratio = ours / theirs if theirs > 0 else math.inf
    passed = ratio <= asked + ROUNDING
    reason = f"{ours:.1f} {meaning}, {champion.tag} {theirs:.1f} beside it: {ratio:.2f} times, asked {asked:g} at most"
    cure = f"{FASTER}, raise release.max_slowdown, or release again when the machine is quiet"
    yield Verdict(name, ratio, asked, passed, reason, "" if passed else cure)
