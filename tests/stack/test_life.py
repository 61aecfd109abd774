"""The life of a stack, from an empty folder on: new data, deployments, a scheduled run, a release, a swap, a rollback.

The tests follow one another, as the days of a team do.
"""

from __future__ import annotations

import time
from datetime import UTC, datetime, timedelta

import httpx
import numpy as np
import pytest

from tests.stack.conftest import PAIRS, Line
from tests.stack.line import Callers, say, wait_for
from tests.stack.project import dvc, pull
from tests.stack.registry import champion

pytestmark = [pytest.mark.stack, pytest.mark.timeout(900)]
NIGHTLY = "pipeline/nightly"
TOLERANCE = 1e-5


def test_new_data_go_through_s3_into_a_clean_clone(line: Line) -> None:
    environment = line.stack["worker"].environment
    dvc(line.team, environment, "push", "--remote", "store")
    clean = line.stack.project  # the worker's checkout (docs/dvc.md): a clone that has never seen the data
    pull(clean)
    assert not (clean / PAIRS).exists()
    dvc(clean, environment, "pull", PAIRS)
    assert (clean / PAIRS).read_bytes() == (line.team / PAIRS).read_bytes()
    (clean / PAIRS).unlink()
    say("data: added, pushed to S3, pulled in a clean clone: the same bytes")


def test_all_flows_are_deployed_and_setting_up_again_changes_nothing(line: Line) -> None:
    def deployments() -> dict[str, str]:
        return {found["name"]: found["id"] for found in line.prefect.post("/deployments/filter")}

    def automations() -> list[str]:
        return sorted(found["name"] for found in line.prefect.post("/automations/filter"))

    before, rules = deployments(), automations()
    assert set(before) == {"train", "tune", "release", "nightly", "rollback"}
    assert rules
    line.stack["setup"].run()
    assert deployments() == before
    assert automations() == rules
    pool = line.prefect.get("/work_pools/local")
    assert pool["type"] == "process"
    assert pool["status"] == "READY", "no worker asks it for work"
    planned = wait_for("scheduled runs", lambda: line.prefect.runs(NIGHTLY, state="SCHEDULED"), 120)
    assert all(run["auto_scheduled"] for run in planned)
    # As somebody does in the UI: at 03:00 UTC the worker would begin its run, and those of the tests would wait for it.
    nightly = line.prefect.deployment(NIGHTLY)
    for schedule in nightly["schedules"]:
        if schedule["slug"] == "nightly":
            line.prefect.patch(f"/deployments/{nightly['id']}/schedules/{schedule['id']}", {"active": False})
    say(f"deployed: {', '.join(sorted(before))}; {len(planned)} runs are planned; setting up again changed nothing")


def test_who_shows_no_password_gets_nothing(line: Line) -> None:
    refused = {
        "mlflow": f"{line.stack.url('mlflow', 5000)}/api/2.0/mlflow/experiments/search?max_results=1",
        "prefect": f"{line.stack.url('prefect', 4200)}/api/work_pools/local",
        "encoder": f"{line.encoder.url}/models/info",
    }
    assert {name: httpx.get(url, timeout=30).status_code for name, url in refused.items()} == dict.fromkeys(
        refused, 401
    )
    assert httpx.get(f"{line.stack.url('s3', 8333)}/ekiben/", timeout=30).status_code == 403
    services = line.stack.services  # the S3 server has other ports that ask for no key
    assert not services["encoder"].networks & (services["s3"].networks | services["postgres"].networks)
    # What MLflow's pages send, by the name that browsers use.
    page = httpx.post(
        f"{line.stack.url('mlflow', 5000)}/api/2.0/mlflow/runs/search",
        json={"experiment_ids": ["0"]},
        headers={"Origin": f"http://{line.stack.addresses['mlflow']}:5000"},
        auth=("admin", line.secrets["MLFLOW_ADMIN_PASSWORD"]),
        timeout=30,
    )
    assert page.status_code == 200
    encoder = line.stack["encoder"].environment
    reader = httpx.Client(
        base_url=line.stack.url("mlflow", 5000),
        auth=(encoder["MLFLOW_TRACKING_USERNAME"], encoder["MLFLOW_TRACKING_PASSWORD"]),
    )
    with reader:
        read = reader.get("/api/2.0/mlflow/experiments/search", params={"max_results": 1})
        assert read.status_code == 200
        number = read.json()["experiments"][0]["experiment_id"]
        written = reader.post("/api/2.0/mlflow/experiments/update", json={"experiment_id": number, "new_name": "x"})
        assert written.status_code == 403
    say("access: MLflow, Prefect, encoder and S3 refuse who shows nothing; the encoder's user of MLflow may only read")


