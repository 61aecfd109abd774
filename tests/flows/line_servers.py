"""A Prefect and an MLflow server as the exporter sees them: real HTTP, made-up deployments, runs and versions."""

from __future__ import annotations

import contextlib
import json
import threading
import time
import uuid
from base64 import b64encode
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

DAY_S = 86_400.0
ENDED = ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")


@dataclass
class Line:
    """What the two servers know; change it, and the next look sees the change."""

    flows: list[dict[str, Any]] = field(default_factory=list)
    deployments: list[dict[str, Any]] = field(default_factory=list)
    runs: list[dict[str, Any]] = field(default_factory=list)
    pools: list[dict[str, Any]] = field(default_factory=list)
    workers: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    model: dict[str, Any] | None = None
    versions: dict[str, dict[str, Any]] = field(default_factory=dict)
    user: str = ""  # user:password; empty: nobody is asked
    broken: bool = False  # answers 500
    sleep_s: float = 0.0  # before each answer
    asked: list[str] = field(default_factory=list)

    def deploy(self, flow: str, name: str, *, pool: str = "local", schedules: int = 0, paused: bool = False) -> str:
        if all(each["name"] != flow for each in self.flows):
            self.flows.append({"id": str(uuid.uuid4()), "name": flow})
        made = {
            "id": str(uuid.uuid4()),
            "name": name,
            "flow_id": self.flow_id(flow),
            "paused": paused,
            "schedules": [{"active": True}] * schedules + [{"active": False}],
            "work_pool_name": pool,
            "created": _moment(30 * DAY_S),
        }
        self.deployments.append(made)
        return str(made["id"])

    def flow_id(self, flow: str) -> str:
        return next(str(each["id"]) for each in self.flows if each["name"] == flow)

    def run(
        self,
        deployment: str | None,
        state: str,
        *,
        flow: str = "",
        ago_s: float = 60.0,
        name: str = "",
        message: str | None = None,
        seconds: float = 10.0,
        child: bool = False,
    ) -> None:
        """Add a run: one that ended, began or was due `ago_s` seconds ago."""
        flow_id = self.flow_id(flow) if flow else next(d["flow_id"] for d in self.deployments if d["id"] == deployment)
        ended, moment = state in ENDED, _moment(ago_s)
        self.runs.append(
            {
                "id": str(uuid.uuid4()),
                "flow_id": flow_id,
                "deployment_id": deployment,
                "parent_task_run_id": str(uuid.uuid4()) if child else None,
                "state_type": state,
                "state_name": name or state.title(),
                "state": {"type": state, "message": message},
                "expected_start_time": moment,
                "next_scheduled_start_time": moment if state == "SCHEDULED" else None,
                "start_time": None if state in ("SCHEDULED", "PENDING") else moment,
                "end_time": moment if ended else None,
                "total_run_time": seconds if ended else 0.0,
            }
        )

    def pool(self, name: str, *, status: str = "READY", beats_ago_s: tuple[float, ...] = ()) -> None:
        self.pools.append({"name": name, "type": "process", "status": status})
        self.workers[name] = [
            {
                "name": f"w{ago_s}",
                "status": "ONLINE" if ago_s < 90 else "OFFLINE",
                "last_heartbeat_time": _moment(ago_s),
            }
            for ago_s in beats_ago_s
        ]

    def release(self, version: str, run_id: str, space_id: str, acts: dict[str, dict[str, Any]]) -> None:
        """Make a version the champion; `acts` are entries of the history by the names of their tags."""
        tags = [{"key": key, "value": json.dumps(act)} for key, act in acts.items()]
        tags.append({"key": "history.20260101T000000000000Z.release", "value": "somebody else's"})
        self.model = {"name": "ekiben", "aliases": [{"alias": "champion", "version": version}], "tags": tags}
        self.versions[version] = {
            "version": version,
            "run_id": run_id,
            "tags": [{"key": "space_id", "value": space_id}],
        }

    # --- answering

    def answer(self, path: str, body: dict[str, Any], query: dict[str, list[str]]) -> tuple[int, Any]:
        limit, offset = body.get("limit", 200), body.get("offset", 0)
        if limit > 200:
            return 422, {"detail": "limit must be at most 200"}
        missing = (404, {"error_code": "RESOURCE_DOES_NOT_EXIST", "message": "not found"})
        found: list[dict[str, Any]]
        match path.split("/")[1:]:
            case ["api", "flows", "filter"]:
                found = self.flows
            case ["api", "deployments", "filter"]:
                found = self.deployments
            case ["api", "work_pools", "filter"]:
                found = self.pools
            case ["api", "work_pools", pool, "workers", "filter"]:
                found = self.workers[pool]
            case ["api", "flow_runs", "filter"]:
                found = [run for run in self.runs if _matches(run, body["flow_runs"])]
                if body.get("sort") == "END_TIME_DESC":
                    found.sort(key=lambda run: run["end_time"], reverse=True)
            case [*_, "registered-models", "get"]:
                return missing if self.model is None else (200, {"registered_model": self.model})
            case [*_, "model-versions", "get"]:
                return 200, {"model_version": self.versions[query["version"][0]]}
            case _:
                return missing
        return 200, found[offset : offset + limit]


