"""prefect.yaml, the job templates and the automations, held against what Prefect, the flows and each other take."""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4
from zoneinfo import ZoneInfo

import jsonschema
import pytest
import yaml
from prefect import Flow
from prefect.cli.deploy._models import (
    ConcurrencyLimitSpec,
    DeploymentConfig,
    PrefectYamlModel,
    RawScheduleConfig,
    WorkPoolConfig,
)
from prefect.client.schemas.schedules import CronSchedule
from prefect.events.schemas.automations import AutomationCore, EventTrigger
from prefect.flows import load_flow_from_entrypoint
from prefect.settings.models.flows import FlowsSettings
from prefect.utilities.callables import parameter_schema
from pydantic import BaseModel

from deployments.prefect import setup
from flows.options import load_params
from flows.settings import PROJECT_ROOT

PREFECT_FILE = PROJECT_ROOT / "prefect.yaml"
FOLDER = PROJECT_ROOT / "deployments" / "prefect"
OWN_KEYS = {"definitions"}  # of anchors; Prefect passes over it
WITHOUT_VALUE = {"rollback": {"reason"}}  # what nobody but the caller can say
DOCUMENT: dict[str, Any] = yaml.safe_load(PREFECT_FILE.read_text(encoding="utf-8"))
DEPLOYMENTS: dict[str, dict[str, Any]] = {entry["name"]: entry for entry in DOCUMENT["deployments"]}
AUTOMATIONS: list[dict[str, Any]] = yaml.safe_load((FOLDER / "automations.yaml").read_text(encoding="utf-8"))


def unknown_keys(document: dict[str, Any]) -> list[str]:
    """Every key that Prefect would pass over without a word."""

    def look(place: str, value: Any, model: type[BaseModel], own: frozenset[str] = frozenset()) -> Iterator[str]:
        known = {field.alias or name for name, field in model.model_fields.items()} | own
        yield from (f"{place}{key}" for key in value if key not in known)

    found = list(look("", document, PrefectYamlModel, frozenset(OWN_KEYS)))
    for entry in document["deployments"]:
        place = f"{entry.get('name')}."
        found += look(place, entry, DeploymentConfig)
        found += look(f"{place}work_pool.", entry.get("work_pool", {}), WorkPoolConfig)
        if isinstance(entry.get("concurrency_limit"), dict):
            found += look(f"{place}concurrency_limit.", entry["concurrency_limit"], ConcurrencyLimitSpec)
        for schedule in entry.get("schedules", []):
            found += look(f"{place}schedules.", schedule, RawScheduleConfig)
    return found


def flow_of(entry: dict[str, Any]) -> Flow[..., Any]:
    return load_flow_from_entrypoint(entry["entrypoint"], use_placeholder_flow=False)


def test_prefect_knows_every_key() -> None:
    assert unknown_keys(DOCUMENT) == []
    PrefectYamlModel.model_validate(DOCUMENT)


@pytest.mark.parametrize(
    ("place", "typo"),
    [
        ((), "deployment"),
        (("deployments", 0), "parameter"),
        (("deployments", 0, "work_pool"), "queue"),
        (("deployments", 2, "concurrency_limit"), "strategy"),
        (("deployments", 3, "schedules", 0), "time_zone"),
    ],
)
def test_a_key_that_prefect_passes_over_is_found(place: tuple[Any, ...], typo: str) -> None:
    document = json.loads(json.dumps(DOCUMENT))  # without what anchors share
    where: Any = document
    for step in place:
        where = where[step]
    where[typo] = {}
    assert [key.rpartition(".")[2] for key in unknown_keys(document)] == [typo]


def test_each_flow_has_a_deployment_of_its_name() -> None:
    flows = {name: entry["entrypoint"].rpartition(".")[2] for name, entry in DEPLOYMENTS.items()}
    assert flows == {name: name for name in ("train", "tune", "release", "rollback")} | {"nightly": "pipeline"}
    assert {name: flow_of(entry).name for name, entry in DEPLOYMENTS.items()} == flows


@pytest.mark.parametrize("name", DEPLOYMENTS)
def test_parameters_are_what_the_flow_takes(name: str) -> None:
    entry, flow = DEPLOYMENTS[name], flow_of(DEPLOYMENTS[name])
    schema = parameter_schema(flow).model_dump(exclude_unset=True)
    given = entry.get("parameters", {})
    missing = set(schema.get("required", [])) - set(given)
    assert missing == WITHOUT_VALUE.get(name, set())
    whole = given | dict.fromkeys(missing, "a reason")
    jsonschema.validate(whole, schema)  # what the server does with a run of the UI
    flow.validate_parameters(whole)  # what the run does


