"""The exporter as a process: what it answers Prometheus, what it costs, how it begins and ends."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.flows.line_servers import act, busy_line, serve_line
from tests.processes import find_free_port

PROMTOOL = shutil.which("promtool")
MAX_RSS_MB = 100.0
START_S = 120.0


@dataclass
class Exporter:
    """A running exporter."""

    url: str
    process: subprocess.Popen[str]

    def scrape(self) -> str:
        answer = httpx.get(f"{self.url}/metrics", timeout=30)
        answer.raise_for_status()
        return answer.text

    def value(self, name: str, **labels: str) -> float | None:
        samples = [s for f in text_string_to_metric_families(self.scrape()) for s in f.samples]
        found = [s.value for s in samples if s.name == f"ekiben_line_{name}" and labels.items() <= s.labels.items()]
        assert len(found) <= 1, found
        return found[0] if found else None

    def wait_up(self, *sources: str) -> None:
        """Wait until a look at each source was a good one: a scrape waits 3 s for it, and then answers without."""
        deadline = time.monotonic() + START_S
        while any(self.value("up", source=name) != 1 for name in sources):
            assert time.monotonic() < deadline, self.scrape()
            time.sleep(0.5)


@contextlib.contextmanager
def run_exporter(**environment: str) -> Iterator[Exporter]:
    """Run `python -m flows.exporter` on a free port until the block ends."""
    command = [sys.executable, "-m", "flows.exporter", "--host", "127.0.0.1", "--port", "0"]
    process = subprocess.Popen(command, env=os.environ | environment, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        first = process.stderr.readline()
        found = re.search(r"(http://127\.0\.0\.1:\d+)/metrics", first)
        assert found, first
        yield Exporter(found[1], process)
    finally:
        process.kill()
        process.wait()
        if process.stderr is not None:
            process.stderr.close()


def test_it_tells_what_both_servers_know() -> None:
    line = busy_line()
    line.user = "ana:geheim"
    with serve_line(line) as url:
        user = {"MLFLOW_TRACKING_USERNAME": "ana", "MLFLOW_TRACKING_PASSWORD": "geheim"}
        both = {"PREFECT_API_URL": f"{url}/api", "MLFLOW_TRACKING_URI": url, "PREFECT_API_AUTH_STRING": "ana:geheim"}
        with run_exporter(**both, **user) as exporter:
            exporter.wait_up("prefect", "mlflow")
            assert exporter.value("last_run_seconds", flow="pipeline") == 1234.5
            assert exporter.value("champion_info", model="ekiben:3-0123abcd") == 1
            asked = len(line.asked)
            exporter.scrape()
            assert len(line.asked) == asked  # it was only just asked
            text = exporter.scrape()
            assert "geheim" not in text
            assert psutil.Process(exporter.process.pid).memory_info().rss / 2**20 < MAX_RSS_MB
    if PROMTOOL is None:
        pytest.skip("the names were not checked: no promtool here (Debian: apt-get install prometheus)")
    checked = subprocess.run([PROMTOOL, "check", "metrics"], input=text, capture_output=True, text=True, check=False)
    assert (checked.returncode, checked.stdout + checked.stderr) == (0, "")


def test_the_page_explains_each_metric_and_no_other() -> None:
    line = busy_line()
    with serve_line(line) as url, run_exporter(PREFECT_API_URL=f"{url}/api", MLFLOW_TRACKING_URI=url) as exporter:
        exporter.wait_up("prefect", "mlflow")
        families = list(text_string_to_metric_families(exporter.scrape()))
    suffix = {"counter": "_total"}
    page = (Path(__file__).parents[2] / "docs" / "monitoring.md").read_text(encoding="utf-8")
    told = {row[1]: row[2] for row in re.finditer(r"^\| `(ekiben_line_[a-z_]+)` \|([^|]*)\|", page, re.MULTILINE)}
    assert set(told) == {family.name + suffix.get(family.type, "") for family in families}
    for family in families:
        labels = {name for sample in family.samples for name in sample.labels}
        assert set(re.findall(r"`([a-z_]+)`", told[family.name + suffix.get(family.type, "")])) == labels, family.name


def test_a_dead_server_blocks_no_scrape_and_shows() -> None:
    line = busy_line()
    line.sleep_s = 4.0  # less than one request may take: a look is of many, and takes all of the 20 s that it has
    with serve_line(line) as url:
        both = {"PREFECT_API_URL": f"{url}/api", "MLFLOW_TRACKING_URI": "http://127.0.0.1:9"}
        with run_exporter(**both) as exporter:
            began = time.monotonic()
            assert exporter.value("up", source="mlflow") == 0
            assert exporter.value("up", source="prefect") == 0
            assert time.monotonic() - began < 15  # two scrapes; one that waited for the look would take longer alone
            assert exporter.value("champion_info") is None


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
def test_it_ends_well(number: signal.Signals) -> None:
    with run_exporter(MLFLOW_TRACKING_URI="http://127.0.0.1:9") as exporter:
        exporter.process.send_signal(number)
        assert exporter.process.wait(30) == 0


@pytest.mark.parametrize(
    ("environment", "told"),
    [
        ({}, "set PREFECT_API_URL"),
        ({"MLFLOW_TRACKING_URI": "sqlite:///a.db"}, "asks servers only"),
        ({"PREFECT_API_URL": "ftp://ana:geheim@host"}, "asks servers only"),
        ({"PREFECT_API_URL": "http://[::1/api"}, "asks servers only"),
    ],
    ids=["nobody", "file", "scheme", "no address"],
)
def test_what_cannot_be_asked_is_one_line_and_exit_code_2(environment: dict[str, str], told: str) -> None:
    command = [sys.executable, "-m", "flows.exporter", "--port", "0"]
    run = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, timeout=60, check=False)
    assert run.returncode == 2
    assert told in run.stderr
    assert len(run.stderr.splitlines()) == 1
    assert "geheim" not in run.stderr


def test_a_port_that_is_taken_is_one_line() -> None:
    with run_exporter(MLFLOW_TRACKING_URI="http://127.0.0.1:9") as exporter:
        command = [
            sys.executable,
            "-m",
            "flows.exporter",
            "--host",
            "127.0.0.1",
            "--port",
            exporter.url.rpartition(":")[2],
        ]
        environment = os.environ | {"MLFLOW_TRACKING_URI": "http://127.0.0.1:9"}
        run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert run.returncode == 2
    assert "choose another with --port" in run.stderr


def test_it_imports_nothing_heavy() -> None:
    heavy = ("torch", "mlflow", "prefect", "bentoml", "pandas", "onnxruntime", "sqlalchemy", "sentence_transformers")
    code = f"import sys, flows.exporter; print([name for name in {heavy!r} if name in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


# --- the real servers


class Prefect:
    """What a worker and the flows tell a real Prefect server, over its API."""

    def __init__(self, url: str, user: str) -> None:
        name, _, password = user.partition(":")
        self.client = httpx.Client(base_url=url, auth=(name, password), timeout=60)

    def post(self, path: str, **body: Any) -> dict[str, Any]:
        answer = self.client.post(path, json=body)
        answer.raise_for_status()
        return answer.json() if answer.content else {}  # type: ignore[no-any-return]

    def run(self, flow: str, deployment: str | None, *states: dict[str, Any]) -> None:
        body = {"flow_id": flow, "deployment_id": deployment, "state": {"type": "PENDING"}}
        run = self.post("/flow_runs/", **body)["id"]
        for state in states:
            answer = self.post(f"/flow_runs/{run}/set_state", state=state, force=True)
            assert answer["status"] == "ACCEPT", answer


@pytest.mark.slow
def test_a_real_prefect_server_is_understood(tmp_path: Path) -> None:
    user = "ana:geheim"
    with real_prefect(tmp_path, user) as url:
        prefect = Prefect(url, user)
        prefect.post("/work_pools/", name="local", type="process", base_job_template={})
        prefect.post("/work_pools/local/workers/heartbeat", name="w1")
        flow = prefect.post("/flows/", name="pipeline")["id"]
        far = (datetime.now(UTC).hour + 12) % 24  # none of its runs is late while the test counts the late ones
        schedule = {"cron": f"0 {far} * * *", "timezone": "UTC"}
        nightly = prefect.post(
            "/deployments/",
            name="nightly",
            flow_id=flow,
            work_pool_name="local",
            schedules=[{"active": True, "schedule": schedule}],
        )["id"]
        prefect.run(flow, nightly, {"type": "RUNNING"}, {"type": "COMPLETED"})
        prefect.run(flow, nightly, {"type": "RUNNING"})
        refusal = "Flow run encountered an exception: flows.errors.ReleaseRefusedError: gate quality"
        prefect.run(flow, None, {"type": "RUNNING"}, {"type": "FAILED", "message": refusal})
        due = (datetime.now(UTC) - timedelta(seconds=600)).isoformat()
        late = {"type": "SCHEDULED", "name": "Late", "state_details": {"scheduled_time": due}}
        prefect.run(flow, nightly, late)
        with run_exporter(PREFECT_API_URL=url, PREFECT_API_AUTH_STRING=user) as exporter:
            key = {"flow": "pipeline", "deployment": "nightly"}
            exporter.wait_up("prefect")
            assert exporter.value("deployment_schedules", pool="local", **key) == 1
            assert exporter.value("runs", state="running", **key) == 1
            assert exporter.value("runs", state="late", **key) == 1
            assert exporter.value("late_seconds", **key) == pytest.approx(600, abs=120)
            assert exporter.value("ended_runs", state="completed", **key) == 1
            assert exporter.value("last_run_state", state="completed", **key) == 1
            assert 0 < (exporter.value("last_run_seconds", **key) or 0) < 60
            assert exporter.value("last_success_timestamp_seconds", **key) == pytest.approx(time.time(), abs=120)
            assert exporter.value("running_since_timestamp_seconds", **key) == pytest.approx(time.time(), abs=120)
            assert exporter.value("ended_runs", state="refused", flow="pipeline", deployment="") == 1
            assert exporter.value("pool_deployments", pool="local") == 1
            assert exporter.value("workers", pool="local", status="online") == 1
            assert exporter.value("worker_heartbeat_timestamp_seconds", pool="local") == pytest.approx(
                time.time(), abs=120
            )
        with run_exporter(PREFECT_API_URL=url, PREFECT_API_AUTH_STRING="ana:wrong") as exporter:
            assert exporter.value("up", source="prefect") == 0


@contextlib.contextmanager
def real_prefect(folder: Path, user: str) -> Iterator[str]:
    """A Prefect server that asks for a user, on a database of its own; yields the address of its API."""
    port = find_free_port()
    own = {
        "PREFECT_HOME": str(folder),
        "PREFECT_SERVER_API_AUTH_STRING": user,
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_UI_ENABLED": "false",
    }
    command = [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)]
    with (folder / "prefect.log").open("w") as log:
        process = subprocess.Popen(command, env=os.environ | own, stdout=log, stderr=log, start_new_session=True)
    url = f"http://127.0.0.1:{port}/api"
    try:
        deadline = time.monotonic() + 3 * START_S
        while True:
            assert process.poll() is None, (folder / "prefect.log").read_text()
            assert time.monotonic() < deadline, (folder / "prefect.log").read_text()
            with contextlib.suppress(httpx.TransportError):
                name, _, password = user.partition(":")
                if httpx.get(f"{url}/health", auth=(name, password), timeout=5).status_code == 200:
                    break
            time.sleep(0.5)
        yield url
    finally:
        os.killpg(process.pid, signal.SIGTERM)  # the group of this server: it was started as one of its own
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(30)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@pytest.mark.slow
def test_a_real_registry_is_understood(tmp_path: Path, mlflow_template: Path) -> None:
    from flows.core.history import Act, begin_act
    from flows.core.registry import Registry
    from tests.registry import run_mlflow

    with run_mlflow(mlflow_template, tmp_path / "mlflow") as url, run_exporter(MLFLOW_TRACKING_URI=url) as exporter:
        exporter.wait_up("mlflow")
        assert exporter.value("champion_info") is None
        registry = Registry(url, experiment="ekiben", model_name="ekiben")
        client = registry._client
        run_id = client.create_run(client.get_experiment_by_name("ekiben").experiment_id).info.run_id
        client.create_registered_model("ekiben")
        version = str(client.create_model_version("ekiben", f"runs:/{run_id}/lunchbox", run_id=run_id).version)
        registry.set_version_tags(version, {"space_id": "cafe"})
        begin_act(registry, Act(at="", kind="release", version=version))
        registry.set_alias("champion", version)
        with run_exporter(MLFLOW_TRACKING_URI=url) as later:
            later.wait_up("mlflow")
            model = f"ekiben:{version}-{run_id[:8]}"
            assert later.value("champion_info", model=model, run_id=run_id, space_id="cafe", version=version) == 1
            assert later.value("champion_since_timestamp_seconds") == pytest.approx(time.time(), abs=120)
            assert later.value("acts_total", kind="release") == 1


def test_the_made_up_history_is_as_the_real_one_is_written() -> None:
    from flows.core.history import TAG_NAME, Act

    name, content = act("release", "3", ago_s=10)
    assert TAG_NAME.fullmatch(name)
    assert Act.model_validate(content).time
