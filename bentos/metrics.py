"""Prometheus metrics with fixed names, units and labels, in the /metrics that BentoML answers.

They are prometheus_client's own objects in its mode for several processes: every worker writes its values into mapped
files of one folder, and whichever worker is asked adds up the files of all. The files of a worker that died count on
(what it counted has happened), except its gauges, which `forget_dead_workers` takes away.

BentoML gives all servers of one BENTOML_HOME the same folder and empties it whenever one starts: a release, which
starts the new Bento to test it, would take the running server's metrics away. So each server gets a folder of its own.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Generic, TypeVar

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.metrics import MetricWrapperBase

from bentos.envelope import UNKNOWN_PATH
from bentos.observer import BatchRecord, Observer, Version
from bentos.settings import ServeSettings, use_prometheus_folder
from bentos.siblings import open_server_folder, started

LANES = ("interactive", "bulk")
SWAP_RESULTS = ("done", "refused", "incomplete", "busy")
STAGES = ("tokenize", "queue", "infer", "respond")
REQUEST_BUCKETS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60)  # seconds
STAGE_BUCKETS = (0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30)  # seconds
TEXTS_BUCKETS = (1, 2, 3, 4, 6, 8, 16, 32, 64)
TOKENS_BUCKETS = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)  # without padding
COSINE_BUCKETS = (0, 0.5, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.999, 0.9999, 1)
OVERLAP_BUCKETS = (0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1)
FOLDER_PREFIX = "ekiben-metrics-"

M = TypeVar("M", bound=MetricWrapperBase)


class _Children(dict[tuple[str, ...], M], Generic[M]):
    """The metric of each combination of labels, looked up without the locks and checks of `labels()`."""

    def __init__(self, metric: M, *start: tuple[str, ...]) -> None:
        super().__init__()
        self._metric = metric
        for labels in start:  # a series that begins at 0 shows its first rise
            self[labels]

    def __missing__(self, labels: tuple[str, ...]) -> M:
        child = self[labels] = self._metric.labels(*labels)
        return child


class ServeMetrics(Observer):
    """All metrics of the server. Methods may be called from any thread, and take microseconds."""

    def __init__(self, routes: Collection[str], folder: Path | None = None) -> None:
        """Create the metrics of this process; `open_metrics` does it in the right folder.

        Args:
            routes: the paths that may be labels; all others count as `/unknown`.
            folder: where prometheus_client keeps the files of all workers; None: it keeps the values to itself.
        """
        self._routes = frozenset(routes)
        self._folder = folder
        self.registry = CollectorRegistry()
        lanes = [(lane,) for lane in LANES]

        def count(name: str, meaning: str, *labels: str) -> Counter:
            return Counter(f"ekiben_{name}_total", meaning, labels, registry=self.registry)

        def measure(name: str, meaning: str, buckets: Collection[float], *labels: str) -> Histogram:
            return Histogram(f"ekiben_{name}", meaning, labels, registry=self.registry, buckets=tuple(buckets))

        def add_up(name: str, meaning: str, *labels: str) -> Gauge:
            return Gauge(f"ekiben_{name}", meaning, labels, registry=self.registry, multiprocess_mode="livesum")

        self._requests = _Children(count("requests", "Requests answered, by route and status.", "route", "code"))
        self._request_s = _Children(
            measure(
                "request_seconds", "From the end of the headers to the end of the answer.", REQUEST_BUCKETS, "route"
            )
        )
        self._answers = _Children(
            count("answers", "Answers of the doors, by version and space of the vectors.", "model", "space")
        )
        self._texts = count("texts", "Texts of the requests that were answered.")
        self._tokens = count("tokens", "Tokens of those texts, before any was cut.")
        self._truncated = count("truncated_texts", "Texts that were longer than the model takes, and were cut.")
        self._batch_texts = measure("batch_texts", "Texts that were computed together.", TEXTS_BUCKETS)
        self._batch_tokens = measure(
            "batch_tokens", "Tokens that were computed together, without padding.", TOKENS_BUCKETS
        )
        self._padding = count(
            "padding_tokens", "Tokens that were computed only to make the texts of a batch equally long."
        )
        self._queue_s = _Children(
            measure("queue_seconds", "How long each text waited to be computed.", STAGE_BUCKETS, "lane"), *lanes
        )
        self._queue_texts = _Children(add_up("queue_texts", "Texts that wait now.", "lane"), *lanes)
        self._queue_tokens = _Children(add_up("queue_tokens", "Tokens of the texts that wait now.", "lane"), *lanes)
        self._queue_oldest = _Children(
            Gauge(
                "ekiben_queue_oldest_seconds",
                "How long the text that is next has waited.",
                ["lane"],
                registry=self.registry,
                multiprocess_mode="livemax",
            ),
            *lanes,
        )
        self._queues: dict[str, dict[int, tuple[int, int, float]]] = {lane: {} for lane in LANES}
        self._queues_lock = threading.Lock()
        self._stage_s = _Children(
            measure(
                "stage_seconds", "Time spent: queue (longest wait in a batch), infer (a batch).", STAGE_BUCKETS, "stage"
            ),
            *((stage,) for stage in STAGES),
        )
        self._shed = _Children(count("shed", "Requests refused or given up for lack of time or room.", "reason"))
        self._hits = count("cache_hits", "Texts whose vector was in the cache.")
        self._misses = count("cache_misses", "Texts whose vector was not in the cache.")
        self._deduplicated = count("deduplicated_texts", "Texts that were being computed already, for another request.")
        self._restarts = _Children(count("lane_restarts", "Threads of a lane that died or hung.", "lane"), *lanes)
        self._refused = _Children(
            count("connections_refused", "Connections closed for what the client did, or did not do.", "reason")
        )
        self._connections = add_up("connections", "Connections that are open now.")
        self._shadows = _Children(count("shadow_requests", "Requests that were shown to the shadow.", "outcome"))
        self._shadow_cosine = _Children(
            measure("shadow_cosine", "Of a text's vector and the shadow's, in one space.", COSINE_BUCKETS, "model")
        )
        self._shadow_overlap = _Children(
            measure("shadow_overlap", "Share of a text's 10 nearest that both versions find.", OVERLAP_BUCKETS, "model")
        )
        self._model = Gauge(
            "ekiben_model_info",
            "1 for each version that is loaded, 0 for one that has left.",
            ["model", "version", "run_id", "space_id", "precision"],
            registry=self.registry,
            multiprocess_mode="livemax",
        )
        self._live = add_up("model_live", "Workers in which this version is the live one.", "model")
        self._versions: dict[str, Version] = {}
        self._swaps = _Children(
            count("swaps", "Versions that were to be brought to all workers.", "result"),
            *((result,) for result in SWAP_RESULTS),
        )
        self._version_refused = Gauge(
            "ekiben_version_refused",
            "1 for each version that failed its checks and is not served for that, 0 once it is.",
            ["model"],
            registry=self.registry,
            multiprocess_mode="livemax",
        )
        self._refused_tags: set[str] = set()
        self._follow = Gauge(
            "ekiben_follow_info",
            "1 for the alias that is followed; nothing when none is.",
            ["alias"],
            registry=self.registry,
            multiprocess_mode="livemax",
        )
        self._follow_seen = Gauge(
            "ekiben_follow_seen_timestamp_seconds",
            "When the alias that is followed was last read, in seconds since 1970; 0 before, or when none is followed.",
            registry=self.registry,
            multiprocess_mode="livemax",
        )
        self._follow_failures = Gauge(
            "ekiben_follow_failures",
            "How often in a row the alias that is followed could not be read, or its version not be brought.",
            registry=self.registry,
            multiprocess_mode="livemax",
        )
        self._ready = Gauge(
            "ekiben_ready",
            "1 while every worker's vectors are right, as the last check found.",
            registry=self.registry,
            multiprocess_mode="livemin",
        )

    def record_request(self, route: str, code: int, seconds: float) -> None:
        """Take note of a request that was answered, with `seconds` since the end of its headers."""
        if route not in self._routes:
            route = UNKNOWN_PATH
        self._requests[route, str(code)].inc()
        self._request_s[(route,)].observe(seconds)

    def record_answer(self, model: str, space: str) -> None:
        """Take note of an answer: the tag of the version that gave it, and the space of its vectors."""
        self._answers[model, space].inc()

    def record_shadow(self, outcome: str) -> None:
        """Take note of a request that was shown to the shadow: `compared`, `dropped` or `failed`."""
        self._shadows[(outcome,)].inc()

    def record_shadow_texts(self, model: str, cosines: Sequence[float], overlaps: Sequence[float]) -> None:
        """Take note of how far a shadow's vectors are from the live version's; `model` is the shadow's tag."""
        for values, metric in ((cosines, self._shadow_cosine), (overlaps, self._shadow_overlap)):
            for value in values:
                metric[(model,)].observe(value)

    def record_texts(self, texts: int, tokens: int, truncated: int) -> None:
        """Take note of what a request that was answered held."""
        self._texts.inc(texts)
        self._tokens.inc(tokens)
        if truncated:
            self._truncated.inc(truncated)

    def record_batch(self, record: BatchRecord) -> None:
        """Take note of a batch."""
        self._batch_texts.observe(record.texts)
        self._batch_tokens.observe(record.tokens)
        if padding := record.padded_tokens - record.tokens:
            self._padding.inc(padding)
        queue_s = self._queue_s[(record.lane,)]
        for seconds in record.queue_s:
            queue_s.observe(seconds)
        self._stage_s[("queue",)].observe(max(record.queue_s, default=0.0))
        self._stage_s[("infer",)].observe(record.infer_s)

    def record_stage(self, stage: str, seconds: float) -> None:
        """Take note of time spent: `tokenize` or `respond`; `queue` and `infer` come with the batches."""
        self._stage_s[(stage,)].observe(seconds)

    def record_shed(self, reason: str) -> None:
        """Take note of a request that was refused or given up for lack of time or room."""
        self._shed[(reason,)].inc()

    def record_cache(self, hits: int, misses: int) -> None:
        """Take note of texts looked up in the cache."""
        if hits:
            self._hits.inc(hits)
        if misses:
            self._misses.inc(misses)

    def record_duplicates(self, texts: int) -> None:
        """Take note of texts that were being computed already."""
        self._deduplicated.inc(texts)

    def record_lane_restart(self, lane: str) -> None:
        """Take note of a lane's thread that died or hung, and was replaced."""
        self._restarts[(lane,)].inc()

    def record_refused_connection(self, reason: str) -> None:
        """Take note of a connection that was closed for what its client did."""
        self._refused[(reason,)].inc()

    def set_connections(self, connections: int) -> None:
        """Take note of how many connections are open now."""
        self._connections.set(connections)

    def set_queue(self, lane: str, texts: int, tokens: int, oldest_s: float, owner: int = 0) -> None:
        """Take note of what waits now in the lane of one version; what is shown is all versions together.

        Called from time to time, so that a queue that stands still is seen as well.
        """
        with self._queues_lock:
            queues = self._queues[lane]
            queues[owner] = (texts, tokens, oldest_s)
            if not texts:
                del queues[owner]
            self._queue_texts[(lane,)].set(sum(queue[0] for queue in queues.values()))
            self._queue_tokens[(lane,)].set(sum(queue[1] for queue in queues.values()))
            self._queue_oldest[(lane,)].set(max((queue[2] for queue in queues.values()), default=0.0))

    def set_versions(self, versions: Sequence[Version]) -> None:
        """Take note of all versions that are loaded; those of the last call that are missing have left."""
        now = {version.manifest.tag: version for version in versions}
        for tag, version in {**self._versions, **now}.items():
            if self._versions.get(tag) == now.get(tag):
                continue
            manifest = version.manifest
            labels = (tag, manifest.version, manifest.run_id, manifest.space_id, version.precision)
            self._model.labels(*labels).set(tag in now)
            self._live.labels(tag).set(tag in now and version.live)
        self._versions = now

    def record_swap(self, result: str) -> None:
        """Take note of a version that was brought to all workers (`done`), or not: `refused`, `incomplete`, `busy`."""
        self._swaps[(result,)].inc()

    def set_refused(self, tags: Collection[str]) -> None:
        """Take note of the versions that failed their checks and are not served for that."""
        for tag in self._refused_tags | set(tags):
            self._version_refused.labels(tag).set(tag in tags)
        self._refused_tags |= set(tags)

    def set_alias(self, alias: str) -> None:
        """Take note of the alias that is followed."""
        self._follow.labels(alias).set(1)

    def set_followed(self, seen_at: float | None, failures: int) -> None:
        """Take note of when the alias was last read, in seconds since 1970, and how often in a row it was not since."""
        self._follow_seen.set(seen_at or 0.0)
        self._follow_failures.set(failures)

    def set_ready(self, ready: bool) -> None:
        """Take note of what the readiness check found."""
        self._ready.set(ready)

    def forget_dead_workers(self) -> None:
        """Take away the gauges of workers that have ended; to be called before /metrics is answered."""
        if self._folder is None or sys.platform != "linux":
            return
        for path in self._folder.glob("gauge_live*_*.db"):
            if started(path.stem.rpartition("_")[2]) is None:
                path.unlink(missing_ok=True)


def open_metrics(settings: ServeSettings, routes: Collection[str]) -> ServeMetrics:
    """Create the metrics of this worker, in a folder that only this server's workers share."""
    folder = settings.prometheus_folder
    if folder is not None and (own := open_server_folder(FOLDER_PREFIX)) is not None:
        use_prometheus_folder(own)
        folder = own
    metrics = ServeMetrics(routes, folder)
    if settings.follow:
        metrics.set_alias(settings.follow)
    return metrics
