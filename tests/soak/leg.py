"""One leg of the soak: a server, its clients, what is done to it, and what comes of it."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tests.serving import Server, serve
from tests.soak.bad import JSON
from tests.soak.client import BrokenError, Connection, LostError, MalformedError, render_request
from tests.soak.driver import CUT, LATE, OK, SHED, Driver, Target
from tests.soak.ledger import Ledger
from tests.soak.reference import Reference
from tests.soak.spells import DIE_ALWAYS, DIE_ONCE, FAIL, HANG_ONCE, TELL
from tests.soak.watch import Fault, MemoryWatch, ReadinessWatch, open_outage

ROOT = Path(__file__).parents[2]
SOURCE = "tests.soak.service:EmbeddingService"
KEY = "a-key-of-the-soak-0123456789"
CLIENTS, CASTERS = 14, 2
MAX_TEXTS, MAX_CHARS, MAX_BYTES = 48, 4000, 200_000
HEADER_TIMEOUT_S, BODY_TIMEOUT_S = 3.0, 3.0
STALL_S, HANG_S = 2.0, 5.0
RECOVERY_S = 60.0  # longest time from the end of a worker to the next green light
SETTLE_S = 2.0  # a replaced thread, and the next look at readiness
MOST_SHED, LEAST_ANSWERED = 0.2, 0.3  # shares of all requests, else the soak has tested something else
LIMITS = {
    "EKIBEN_MAX_TEXTS": str(MAX_TEXTS),
    "EKIBEN_MAX_CHARS": str(MAX_CHARS),
    "EKIBEN_MAX_BODY_BYTES": str(MAX_BYTES),
    "EKIBEN_HEADER_TIMEOUT_S": str(HEADER_TIMEOUT_S),
    "EKIBEN_BODY_TIMEOUT_S": str(BODY_TIMEOUT_S),
    "EKIBEN_STALL_S": str(STALL_S),
    "EKIBEN_LOG_LEVEL": "warning",
}
logger = logging.getLogger("soak")


@dataclass(frozen=True)
class Leg:
    """What is served, and what is done to it."""

    name: str
    target: str  # of `bentoml serve`: a Bento's tag, or the module of the service with the spells
    settings: Mapping[str, str] = field(default_factory=dict)
    has_spells: bool = False
    key: str | None = None


class Run:
    """A leg under way."""

    def __init__(self, leg: Leg, server: Server, reference: Reference, events: Path, *, seed: str) -> None:
        self.leg, self.server, self.reference, self.events = leg, server, reference, events
        self.ledger = Ledger()
        self.random = random.Random(seed)
        self.seed = seed
        self.target = Target(
            port=int(server.url.rsplit(":", 1)[1]),
            key={"Authorization": f"Bearer {leg.key}"} if leg.key else {},
            max_texts=MAX_TEXTS,
            max_chars=MAX_CHARS,
            max_bytes=MAX_BYTES,
            header_timeout_s=HEADER_TIMEOUT_S,
            body_timeout_s=BODY_TIMEOUT_S,
        )
        self.readiness = ReadinessWatch(self.target, self.ledger)
        self.memory = MemoryWatch(server.pid)
        self.recoveries_s: list[float] = []
        self.spells: Counter[str] = Counter()
        self._spell_numbers = iter(range(1, 1_000_000))

    async def run(self, seconds: float) -> dict[str, Any]:
        """Do it all for so many seconds, and report."""
        begin = time.monotonic()
        end = begin + seconds
        drivers = [
            Driver(self.target, self.reference, self.ledger, seed=f"{self.seed} {number}") for number in range(CLIENTS)
        ]
        async with asyncio.TaskGroup() as group:
            watch = group.create_task(self.readiness.run(end + RECOVERY_S))
            group.create_task(self.memory.run(end))
            clients = [group.create_task(driver.run(end)) for driver in drivers]
            kills = group.create_task(self._end_workers(begin, seconds))
            if self.leg.has_spells:
                clients += [group.create_task(self._cast_spells(end)) for _ in range(CASTERS)]
            await asyncio.wait([*clients, kills])
            await self._find_leftovers()
            if await self.readiness.wait_for_green(RECOVERY_S) is None:
                self.ledger.complain("readiness", "not green at the end")
            watch.cancel()
        return self._report(seconds)

    # --- what is done to the server

    async def _end_workers(self, begin: float, seconds: float) -> None:
        """End the worker a few times in the first half; the second is for the memory."""
        count = max(1, round(seconds / 75))
        for at in sorted(self.random.uniform(0.08, 0.45) * seconds for _ in range(count)):
            await asyncio.sleep(max(0.0, begin + at - time.monotonic()))
            outage = open_outage(self.ledger)
            os.kill(self.server.worker_pid(), signal.SIGKILL)
            waited_s = await self.readiness.wait_for_green(RECOVERY_S)
            outage.end = time.monotonic()
            if waited_s is None:
                self.ledger.complain("readiness", f"not green {RECOVERY_S:g} s after the worker was ended")
            else:
                self.recoveries_s.append(round(waited_s, 2))

    async def _cast_spells(self, end: float) -> None:
        """End, hang or fail threads of both lanes, some at once."""
        while time.monotonic() < end - STALL_S - SETTLE_S:
            spell = self.random.choice([DIE_ONCE, DIE_ALWAYS, FAIL, HANG_ONCE, HANG_ONCE])
            threads = self.random.choice([1, 2, 2]) if spell == HANG_ONCE else 1
            in_bulk = self.random.random() < 0.3
            await asyncio.gather(*(self._cast(spell, in_bulk=in_bulk) for _ in range(threads)))
            await asyncio.sleep(self.random.uniform(0.5, 2.5))

    async def _cast(self, spell: str, *, in_bulk: bool = False) -> None:
        """Send a text that breaks things, alone or among others, and check what comes back."""
        rows = [self.random.randrange(len(self.reference.texts)) for _ in range(7 if in_bulk else 0)]
        texts = [f"{spell} {next(self._spell_numbers)}", *(self.reference.texts[row] for row in rows)]
        request = render_request("POST", "/encode", json.dumps({"texts": texts}).encode(), {**JSON, **self.target.key})
        self.spells[spell] += 1
        expected = {DIE_ALWAYS: 503, FAIL: 500}.get(spell, 200)
        since = time.monotonic()
        try:
            connection = await Connection.open(self.target.port)
            try:
                await connection.send(request)
                answer = await connection.read_answer()
            finally:
                connection.abort()
        except (BrokenError, LostError, MalformedError) as error:
            if not self.ledger.excuses(since):
                self.ledger.complain(spell, str(error))
            return
        if answer.status != expected and not (answer.status == 429 or self.ledger.excuses(since)):
            self.ledger.complain(spell, f"{answer.status} {answer.body!r:.200}, expected {expected}")
        elif answer.status == 200 and rows:
            vectors = np.array(json.loads(answer.body)["embeddings"][1:])
            if (wrong := self.reference.find_wrong_vectors(rows, vectors)) is not None:
                self.ledger.complain(spell, wrong)

    async def _find_leftovers(self) -> None:
        """When all is quiet nothing may be under way, in the batcher's own books."""
        if not self.leg.has_spells:
            return
        await asyncio.sleep(SETTLE_S)
        await self._cast(TELL)
        told = [event for event in self._read_events() if event["what"] == TELL]
        if not told:
            self.ledger.complain("leftovers", "the service told nothing")
        elif told[-1]["in_flight"] != 1 or told[-1]["admitted_tokens"]["bulk"] != 0:
            self.ledger.complain("leftovers", f"{told[-1]}")

    # --- what came of it

    def _read_events(self) -> list[dict[str, Any]]:
        if not self.events.exists():
            return []
        return [json.loads(line) for line in self.events.read_text(encoding="utf-8").splitlines()]

    def _find_faults(self) -> tuple[list[Fault], list[Fault]]:
        """When threads were missing, and when all of the interactive lane were."""
        faults = []
        hung: list[float] = []
        blackouts = []
        for event in self._read_events():
            at = event["at"]
            if event["what"] == HANG_ONCE:
                faults.append(Fault(at, at + STALL_S + SETTLE_S))
                if event["lane"] == "interactive":
                    hung = [*(before for before in hung if at - before < STALL_S), at]
                    if len(hung) >= event["threads"]:
                        # the first of them is given up after STALL_S, and no look is older than a second
                        blackouts.append(Fault(at + 1, min(hung) + STALL_S))
            elif event["what"] != TELL:
                faults.append(Fault(at, at + SETTLE_S))
        return faults, [fault for fault in blackouts if fault.end > fault.begin]

    def _report(self, seconds: float) -> dict[str, Any]:
        ledger = self.ledger
        faults, blackouts = self._find_faults()
        settled = max([outage.end or 0 for outage in ledger.outages], default=0.0) + 0.1 * seconds
        readiness = self.readiness.judge(faults, blackouts)
        memory = self.memory.judge(ledger, settled)
        total, answered, shed = sum(ledger.outcomes.values()), ledger.total(OK), ledger.total(SHED)
        if answered < LEAST_ANSWERED * total or shed > MOST_SHED * total:
            ledger.complain("balance", f"of {total} requests {answered} were answered and {shed} shed")
        kinds: dict[str, dict[str, int]] = {}
        for (kind, outcome), number in sorted(ledger.outcomes.items()):
            kinds.setdefault(kind, {})[outcome] = number
        refused = sum(number for (_, outcome), number in ledger.outcomes.items() if outcome.startswith("refused"))
        return {
            "leg": self.leg.name,
            "seconds": round(seconds, 1),
            "requests": total,
            "answered": answered,
            "refused": refused,
            "shed": shed,
            "late": ledger.total(LATE),
            "cut_off": ledger.total(CUT),
            "ended_with_the_worker": ledger.total("ended with the worker"),
            "workers_ended": len(ledger.outages),
            "recoveries_s": self.recoveries_s,
            "spells": dict(self.spells),
            "blackouts": len(blackouts),
            "readiness": readiness,
            "memory": memory,
            "problems": dict(ledger.problems),
            "listed": ledger.listed,
            "kinds": kinds,
        }


def run_leg(leg: Leg, home: Path, folder: Path, reference: Reference, *, seconds: float, seed: str) -> dict[str, Any]:
    """Serve, soak, and report."""
    events = folder / "events.jsonl"
    own = {"PYTHONPATH": str(ROOT), "SOAK_EVENTS": str(events), "SOAK_HANG_S": str(HANG_S)} if leg.has_spells else {}
    keys = {"EKIBEN_API_KEYS": leg.key} if leg.key else {}
    with serve(leg.target, home, folder, {**LIMITS, **leg.settings, **own, **keys}) as server:
        logger.info("%s: %s at %s, log %s", leg.name, leg.target, server.url, server.log)
        return asyncio.run(Run(leg, server, reference, events, seed=seed).run(seconds))


def find_problems(reports: Sequence[Mapping[str, Any]]) -> list[str]:
    """Everything that should not have happened, of all legs."""
    return [f"{report['leg']}: {line}" for report in reports for line in report["listed"]]
