"""The gates: what a candidate must prove before it ships, and the report that says so. Core layer, pure.

A gate is a function from `Evidence` to a `Verdict`, or to None while its evidence does not exist yet (the certificate
is made after the cheap gates have passed). A new gate is one such function, its name in `GATES`, and its threshold in
`ReleaseParams`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from flows.params import ReleaseParams

ROUNDING = 1e-9  # 0.9 - 0.8 is a hair below 0.1
PRIMARY_METRICS = ("spearman", "ndcg_at_10")  # the first that the run has


@dataclass(frozen=True)
class Verdict:
    """What one gate found."""

    gate: str
    value: float
    threshold: float
    passed: bool
    reason: str  # what was found, with its figures
    cure: str  # what would change the verdict; empty when passed


@dataclass(frozen=True)
class Evidence:
    """All that is known about a candidate when the gates are asked."""

    metrics: Mapping[str, float]  # of the run, under their names in MLflow
    params: ReleaseParams
    certificate: Mapping[str, Any] | None = None  # as `certify` returns it

    @property
    def primary_metric(self) -> str:
        """The metric that candidates are compared by."""
        return next((name for name in PRIMARY_METRICS if f"eval/{name}" in self.metrics), PRIMARY_METRICS[0])


@dataclass(frozen=True)
class Report:
    """All verdicts on one candidate: the same for terminal, MLflow, Prefect and model card."""

    candidate: str
    verdicts: tuple[Verdict, ...]

    @property
    def passed(self) -> bool:
        """Whether every gate passed, and there was one."""
        return bool(self.verdicts) and all(verdict.passed for verdict in self.verdicts)

    @property
    def refusal(self) -> str:
        """One line for the error: which gates refused, why, and what would change it; empty when all passed."""
        parts = [f"{item.gate}: {item.reason}; {item.cure}" for item in self.verdicts if not item.passed]
        return f"{self.candidate} was refused, nothing was changed. {' | '.join(parts)}" if parts else ""

    def to_rows(self) -> list[dict[str, str]]:
        """Return one row a gate: `gate`, `verdict`, `value`, `threshold`, `reason`, `cure`."""
        return [
            {
                "gate": item.gate,
                "verdict": "passed" if item.passed else "refused",
                "value": format_figure(item.value),
                "threshold": format_figure(item.threshold),
                "reason": item.reason,
                "cure": item.cure,
            }
            for item in self.verdicts
        ]

    def to_markdown(self) -> str:
        """Return a heading with the verdict, a table, and for every refusal what would change it."""
        lines = [
            f"### {self.candidate}: {'passed' if self.passed else 'refused'}",
            "",
            "| gate | verdict | value | threshold | reason |",
            "| --- | --- | ---: | ---: | --- |",
        ]
        for row in self.to_rows():
            cells = (row["gate"], row["verdict"], row["value"], row["threshold"], row["reason"].replace("|", "\\|"))
            lines.append(f"| {' | '.join(cells)} |")
        cures = [f"- **{item.gate}**: {item.cure}" for item in self.verdicts if not item.passed]
        return "\n".join([*lines, *(["", "What would change it:", "", *cures] if cures else []), ""])


def run_gates(
    metrics: Mapping[str, float],
    params: ReleaseParams,
    *,
    candidate: str,
    certificate: Mapping[str, Any] | None = None,
) -> Report:
    """Ask every gate about a candidate.

    Args:
        metrics: The run's metrics, `eval/*` and `base/*` among them.
        params: The thresholds.
        candidate: How the report names it, e.g. `ekiben:3-1f2e3d4c`.
        certificate: What `certify` returned; without it the gates that need it are left out.
    """
    evidence = Evidence(metrics, params, certificate)
    verdicts = (gate(evidence) for gate in GATES)
    return Report(candidate, tuple(verdict for verdict in verdicts if verdict is not None))


def format_figure(value: float) -> str:
    """Format a figure with up to six decimals, rounded down so that 0.99999999 does not read as a perfect 1."""
    if not math.isfinite(value):
        return str(value)
    return f"{math.floor(value * 1e6 + ROUNDING) / 1e6:.6f}".rstrip("0").rstrip(".")


def judge_finite(evidence: Evidence) -> Verdict:
    """Every metric is a number: one NaN means that the training or the evaluation went wrong."""
    bad = sorted(name for name, value in evidence.metrics.items() if not math.isfinite(value))
    if not evidence.metrics:
        reason = "the run has no metrics"
    elif bad:
        reason = f"{len(bad)} of {len(evidence.metrics)} metrics are no finite number: {', '.join(bad[:5])}"
    else:
        reason = f"all {len(evidence.metrics)} metrics are finite"
    passed = bool(evidence.metrics) and not bad
    return Verdict(
        gate="finite",
        value=float(len(bad)),
        threshold=0.0,
        passed=passed,
        reason=reason,
        cure="" if passed else "train again with a lower train.learning_rate, and look at the data for constant scores",
    )


def judge_quality(evidence: Evidence) -> Verdict:
    """On test rows that neither model was trained on, the candidate is not worse than its base model."""
    name, asked = evidence.primary_metric, evidence.params.min_gain
    tuned = evidence.metrics.get(f"eval/{name}", math.nan)
    base = evidence.metrics.get(f"base/{name}", math.nan)
    gain = tuned - base
    passed = math.isfinite(gain) and gain >= asked - ROUNDING
    if math.isfinite(gain):
        low, high = (evidence.metrics.get(f"gain/{end}", math.nan) for end in ("low", "high"))
        interval = f" (interval {low:+.4f} to {high:+.4f})" if math.isfinite(low) and math.isfinite(high) else ""
        reason = (
            f"test {name} is {tuned:.4f}, the base model's {base:.4f}: "
            f"a gain of {gain:+.4f}{interval}, asked {asked:+.4f}"
        )
        cure = "train longer or on more data, run `ekiben tune`, or set release.min_gain lower"
    else:
        reason = f"test {name} is {tuned:.4f}, the base model's {base:.4f}: there is no gain to compare"
        cure = "train and evaluate again: a run must have finite eval/ and base/ metrics"
    return Verdict("quality", gain, asked, passed, reason, "" if passed else cure)


def judge_parity(evidence: Evidence) -> Verdict | None:
    """The exported model gives sentence-transformers' own vectors."""
    return _judge_cosine(evidence, "parity", "min_cosine", "with sentence-transformers' own vectors")


