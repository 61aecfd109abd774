"""The metrics: names, labels and sums in one process, and in the /metrics of a real BentoML server with two workers."""

from __future__ import annotations

import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import httpx
import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families

from bentos.manifest import Manifest
from bentos.metrics import ServeMetrics, open_metrics
from bentos.observer import BatchRecord, Version
from bentos.settings import ServeSettings
from tests.serving import Server, serve

ROUTES = ("/encode", "/health")
NAMES = {
    "ekiben_requests_total",
    "ekiben_request_seconds",
    "ekiben_texts_total",
    "ekiben_tokens_total",
    "ekiben_truncated_texts_total",
    "ekiben_batch_texts",
    "ekiben_batch_tokens",
    "ekiben_padding_tokens_total",
    "ekiben_queue_seconds",
    "ekiben_queue_texts",
    "ekiben_queue_tokens",
    "ekiben_queue_oldest_seconds",
    "ekiben_stage_seconds",
    "ekiben_shed_total",
    "ekiben_cache_hits_total",
    "ekiben_cache_misses_total",
    "ekiben_deduplicated_texts_total",
    "ekiben_lane_restarts_total",
    "ekiben_connections",
    "ekiben_connections_refused_total",
    "ekiben_answers_total",
    "ekiben_shadow_requests_total",
    "ekiben_shadow_cosine",
    "ekiben_shadow_overlap",
    "ekiben_model_info",
    "ekiben_model_live",
    "ekiben_swaps_total",
    "ekiben_version_refused",
    "ekiben_follow_info",
    "ekiben_follow_seen_timestamp_seconds",
    "ekiben_follow_failures",
    "ekiben_ready",
}
BATCH = BatchRecord("bulk", texts=3, tokens=20, padded_tokens=24, queue_s=[0.2, 0.1, 0.4], infer_s=0.05)


@pytest.fixture
def metrics() -> ServeMetrics:
    return ServeMetrics(ROUTES)


def value(metrics: ServeMetrics, name: str, **labels: str) -> float | None:
    return metrics.registry.get_sample_value(name, labels)


def exercise(metrics: ServeMetrics, manifest: Manifest) -> None:
    """Call everything once."""
    metrics.record_request("/encode", 200, 0.01)
    metrics.record_texts(3, 20, 1)
    metrics.record_batch(BATCH)
    metrics.record_stage("tokenize", 0.001)
    metrics.record_shed("queue")
    metrics.record_cache(1, 2)
    metrics.record_duplicates(1)
    metrics.record_lane_restart("bulk")
    metrics.record_refused_connection("headers")
    metrics.record_answer("ekiben:1-12345678", "space")
    metrics.record_shadow("compared")
    metrics.record_shadow_texts("ekiben:2-12345678", [0.9], [0.8])
    metrics.set_connections(3)
    metrics.set_queue("interactive", 1, 2, 0.5)
    metrics.set_versions([Version(manifest, "fp32", live=True)])
    metrics.record_swap("done")
    metrics.set_refused(["ekiben:9-12345678"])
    metrics.set_alias("champion")
    metrics.set_followed(1.0, 0)
    metrics.set_ready(True)


# --- one process


def test_the_names_are_these(metrics: ServeMetrics, manifest: Manifest) -> None:
    exercise(metrics, manifest)
    suffix = {"counter": "_total"}
    assert {family.name + suffix.get(family.type, "") for family in metrics.registry.collect()} == NAMES


def test_the_operations_page_explains_each() -> None:
    page = (Path(__file__).parents[2] / "docs" / "operations.md").read_text(encoding="utf-8")
    assert set(re.findall(r"`(ekiben_[a-z_]+)`", page)) == NAMES


def test_requests_count_by_route_and_code(metrics: ServeMetrics) -> None:
    for code in (200, 200, 503):
        metrics.record_request("/encode", code, 0.3)
    assert value(metrics, "ekiben_requests_total", route="/encode", code="200") == 2
    assert value(metrics, "ekiben_requests_total", route="/encode", code="503") == 1
    assert value(metrics, "ekiben_request_seconds_sum", route="/encode") == pytest.approx(0.9)
    assert value(metrics, "ekiben_request_seconds_bucket", route="/encode", le="0.2") == 0
    assert value(metrics, "ekiben_request_seconds_bucket", route="/encode", le="0.5") == 3


def test_unknown_routes_are_one_label(metrics: ServeMetrics) -> None:
    for number in range(50):
        metrics.record_request(f"/probe-{number}", 404, 0.001)
    assert value(metrics, "ekiben_requests_total", route="/unknown", code="404") == 50
    routes = {s.labels["route"] for f in metrics.registry.collect() for s in f.samples if "route" in s.labels}
    assert routes == {"/unknown"}


