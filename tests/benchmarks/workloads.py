"""The workloads W1 to W6, each run on one server that is up, and what is measured of them."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from bentos.machine import count_cores
from tests.benchmarks import load
from tests.benchmarks.connection import render_request
from tests.benchmarks.load import GAVE_UP, RESET, Load, Requests, Shot
from tests.benchmarks.machine import read_busy_s
from tests.benchmarks.peers import Peer
from tests.benchmarks.servers import RunningServer, ServerError
from tests.benchmarks.texts import BULK_TEXTS, Writer

logger = logging.getLogger(__name__)
MANY, FEW = 32, 4  # connections
QUERIES_PER_S = 20.0  # W6
OVERLOAD, PATIENCE_S = 2.0, 2.0  # W5: times the capacity; how long its clients wait
SETTLED_S, SETTLE_TIMEOUT_S, SETTLE_TRIES = 0.5, 10.0, 100
CHECKED_TEXTS = 8  # of each kind, before anything is measured
KEPT_TEXTS = 32  # answers under load that are compared with the reference
TITLES = {
    "W1": "short single texts, 32 connections",
    "W2": "profile-length single texts, 32 connections",
    "W3": "bulk: 64 mixed-length texts a request, 4 connections",
    "W4": "short single texts, 1 connection",
    "W5": "overload: short single texts arrive at twice the server's W1 rate",
    "W6": "20 short queries a second on 1 connection, while 4 connections send bulk",
}
# Texts a second and core that no server here comes near: how many have to be written beforehand.
MOST_SHORT_PER_S, MOST_PROFILES_PER_S, MOST_MIXED_PER_S = 1200, 200, 300


@dataclass(frozen=True)
class Times:
    """How long the phases take, in seconds."""

    warm_s: float
    measure_s: float
    single_s: float  # W4
    idle_s: float  # W6, before the bulk begins
    ceiling_s: float  # one batch size of the engine


FULL = Times(warm_s=1.5, measure_s=7.0, single_s=4.0, idle_s=5.0, ceiling_s=1.5)
QUICK = Times(warm_s=0.7, measure_s=1.5, single_s=1.0, idle_s=1.0, ceiling_s=0.3)


@dataclass(frozen=True)
class Texts:
    """All texts of the workloads, the same for every server."""

    warm_short: list[str]
    warm_mixed: list[str]
    warm_profiles: list[str]
    short: list[str]
    profiles: list[str]
    mixed: list[str]
    single: list[str]  # W4
    overload: list[str]  # W5
    queries: list[str]  # W6
    background: list[str]  # W6, the bulk

    @property
    def checked(self) -> tuple[list[str], list[str], list[str]]:
        """Short, profile-length and mixed texts that a server is asked for before anything is measured."""
        return self.warm_short[-CHECKED_TEXTS:], self.warm_profiles[-CHECKED_TEXTS:], self.warm_mixed[-KEPT_TEXTS:]

    @property
    def with_reference(self) -> list[str]:
        """Texts whose vectors are compared with the reference: those, and the first of each closed loop."""
        kept = [*self.short[:KEPT_TEXTS], *self.profiles[:KEPT_TEXTS], *self.single[:KEPT_TEXTS]]
        return [*kept, *self.mixed[:BULK_TEXTS], *(text for group in self.checked for text in group)]


def write_texts(writer: Writer, times: Times, cores: int | None = None) -> Texts:
    """Write enough texts for the fastest server that this machine could run."""
    cores = cores or count_cores()
    seconds = times.warm_s + times.measure_s
    short, profiles, mixed = (
        int(rate * cores * seconds) + 4 * BULK_TEXTS * MANY
        for rate in (MOST_SHORT_PER_S, MOST_PROFILES_PER_S, MOST_MIXED_PER_S)
    )
    paced = int((times.idle_s + times.warm_s + seconds) * QUERIES_PER_S) + 10
    return Texts(
        warm_short=writer.write_short("warm short", short),
        warm_profiles=writer.write_profiles("warm profiles", profiles),
        warm_mixed=writer.write_mixed("warm mixed", mixed),
        short=writer.write_short("W1", short),
        profiles=writer.write_profiles("W2", profiles),
        mixed=writer.write_mixed("W3", mixed),
        single=writer.write_short("W4", short),
        overload=writer.write_short("W5", int(OVERLOAD * short)),
        queries=writer.write_short("W6", 2 * paced),
        background=writer.write_mixed("W6 bulk", mixed),
    )


class Examiner:
    """Compares a server's vectors with the reference, text by text."""

    def __init__(self, reference: dict[str, list[float]]) -> None:
        self._reference = {text: np.asarray(vector) for text, vector in reference.items()}

    def find_min_cosine(self, texts: Sequence[str], vectors: Sequence[Sequence[float]]) -> float:
        """Return the smallest cosine of the texts that the reference holds.

        Raises:
            ServerError: when there are not as many vectors as texts.
        """
        if len(texts) != len(vectors):
            raise ServerError(f"{len(vectors)} vectors came back for {len(texts)} texts")
        cosines = [1.0]
        for text, vector in zip(texts, vectors, strict=True):
            if (right := self._reference.get(text)) is not None:
                found = np.asarray(vector)
                cosines.append(float(found @ right / (np.linalg.norm(found) * np.linalg.norm(right))))
        return min(cosines)