def judge_batch_invariance(evidence: Evidence) -> Verdict | None:
    """A text's vector does not depend on the texts that share its batch."""
    return _judge_cosine(
        evidence, "batch_invariance", "batch_min_cosine", "of a text in a batch with the same text alone"
    )


def judge_int8(evidence: Evidence) -> Verdict | None:
    """int8 is certified, or it is left out and fp32 serves; only `release.precision: int8` refuses then."""
    section = (evidence.certificate or {}).get("int8")
    asked = evidence.params.int8_max_loss
    if section is None:
        return None
    if section["certified"]:
        losses = ", ".join(f"{item['metric']} {-item['loss']:+.4f}" for item in section["quality"])
        reason = (
            f"int8 is the default: {losses}, mean cosine with fp32 {format_figure(section['mean_cosine'])}, of a text "
            f"among others with itself alone {format_figure(section['batch_min_cosine'])}, "
            f"{section['speed']['ratio']:.2f} times the speed"
        )
    else:
        reason = f"int8 is left out, fp32 serves: {section['reason']}"
    loss = max((item["loss"] for item in section.get("quality", ())), default=math.nan)
    passed = section["certified"] or evidence.params.precision != "int8"
    return Verdict(
        "int8", loss, asked, passed, reason, "" if passed else "set release.precision to auto, or lower what it misses"
    )


def _judge_cosine(evidence: Evidence, gate: str, key: str, meaning: str) -> Verdict | None:
    if evidence.certificate is None:
        return None
    value, asked = float(evidence.certificate[key]), evidence.params.min_cosine
    passed = math.isfinite(value) and value >= asked
    reason = f"smallest cosine {meaning} is {format_figure(value)}, asked {format_figure(asked)}"
    cure = "export again; if it stays so, choose another base model"
    return Verdict(gate, value, asked, passed, reason, "" if passed else cure)


GATES: tuple[Callable[[Evidence], Verdict | None], ...] = (
    judge_finite,
    judge_quality,
    judge_parity,
    judge_batch_invariance,
    judge_int8,
)