@pytest.mark.parametrize("name", DEPLOYMENTS)
def test_the_form_of_the_ui_explains_every_parameter(name: str) -> None:
    schema = parameter_schema(flow_of(DEPLOYMENTS[name])).model_dump(exclude_unset=True)
    groups = {"": schema["properties"]} | {
        title: part["properties"] for title, part in schema.get("definitions", {}).items() if "properties" in part
    }
    unexplained = [
        f"{title}.{key}"
        for title, properties in groups.items()
        for key, field in properties.items()
        if (not field.get("title") and "$ref" not in field) or not field.get("description")
    ]
    assert unexplained == []


def test_what_the_forms_begin_with_is_the_sample_and_the_quick_parameters() -> None:
    quick = load_params(PROJECT_ROOT / "deployments" / "params" / "quick.yaml", [], {})
    for name in ("train", "tune", "nightly"):
        given = flow_of(DEPLOYMENTS[name]).validate_parameters(DEPLOYMENTS[name]["parameters"])
        assert given["train"] == quick.train
        assert given.get("tune", quick.tune) == quick.tune
        for address in (given["data"].profiles, given["data"].judgements):
            assert (PROJECT_ROOT / address).is_file()


def test_schedules_have_a_slug_and_a_time_zone() -> None:
    schedules = [schedule for entry in DEPLOYMENTS.values() for schedule in entry.get("schedules", [])]
    assert [schedule["slug"] for schedule in schedules] == ["nightly"]
    for schedule in schedules:
        ZoneInfo(schedule["timezone"])
        CronSchedule(cron=schedule["cron"], timezone=schedule["timezone"])
        assert "active" not in schedule, "it would wake one that was paused in the UI"


def test_no_path_of_a_machine_is_written_down() -> None:
    [step] = DOCUMENT["pull"]
    assert step == {"flows.workspace.enter_project": {}}
    assert not any("pull" in entry or "build" in entry or "push" in entry for entry in DEPLOYMENTS.values())
    texts = [text for text in _texts(DOCUMENT["deployments"]) if Path(text).is_absolute() or "~" in text]
    assert texts == []


def test_pools_and_queues_are_those_that_set_up_makes() -> None:
    assert {entry["work_pool"]["name"] for entry in DEPLOYMENTS.values()} == {"local"}
    used = {name: entry["work_pool"]["work_queue_name"] for name, entry in DEPLOYMENTS.items()}
    assert used == dict.fromkeys(("train", "tune", "release", "nightly"), "heavy") | {"rollback": "urgent"}
    for pool in setup.POOLS.values():
        limits = {queue.name: queue.limit for queue in pool.queues()}
        assert set(used.values()) == set(limits)
        assert limits["urgent"] is None, "a rollback must not wait"
        assert limits["heavy"] >= 1


def test_releases_wait_for_each_other() -> None:
    for name in ("release", "nightly", "rollback"):
        assert DEPLOYMENTS[name]["concurrency_limit"] == {"limit": 1, "collision_strategy": "ENQUEUE"}


@pytest.mark.parametrize("pool", setup.POOLS)
def test_a_deployment_fits_each_pool(pool: str) -> None:
    template = setup.job_template(pool)
    jsonschema.Draft202012Validator.check_schema(template["variables"])
    known = template["variables"]["properties"]
    for entry in DEPLOYMENTS.values():
        assert set(entry["work_pool"]["job_variables"]) <= set(known)
    used = set(re.findall(r"{{ (\w+) }}", json.dumps(template["job_configuration"])))
    assert used - {"env"} == set(known) - {"env"}, "a variable that nothing uses, or a place that nothing fills"


