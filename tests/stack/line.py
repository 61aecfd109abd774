"""What the stack test does to the running services: deployments and runs by Prefect's API, callers of the encoder."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from bentos.vectors import Vectors
from tests.stack.native import NativeStack

TEXTS = ["barista with latte art", "site engineer for bridges", "jazz guitar and piano", "backend developer"]
TERMINAL = {"COMPLETED", "FAILED", "CRASHED", "CANCELLED"}
SEND_EVERY_S = 0.05
BEGUN = time.monotonic()
# Gates that let the model of a few steps pass, on a machine that does other things: what they ask is tested elsewhere.
LOOSE = {
    "min_gain": -2.0,
    "champion_margin": -2.0,
    "slice_max_drop": 2.0,
    "max_calibration_error": 1.0,
    "max_slowdown": 1e6,
}


def say(step: str) -> None:
    """Print a step of the life of the stack, with the seconds since the beginning."""
    sys.stderr.write(f"[stack {time.monotonic() - BEGUN:6.1f} s] {step}\n")
    sys.stderr.flush()


def wait_for(what: str, ask: Callable[[], Any], timeout_s: float, every_s: float = 0.5) -> Any:
    """Ask until there is an answer that is not empty; an error on the way counts as none."""
    deadline = time.monotonic() + timeout_s
    problem: object = "nothing"
    while time.monotonic() < deadline:
        try:
            found = ask()
            if isinstance(found, np.ndarray) or found:
                return found
            problem = found
        except (httpx.HTTPError, KeyError, IndexError) as error:
            problem = repr(error)
        time.sleep(every_s)
    raise AssertionError(f"{what}: not within {timeout_s:.0f} s; last: {problem}")


def quick_train(tiny_model: Path, seed: int = 1, steps: int = 4) -> dict[str, Any]:
    """Parameters of a training of a few steps."""
    return {
        "base_model": str(tiny_model),
        "steps": steps,
        "batch_size": 8,
        "max_tokens": 32,
        "learning_rate": 1e-3,
        "seed": seed,
    }


def quick_pipeline(data: dict[str, Any], tiny_model: Path, seed: int) -> dict[str, Any]:
    """Parameters of a pipeline that takes a minute."""
    space = {"base_model": [str(tiny_model)], "steps": [2, 4], "batch_size": [8], "max_tokens": [32]}
    return {
        "data": data,
        "train": quick_train(tiny_model, seed),
        "evaluate": {"bootstrap_samples": 100},
        "tune": {"trials": 2, "minutes": 5, "space": space, "costs": [], "pruning_checks": 0, "min_improvement": 0},
        "release": LOOSE,
    }


class Prefect:
    """Prefect's API, as the UI uses it."""

    def __init__(self, stack: NativeStack) -> None:
        environment = stack["worker"].environment
        user, _, password = environment["PREFECT_API_AUTH_STRING"].partition(":")
        self._client = httpx.Client(base_url=environment["PREFECT_API_URL"], auth=(user, password), timeout=30)

    def get(self, path: str) -> Any:
        answer = self._client.get(path)
        answer.raise_for_status()
        return answer.json()

    def post(self, path: str, body: Any = None) -> Any:
        answer = self._client.post(path, json=body or {})
        assert answer.status_code < 500, answer.text
        answer.raise_for_status()
        return answer.json() if answer.content else None

    def put(self, path: str, body: Any) -> None:
        self._client.put(path, json=body).raise_for_status()

    def patch(self, path: str, body: Any) -> None:
        self._client.patch(path, json=body).raise_for_status()

    def delete(self, path: str) -> None:
        self._client.delete(path).raise_for_status()

    def deployment(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] = self.get(f"/deployments/name/{name}")
        return found

    def runs(self, deployment: str, *, state: str | None = None) -> list[dict[str, Any]]:
        """Runs of a deployment, the newest first."""
        query: dict[str, Any] = {
            "flow_runs": {"deployment_id": {"any_": [self.deployment(deployment)["id"]]}},
            "sort": "EXPECTED_START_TIME_DESC",
        }
        if state:
            query["flow_runs"]["state"] = {"type": {"any_": [state]}}
        found: list[dict[str, Any]] = self.post("/flow_runs/filter", query)
        return found

    def run(self, deployment: str, parameters: dict[str, Any]) -> str:
        """Start a run by hand; returns its id."""
        created = self.post(
            f"/deployments/{self.deployment(deployment)['id']}/create_flow_run",
            {"parameters": parameters, "state": {"type": "SCHEDULED"}},
        )
        return str(created["id"])

    def state(self, run_id: str) -> tuple[str, str]:
        """Type and message of a run's state."""
        state = self.get(f"/flow_runs/{run_id}")["state"]
        return state["type"], state["message"] or ""

    def wait(self, run_id: str, timeout_s: float = 300) -> tuple[str, str]:
        """Wait until a run has ended, whatever becomes of the server meanwhile."""

        def ended() -> tuple[str, str] | None:
            state = self.state(run_id)
            return state if state[0] in TERMINAL else None

        return wait_for(f"the end of run {run_id}", ended, timeout_s, every_s=1)

    def complete(self, deployment: str, parameters: dict[str, Any], timeout_s: float = 300) -> str:
        """Run a deployment to its good end."""
        run_id = self.run(deployment, parameters)
        kind, message = self.wait(run_id, timeout_s)
        assert kind == "COMPLETED", f"{deployment}: {kind}, {message}\n{self.logs(run_id)}"
        return run_id

    def logs(self, run_id: str) -> str:
        """The lines that a run has logged."""
        lines = self.post("/logs/filter", {"logs": {"flow_run_id": {"any_": [run_id]}}, "sort": "TIMESTAMP_ASC"})
        return "\n".join(line["message"] for line in lines)[-3000:]

    def artifact_keys(self, run_id: str) -> set[str]:
        """Keys of the artifacts of a run and of the runs that it started."""
        found = {run_id}
        tasks = self.post("/task_runs/filter", {"flow_runs": {"id": {"any_": [run_id]}}})
        if parents := [task["id"] for task in tasks]:
            children = self.post("/flow_runs/filter", {"flow_runs": {"parent_task_run_id": {"any_": parents}}})
            found |= {child["id"] for child in children}
        artifacts = self.post("/artifacts/filter", {"artifacts": {"flow_run_id": {"any_": sorted(found)}}})
        return {artifact["key"] for artifact in artifacts}


