"""Rounds: every server is started, measured on all workloads and ended before the next one starts, then all again.

The order turns by one place a round, so that no server always has the warmest machine. A server that cannot be
measured is noted and left out; results are saved after every server.
"""

from __future__ import annotations

import hashlib
import json
import logging
import multiprocessing
import resource
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, fields
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any, TypeVar

from tests.benchmarks.box import ROOT, Box, encode_reference, prepare_box
from tests.benchmarks.ceiling import measure_ceiling
from tests.benchmarks.connection import LoadError
from tests.benchmarks.machine import describe_machine, read_steal_s
from tests.benchmarks.peers import ALL_WORKLOADS, Peer, list_peers
from tests.benchmarks.servers import Memory, ServerError, running
from tests.benchmarks.texts import MIXED_MEAN_TOKENS, PROFILE_TOKENS, SHORT_TOKENS, Writer
from tests.benchmarks.workloads import Examiner, Texts, Times, Trial, write_texts

STATE = ROOT / ".bench"
MEAN_TOLERANCE = 0.1
OPEN_FILES = 16_384
TOLD_FIGURES = ("texts_per_s", "goodput_share", "p50_ms", "p99_ms", "p99_ratio", "min_cosine", "ready_s", "pss_mb")
logger = logging.getLogger(__name__)
T = TypeVar("T")


class Benchmark:
    """One run of the benchmark: everything prepared, then round after round."""

    def __init__(
        self,
        times: Times,
        *,
        servers: Sequence[str] = (),
        workloads: Sequence[str] = ALL_WORKLOADS,
        with_ceiling: bool = True,
        save_to: Path,
    ) -> None:
        """Install the peers, pack the Bento, write the texts and embed the reference; kept for the next time."""
        self._times = times
        self._workloads = workloads
        self._save_to = save_to
        _allow_many_connections()
        self._box: Box = _run_apart(prepare_box, STATE / "box")
        writer = Writer(Path(self._box.lunchbox) / "tokenizer.json")
        self._texts = write_texts(writer, times)
        self._examiner = Examiner(_make_reference(self._box, self._texts))
        peers = list_peers(self._box, STATE / "envs", servers)
        self._stations: list[Callable[[int], None]] = [partial(self._measure_peer, peer) for peer in peers]
        if with_ceiling:
            self._stations.append(self._measure_ceilings)
        self.results: dict[str, Any] = {
            "made_at": datetime.now(UTC).isoformat(timespec="seconds"),
            "times": asdict(times),
            "machine": describe_machine(),
            "texts": describe_texts(writer, self._texts),
            "servers": {peer.name: {"title": peer.title, "versions": dict(peer.versions)} for peer in peers},
            "skipped": {} if (reason := self._box.explain_missing_int8()) is None else {"ekiben-int8": reason},
            "runs": [],
            "ceilings": [],
        }

    def run(self, repetitions: int) -> dict[str, Any]:
        """Run the rounds and return the results."""
        begun = time.monotonic()
        self._save_to.parent.mkdir(parents=True, exist_ok=True)
        for repetition in range(repetitions):
            first = repetition % len(self._stations)
            for station in self._stations[first:] + self._stations[:first]:
                station(repetition)
                self.results["repetitions"] = repetition + 1
                self.results["minutes"] = (time.monotonic() - begun) / 60
                self._save_to.write_text(json.dumps(self.results, indent=1), encoding="utf-8")
        logger.info("%.1f minutes; results in %s", self.results["minutes"], self._save_to)
        return self.results

    def _measure_peer(self, peer: Peer, repetition: int) -> None:
        """Start one server, run its workloads, end it."""
        try:
            with running(peer, STATE / "logs" / f"{peer.name}-{repetition}.log") as server:
                trial = Trial(server, self._texts, self._examiner, self._times)
                self._record(peer, repetition, "start", trial.run_start)
                memory = [server.measure_memory()]
                for workload in peer.workloads:
                    if workload in self._workloads:
                        self._record(peer, repetition, workload, partial(trial.run, workload))
                        memory.append(server.measure_memory())
                self._record(peer, repetition, "memory", partial(summarize_memory, memory))
        except (ServerError, LoadError, OSError) as error:
            self.results["skipped"][peer.name] = str(error)
            logger.warning("%s is left out: %s", peer.name, error)

    def _record(self, peer: Peer, repetition: int, workload: str, run: Callable[[], dict[str, Any]]) -> None:
        steal_s, began = read_steal_s(), time.monotonic()
        figures = run()
        stolen = (read_steal_s() - steal_s) / (time.monotonic() - began)
        row = {"repetition": repetition, "server": peer.name, "workload": workload, "steal_share": stolen, **figures}
        self.results["runs"].append(row)
        line = "  ".join(f"{name} {figures[name]:.4g}" for name in TOLD_FIGURES if figures.get(name) is not None)
        logger.info("%d %-18s %-6s %s", repetition, peer.name, workload, line)

    def _measure_ceilings(self, repetition: int) -> None:
        chosen = {"W1": self._texts.short, "W2": self._texts.profiles, "W3": self._texts.mixed}
        texts = {name: some for name, some in chosen.items() if name in self._workloads}
        for precision in self._box.manifest.precisions if texts else ():
            rows = _run_apart(measure_ceiling, self._box.lunchbox, precision, texts, self._times.ceiling_s)
            self.results["ceilings"] += [{"repetition": repetition, **row} for row in rows]
            for row in rows:
                logger.info("%d ceiling %s", repetition, row)