@pytest.mark.parametrize("pool", ["docker", "kubernetes"])
def test_containers_get_this_version_and_no_secret_from_a_file(pool: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("EKIBEN_LINE_IMAGE", raising=False)
    assert re.fullmatch(r"ekiben-line:\d+\.\d+\.\d+", _image(pool))
    monkeypatch.setenv("EKIBEN_LINE_IMAGE", "registry.example.com/line:7")
    assert _image(pool) == "registry.example.com/line:7"
    template = setup.job_template(pool)
    assert template["job_configuration"]["env"] == "{{ env }}"
    values = template["variables"]["properties"]["env"]["default"]
    secrets = {
        name: value for name, value in values.items() if re.search("KEY|SECRET|PASSWORD|TOKEN|AUTH|STORAGE", name)
    }
    if pool == "docker":  # the worker's own environment fills them in
        assert secrets == {name: f"{{{{ ${name} }}}}" for name in secrets}
        assert {"AWS_SECRET_ACCESS_KEY", "MLFLOW_TRACKING_PASSWORD", "EKIBEN_STUDY_STORAGE"} <= set(secrets)
    else:
        assert secrets == {"PREFECT_API_AUTH_STRING": None}, "the worker would write its own into each job"
        [container] = template["job_configuration"]["job_manifest"]["spec"]["template"]["spec"]["containers"]
        assert [next(iter(source)) for source in container["envFrom"]] == ["configMapRef", "secretRef"]


def test_automations_are_what_prefect_takes() -> None:
    names = [definition["name"] for definition in AUTOMATIONS]
    assert len(set(names)) == len(names) == 3
    for definition in AUTOMATIONS:
        known = set(AutomationCore.model_fields)
        assert set(definition) <= known
        assert set(definition["trigger"]) <= set(EventTrigger.model_fields)
        blocks = {action["block"] for action in definition["actions"] if "block" in action}
        assert blocks <= set(setup.WEBHOOKS)
        actions = [action | ({"block_document_id": str(uuid4())} if blocks else {}) for action in definition["actions"]]
        AutomationCore.model_validate(definition | {"actions": actions})


def test_a_living_run_has_time_for_several_signs_of_life() -> None:
    trigger = AUTOMATIONS[0]["trigger"]
    assert trigger["after"] == ["prefect.flow-run.heartbeat"]
    assert "prefect.flow-run.heartbeat" in trigger["expect"]
    slowest = FlowsSettings.model_fields["heartbeat_frequency"].default  # of a run that `ekiben` started
    assert trigger["within"] >= 3 * slowest
    for entry in DEPLOYMENTS.values():
        seconds = int(entry["work_pool"]["job_variables"]["env"]["PREFECT_FLOWS_HEARTBEAT_FREQUENCY"])
        assert 30 <= seconds <= trigger["within"] / 5  # Prefect refuses less than 30


def _image(pool: str) -> str:
    return str(setup.job_template(pool)["variables"]["properties"]["image"]["default"])


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for item in value.values():
            yield from _texts(item)
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item)
    elif isinstance(value, str):
        yield value


@pytest.mark.parametrize(
    ("chosen", "pool", "automations", "told"),
    [
        ("dokcer", "local", "[]", "EKIBEN_WORK_POOL is 'dokcer': there are local"),
        ("", "dokcer", "[]", "prefect.yaml is 'dokcer': there are local"),
        ("", "local", None, "automations.yaml cannot be read"),
        ("", "local", "- {", "automations.yaml cannot be read"),
    ],
    ids=["chosen pool", "pool of the file", "no automations", "no YAML"],
)
def test_files_that_cannot_be_used_are_told_before_a_server_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chosen: str, pool: str, automations: str | None, told: str
) -> None:
    monkeypatch.setenv("EKIBEN_WORK_POOL", chosen)
    text = yaml.safe_dump(DOCUMENT | {"deployments": [{"work_pool": {"name": pool}}]})
    (tmp_path / "prefect.yaml").write_text(text)
    monkeypatch.setattr(setup, "PREFECT_FILE", tmp_path / "prefect.yaml")
    if automations is not None:
        (tmp_path / "automations.yaml").write_text(automations)
    with pytest.raises(setup.SetupError, match=told):
        asyncio.run(setup.set_up(tmp_path / "automations.yaml"))


@pytest.mark.parametrize(("out", "err"), [("the reason", "a warning"), ("", "the reason")])
def test_a_deploy_that_fails_gives_its_reason(monkeypatch: pytest.MonkeyPatch, out: str, err: str) -> None:
    failed = subprocess.CompletedProcess([], 1, stdout=out, stderr=err)
    monkeypatch.setattr(setup.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(setup.SetupError, match="the reason"):
        setup.deploy(DOCUMENT, "")