def test_a_batch_counts_texts_tokens_padding_and_waits(metrics: ServeMetrics) -> None:
    metrics.record_batch(BATCH)
    assert value(metrics, "ekiben_batch_texts_sum") == 3
    assert value(metrics, "ekiben_batch_tokens_sum") == 20
    assert value(metrics, "ekiben_padding_tokens_total") == 4
    assert value(metrics, "ekiben_queue_seconds_count", lane="bulk") == 3
    assert value(metrics, "ekiben_queue_seconds_sum", lane="bulk") == pytest.approx(0.7)
    assert value(metrics, "ekiben_stage_seconds_sum", stage="queue") == pytest.approx(0.4)
    assert value(metrics, "ekiben_stage_seconds_sum", stage="infer") == pytest.approx(0.05)


def test_texts_tokens_and_cache_add_up(metrics: ServeMetrics) -> None:
    metrics.record_texts(2, 30, 1)
    metrics.record_texts(1, 5, 0)
    metrics.record_cache(2, 0)
    metrics.record_cache(0, 3)
    metrics.record_duplicates(4)
    counts = {name: value(metrics, f"ekiben_{name}_total") for name in ("texts", "tokens", "truncated_texts")}
    assert counts == {"texts": 3, "tokens": 35, "truncated_texts": 1}
    cache = {name: value(metrics, f"ekiben_{name}_total") for name in ("cache_hits", "cache_misses")}
    assert cache == {"cache_hits": 2, "cache_misses": 3}
    assert value(metrics, "ekiben_deduplicated_texts_total") == 4


def test_gauges_show_the_last_value(metrics: ServeMetrics, manifest: Manifest) -> None:
    for texts in (5, 0):
        metrics.set_queue("bulk", texts, texts * 10, texts / 2)
    metrics.set_ready(True)
    metrics.set_ready(False)
    metrics.set_followed(5.0, 2)
    metrics.set_followed(7.0, 0)
    assert value(metrics, "ekiben_queue_texts", lane="bulk") == 0
    assert value(metrics, "ekiben_queue_oldest_seconds", lane="bulk") == 0
    assert value(metrics, "ekiben_ready") == 0
    assert value(metrics, "ekiben_follow_seen_timestamp_seconds") == 7.0
    assert value(metrics, "ekiben_follow_failures") == 0


def test_the_queues_of_all_versions_add_up(metrics: ServeMetrics) -> None:
    metrics.set_queue("bulk", 5, 50, 1.5, owner=1)
    metrics.set_queue("bulk", 2, 20, 2.5, owner=2)
    assert value(metrics, "ekiben_queue_texts", lane="bulk") == 7
    assert value(metrics, "ekiben_queue_tokens", lane="bulk") == 70
    assert value(metrics, "ekiben_queue_oldest_seconds", lane="bulk") == 2.5
    metrics.set_queue("bulk", 0, 0, 0.0, owner=2)
    assert value(metrics, "ekiben_queue_texts", lane="bulk") == 5
    assert value(metrics, "ekiben_queue_oldest_seconds", lane="bulk") == 1.5


def test_a_version_that_left_is_not_loaded_any_more(metrics: ServeMetrics, manifest: Manifest) -> None:
    old, new = (manifest.model_copy(update={"version": version}) for version in "12")

    def info(of: Manifest) -> float | None:
        labels = {"version": of.version, "run_id": of.run_id, "space_id": of.space_id, "precision": "fp32"}
        return value(metrics, "ekiben_model_info", model=of.tag, **labels)

    metrics.set_versions([Version(old, "fp32", live=True), Version(new, "fp32", live=False)])
    assert (info(old), info(new)) == (1, 1)
    assert [value(metrics, "ekiben_model_live", model=each.tag) for each in (old, new)] == [1, 0]
    metrics.set_versions([Version(new, "fp32", live=True)])
    assert (info(old), info(new)) == (0, 1)
    assert [value(metrics, "ekiben_model_live", model=each.tag) for each in (old, new)] == [0, 1]


def test_a_version_that_is_served_after_all_is_not_refused_any_more(metrics: ServeMetrics) -> None:
    metrics.set_refused(["ekiben:2-12345678"])
    assert value(metrics, "ekiben_version_refused", model="ekiben:2-12345678") == 1
    metrics.set_refused([])
    assert value(metrics, "ekiben_version_refused", model="ekiben:2-12345678") == 0


@pytest.mark.parametrize(("follow", "shown"), [("", {}), ("champion", {"champion": 1.0})], ids=["none", "champion"])
def test_the_alias_that_is_followed_is_told(follow: str, shown: dict[str, float]) -> None:
    metrics = open_metrics(ServeSettings(follow=follow), ROUTES)
    families = {family.name: family.samples for family in metrics.registry.collect()}
    assert {sample.labels["alias"]: sample.value for sample in families["ekiben_follow_info"]} == shown


