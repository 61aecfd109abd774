"""The deployments on a real Prefect server (SQLite) with a real process worker: set-up, schedules, runs, dead workers.

The tests build on each other: one server, started once, and set up as a new one is.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from flows.settings import PROJECT_ROOT
from tests.flows.support import write_pairs
from tests.processes import family_of, find_free_port, kill

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

SETUP = PROJECT_ROOT / "deployments" / "prefect" / "setup.py"
AUTOMATIONS = {
    entry["name"]: entry for entry in yaml.safe_load((SETUP.parent / "automations.yaml").read_text(encoding="utf-8"))
}
ZOMBIE, NEVER_BEGAN, TELL = AUTOMATIONS
START_TIMEOUT_S = 240
RUN_TIMEOUT_S = 240
# Shorter than in earnest, and longer than the 60 s between two heartbeats (prefect.yaml): a run that lives is not dead.
NO_SIGN_OF_LIFE_S = 75
FINAL = {"COMPLETED", "FAILED", "CRASHED", "CANCELLED"}


@dataclass
class Line:
    """A server, how a client reaches it, and what its webhook was told."""

    url: str
    folder: Path
    environment: dict[str, str]
    told: list[dict[str, Any]] = field(default_factory=list)

    def ask(self, method: str, path: str, body: object = None) -> Any:
        deadline = time.monotonic() + 60
        while True:
            answer = httpx.request(method, f"{self.url}{path}", json=body, timeout=180)
            if answer.status_code != 503 or time.monotonic() > deadline:
                break
            time.sleep(0.5)  # SQLite is locked for a moment; Prefect's clients ask again, too
        assert answer.is_success, answer.text
        return answer.json() if answer.content else None

    def set_up(self) -> str:
        """Run the script as a person would; returns what it said."""
        done = subprocess.run(
            [sys.executable, str(SETUP)],
            cwd=self.folder,
            env=self.environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def deployment(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] = self.ask("GET", f"/deployments/name/{name}")
        return found

    def automations(self) -> dict[str, dict[str, Any]]:
        return {entry["name"]: entry for entry in self.ask("POST", "/automations/filter", {})}

    def start_run(self, name: str, parameters: dict[str, Any]) -> str:
        body = {"parameters": parameters, "state": {"type": "SCHEDULED"}}
        return str(self.ask("POST", f"/deployments/{self.deployment(name)['id']}/create_flow_run", body)["id"])

    def run(self, run_id: str) -> dict[str, Any]:
        found: dict[str, Any] = self.ask("GET", f"/flow_runs/{run_id}")
        return found

    def end_of(self, run_id: str) -> dict[str, Any]:
        wait_until(lambda: self.run(run_id)["state_type"] in FINAL, RUN_TIMEOUT_S, lambda: self.logs(run_id))
        return self.run(run_id)

    def logs(self, run_id: str) -> str:
        body = {"logs": {"flow_run_id": {"any_": [run_id]}}, "sort": "TIMESTAMP_ASC"}
        worker = self.folder / "worker.log"
        lines = [entry["message"] for entry in self.ask("POST", "/logs/filter", body)]
        return "\n".join([self.run(run_id)["state_type"], *lines, worker.read_text() if worker.exists() else ""])

    def has_event(self, run_id: str, event: str) -> bool:
        resource = {"id": [f"prefect.flow-run.{run_id}"]}
        body = {"filter": {"event": {"name": [event]}, "resource": resource}, "limit": 1}
        return bool(self.ask("POST", "/events/filter", body)["events"])

    def work_for_a_worker(self, queue: str) -> list[str]:
        """The runs that a worker would be given now."""
        body = {"work_queue_names": [queue]}
        return [
            entry["flow_run"]["id"] for entry in self.ask("POST", "/work_pools/local/get_scheduled_flow_runs", body)
        ]

    def shorten(self, automation: str, seconds: float) -> None:
        """Let an automation wait no longer than that."""
        found = self.automations()[automation]
        body = {key: value for key, value in found.items() if key not in ("id", "created", "updated")}
        body["trigger"]["within"] = seconds
        self.ask("PUT", f"/automations/{found['id']}", body)


@pytest.fixture(scope="module")
def line(tmp_path_factory: pytest.TempPathFactory, mlflow_template: Path) -> Iterator[Line]:
    """Start a server of its own on SQLite, and set it up once."""
    folder = tmp_path_factory.mktemp("prefect")
    port, told = find_free_port(), []
    url = f"http://127.0.0.1:{port}/api"
    home = folder / "ekiben"
    home.mkdir()
    (home / "mlflow.db").write_bytes(mlflow_template.read_bytes())
    foreign = ("PREFECT_", "EKIBEN_", "MLFLOW_", "BENTOML_", "AWS_")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(foreign)} | {
        "BENTOML_HOME": str(home / "bentoml"),
        "BENTOML_DO_NOT_TRACK": "true",
        "EKIBEN_HOME": str(home),
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "PREFECT_API_URL": url,
        "PREFECT_HOME": str(folder / "home"),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_UI_API_URL": url,
        "PREFECT_WORKER_QUERY_SECONDS": "2",
    }
    with hook(told) as address:
        environment["EKIBEN_NOTIFY_URL"] = address
        with running(
            ["server", "start", "--host", "127.0.0.1", "--port", str(port)], environment, folder / "server.log"
        ):
            line = Line(url, folder, environment, told)
            line.set_up()  # which waits for the server
            yield line


@pytest.fixture(scope="module")
def worker(line: Line) -> Iterator[subprocess.Popen[bytes]]:
    """Start a worker; the last test kills it."""
    command = ["worker", "start", "--pool", "local", "--type", "process"]
    with running(command, line.environment, line.folder / "worker.log") as process:
        yield process


@contextlib.contextmanager
def running(command: list[str], environment: dict[str, str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A `prefect` command in the project's folder, and the end of it and of all that it started."""
    with log.open("ab") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "prefect", *command], cwd=PROJECT_ROOT, env=environment, stdout=file, stderr=file
        )
        try:
            yield process
        finally:
            family = family_of(process.pid)
            for _ in range(2):  # a worker does not always end at the first
                process.send_signal(signal.SIGTERM)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(timeout=10)
                    break
            kill(family)
            process.wait(timeout=30)


