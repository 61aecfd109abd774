"""What happened: counts, outages that were made on purpose, and everything that should not have happened."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, field

MAX_LISTED = 40
AFTERMATH_S = 1.0  # that an outage may still be felt


@dataclass
class Outage:
    """A time in which the worker was down, because we ended it."""

    begin: float  # time.monotonic()
    end: float | None = None

    def touches(self, since: float, until: float) -> bool:
        """Whether it overlaps the time from `since` to `until`."""
        return self.begin <= until and (self.end is None or self.end + AFTERMATH_S >= since)


@dataclass
class Ledger:
    """The account of one leg."""

    outages: list[Outage] = field(default_factory=list)
    outcomes: Counter[tuple[str, str]] = field(default_factory=Counter)  # (kind of request, what came of it)
    problems: Counter[str] = field(default_factory=Counter)
    listed: list[str] = field(default_factory=list)
    request_ids: set[str] = field(default_factory=set)  # of all answers

    def count(self, kind: str, outcome: str) -> None:
        """Note what came of a request."""
        self.outcomes[kind, outcome] += 1

    def complain(self, kind: str, problem: str) -> None:
        """Note what should not have happened."""
        self.problems[kind] += 1
        self.count(kind, "WRONG")
        if len(self.listed) < MAX_LISTED:
            self.listed.append(f"{time.monotonic():.2f} {kind}: {problem}")

    def excuses(self, since: float) -> bool:
        """Whether the worker was down at any time since `since`."""
        now = time.monotonic()
        return any(outage.touches(since, now) for outage in self.outages)

    def total(self, *outcomes: str) -> int:
        """How many requests had one of these outcomes."""
        return sum(number for (_, outcome), number in self.outcomes.items() if outcome in outcomes)