def test_lanes_and_stages_begin_at_zero(metrics: ServeMetrics) -> None:
    for lane in ("interactive", "bulk"):
        assert value(metrics, "ekiben_queue_texts", lane=lane) == 0
        assert value(metrics, "ekiben_lane_restarts_total", lane=lane) == 0
    for stage in ("tokenize", "queue", "infer", "respond"):
        assert value(metrics, "ekiben_stage_seconds_count", stage=stage) == 0


def test_nothing_is_lost_between_threads(metrics: ServeMetrics) -> None:
    def work() -> None:
        for _ in range(500):
            metrics.record_request("/encode", 200, 0.01)
            metrics.record_batch(BATCH)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert value(metrics, "ekiben_requests_total", route="/encode", code="200") == 4000
    assert value(metrics, "ekiben_queue_seconds_count", lane="bulk") == 12000


# --- several processes, under BentoML

SERVICE = """
import os
import bentoml
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from bentos.metrics import open_metrics
from bentos.observer import BatchRecord
from bentos.settings import ServeSettings


class MetricService(bentoml.Service):
    def to_asgi(self, is_main=True):
        metrics = open_metrics(ServeSettings(), ["/count"])
        metrics.set_ready(True)
        metrics.set_queue("bulk", 5, 50, 1.5)

        async def count(request):
            metrics.record_request("/count", 200, 0.01)
            metrics.record_batch(BatchRecord("bulk", 2, 10, 12, [0.1, 0.2], 0.05))
            return PlainTextResponse(str(os.getpid()))

        self.mount_asgi_app(Starlette(routes=[Route("/count", count)]))
        app = super().to_asgi(is_main)

        async def wrapped(scope, receive, send):
            if scope["type"] == "http" and scope["path"] == "/metrics":
                metrics.forget_dead_workers()
            await app(scope, receive, send)

        return wrapped


@bentoml.service(service_class=MetricService, workers=2)
class Counting:
    pass
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("counting")
    (folder / "counting.py").write_text(SERVICE)
    return folder


@pytest.fixture(scope="module")
def counting(folder: Path) -> Iterator[Server]:
    with counting_server(folder) as server:
        yield server


def counting_server(folder: Path) -> AbstractContextManager[Server]:
    return serve("counting:Counting", folder / "home", folder, {"TMPDIR": str(folder)})


def counted(server: Server) -> float:
    return scrape(server, "ekiben_requests_total", route="/count", code="200") or 0


def count_requests(server: Server, times: int) -> set[int]:
    """Ask so often, over a connection each; return the workers that answered."""
    return {int(httpx.get(f"{server.url}/count", timeout=30).text) for _ in range(times)}


def scrape(server: Server, name: str, **labels: str) -> float | None:
    families = text_string_to_metric_families(httpx.get(f"{server.url}/metrics", timeout=30).text)
    samples = [s for family in families for s in family.samples if s.name == name]
    found = [sample.value for sample in samples if labels.items() <= sample.labels.items()]
    assert len(found) <= 1, f"{name} has several series: {samples}"
    return found[0] if found else None


def wait_until(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + 60
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.1)
    return condition()


def both_workers(server: Server) -> set[int]:
    """The workers, once both serve."""
    assert wait_until(lambda: scrape(server, "ekiben_queue_texts", lane="bulk") == 10)
    return {
        child.pid for child in psutil.Process(server.pid).children() if "_bentoml_impl" in " ".join(child.cmdline())
    }


def test_another_server_of_the_same_home_takes_nothing_away(counting: Server, folder: Path) -> None:
    both_workers(counting)
    count_requests(counting, 20)
    with counting_server(folder) as other:
        both_workers(other)
        count_requests(other, 5)
        count_requests(counting, 1)
        assert (counted(other), counted(counting)) == (5, 21)
    count_requests(counting, 1)
    assert counted(counting) == 22


def test_workers_add_up_and_a_killed_one_keeps_its_counts_but_not_its_gauges(counting: Server) -> None:
    workers = both_workers(counting)
    before = counted(counting)
    answered = count_requests(counting, 60)
    assert answered <= workers
    assert len(workers) == 2
    total = counted(counting)
    assert total == before + 60
    assert scrape(counting, "ekiben_batch_texts_sum") == 2 * total
    assert scrape(counting, "ekiben_queue_seconds_bucket", lane="bulk", le="+Inf") == 2 * total
    assert scrape(counting, "ekiben_queue_oldest_seconds", lane="bulk") == 1.5
    assert scrape(counting, "ekiben_ready") == 1
    killed = min(answered)
    os.kill(killed, signal.SIGKILL)
    assert wait_until(lambda: not psutil.pid_exists(killed))
    assert killed not in both_workers(counting)  # BentoML has replaced it, and its gauges count once
    count_requests(counting, 40)
    assert counted(counting) == total + 40
