"""What is seen from outside: readiness, asked again and again and put to the proof, and the memory of all processes."""

from __future__ import annotations

import asyncio
import contextlib
import json
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from tests.soak.bad import JSON
from tests.soak.client import Answer, BrokenError, Connection, LostError, MalformedError, render_request
from tests.soak.driver import Target
from tests.soak.ledger import Ledger, Outage

POLL_S, SAMPLE_S = 0.25, 1.0
POLL_PATIENCE_S = 2.0
CACHED_S = 1.0  # the server looks no more often, so an answer may be so old
FIRST_SHARE = LAST_SHARE = 1 / 3  # of the samples, compared with each other
ALLOWED_GROWTH, ALLOWED_GROWTH_MB = 0.04, 8.0
SHOWN_SAMPLES = 60
MIB = 2**20


@dataclass(frozen=True)
class Poll:
    """One look at /readyz, and at /encode right after a green one. Times of `time.monotonic()`."""

    begin: float
    end: float
    status: int | None  # None: no answer within `POLL_PATIENCE_S`
    proof: int | None = None  # what /encode answered then
    proof_end: float = 0.0


@dataclass(frozen=True)
class Fault:
    """A thread that we ended or hung, and until when it may be felt."""

    begin: float
    end: float

    def touches(self, begin: float, end: float) -> bool:
        """Whether it overlaps the time from `begin` to `end`."""
        return self.begin <= end and begin <= self.end


@dataclass
class ReadinessWatch:
    """Asks /readyz all the time."""

    target: Target
    ledger: Ledger
    polls: list[Poll] = field(default_factory=list)

    async def run(self, until: float) -> None:
        """Poll until `time.monotonic()` is `until`."""
        body = json.dumps({"texts": ["is it true"]}).encode()
        probe = render_request("POST", "/encode", body, {**JSON, **self.target.key})
        while time.monotonic() < until:
            begin = time.monotonic()
            status = proof = None
            end = proof_end = 0.0
            with contextlib.suppress(BrokenError, LostError, MalformedError, TimeoutError):
                connection = await Connection.open(self.target.port)
                try:
                    async with asyncio.timeout(POLL_PATIENCE_S):
                        answer = await self._ask(connection, render_request("GET", "/readyz"))
                    status, end = answer.status, time.monotonic()
                    if status == 200:
                        proof = (await self._ask(connection, probe)).status
                        proof_end = time.monotonic()
                finally:
                    connection.abort()
            self.polls.append(Poll(begin, end or time.monotonic(), status, proof, proof_end))
            await asyncio.sleep(POLL_S)

    async def _ask(self, connection: Connection, request: bytes) -> Answer:
        await connection.send(request)
        return await connection.read_answer()

    async def wait_for_green(self, limit_s: float) -> float | None:
        """Seconds until /readyz is asked anew and says 200; None when it does not within the limit."""
        begin = time.monotonic()
        while time.monotonic() - begin < limit_s:
            if any(poll.status == 200 and poll.begin >= begin for poll in self.polls[-3:]):
                return time.monotonic() - begin
            await asyncio.sleep(0.02)
        return None

    def judge(self, faults: Sequence[Fault], blackouts: Sequence[Fault]) -> dict[str, Any]:
        """Complain about every answer that was not true; sum the others up.

        Args:
            faults: times in which a red answer is true.
            blackouts: times in which a green one is not, as nothing could be computed.
        """
        down = [Fault(outage.begin, outage.end or time.monotonic()) for outage in self.ledger.outages]
        for poll in self.polls:
            when = f"at {poll.begin:.2f}"
            excused = [fault for fault in (*faults, *down) if fault.touches(poll.begin - CACHED_S, poll.end + 1)]
            if poll.status == 200:
                if any(fault.begin <= poll.begin and poll.end <= fault.end for fault in blackouts):
                    self.ledger.complain("readiness", f"green {when}, but nothing could be computed")
                if poll.proof not in (200, 429) and not any(
                    fault.touches(poll.begin - CACHED_S, (poll.proof_end or poll.end) + 1) for fault in (*faults, *down)
                ):
                    self.ledger.complain("readiness", f"green {when}, but /encode answered {poll.proof}")
            elif not excused:
                self.ledger.complain("readiness", f"{poll.status or 'silent'} {when}, with no fault under way")
        green = [poll for poll in self.polls if poll.status == 200]
        red = [poll for poll in self.polls if poll.status == 503]
        return {
            "polls": len(self.polls),
            "green": len(green),
            "red": len(red),
            "silent": len(self.polls) - len(green) - len(red),
            "red_or_silent_in_blackouts": sum(
                1
                for poll in self.polls
                if poll.status != 200 and any(fault.touches(poll.begin, poll.end) for fault in blackouts)
            ),
        }


@dataclass
class MemoryWatch:
    """Samples the memory of a server, of all its processes together."""

    pid: int
    samples: list[tuple[float, float]] = field(default_factory=list)  # (time.monotonic(), MiB)

    async def run(self, until: float) -> None:
        """Sample until `time.monotonic()` is `until`."""
        while time.monotonic() < until:
            self.samples.append((time.monotonic(), await asyncio.to_thread(measure_mb, self.pid)))
            await asyncio.sleep(SAMPLE_S)

    def judge(self, ledger: Ledger, since: float) -> dict[str, Any]:
        """Compare the memory soon after `since` with that at the end; complain when it has grown."""
        values = [value for at, value in self.samples if at >= since]
        if len(values) < 6:
            return {"samples": len(values), "judged": False}
        share = max(int(len(values) * FIRST_SHARE), 1)
        first, last = statistics.median(values[:share]), statistics.median(values[-share:])
        if last - first > ALLOWED_GROWTH * first + ALLOWED_GROWTH_MB:
            ledger.complain("memory", f"it grew from {first:.1f} to {last:.1f} MiB")
        shown = {"first_mb": first, "last_mb": last, "peak_mb": max(values)}
        every = [round(value, 1) for _, value in self.samples[:: max(len(self.samples) // SHOWN_SAMPLES, 1)]]
        rounded = {name: round(value, 1) for name, value in shown.items()}
        return {"samples": len(values), "judged": True, **rounded, "whole_leg_mb": every}


def measure_mb(pid: int) -> float:
    """Memory of a process and all below it that no file backs, in MiB: libraries cannot leak, and others share them."""
    total = 0
    with contextlib.suppress(psutil.NoSuchProcess):
        for process in (parent := psutil.Process(pid), *parent.children(recursive=True)):
            with contextlib.suppress(psutil.NoSuchProcess, FileNotFoundError, ProcessLookupError):
                total += _read_anonymous_bytes(process)
    return total / MIB


def _read_anonymous_bytes(process: psutil.Process) -> int:
    if sys.platform != "linux":
        return int(process.memory_full_info().uss)
    lines = Path(f"/proc/{process.pid}/smaps_rollup").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Anonymous:"))


def open_outage(ledger: Ledger) -> Outage:
    """Note that the worker is about to be ended."""
    outage = Outage(time.monotonic())
    ledger.outages.append(outage)
    return outage