def _matches(run: dict[str, Any], only: dict[str, Any]) -> bool:
    unknown = set(only) - {"parent_task_run_id", "state", "deployment_id", "end_time"}
    assert not unknown, unknown
    return (
        (run["parent_task_run_id"] is None) == only["parent_task_run_id"]["is_null_"]
        and run["state_type"] in only["state"]["type"]["any_"]
        and ("deployment_id" not in only or run["deployment_id"] in only["deployment_id"]["any_"])
        and ("end_time" not in only or (run["end_time"] or "") >= only["end_time"]["after_"])
    )


def _moment(ago_s: float) -> str:
    return datetime.fromtimestamp(time.time() - ago_s, tz=UTC).isoformat()


def stamp(ago_s: float) -> str:
    """A time as it stands in the history."""
    return datetime.fromtimestamp(time.time() - ago_s, tz=UTC).strftime("%Y%m%dT%H%M%S%fZ")


def act(kind: str, version: str, *, ago_s: float, replaces: str = "") -> tuple[str, dict[str, Any]]:
    """An entry of the history: name and content of its tag."""
    at = stamp(ago_s)
    return f"history.{at}.{kind}", {"at": at, "kind": kind, "version": version, "replaces": replaces}


def busy_line(model: str = "ekiben:3-0123abcd", space_id: str = "cafe0123cafe0123") -> Line:
    """A line with something of everything."""
    line = Line()
    nightly = line.deploy("pipeline", "nightly", schedules=1)
    train = line.deploy("train", "train")
    line.deploy("release", "release", pool="kubernetes", schedules=1, paused=True)
    line.run(nightly, "COMPLETED", ago_s=3600, seconds=1234.5)
    line.run(nightly, "COMPLETED", ago_s=2 * DAY_S)
    line.run(nightly, "SCHEDULED", ago_s=-3600)
    line.run(train, "COMPLETED", ago_s=9 * DAY_S)
    line.run(train, "FAILED", ago_s=8 * DAY_S, seconds=7.0, message="Flow run encountered an exception: ValueError: x")
    line.run(train, "RUNNING", ago_s=500)
    line.run(train, "RUNNING", ago_s=100)
    line.run(train, "FAILED", ago_s=50, child=True)
    line.run(None, "CRASHED", flow="train", ago_s=600)
    line.pool("local", beats_ago_s=(5.0, 4000.0))
    line.pool("kubernetes", status="NOT_READY")
    version, _, run = model.partition(":")[2].partition("-")
    acts = [
        act("release", str(int(version) - 1), ago_s=9000),
        act("release", version, ago_s=7000, replaces=str(int(version) - 1)),
        act("refusal", "9", ago_s=50),
    ]
    line.release(version, run.ljust(32, "0"), space_id, dict(acts))
    return line


@contextlib.contextmanager
def serve_line(line: Line) -> Iterator[str]:
    """Both servers at one address until the block ends: Prefect below /api."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            address = urlsplit(self.path)
            line.asked.append(address.path)
            body = json.loads(self.rfile.read(int(self.headers.get("content-length") or 0)) or b"{}")
            time.sleep(line.sleep_s)
            wanted = f"Basic {b64encode(line.user.encode()).decode()}"
            if line.user and self.headers.get("authorization") != wanted:
                status, content = 401, {"exception_message": "Unauthorized"}
            elif line.broken:
                status, content = 500, {"exception_message": "Internal Server Error"}
            else:
                status, content = line.answer(address.path, body, parse_qs(address.query))
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # whoever asked has given up
                self.send_response(status)
                self.send_header("content-type", "application/json")
                self.end_headers()
                self.wfile.write(json.dumps(content).encode())

        do_GET = do_POST  # noqa: N815 - the name that http.server wants

        def log_message(self, *_: object) -> None:
            """Nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()
