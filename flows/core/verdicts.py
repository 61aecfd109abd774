"""Verdicts and the report of them: one content for terminal, MLflow, Prefect, model card and error. Core layer, pure.

A report says of every gate what was found, what was asked, the verdict, the reason, and what would change it.
`to_rows` is the content; markdown, JSON and the refusal are the same in other clothes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

ROUNDING = 1e-9  # 0.9 - 0.8 is a hair below 0.1
EXACT = 1e9  # from here on a double has no six decimals left
NOT_ASKED = "not asked"
UNKNOWN = "unknown"
COLUMNS = ("gate", "verdict", "value", "threshold", "reason", "cure")

Figure = float | str | None


@dataclass(frozen=True)
class Verdict:
    """What one gate found."""

    gate: str
    value: Figure  # None: unknown
    threshold: Figure  # None: not asked
    passed: bool
    reason: str  # what was found, with its figures
    cure: str = ""  # what would change the verdict; empty when passed

    def to_row(self) -> dict[str, str]:
        """Return the verdict as text, under the names of `COLUMNS`."""
        return {
            "gate": self.gate,
            "verdict": "passed" if self.passed else "refused",
            "value": UNKNOWN if self.value is None else format_figure(self.value),
            "threshold": NOT_ASKED if self.threshold is None else format_figure(self.threshold),
            "reason": self.reason,
            "cure": self.cure,
        }


@dataclass(frozen=True)
class Report:
    """All verdicts on one candidate."""

    candidate: str
    verdicts: tuple[Verdict, ...]
    not_asked: tuple[str, ...] = ()  # gates that would have come later, had it not been refused before

    @property
    def passed(self) -> bool:
        """Whether every gate passed, and there was one."""
        return bool(self.verdicts) and all(verdict.passed for verdict in self.verdicts)

    @property
    def refusal(self) -> str:
        """One line for the error: which gates refused, why, and what would change it; empty when all passed."""
        parts = [f"{item.gate}: {item.reason}; {item.cure}" for item in self.verdicts if not item.passed]
        return f"{self.candidate} was refused, nothing was changed. {' | '.join(parts)}" if parts else ""

    @property
    def unasked(self) -> str:
        """One line on the gates that were not asked; empty when all were, or none refused."""
        if not self.refusal or not self.not_asked:
            return ""
        return f"not asked: {', '.join(self.not_asked)}; it was refused before"

    def add(self, verdict: Verdict, *, answers: Sequence[str] = ()) -> Report:
        """Return the report with one more verdict, which also answers the gates of those names."""
        not_asked = tuple(name for name in self.not_asked if name not in answers)
        return replace(self, verdicts=(*self.verdicts, verdict), not_asked=not_asked)

    def keep_refusals(self, before: Report) -> Report:
        """Return the report with what was refused on less evidence: it would have ended the release there."""
        refused = {item.gate: item for item in before.verdicts if not item.passed}
        kept = [refused.pop(item.gate, item) if item.passed else item for item in self.verdicts]
        names = {item.gate for item in kept}
        return replace(self, verdicts=(*kept, *(item for gate, item in refused.items() if gate not in names)))

    def to_rows(self) -> list[dict[str, str]]:
        """Return one row a gate: `gate`, `verdict`, `value`, `threshold`, `reason`, `cure`."""
        return [item.to_row() for item in self.verdicts]

    def to_markdown(self) -> str:
        """Return a heading with the verdict, a table, and for every refusal what would change it."""
        lines = [
            f"### {self.candidate}: {'passed' if self.passed else 'refused'}",
            "",
            "| gate | verdict | value | threshold | reason |",
            "| --- | --- | ---: | ---: | --- |",
        ]
        for row in self.to_rows():
            cells = [row[name].replace("|", "\\|") for name in COLUMNS[:-1]]
            lines.append(f"| {' | '.join(cells)} |")
        cures = [f"- **{item.gate}**: {item.cure}" for item in self.verdicts if not item.passed]
        unasked = ["", f"{self.unasked.capitalize()}."] if self.unasked else []
        return "\n".join([*lines, *unasked, *(["", "What would change it:", "", *cures] if cures else []), ""])

    def to_json(self) -> str:
        """Return the report as JSON text: numbers stay numbers where JSON has them, unknown and not asked are null."""
        gates = [
            {**item.to_row(), "value": _plain(item.value), "threshold": _plain(item.threshold)}
            for item in self.verdicts
        ]
        content = {
            "candidate": self.candidate,
            "verdict": "passed" if self.passed else "refused",
            "refusal": self.refusal,
            "not_asked": list(self.not_asked),
            "gates": gates,
        }
        return json.dumps(content, ensure_ascii=False, indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Report:
        """Read what `to_json` wrote.

        Raises:
            ValueError: when the text is no such report.
        """
        try:
            raw = json.loads(text)
            verdicts = tuple(
                Verdict(
                    gate=str(item["gate"]),
                    value=_restore(item["value"]),
                    threshold=_restore(item["threshold"]),
                    passed=item["verdict"] == "passed",
                    reason=str(item["reason"]),
                    cure=str(item["cure"]),
                )
                for item in raw["gates"]
            )
            return cls(str(raw["candidate"]), verdicts, tuple(map(str, raw.get("not_asked", ()))))
        except (KeyError, TypeError) as error:
            raise ValueError(f"this is no report of gates: {error!r}") from None


def format_figure(value: float | str) -> str:
    """Format a figure with up to six decimals, rounded down so that 0.99999999 does not read as a perfect 1."""
    if isinstance(value, str):
        return value
    if not abs(value) < EXACT:  # NaN and infinite, too
        return f"{value:g}"
    return f"{math.floor(value * 1e6 + ROUNDING) / 1e6:.6f}".rstrip("0").rstrip(".")


def _plain(value: Figure) -> Figure:
    """A figure as JSON has it: what is no finite number becomes its name."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _restore(value: object) -> Figure:
    if isinstance(value, str) and value in ("nan", "inf", "-inf"):
        return float(value)
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{value!r} is no figure")
    return float(value)