@dataclass
class Answer:
    """What a caller of the encoder got."""

    at: float
    status: int  # 0: none
    model: str
    said: str = ""


class Encoder:
    """The encoder, as its callers see it."""

    def __init__(self, stack: NativeStack) -> None:
        key = stack["encoder"].environment["EKIBEN_API_KEYS"]
        self.url = stack.url("encoder", 3000)
        self._headers = {"Authorization": f"Bearer {key}"}

    def encode(self, client: httpx.Client | None = None) -> tuple[str, Vectors]:
        """The version that answers, and its vectors of TEXTS."""
        post = client.post if client is not None else httpx.post
        answer = post(f"{self.url}/encode", json={"texts": TEXTS}, headers=self._headers, timeout=30)
        answer.raise_for_status()
        return answer.headers["X-Ekiben-Model"], np.asarray(answer.json()["embeddings"], dtype=np.float32)

    def info(self) -> dict[str, Any]:
        """GET /models/info."""
        content: dict[str, Any] = httpx.get(f"{self.url}/models/info", headers=self._headers, timeout=30).json()
        return content

    def wait_for_version(self, tag: str, timeout_s: float = 60) -> Vectors:
        """Wait until a version answers; returns its vectors."""

        def answers() -> Vectors | None:
            model, vectors = self.encode()
            return vectors if model == tag else None

        return wait_for(f"{tag} answers", answers, timeout_s)


@dataclass
class Callers:
    """One caller who never stops, until the block ends; every answer is kept."""

    encoder: Encoder
    answers: list[Answer] = field(default_factory=list)
    _stopping: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> Callers:
        self._thread = threading.Thread(target=self._call, name="callers")
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        self._thread.join()

    def _call(self) -> None:
        with httpx.Client() as client:
            while not self._stopping.wait(SEND_EVERY_S):
                at = time.monotonic()
                try:
                    model, _ = self.encoder.encode(client)
                    self.answers.append(Answer(at, 200, model))
                except httpx.HTTPStatusError as error:
                    self.answers.append(Answer(at, error.response.status_code, "", error.response.text))
                except httpx.HTTPError as error:
                    self.answers.append(Answer(at, 0, "", repr(error)))

    def failures(self) -> list[Answer]:
        """Requests that were not answered with vectors."""
        return [answer for answer in self.answers if answer.status != 200]
