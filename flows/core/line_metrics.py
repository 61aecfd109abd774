"""The metrics of the training line: what the sources say, kept for a moment, in Prometheus' terms. Core layer.

A scrape never waits for a server that hangs: each source is asked in a thread of its own, a scrape waits for it a
moment only, and then tells what the source said last. What is older than `KEEP_S` is not told any more.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any, Generic, Protocol, TypeVar

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from flows.core.line_sources import ENDED, LATE, OPEN, REFUSED, Key, LineState, Pool, RegistryState, Run, read_stamp
from flows.errors import EkibenError, one_line

EVERY_S = 15.0  # a source is asked at most so often
WAIT_S = 3.0  # a scrape waits at most so long for all of them
KEEP_S = 300.0  # a server that is started anew must not look like a line without runs
HANGS_S = 30.0  # an answer that takes longer counts as none
OPEN_STATES = (*OPEN, LATE)
ENDED_STATES = (*ENDED, REFUSED)
ACTS = ("release", "challenger", "rollback", "refusal")
POOL_STATES = ("ready", "not_ready", "paused")
RUN_LABELS = ("flow", "deployment")
logger = logging.getLogger(__name__)

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


class Source(Protocol[T_co]):
    """A server that knows something about the line."""

    name: str

    def ask(self) -> T_co:
        """Look at it; raises EkibenError when that is not possible."""


class Watch(Generic[T]):
    """One source: asked in the background, and what it said last."""

    def __init__(self, source: Source[T], *, every_s: float = EVERY_S, keep_s: float = KEEP_S) -> None:
        """Prepare; nothing is asked before the first `refresh`.

        Args:
            source: who is asked.
            every_s: it is asked at most so often.
            keep_s: what it said is told for so long.
        """
        self.name = source.name
        self.took_s = 0.0  # the last look
        self.seen_at = 0.0  # the last good look, in seconds since 1970
        self._source = source
        self._every_s = every_s
        self._keep_s = keep_s
        self._lock = threading.Lock()
        self._asked_at = float("-inf")  # by the clock that never jumps, like the next one
        self._answered_at = float("-inf")
        self._answer: T | None = None
        self._problem: str | None = "not asked yet"
        self._done = threading.Event()
        self._done.set()

    @property
    def up(self) -> bool:
        """Whether the last look was a good one, and none has hung since."""
        hangs = not self._done.is_set() and time.monotonic() - self._asked_at > HANGS_S
        return self._problem is None and not hangs

    @property
    def answer(self) -> T | None:
        """What the source said last, unless that is too old."""
        return self._answer if time.monotonic() - self._answered_at <= self._keep_s else None

    def refresh(self) -> None:
        """See that the source is asked, if it is time; returns at once."""
        with self._lock:
            if self._done.is_set() and time.monotonic() - self._asked_at >= self._every_s:
                self._asked_at = time.monotonic()
                self._done.clear()
                threading.Thread(target=self._look, name=f"ask-{self.name}", daemon=True).start()

    def wait(self, until: float) -> None:
        """Wait for the look that is under way, at most until that moment of `time.monotonic`."""
        self._done.wait(max(0.0, until - time.monotonic()))

    def _look(self) -> None:
        problem: str | None = "the look was broken off"
        try:
            self._answer = self._source.ask()
            self._answered_at, self.seen_at = time.monotonic(), time.time()
            problem = None
        except EkibenError as error:
            problem = one_line(error)
        except Exception as error:  # a fault of ours must show as well, and not end the exporter
            problem = f"{type(error).__name__} {one_line(error)}"
        finally:
            self.took_s = time.monotonic() - self._asked_at
            if (problem is None) != (self._problem is None) or (problem and self._answered_at == float("-inf")):
                logger.log(logging.WARNING if problem else logging.INFO, "%s: %s", self.name, problem or "answers")
            self._problem = problem
            self._done.set()


class LineCollector(Collector):
    """Gives the metrics at each scrape."""

    def __init__(
        self,
        *,
        prefect: Watch[LineState] | None = None,
        registry: Watch[RegistryState] | None = None,
        wait_s: float = WAIT_S,
    ) -> None:
        """Prepare; a source that is None is left out.

        Args:
            prefect: the server that runs the flows.
            registry: the one that holds the versions.
            wait_s: a scrape waits at most so long.
        """
        self._prefect = prefect
        self._registry = registry
        self._wait_s = wait_s

    def describe(self) -> list[Metric]:
        """Nothing: prometheus_client would ask for the metrics when it is told about them."""
        return []

    def collect(self) -> Iterator[Metric]:
        """All metrics, now."""
        watches: list[Watch[Any]] = [watch for watch in (self._prefect, self._registry) if watch is not None]
        for watch in watches:
            watch.refresh()
        until = time.monotonic() + self._wait_s
        for watch in watches:
            watch.wait(until)
        yield from _describe_watches(watches)
        if self._prefect is not None and (line := self._prefect.answer) is not None:
            yield from describe_line(line)
        if self._registry is not None and (versions := self._registry.answer) is not None:
            yield from describe_registry(versions)


def _describe_watches(watches: Sequence[Watch[Any]]) -> Iterator[Metric]:
    up = _gauge("up", "1 while the source answers: the Prefect server, the MLflow registry.", "source")
    took = _gauge("ask_seconds", "How long the last look at the source took.", "source")
    seen = _gauge(
        "seen_timestamp_seconds", "When the source last answered, in seconds since 1970; 0: not yet.", "source"
    )
    for watch in watches:
        up.add_metric([watch.name], watch.up)
        took.add_metric([watch.name], watch.took_s)
        seen.add_metric([watch.name], watch.seen_at)
    yield from (up, took, seen)


def describe_line(line: LineState) -> Iterator[Metric]:
    """The metrics of what Prefect knows."""
    schedules = _gauge(
        "deployment_schedules",
        "Active schedules of a deployment; 0 also while it is paused.",
        *RUN_LABELS,
        "pool",
    )
    created = _gauge(
        "deployment_created_timestamp_seconds", "When the deployment was made, in seconds since 1970.", *RUN_LABELS
    )
    for deployment in line.deployments:
        labels = _labels(deployment.key)
        schedules.add_metric([*labels, deployment.pool], deployment.schedules)
        created.add_metric(labels, deployment.created_at)
    yield from (schedules, created)
    keys = sorted({deployment.key for deployment in line.deployments} | {run.key for run in line.runs})
    yield _count("runs", "Runs that have not ended, by state.", OPEN_STATES, keys, line.runs)
    yield _count("ended_runs", "Runs that have ended within the last day, by state.", ENDED_STATES, keys, line.runs)
    yield from _describe_open(keys, line.runs)
    yield from _describe_last(line)
    yield from _describe_pools(line)


def _count(name: str, meaning: str, states: Sequence[str], keys: Sequence[Key], runs: Sequence[Run]) -> Metric:
    family = _gauge(name, meaning, *RUN_LABELS, "state")
    counts = {(key, state): 0 for key in keys for state in states}
    for run in runs:
        if run.state in states:
            counts[run.key, run.state] += 1
    for (key, state), count in counts.items():
        family.add_metric([*_labels(key), state], count)
    return family


def _describe_open(keys: Sequence[Key], runs: Sequence[Run]) -> Iterator[Metric]:
    late = _gauge(
        "late_seconds", "How far the run that is most behind its schedule is behind; 0: none is.", *RUN_LABELS
    )
    since = _gauge(
        "running_since_timestamp_seconds",
        "When the run that has been running longest began, in seconds since 1970; nothing when none runs.",
        *RUN_LABELS,
    )
    now = time.time()
    for key in keys:
        own = [run for run in runs if run.key == key]
        behind = [now - run.due_at for run in own if run.state == LATE and run.due_at is not None]
        late.add_metric(_labels(key), max(behind, default=0.0))
        begun = [run.started_at for run in own if run.state == "running" and run.started_at is not None]
        if begun:
            since.add_metric(_labels(key), min(begun))
    yield from (late, since)


def _describe_last(line: LineState) -> Iterator[Metric]:
    state = _gauge(
        "last_run_state",
        "1 for the state in which the last run ended, 0 for the others; refused: a gate of the release said no.",
        *RUN_LABELS,
        "state",
    )
    seconds = _gauge("last_run_seconds", "How long the run that ended last has run.", *RUN_LABELS)
    ended = _gauge("last_run_timestamp_seconds", "When the last run ended, in seconds since 1970.", *RUN_LABELS)
    success = _gauge(
        "last_success_timestamp_seconds", "When the last run that completed ended, in seconds since 1970.", *RUN_LABELS
    )
    for key, run in sorted(line.last_ended.items()):
        for each in ENDED_STATES:
            state.add_metric([*_labels(key), each], each == run.state)
        seconds.add_metric(_labels(key), run.seconds)
        ended.add_metric(_labels(key), run.ended_at or 0.0)
    for key, run in sorted(line.last_success.items()):
        success.add_metric(_labels(key), run.ended_at or 0.0)
    yield from (state, seconds, ended, success)


def _describe_pools(line: LineState) -> Iterator[Metric]:
    status = _gauge("pool_status", "1 for the status of the work pool, 0 for the others.", "pool", "status")
    deployments = _gauge("pool_deployments", "Deployments that run in the work pool.", "pool")
    workers = _gauge(
        "workers", "Workers of the pool; those that have ended stay offline for a while.", "pool", "status"
    )
    beat = _gauge(
        "worker_heartbeat_timestamp_seconds",
        "When the pool last heard from one of its workers, in seconds since 1970; nothing before the first.",
        "pool",
    )
    needed = [deployment.pool for deployment in line.deployments if deployment.pool]
    pools = {pool.name: pool for pool in line.pools}
    for name in sorted({*needed, *pools}):
        pool = pools.get(name) or Pool(name, "not_ready", {}, None)
        deployments.add_metric([name], needed.count(name))
        for each in POOL_STATES:
            status.add_metric([name, each], each == pool.status)
        for each, count in pool.workers.items():
            workers.add_metric([name, each], count)
        if pool.heartbeat_at is not None:
            beat.add_metric([name], pool.heartbeat_at)
    yield from (status, deployments, workers, beat)


def describe_registry(registry: RegistryState) -> Iterator[Metric]:
    """The metrics of what the registry knows."""
    info = _gauge("champion_info", "1 for the version that is in use.", "model", "version", "run_id", "space_id")
    since = _gauge(
        "champion_since_timestamp_seconds",
        "When the champion became it, in seconds since 1970; nothing when its alias was moved by hand.",
    )
    if (champion := registry.champion) is not None:
        info.add_metric([champion.model, champion.version, champion.run_id, champion.space_id], 1)
        if champion.since is not None:
            since.add_metric([], champion.since)
    acts = CounterMetricFamily(
        "ekiben_line_acts", "Entries of the history: what was released, refused, rolled back.", labels=["kind"]
    )
    last = _gauge("last_act_timestamp_seconds", "When the newest entry of the kind was made.", "kind")
    for kind in ACTS:
        times = [read_stamp(act.at) for act in registry.acts if act.kind == kind]
        acts.add_metric([kind], len(times))
        if times:
            last.add_metric([kind], max(times))
    yield from (info, since, acts, last)


def _gauge(name: str, meaning: str, *labels: str) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"ekiben_line_{name}", meaning, labels=labels)


def _labels(key: Key) -> list[str]:
    return [key.flow, key.deployment]