@contextlib.contextmanager
def hook(told: list[dict[str, Any]]) -> Iterator[str]:
    """A webhook that keeps what it is told; yields its address."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            told.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/hook?key=of-the-webhook"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def wait_until(condition: Callable[[], bool], timeout_s: float, explain: Callable[[], object] = str) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, explain()
        time.sleep(1)


def small(tiny_model_path: Path, pairs: Path | None = None, **train: Any) -> dict[str, Any]:
    """Parameters of a training of a moment, on `pairs` or the data that the deployment names."""
    usual = {"base_model": str(tiny_model_path), "steps": 4, "batch_size": 8, "max_tokens": 32, "learning_rate": 1e-3}
    data = {} if pairs is None else {"data": {"pairs": str(pairs)}}
    return {"train": usual | train, "evaluate": {"bootstrap_samples": 100}} | data


def state_of(line: Line) -> dict[str, Any]:
    """Everything that a set-up may change, but for the times at which it looked."""
    passing = ("updated", "last_polled", "status", "next_run", "worker_id", "concurrency_limit_id", "active_slots")

    def settled(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: settled(item) for key, item in value.items() if key not in passing}
        if isinstance(value, list):
            return [settled(item) for item in value]
        return value

    found = {
        "deployments": line.ask("POST", "/deployments/filter", {}),
        "pools": line.ask("POST", "/work_pools/filter", {}),
        "queues": line.ask("POST", "/work_pools/local/queues/filter", {}),
        "automations": line.ask("POST", "/automations/filter", {}),
        "blocks": line.ask("POST", "/block_documents/filter", {}),
    }
    return {kind: {entry["id"]: settled(entry) for entry in entries} for kind, entries in found.items()}


def test_set_up_makes_what_the_files_say(line: Line) -> None:
    names = ("train/train", "tune/tune", "release/release", "pipeline/nightly", "rollback/rollback")
    deployments = {name: line.deployment(name) for name in names}
    assert len(line.ask("POST", "/deployments/filter", {})) == len(names)
    assert str(PROJECT_ROOT) not in json.dumps(deployments), "another machine has it elsewhere"
    for deployment in deployments.values():
        assert deployment["pull_steps"] == [{"flows.workspace.enter_project": {}}]
        fields = deployment["parameter_openapi_schema"]["properties"]
        assert all(field["title"] and field["description"] for field in fields.values())
        assert deployment["description"]
        assert deployment["enforce_parameter_schema"]
    limited = {name for name, deployment in deployments.items() if deployment["global_concurrency_limit"]}
    assert limited == {"release/release", "pipeline/nightly", "rollback/rollback"}
    queues = {queue["name"]: queue for queue in line.ask("POST", "/work_pools/local/queues/filter", {})}
    assert {name: queue["concurrency_limit"] for name, queue in queues.items()} == {
        "default": None,
        "heavy": 1,
        "urgent": None,
    }
    assert set(line.automations()) == {ZOMBIE, NEVER_BEGAN, TELL}
    assert "of-the-webhook" not in json.dumps(line.ask("POST", "/block_documents/filter", {}))


def test_the_scheduler_plans_the_nights(line: Line) -> None:
    nightly = line.deployment("pipeline/nightly")["id"]
    body = {"flow_runs": {"deployment_id": {"any_": [nightly]}, "state": {"type": {"any_": ["SCHEDULED"]}}}}
    wait_until(lambda: bool(line.ask("POST", "/flow_runs/filter", body)), 60)
    assert {run["auto_scheduled"] for run in line.ask("POST", "/flow_runs/filter", body)} == {True}


def test_another_set_up_changes_nothing_not_even_what_people_did_in_the_ui(line: Line) -> None:
    hourly = {"cron": "7 * * * *", "timezone": "UTC"}
    theirs = {"schedule": hourly, "active": True, "parameters": {"data": {"pairs": "x.csv"}}}
    for name in ("train/train", "pipeline/nightly"):  # one has no schedule in prefect.yaml, the other has
        line.ask("POST", f"/deployments/{line.deployment(name)['id']}/schedules", [theirs])
    nightly = line.deployment("pipeline/nightly")
    [ours] = [schedule for schedule in nightly["schedules"] if schedule["slug"] == "nightly"]
    line.ask("PATCH", f"/deployments/{nightly['id']}/schedules/{ours['id']}", {"active": False})
    line.ask("PATCH", "/work_pools/local/queues/heavy", {"concurrency_limit": 2})
    line.ask("PATCH", f"/automations/{line.automations()[NEVER_BEGAN]['id']}", {"enabled": False})

    before = state_of(line)
    said = line.set_up()
    after = state_of(line)
    named = [
        schedule
        for deployment in before["deployments"].values()
        for schedule in deployment["schedules"]
        if schedule["slug"] is None
    ]
    assert len(named) == 2
    for schedule in named:  # the one thing that was done to them, without which Prefect deletes the one of `nightly`
        schedule["slug"] = f"ui-{schedule['id'][:8]}"
    assert after == before
    assert "created" not in said
    assert "updated" not in said

    line.ask("PATCH", f"/automations/{line.automations()[NEVER_BEGAN]['id']}", {"enabled": True})
    for name in ("train/train", "pipeline/nightly"):  # their next run must not come in between
        deployment = line.deployment(name)
        for schedule in deployment["schedules"]:
            line.ask("DELETE", f"/deployments/{deployment['id']}/schedules/{schedule['id']}")


def test_a_run_trains_on_a_worker(line: Line, worker: subprocess.Popen[bytes], tiny_model_path: Path) -> None:
    run_id = line.start_run("train/train", small(tiny_model_path))  # on the sample: a path in the project's folder
    run = line.end_of(run_id)
    assert run["state_type"] == "COMPLETED", line.logs(run_id)
    assert run["work_queue_name"] == "heavy"
    artifacts = line.ask("POST", "/artifacts/filter", {"artifacts": {"flow_run_id": {"any_": [run_id]}}})
    [progress] = [artifact for artifact in artifacts if artifact["key"] == "fit"]
    assert float(progress["data"]) == 100.0
    # A run sends its lines every 2 s, and the server writes events down every 5 s: both may come after its end.
    wait_until(lambda: "registered as version 1" in line.logs(run_id), 60, lambda: line.logs(run_id))
    wait_until(lambda: line.has_event(run_id, "prefect.flow-run.heartbeat"), 60)


def test_bad_data_fail_and_are_told_of_once(
    line: Line, worker: subprocess.Popen[bytes], tiny_model_path: Path, tmp_path: Path
) -> None:
    bad = tmp_path / "bad.csv"
    bad.write_text("text_a,text_b\nno,score\n")
    line.told.clear()
    run_id = line.start_run("pipeline/nightly", small(tiny_model_path, bad))
    run = line.end_of(run_id)
    assert run["state_type"] == "FAILED", line.logs(run_id)
    assert "score" in run["state"]["message"]
    wait_until(lambda: bool(line.told), 60)
    [told] = line.told  # the flow in the pipeline has failed, too: once is enough
    assert told["flow_run_id"] == run_id
    assert told["deployment"] == "nightly"
    assert told["text"].startswith(f"Ekiben: pipeline ({run['name']}) Failed: ")
    assert "score" in told["text"]
    assert run_id in told["url"]


def test_parameters_that_do_not_fit_are_refused_before_a_run(line: Line) -> None:
    url = f"{line.url}/deployments/{line.deployment('train/train')['id']}/create_flow_run"
    for parameters in ({"train": {"step": 3}}, {"train": {"steps": 0}}, {"data": {}, "train": {"seed": "one"}}):
        answer = httpx.post(url, json={"parameters": parameters}, timeout=60)
        assert answer.status_code == 409, answer.text


def test_runs_of_the_dead_crash_and_make_room(
    line: Line, worker: subprocess.Popen[bytes], tiny_model_path: Path, tmp_path: Path
) -> None:
    line.ask("PATCH", "/work_pools/local/queues/heavy", {"concurrency_limit": 1})
    pairs = write_pairs(tmp_path / "pairs.csv")
    line.shorten(ZOMBIE, NO_SIGN_OF_LIFE_S)
    running = line.start_run("train/train", small(tiny_model_path, pairs, steps=100_000, max_minutes=60.0))
    sign = "prefect.flow-run.heartbeat"
    wait_until(lambda: line.has_event(running, sign), RUN_TIMEOUT_S, lambda: line.logs(running))
    line.told.clear()
    kill(family_of(worker.pid))  # as when the power fails: nobody says a word
    worker.wait(timeout=30)

    waiting = line.start_run("train/train", small(tiny_model_path, pairs))
    assert line.work_for_a_worker("heavy") == [], "the dead has its place"
    assert line.run(running)["state_type"] == "RUNNING"
    line.shorten(NEVER_BEGAN, 15)
    taken = line.start_run("rollback/rollback", {"reason": "its worker has died before it began"})
    line.ask("POST", f"/flow_runs/{taken}/set_state", {"state": {"type": "PENDING", "name": "Pending"}})

    for dead, automation in ((running, ZOMBIE), (taken, NEVER_BEGAN)):
        state = line.end_of(dead)["state"]
        assert state["type"] == "CRASHED"
        assert state["message"] == AUTOMATIONS[automation]["actions"][0]["message"]
    assert line.work_for_a_worker("heavy") == [waiting]
    wait_until(lambda: {entry["flow_run_id"] for entry in line.told} == {running, taken}, 60, lambda: line.told)
