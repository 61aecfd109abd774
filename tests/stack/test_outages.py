"""Each server of the stack dies during a run and comes back: the run finishes, or ends clearly and can be run again.

Nothing is lost, nothing is there twice, and the encoder answers all the time.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from tests.stack.conftest import Line
from tests.stack.line import Callers, say, wait_for
from tests.stack.registry import champion, read_runs, read_versions

pytestmark = [pytest.mark.stack, pytest.mark.timeout(900)]
AWAY_S = 3.0
# What sends the heartbeats that the automation waits for: every 60 s (prefect.yaml). Shorter than in earnest.
NO_SIGN_OF_LIFE_S = 75


@pytest.mark.parametrize("name", ["postgres", "s3", "mlflow", "prefect"])
def test_a_server_dies_during_a_run_and_comes_back(line: Line, name: str) -> None:
    served, versions = champion(line.stack), read_versions(line.stack)
    with Callers(line.encoder) as callers:
        run_id = begin_training(line, seed=11)
        line.stack[name].kill()
        begun = time.monotonic()
        time.sleep(AWAY_S)
        line.stack[name].start()
        line.stack[name].wait_healthy()
        away_s = time.monotonic() - begun
        kind, message = line.prefect.wait(run_id, 500)
        if kind != "COMPLETED":
            assert message, "it does not say why"
            line.prefect.complete("train/train", training(line, seed=11))
    assert not callers.failures(), callers.failures()[:3]
    assert_nothing_lost_or_doubled(line, versions, added=1)
    assert champion(line.stack) == served
    outcome = (
        "finished" if kind == "COMPLETED" else f"{kind.lower()} ({message.splitlines()[0][:90]}), run again: finished"
    )
    say(f"{name} killed during a run, away {away_s:.0f} s: it {outcome}; {len(callers.answers)} answers, none failed")


def test_a_worker_dies_with_its_run_which_is_found_crashed_and_run_again(line: Line) -> None:
    served, versions = champion(line.stack), read_versions(line.stack)
    with shortened_patience(line), Callers(line.encoder) as callers:
        run_id = begin_training(line, seed=12)
        line.stack["worker"].kill()
        begun = time.monotonic()
        line.stack["worker"].start()
        line.stack["worker"].wait_healthy()
        kind, message = line.prefect.wait(run_id, 400)
        found_s = time.monotonic() - begun
        assert kind == "CRASHED", f"{kind}: {message}"
        line.prefect.complete("train/train", training(line, seed=12))
    assert not callers.failures(), callers.failures()[:3]
    assert_nothing_lost_or_doubled(line, versions, added=1)
    assert champion(line.stack) == served
    say(f"the worker killed with its run: found crashed after {found_s:.0f} s ({message}), run again: finished")


def test_the_encoder_dies_and_comes_back_as_what_it_was(line: Line) -> None:
    model, vectors = line.encoder.encode()
    line.stack["encoder"].kill()
    line.stack["mlflow"].kill()
    line.stack["encoder"].start()
    line.stack["encoder"].wait_healthy()
    again, same = line.encoder.encode()
    assert again == model, "it has the champion's files, and needs no registry to serve them"
    assert abs(same - vectors).max() < 1e-5
    line.stack["mlflow"].start()
    line.stack["mlflow"].wait_healthy()
    say(f"the encoder killed, and started again while the registry was away: {model} answers, the same vectors")


def training(line: Line, seed: int) -> dict[str, Any]:
    """Parameters of a training that takes long enough to be interrupted."""
    return {"data": line.data, "train": line.train(seed, steps=400), "evaluate": {"bootstrap_samples": 100}}


def begin_training(line: Line, seed: int) -> str:
    """Start a training and wait until it is at work."""
    run_id = line.prefect.run("train/train", training(line, seed))

    def at_work() -> bool:
        tasks = line.prefect.post("/task_runs/filter", {"flow_runs": {"id": {"any_": [run_id]}}})
        return any(task["name"].startswith("fit") and task["state_type"] == "RUNNING" for task in tasks)

    wait_for("the training is at work", at_work, 200, every_s=0.2)
    return run_id


def assert_nothing_lost_or_doubled(line: Line, before: dict[str, str], *, added: int) -> None:
    """Every version is still there, with its run, and just so many are new; no run is left open."""
    after = read_versions(line.stack)
    assert {number: after.get(number) for number in before} == before
    assert len(after) == len(before) + added, sorted(after)
    assert len(set(after.values())) == len(after), "two versions of one run"
    runs = read_runs(line.stack)
    assert not [run_id for run_id, status in runs.items() if status == "RUNNING"]
    assert all(runs[run_id] == "FINISHED" for run_id in after.values())


@contextmanager
def shortened_patience(line: Line) -> Iterator[None]:
    """Let the automation that finds dead runs wait for seconds, where it waits for minutes."""
    (automation,) = [found for found in line.prefect.post("/automations/filter") if "sign of life" in found["name"]]
    number, fields = automation["id"], ("name", "description", "tags", "enabled", "trigger", "actions")
    body = {field: automation[field] for field in fields if field in automation}
    line.prefect.put(f"/automations/{number}", body | {"trigger": body["trigger"] | {"within": NO_SIGN_OF_LIFE_S}})
    try:
        yield
    finally:
        line.prefect.put(f"/automations/{number}", body)