def summarize_memory(readings: Sequence[Memory]) -> dict[str, float]:
    """Memory after the start and at its highest after any workload."""
    highest = {f.name: max(getattr(reading, f.name) for reading in readings) for f in fields(Memory)}
    return {**highest, **{f"idle_{name}": value for name, value in asdict(readings[0]).items()}}


def describe_texts(writer: Writer, texts: Texts) -> dict[str, dict[str, Any]]:
    """Measured tokens of the workloads' texts, and one of each.

    Raises:
        ValueError: when a mean is not what the workload promises.
    """
    described: dict[str, dict[str, Any]] = {}
    for workload, some, promised in (
        ("W1", texts.short, SHORT_TOKENS),
        ("W2", texts.profiles, PROFILE_TOKENS),
        ("W3", texts.mixed, MIXED_MEAN_TOKENS),
    ):
        tokens = writer.count_tokens(some)
        mean = fmean(tokens)
        if abs(mean / promised - 1) > MEAN_TOLERANCE:
            raise ValueError(f"the texts of {workload} have {mean:.1f} tokens on average, promised are {promised}")
        described[workload] = {"mean_tokens": mean, "min_tokens": min(tokens), "max_tokens": max(tokens)}
        described[workload]["example"] = some[0]
    return described


def _make_reference(box: Box, texts: Texts) -> dict[str, list[float]]:
    """Vectors of sentence-transformers for the texts whose answers are looked at."""
    chosen = texts.with_reference
    key = hashlib.sha256(json.dumps([box.model, chosen]).encode()).hexdigest()[:16]
    kept = STATE / f"reference-{key}.json"
    if not kept.is_file():
        kept.write_text(json.dumps(_run_apart(encode_reference, box.model, chosen)), encoding="utf-8")
    return dict(zip(chosen, json.loads(kept.read_text(encoding="utf-8")), strict=True))


def _run_apart(function: Callable[..., T], *arguments: Any) -> T:
    """Run in a process of its own, which takes its memory along when it ends."""
    with ProcessPoolExecutor(max_workers=1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def _allow_many_connections() -> None:
    """Let this process hold a connection for each request of the overload that waits."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = OPEN_FILES if hard == resource.RLIM_INFINITY else min(OPEN_FILES, hard)
    if soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
