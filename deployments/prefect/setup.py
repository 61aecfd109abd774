"""What Prefect's server must know of the line: work pools, queues and their limits, deployments, automations.

    PREFECT_API_URL=http://127.0.0.1:4200/api python deployments/prefect/setup.py

It waits for the server and may be run at any time, also at every start of a stack. What stands in files follows the
files: deployments, the job templates of the pools, what automations do. What people do in the UI stays: schedules that
they have added, what they have paused or switched off, limits that they have changed. A deployment that is taken out of
prefect.yaml stays on the server: `prefect deployment delete` removes it.

From the environment, beside Prefect's own variables:

    EKIBEN_WORK_POOL   local, docker or kubernetes: where runs are carried out; default: what prefect.yaml says
    EKIBEN_LINE_IMAGE  image of the pools `docker` and `kubernetes`; default: ekiben-line of this version
    EKIBEN_NOTIFY_URL  webhook that is told of failed and crashed runs; without it nobody is told
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml
from prefect.blocks.webhook import Webhook
from prefect.client.orchestration import PrefectClient, get_client
from prefect.client.schemas.actions import WorkPoolCreate, WorkPoolUpdate
from prefect.client.schemas.filters import WorkQueueFilter
from prefect.events.schemas.automations import AutomationCore
from prefect.exceptions import ObjectNotFound, PrefectHTTPStatusError
from prefect.settings import PREFECT_API_URL
from prefect.workers.process import ProcessWorker
from pydantic import ValidationError

HERE = Path(__file__).resolve().parent
PROJECT_ROOT = HERE.parents[1]
PREFECT_FILE = PROJECT_ROOT / "prefect.yaml"
AUTOMATIONS_FILE = HERE / "automations.yaml"
SERVER_TIMEOUT_S = 180


class SetupError(Exception):
    """Something that whoever runs this can put right; the text says how."""


@dataclass(frozen=True)
class Queue:
    """A queue of a work pool; a limit is the number of runs that it lets be at work at a time."""

    name: str
    description: str
    limit: int | None = None


@dataclass(frozen=True)
class Pool:
    """A place where runs are carried out. All have the same queues, so that a deployment fits each of them."""

    type: str
    description: str
    heavy_limit: int

    def queues(self) -> tuple[Queue, ...]:
        """Those that prefect.yaml names."""
        return (
            Queue("urgent", "What must not wait for a training: rollback."),
            Queue(
                "heavy", "Trainings, studies and releases: as many at a time as there are machines.", self.heavy_limit
            ),
        )


POOLS = {
    "local": Pool("process", "Processes of a worker, in the environment that it was started in.", heavy_limit=1),
    "docker": Pool(
        "docker", "Containers of the image ekiben-line, beside the stack of docker-compose.yml.", heavy_limit=1
    ),
    # Here each run has a machine or a share of one: what it measures is not disturbed.
    "kubernetes": Pool("kubernetes", "Jobs of the image ekiben-line in the namespace ekiben.", heavy_limit=4),
}

# Name of a block -> variable with the address of the webhook that it calls.
WEBHOOKS = {"ekiben-notify": "EKIBEN_NOTIFY_URL"}


async def set_up(automations: Path = AUTOMATIONS_FILE) -> None:
    """Do all of it, one step after the other.

    Raises:
        SetupError: names what is wrong and the cure.
    """
    document, definitions = _read(PREFECT_FILE), _read(automations)
    chosen = os.environ.get("EKIBEN_WORK_POOL", "")
    pools = sorted({chosen or deployment["work_pool"]["name"] for deployment in document["deployments"]})
    if unknown := [name for name in pools if name not in POOLS]:
        source = "EKIBEN_WORK_POOL" if chosen else "the work pool in prefect.yaml"
        raise SetupError(f"{source} is {unknown[0]!r}: there are {', '.join(POOLS)}")
    if PREFECT_API_URL.value() is None:
        raise SetupError(
            "PREFECT_API_URL is not set: start a server (`prefect server start`) and set it; for one on this machine "
            "that is http://127.0.0.1:4200/api"
        )
    async with get_client() as client:
        await wait_for_server(client)
        for name in pools:
            await make_pool(client, name)
        await name_schedules(client, document)
        deploy(document, chosen)
        await make_automations(client, definitions)


def _read(path: Path) -> Any:
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise SetupError(f"{path} cannot be read: {error}") from error


async def wait_for_server(client: PrefectClient) -> None:
    """Return when the server answers.

    Raises:
        SetupError: it does not in time.
    """
    deadline = time.monotonic() + SERVER_TIMEOUT_S
    while (trouble := await client.api_healthcheck()) is not None:
        if time.monotonic() > deadline:
            raise SetupError(f"no Prefect server answers at {PREFECT_API_URL.value()}: {trouble!r}")
        await asyncio.sleep(1)


async def make_pool(client: PrefectClient, name: str) -> None:
    """Create a work pool with its queues, or bring its job template up to date; limits stay as they are.

    Raises:
        SetupError: there is a pool of that name and another type.
    """
    pool, template = POOLS[name], job_template(name)
    try:
        found = await client.read_work_pool(name)
    except ObjectNotFound:
        new = WorkPoolCreate(name=name, type=pool.type, description=pool.description, base_job_template=template)
        await client.create_work_pool(new)
        say(f"work pool {name}: created")
    else:
        if found.type != pool.type:
            raise SetupError(f"the work pool {name} is of type {found.type}, not {pool.type}: delete or rename it")
        if found.base_job_template != template:
            await client.update_work_pool(name, WorkPoolUpdate(base_job_template=template))
            say(f"work pool {name}: new job template")
        else:
            say(f"work pool {name}: unchanged")
    # The server refuses what the client sends when these are left out.
    listed = await client.read_work_queues(name, WorkQueueFilter(), limit=200, offset=0)
    there = {queue.name: queue for queue in listed}
    for queue in pool.queues():
        if queue.name not in there:
            await client.create_work_queue(
                queue.name, queue.description, concurrency_limit=queue.limit, work_pool_name=name
            )
            say(f"queue {queue.name} of {name}: created, limit {queue.limit or 'none'}")
        elif (limit := there[queue.name].concurrency_limit) != queue.limit:
            kept, usual = limit or "none", queue.limit or "none"
            say(f"queue {queue.name} of {name}: keeps its limit {kept}; a new one gets {usual}")


def job_template(pool: str) -> dict[str, Any]:
    """How a pool carries out a run: its file here with the image of this version, or what Prefect does by itself."""
    path = HERE / f"{pool}.json"
    if not path.exists():
        return ProcessWorker.get_default_base_job_template()
    template: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    image = os.environ.get("EKIBEN_LINE_IMAGE") or f"ekiben-line:{version('ekiben')}"
    template["variables"]["properties"]["image"]["default"] = image
    return template


async def name_schedules(client: PrefectClient, document: dict[str, Any]) -> None:
    """Give schedules that were added in the UI a slug: they have none, and without one a deploy would delete them.

    That is so for deployments that have a schedule in prefect.yaml, too: Prefect makes all anew unless all have a slug.
    """
    for deployment in document["deployments"]:
        flow = deployment["entrypoint"].rpartition(".")[2]
        try:
            found = await client.read_deployment_by_name(f"{flow}/{deployment['name']}")
        except ObjectNotFound:
            continue
        for schedule in found.schedules:
            if schedule.slug is None:
                slug = f"ui-{str(schedule.id)[:8]}"
                # The parameters are repeated because Prefect takes their absence for none.
                await client.update_deployment_schedule(
                    found.id, schedule.id, slug=slug, parameters=dict(schedule.parameters)
                )
                say(f"schedule of {flow}/{deployment['name']}: {slug}, so that it stays")


def deploy(document: dict[str, Any], pool: str) -> None:
    """Run `prefect deploy --all` in the project's folder, with another work pool when one is chosen.

    Raises:
        SetupError: it failed.
    """
    with tempfile.TemporaryDirectory() as scratch:
        path = PREFECT_FILE
        if pool:
            path = Path(scratch) / "prefect.yaml"
            for deployment in document["deployments"]:
                deployment["work_pool"] = deployment["work_pool"] | {"name": pool}
            path.write_text(yaml.safe_dump(document), encoding="utf-8")
        command = [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all", "--prefect-file", str(path)]
        done = subprocess.run(command, cwd=PROJECT_ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        said = "\n".join(part.strip() for part in (done.stdout, done.stderr))  # Prefect's own words are in either
        raise SetupError(f"prefect deploy failed: {said.strip()}")
    names = ", ".join(deployment["name"] for deployment in document["deployments"])
    say(f"deployed: {names}")


async def make_automations(client: PrefectClient, definitions: list[dict[str, Any]]) -> None:
    """Create or update automations; one whose webhook has no address is left out, or removed.

    Raises:
        SetupError: Prefect does not take one.
    """
    for definition in definitions:
        name = definition["name"]
        found = await client.read_automations_by_name(name)
        wanted = [action["block"] for action in definition["actions"] if "block" in action]
        missing = [WEBHOOKS[block] for block in wanted if not os.environ.get(WEBHOOKS[block])]
        if missing:
            for old in found:
                await client.delete_automation(old.id)
            say(f"automation {name!r}: {'removed' if found else 'left out'}, {', '.join(missing)} is not set")
            continue
        actions = [await _with_block_id(action) for action in definition["actions"]]
        try:
            desired = AutomationCore.model_validate(definition | {"actions": actions})
        except ValidationError as error:
            raise SetupError(f"automation {name!r} cannot be used: {error}") from error
        if not found:
            await client.create_automation(desired)
            say(f"automation {name!r}: created")
            continue
        desired = desired.model_copy(update={"enabled": found[0].enabled})
        # An update forgets which runs are being watched: none without need.
        if AutomationCore.model_validate(found[0].model_dump()) == desired:
            say(f"automation {name!r}: unchanged")
        else:
            await client.update_automation(found[0].id, desired)
            say(f"automation {name!r}: updated")


async def _with_block_id(action: dict[str, Any]) -> dict[str, Any]:
    """An action as Prefect takes it: with the id of its block, which has the address of now."""
    if "block" not in action:
        return action
    name = action["block"]
    webhook = Webhook(url=os.environ[WEBHOOKS[name]], headers={"Content-Type": "application/json"})
    block_id = await webhook.asave(name, overwrite=True)
    return {key: value for key, value in action.items() if key != "block"} | {"block_document_id": block_id}


def say(line: str) -> None:
    """Tell one thing that was done."""
    sys.stdout.write(f"[prefect] {line}\n")
    sys.stdout.flush()


def main() -> int:
    """Set up; bad input is one line and exit code 2."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--automations", type=Path, default=AUTOMATIONS_FILE, help="other automations than those here")
    try:
        asyncio.run(set_up(parser.parse_args().automations))
    except SetupError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    except PrefectHTTPStatusError as error:
        cure = " (PREFECT_API_AUTH_STRING must be what the server has)" if error.response.status_code == 401 else ""
        sys.stderr.write(f"the Prefect server refused{cure}: {error}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
