"""The metrics of the line: their values, and that a scrape never waits for a server that is away."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest
from prometheus_client import CollectorRegistry

from flows.core.line_metrics import LineCollector, Watch
from flows.core.line_sources import LineState, PrefectSource, RegistrySource, RegistryState, SourceError
from tests.flows.line_servers import Line, busy_line, serve_line

EMPTY = RegistryState(None, [])


@pytest.fixture
def line() -> Line:
    return busy_line()


@pytest.fixture
def metrics(line: Line) -> Iterator[CollectorRegistry]:
    with serve_line(line) as url:
        registry = CollectorRegistry()
        registry.register(
            LineCollector(
                prefect=Watch(PrefectSource(f"{url}/api"), every_s=0),
                registry=Watch(RegistrySource(url, "ekiben"), every_s=0),
                wait_s=60,
            )
        )
        yield registry


def value(metrics: CollectorRegistry, name: str, **labels: str) -> float | None:
    return metrics.get_sample_value(f"ekiben_line_{name}", labels)


def test_runs_are_counted_by_state_and_a_state_without_runs_is_0(metrics: CollectorRegistry) -> None:
    nightly = {"flow": "pipeline", "deployment": "nightly"}
    assert value(metrics, "runs", state="scheduled", **nightly) == 1
    assert value(metrics, "runs", state="late", **nightly) == 0
    assert value(metrics, "ended_runs", state="completed", **nightly) == 1
    assert value(metrics, "ended_runs", state="refused", **nightly) == 0
    assert value(metrics, "ended_runs", state="crashed", flow="train", deployment="") == 1


def test_the_last_run_tells_its_state_its_duration_and_when_it_was(metrics: CollectorRegistry) -> None:
    nightly, train = ({"flow": "pipeline", "deployment": "nightly"}, {"flow": "train", "deployment": "train"})
    assert value(metrics, "last_run_state", state="completed", **nightly) == 1
    assert value(metrics, "last_run_state", state="failed", **nightly) == 0
    assert value(metrics, "last_run_seconds", **nightly) == 1234.5
    assert value(metrics, "last_run_timestamp_seconds", **nightly) == pytest.approx(time.time() - 3600, abs=60)
    assert value(metrics, "last_run_state", state="failed", **train) == 1
    assert value(metrics, "last_success_timestamp_seconds", **train) == pytest.approx(time.time() - 9 * 86400, abs=60)
    assert value(metrics, "last_success_timestamp_seconds", flow="release", deployment="release") is None


def test_the_longest_running_and_the_latest_run_count(line: Line, metrics: CollectorRegistry) -> None:
    train, nightly = ({"flow": "train", "deployment": "train"}, {"flow": "pipeline", "deployment": "nightly"})
    assert value(metrics, "running_since_timestamp_seconds", **train) == pytest.approx(time.time() - 500, abs=60)
    assert value(metrics, "running_since_timestamp_seconds", **nightly) is None
    assert value(metrics, "late_seconds", **nightly) == 0
    line.run(line.deployments[0]["id"], "SCHEDULED", ago_s=200, name="Late")
    line.run(line.deployments[0]["id"], "SCHEDULED", ago_s=900, name="Late")
    assert value(metrics, "late_seconds", **nightly) == pytest.approx(900, abs=60)


def test_pools_and_workers(line: Line, metrics: CollectorRegistry) -> None:
    assert value(metrics, "pool_status", pool="local", status="ready") == 1
    assert value(metrics, "pool_status", pool="kubernetes", status="ready") == 0
    assert value(metrics, "pool_deployments", pool="local") == 2
    assert value(metrics, "workers", pool="local", status="online") == 1
    assert value(metrics, "worker_heartbeat_timestamp_seconds", pool="local") == pytest.approx(time.time(), abs=60)
    assert value(metrics, "worker_heartbeat_timestamp_seconds", pool="kubernetes") is None
    line.pools.clear()  # deployments may name a pool that is gone
    assert value(metrics, "pool_deployments", pool="local") == 2
    assert value(metrics, "pool_status", pool="local", status="not_ready") == 1


def test_the_champion_and_the_history(metrics: CollectorRegistry) -> None:
    labels = {"model": "ekiben:3-0123abcd", "version": "3", "space_id": "cafe0123cafe0123"}
    assert value(metrics, "champion_info", run_id="0123abcd".ljust(32, "0"), **labels) == 1
    assert value(metrics, "champion_since_timestamp_seconds") == pytest.approx(time.time() - 7000, abs=60)
    counts = {kind: value(metrics, "acts_total", kind=kind) for kind in ("release", "refusal", "rollback")}
    assert counts == {"release": 2, "refusal": 1, "rollback": 0}
    assert value(metrics, "last_act_timestamp_seconds", kind="refusal") == pytest.approx(time.time() - 50, abs=60)


def test_one_server_that_is_broken_leaves_the_other_one_s_metrics_alone(line: Line, metrics: CollectorRegistry) -> None:
    line.deployments[0].pop("schedules")  # Prefect's answer is not understood any more
    assert value(metrics, "up", source="prefect") == 0
    assert value(metrics, "up", source="mlflow") == 1
    assert value(metrics, "acts_total", kind="release") == 2


# --- the watch


class Scripted:
    """A source that answers what it is told to, when it is told to."""

    name = "scripted"

    def __init__(self, *answers: RegistryState | Exception) -> None:
        self.answers = list(answers)
        self.asked = 0
        self.go = threading.Event()
        self.go.set()

    def ask(self) -> RegistryState:
        self.asked += 1
        self.go.wait(60)
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, Exception):
            raise answer
        return answer


def look(watch: Watch[RegistryState], wait_s: float = 60.0) -> None:
    watch.refresh()
    watch.wait(time.monotonic() + wait_s)


def test_a_source_is_not_asked_again_at_once() -> None:
    watch = Watch(source := Scripted(EMPTY), every_s=3600)
    for _ in range(5):
        look(watch)
    assert (source.asked, watch.up, watch.answer) == (1, True, EMPTY)


def test_a_short_trouble_keeps_what_was_said_and_tells_that_the_source_is_down() -> None:
    watch = Watch(Scripted(EMPTY, SourceError("away")), every_s=0)
    look(watch)
    look(watch)
    assert (watch.up, watch.answer) == (False, EMPTY)


def test_what_is_too_old_is_not_told() -> None:
    watch = Watch(Scripted(EMPTY), every_s=3600, keep_s=0)
    look(watch)
    time.sleep(0.01)
    assert watch.answer is None


def test_an_error_of_our_own_shows_and_ends_nothing() -> None:
    watch = Watch(Scripted(ZeroDivisionError("ours"), EMPTY), every_s=0)
    look(watch)
    assert not watch.up
    look(watch)
    assert watch.up


def test_a_source_comes_back() -> None:
    watch = Watch(Scripted(SourceError("away"), EMPTY), every_s=0)
    look(watch)
    assert (watch.up, watch.answer) == (False, None)
    look(watch)
    assert (watch.up, watch.answer) == (True, EMPTY)


def test_a_server_that_hangs_blocks_no_scrape_and_is_asked_once_only(monkeypatch: pytest.MonkeyPatch) -> None:
    source = Scripted(EMPTY)
    source.go.clear()
    watch = Watch(source, every_s=0)
    collector = LineCollector(registry=watch, wait_s=0.01)
    for _ in range(20):
        assert {metric.name for metric in collector.collect()} == {
            "ekiben_line_up",
            "ekiben_line_ask_seconds",
            "ekiben_line_seen_timestamp_seconds",
        }
    assert source.asked == 1
    source.go.set()
    watch.wait(time.monotonic() + 60)
    assert watch.up
    source.go.clear()
    watch.refresh()
    assert watch.up  # it may take a moment
    monkeypatch.setattr("flows.core.line_metrics.HANGS_S", 0.0)
    time.sleep(0.01)
    assert not watch.up
    source.go.set()


def test_the_line_is_told_though_nothing_is_deployed() -> None:
    source = PrefectSource("http://unused/api")
    source.ask = lambda: LineState([], [], {}, {}, [])  # type: ignore[method-assign]
    names = {metric.name for metric in LineCollector(prefect=Watch(source), wait_s=60).collect()}
    assert "ekiben_line_runs" in names