class Trial:
    """All workloads on one running server."""

    def __init__(self, server: RunningServer, texts: Texts, examiner: Examiner, times: Times) -> None:
        self.server = server
        self.peer: Peer = server.peer
        self._texts = texts
        self._examiner = examiner
        self._times = times
        self._capacity: float | None = None  # requests a second in W1

    def check(self, *groups: Sequence[str]) -> float:
        """Ask for the vectors of each group of texts, and return the smallest cosine with the reference.

        Raises:
            ServerError: when it is too small: the speed of wrong answers is of no interest.
        """
        smallest = 1.0
        for texts in groups:
            for some in _cut(texts, len(texts) if self.peer.takes_lists else 1):
                vectors = self.peer.read(self.server.post(self.peer.render_body(some)))
                smallest = min(smallest, self._examiner.find_min_cosine(some, vectors))
        return self._accept(smallest)

    def run_start(self) -> dict[str, Any]:
        """Time to readiness and to the first right vector, then a closer look at the vectors."""
        short, profiles, mixed = self._texts.checked
        cosine = self.check(short[:1])
        first_vector_s = time.perf_counter() - self.server.started
        cosine = min(cosine, self.check(short[1:], profiles, mixed))
        return {"ready_s": self.server.ready_s, "first_vector_s": first_vector_s, "min_cosine": cosine}

    def run(self, workload: str) -> dict[str, Any]:
        """Run one workload and return its figures."""
        return {
            "W1": self.run_short,
            "W2": self.run_profiles,
            "W3": self.run_bulk,
            "W4": self.run_single,
            "W5": self.run_overload,
            "W6": self.run_queries_beside_bulk,
        }[workload]()

    def run_short(self) -> dict[str, Any]:
        """W1."""
        figures = self._run_closed(self._texts.warm_short, self._texts.short, 1, MANY)
        self._capacity = figures["requests_per_s"]
        return figures

    def run_profiles(self) -> dict[str, Any]:
        """W2."""
        return self._run_closed(self._texts.warm_profiles, self._texts.profiles, 1, MANY)

    def run_bulk(self) -> dict[str, Any]:
        """W3."""
        return self._run_closed(self._texts.warm_mixed, self._texts.mixed, self._bulk_texts, FEW)

    def run_single(self) -> dict[str, Any]:
        """W4."""
        return self._run_closed(self._texts.warm_short, self._texts.single, 1, 1, seconds=self._times.single_s)

    def run_overload(self) -> dict[str, Any]:
        """W5; returns when the server answers promptly again."""
        capacity = self._capacity or self.run_short()["requests_per_s"]
        requests = self._render(self._texts.overload, 1)
        phase = self._measure(
            lambda meter: load.run_open(
                self.server.port,
                requests,
                per_second=OVERLOAD * capacity,
                patience_s=PATIENCE_S,
                warm_s=PATIENCE_S,
                seconds=self._times.measure_s,
                on_edge=meter,
            )
        )
        shots = [shot for shot in phase.load.shots if phase.load.begin <= shot.due < phase.load.end]
        figures = count_outcomes(shots)
        settled_s = self._wait_until_settled()
        good = [shot for shot in shots if shot.status == 200]
        refused = [shot for shot in shots if shot.status == 429]
        return {
            **figures,
            **summarize_latencies(good),
            "offered_per_s": len(shots) / phase.load.seconds,
            "goodput_per_s": len(good) / phase.load.seconds,
            "goodput_share": len(good) / phase.load.seconds / capacity,
            "refused_without_retry_after": sum(not shot.has_retry_after for shot in refused),
            "settled_s": settled_s,
            "refusal_p50_ms": summarize_latencies(refused, (429,)).get("p50_ms"),
            **phase.describe_noise(),
        }

    def run_queries_beside_bulk(self) -> dict[str, Any]:
        """W6: the queries alone first, then beside the bulk."""
        times = self._times
        queries = self._render(self._texts.queries, 1)
        port = self.server.port
        idle = self._measure(
            lambda meter: load.run_paced(
                port, queries, per_second=QUERIES_PER_S, warm_s=0.5, seconds=times.idle_s, on_edge=meter
            )
        )
        bulk, warm = (
            self._render(texts, self._bulk_texts) for texts in (self._texts.background, self._texts.warm_mixed)
        )
        beside: dict[str, Load] = {}

        async def both(meter: load.OnEdge) -> Load:
            background = asyncio.create_task(
                load.run_closed(port, warm, bulk, connections=FEW, warm_s=times.warm_s, seconds=times.measure_s)
            )
            busy = await load.run_paced(
                port, queries, per_second=QUERIES_PER_S, warm_s=times.warm_s, seconds=times.measure_s, on_edge=meter
            )
            beside["bulk"] = await background
            return busy

        busy = self._measure(both)
        # A query that could not even be sent counts by the time that it waited: its latency would be longer still.
        idle_ms, busy_ms = (summarize_latencies(select_due(phase.load), (200, GAVE_UP)) for phase in (idle, busy))
        return {
            **count_outcomes(select_due(busy.load)),
            **busy_ms,
            **{f"idle_{name}": value for name, value in idle_ms.items()},
            "p99_ratio": busy_ms["p99_ms"] / idle_ms["p99_ms"] if busy_ms and idle_ms else None,
            "bulk_texts_per_s": self._bulk_texts * compute_rate(beside["bulk"]),
            **busy.describe_noise(),
        }

    def _wait_until_settled(self) -> float | None:
        """Seconds from the end of the overload until a single text is answered within `SETTLED_S`; None if never."""
        began = time.monotonic()
        for text in self._texts.warm_profiles[-SETTLE_TRIES:]:
            asked = time.monotonic()
            with contextlib.suppress(ServerError):
                self.server.post(self.peer.render_body([text]))
                if time.monotonic() - asked < SETTLED_S:
                    return time.monotonic() - began
            if time.monotonic() - began > SETTLE_TIMEOUT_S:
                break
            time.sleep(0.1)
        return None

    @property
    def _bulk_texts(self) -> int:
        return BULK_TEXTS if self.peer.takes_lists else 1

    def _run_closed(
        self, warm: list[str], texts: list[str], size: int, connections: int, seconds: float | None = None
    ) -> dict[str, Any]:
        warm_up, requests = self._render(warm, size), self._render(texts, size, keep=True)
        phase = self._measure(
            lambda meter: load.run_closed(
                self.server.port,
                warm_up,
                requests,
                connections=connections,
                warm_s=self._times.warm_s,
                seconds=seconds or self._times.measure_s,
                on_edge=meter,
            )
        )
        rate = compute_rate(phase.load)
        return {
            "requests_per_s": rate,
            "texts_per_s": rate * size,
            "texts_a_request": size,
            **summarize_latencies(select_due(phase.load)),
            **count_outcomes(select_due(phase.load)),
            "cpu_ms_a_text": 1000 * phase.cpu_s / (rate * size * phase.load.seconds) if rate else None,
            "min_cosine": self._examine(phase.load, texts, size),
            **phase.describe_noise(),
        }

    def _examine(self, phase: Load, texts: list[str], size: int) -> float | None:
        """Compare the answers under load that were kept with the reference; None when none came."""
        cosines = [
            self._examiner.find_min_cosine(texts[number * size : (number + 1) * size], self.peer.read(body))
            for number, body in phase.bodies.items()
        ]
        return self._accept(min(cosines)) if cosines else None

    def _accept(self, cosine: float) -> float:
        if not cosine >= self.peer.min_cosine:  # also when it is not a number
            raise ServerError(f"{self.peer.name} answers wrongly: cosine {cosine}, needed {self.peer.min_cosine}")
        return cosine

    def _render(self, texts: list[str], size: int, *, keep: bool = False) -> Requests:
        rendered = [render_request(self.peer.path, self.peer.render_body(some)) for some in _cut(texts, size)]
        return Requests(rendered, keep=range(-(-KEPT_TEXTS // size)) if keep else ())

    def _measure(self, phase: Any) -> _Measured:
        readings: list[tuple[float, float]] = []
        result = load.run(lambda: phase(lambda: readings.append((self.server.cpu_s(), read_busy_s()))))
        cpu_s, busy_s = (end - begin for begin, end in zip(*readings, strict=True))
        foreign_s = max(busy_s - cpu_s - result.generator_cpu_s, 0.0)
        return _Measured(result, cpu_s, foreign_s / result.seconds / count_cores())


@dataclass(frozen=True)
class _Measured:
    load: Load
    cpu_s: float  # of the server, in the measured window
    foreign_share: float  # of all cores' time, taken by programs that have no part in this

    def describe_noise(self) -> dict[str, float]:
        """How much the generator and others took from the server."""
        share = self.load.generator_cpu_s / self.load.seconds
        return {"generator_share": share, "foreign_share": self.foreign_share}


def _cut(texts: Sequence[str], size: int) -> list[Sequence[str]]:
    """Cut into pieces of `size`; what is left over is dropped."""
    return [texts[at : at + size] for at in range(0, len(texts) - size + 1, size)]


def select_due(phase: Load) -> list[Shot]:
    """The requests that were due in the measured window."""
    return [shot for shot in phase.shots if phase.begin <= shot.due < phase.end]


def compute_rate(phase: Load) -> float:
    """Requests answered 200 a second; one that reaches beyond the window counts by its part inside."""
    total = 0.0
    for shot in phase.shots:
        if shot.status == 200:
            inside = min(shot.done, phase.end) - max(shot.due, phase.begin)
            total += max(inside, 0.0) / max(shot.done - shot.due, 1e-9)
    return total / phase.seconds


def summarize_latencies(shots: Sequence[Shot], statuses: Collection[int] = (200,)) -> dict[str, float]:
    """Percentiles of the requests that ended so, in milliseconds; empty when there are none."""
    latencies_ms = [1000 * (shot.done - shot.due) for shot in shots if shot.status in statuses]
    if not latencies_ms:
        return {}
    p50, p95, p99 = np.percentile(latencies_ms, (50, 95, 99))
    return {"p50_ms": float(p50), "p95_ms": float(p95), "p99_ms": float(p99)}


def count_outcomes(shots: Sequence[Shot]) -> dict[str, int]:
    """How the requests ended."""
    statuses = [shot.status for shot in shots]
    return {
        "requests": len(statuses),
        "ok": statuses.count(200),
        "refused": statuses.count(429),
        "server_errors": sum(status >= 500 for status in statuses),
        "other_errors": sum(200 < status < 500 and status != 429 for status in statuses),
        "resets": statuses.count(RESET),
        "late": statuses.count(GAVE_UP),
    }