def test_a_scheduled_pipeline_makes_a_champion_and_the_running_encoder_swaps_to_it(line: Line) -> None:
    assert line.encoder.encode()[0] == line.image_tag
    nightly = line.prefect.deployment(NIGHTLY)
    # What somebody adds in the UI: a time of their own, with parameters. Prefect plans new times once a minute, so this
    # one is more than that ahead.
    at = (datetime.now(UTC) + timedelta(seconds=150)).replace(second=0, microsecond=0)
    (added,) = line.prefect.post(
        f"/deployments/{nightly['id']}/schedules",
        [
            {
                "active": True,
                "schedule": {"cron": f"{at.minute} {at.hour} * * *", "timezone": "UTC"},
                "parameters": line.pipeline(seed=1),
            }
        ],
    )

    def mine() -> dict[str, object] | None:
        runs = [run for run in line.prefect.runs(NIGHTLY) if run["auto_scheduled"] and run["parameters"].get("tune")]
        now = [run for run in runs if abs(datetime.fromisoformat(run["expected_start_time"]) - at).total_seconds() < 5]
        return next((run for run in now if run["state"]["type"] not in ("SCHEDULED",)), None)

    with Callers(line.encoder) as callers:
        run = wait_for("the scheduled run begins", mine, 300)
        kind, message = line.prefect.wait(str(run["id"]), 400)
        assert kind == "COMPLETED", f"{message}\n{line.prefect.logs(str(run['id']))}\n{line.stack['worker'].tail()}"
        tag = wait_for("a champion", lambda: champion(line.stack), 30)
        vectors = line.encoder.wait_for_version(tag)
        time.sleep(1)
    line.prefect.delete(f"/deployments/{nightly['id']}/schedules/{added['id']}")
    assert not callers.failures(), callers.failures()[:3]
    assert {answer.model for answer in callers.answers} == {line.image_tag, tag}
    assert line.prefect.artifact_keys(str(run["id"])) >= {"gates"}
    line.known |= {"first": tag, "vectors": vectors}
    say(
        f"a run that was planned for {at:%H:%M:%S} came out as {tag}; the encoder swapped to it while "
        f"{len(callers.answers)} requests were answered, none failed"
    )


def test_the_next_release_replaces_it_and_a_rollback_brings_its_exact_vectors_back(line: Line) -> None:
    first, old = line.known["first"], line.known["vectors"]
    with Callers(line.encoder) as callers:
        line.prefect.complete(NIGHTLY, line.pipeline(seed=2), 400)
        second = wait_for("another champion", lambda: (tag := champion(line.stack)) != first and tag, 30)
        new = line.encoder.wait_for_version(second)
        assert np.abs(new - old).max() > 100 * TOLERANCE
        line.prefect.complete("rollback/rollback", {"reason": "wrong answers to short queries"}, 200)
        assert champion(line.stack) == first
        again = line.encoder.wait_for_version(first)
    assert np.abs(again - old).max() < TOLERANCE
    assert not callers.failures(), callers.failures()[:3]
    line.known["second"] = second
    say(f"{second} released and rolled back to {first}: the same vectors; {len(callers.answers)} answers, none failed")


def test_a_run_on_bad_data_ends_red_and_changes_nothing(line: Line) -> None:
    before = champion(line.stack)
    bad = line.pipeline(seed=3) | {"data": {"pairs": line.data["pairs"].replace("pairs.csv", "none.csv")}}
    run_id = line.prefect.run(NIGHTLY, bad)
    kind, message = line.prefect.wait(run_id, 200)
    assert kind == "FAILED"
    assert "none.csv" in message
    assert champion(line.stack) == before
    say(f"a run on data that are not there ended {kind}: {message[:120]}")


def test_prometheus_sees_every_target_and_what_happened(line: Line) -> None:
    url = line.stack.url("prometheus", 9090)

    def ask(query: str) -> list[dict[str, dict[str, str]]]:
        answer = httpx.get(f"{url}/api/v1/query", params={"query": query}, timeout=10).json()
        found: list[dict[str, dict[str, str]]] = answer["data"]["result"]
        return found

    jobs = wait_for("all targets up", lambda: all_up(ask), 90)
    tag = line.known["first"]
    live = wait_for("the champion in the metrics", lambda: ask(f'ekiben_model_live{{model="{tag}"}} > 0'), 60)
    assert live
    assert wait_for("the exporter's view of the line", lambda: ask("ekiben_line_up == 1"), 60)
    rules = wait_for("all rules evaluated", lambda: evaluated(url), 60)
    assert len(rules) > 5
    assert set(rules.values()) == {"ok"}
    say(f"Prometheus scrapes {', '.join(sorted(jobs))}, and sees that {tag} is live")


def evaluated(url: str) -> dict[str, str] | None:
    """Every rule and its health, once each was evaluated."""
    groups = httpx.get(f"{url}/api/v1/rules", timeout=10).json()["data"]["groups"]
    found = {rule["name"]: rule["health"] for group in groups for rule in group["rules"]}
    return None if "unknown" in found.values() else found


def all_up(ask: object) -> set[str] | None:
    found = ask("up")  # type: ignore[operator]
    up = {sample["metric"]["job"] for sample in found if sample["value"][1] == "1"}
    return up if found and len(up) == len({sample["metric"]["job"] for sample in found}) >= 3 else None
