"""The workflows of GitHub: only what GitHub knows, only commands that exist, no right that is not needed."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / ".github" / "workflows").iterdir())
WORKFLOW_KEYS = {"name", "on", "permissions", "concurrency", "jobs", "env"}
JOB_KEYS = {"needs", "runs-on", "timeout-minutes", "permissions", "strategy", "env", "steps"}
STEP_KEYS = {"id", "name", "run", "env", "uses", "with"}
EVENTS = {"push": {"branches", "tags"}, "pull_request": {"branches"}}
# What each action takes, of what is used here.
INPUTS = {
    "actions/checkout": set[str](),
    "actions/setup-python": {"python-version"},
    "docker/setup-buildx-action": set[str](),
    "docker/login-action": {"registry", "username", "password"},
    "docker/build-push-action": {"context", "file", "build-args", "tags", "push", "provenance", "sbom"},
}
# A job that pushes images writes packages; nothing writes anything else.
RIGHTS = {"contents": {"read"}, "packages": {"read", "write"}}
EXPRESSION = re.compile(r"\$\{\{(.*?)\}\}", re.DOTALL)
COMMAND = re.compile(r"(?:^|&&|\|\||;)\s*make ([a-z-]+)", re.MULTILINE)


def read(path: Path) -> dict[str, Any]:
    """A workflow; YAML 1.1 takes the key `on` for a truth."""
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    content["on"] = content.pop(True)
    return dict(content)


WORKFLOWS = {path.name: read(path) for path in FILES}
JOBS = [
    pytest.param(workflow, job, id=f"{name}:{key}")
    for name, workflow in WORKFLOWS.items()
    for key, job in workflow["jobs"].items()
]


def steps_of(workflow: dict[str, Any]) -> list[dict[str, Any]]:
    return [step for job in workflow["jobs"].values() for step in job["steps"]]


def test_there_is_one_for_changes_and_one_for_releases() -> None:
    assert set(WORKFLOWS) == {"ci.yml", "release.yml"}
    assert set(WORKFLOWS["ci.yml"]["on"]) == {"push", "pull_request"}
    assert WORKFLOWS["release.yml"]["on"] == {"push": {"tags": ["v*"]}}


@pytest.mark.parametrize("name", WORKFLOWS)
def test_only_known_keys_are_used(name: str) -> None:
    workflow = WORKFLOWS[name]
    assert set(workflow) <= WORKFLOW_KEYS
    for event, filters in workflow["on"].items():
        assert set(filters or {}) <= EVENTS[event]
    assert set(workflow["concurrency"]) == {"group", "cancel-in-progress"}


@pytest.mark.parametrize(("workflow", "job"), JOBS)
def test_jobs_use_only_known_keys_end_in_time_and_wait_for_jobs_that_exist(
    workflow: dict[str, Any], job: dict[str, Any]
) -> None:
    assert set(job) <= JOB_KEYS
    assert job["runs-on"] == "ubuntu-24.04", "`latest` would be another machine some day"
    assert 0 < job["timeout-minutes"] <= 90
    assert {job["needs"]} <= set(workflow["jobs"]) if "needs" in job else True
    assert set(job.get("strategy", {})) <= {"fail-fast", "matrix"}
    for step in job["steps"]:
        assert set(step) <= STEP_KEYS
        assert ("run" in step) != ("uses" in step)
        assert "with" not in step or "uses" in step


@pytest.mark.parametrize("name", WORKFLOWS)
def test_actions_are_known_pinned_by_their_major_version_and_given_what_they_take(name: str) -> None:
    for step in steps_of(WORKFLOWS[name]):
        if "uses" in step:
            action, _, version = step["uses"].partition("@")
            assert re.fullmatch(r"v\d+", version)
            assert set(step.get("with", {})) <= INPUTS[action]


def test_an_action_has_the_same_version_everywhere() -> None:
    used = {step["uses"] for workflow in WORKFLOWS.values() for step in steps_of(workflow) if "uses" in step}
    assert len({each.partition("@")[0] for each in used}) == len(used)


@pytest.mark.parametrize("name", WORKFLOWS)
def test_every_make_target_exists(name: str) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = [target for step in steps_of(WORKFLOWS[name]) for target in COMMAND.findall(step.get("run", ""))]
    missing = [target for target in targets if not re.search(rf"^{target}:", makefile, re.MULTILINE)]
    assert missing == []


def test_every_make_target_of_ci_exists() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = COMMAND.findall((ROOT / ".ci" / "run").read_text(encoding="utf-8"))
    assert len(targets) > 3
    assert [target for target in targets if not re.search(rf"^{target}:", makefile, re.MULTILINE)] == []


@pytest.mark.parametrize("name", WORKFLOWS)
def test_commands_are_shell_and_files_that_they_name_exist(name: str) -> None:
    for step in steps_of(WORKFLOWS[name]):
        if "run" not in step:
            continue
        checked = subprocess.run(["bash", "-n"], input=step["run"], text=True, capture_output=True, check=False)
        assert checked.returncode == 0, checked.stderr
        for path in re.findall(r"(?:bash|python) ([\w./-]+)", step["run"]):
            assert path.startswith("-") or (ROOT / path).is_file(), path


@pytest.mark.parametrize("name", WORKFLOWS)
def test_what_others_may_choose_never_becomes_part_of_a_command(name: str) -> None:
    assert [step["run"] for step in steps_of(WORKFLOWS[name]) if EXPRESSION.search(step.get("run", ""))] == []


@pytest.mark.parametrize("name", WORKFLOWS)
def test_a_workflow_may_only_read(name: str) -> None:
    assert WORKFLOWS[name]["permissions"] == {"contents": "read"}


@pytest.mark.parametrize(("workflow", "job"), JOBS)
def test_only_who_pushes_may_write_and_only_packages(workflow: dict[str, Any], job: dict[str, Any]) -> None:
    granted = job.get("permissions", workflow["permissions"])
    assert all(right in RIGHTS[scope] for scope, right in granted.items())
    logs_in = any(step.get("uses", "").startswith("docker/login-action@") for step in job["steps"])
    assert (granted.get("packages") == "write") is logs_in
    assert not logs_in or job["needs"] == "test", "nothing untested is pushed"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_the_only_secret_is_the_token_that_github_gives(path: Path) -> None:
    named = re.findall(r"secrets\.(\w+)", path.read_text(encoding="utf-8"))
    assert set(named) <= {"GITHUB_TOKEN"}
    assert "pull_request_target" not in path.read_text(encoding="utf-8")


def test_a_release_tests_what_ci_tests_before_it_pushes() -> None:
    jobs = WORKFLOWS["release.yml"]["jobs"]
    assert [step.get("run") for step in jobs["test"]["steps"]][-1] == "bash .ci/run"
    assert {name for name, job in jobs.items() if "needs" not in job} == {"test"}


def test_the_dockerfiles_of_the_matrix_exist() -> None:
    job = WORKFLOWS["release.yml"]["jobs"]["images"]
    for image in job["strategy"]["matrix"]["image"]:
        dockerfile = (ROOT / "deployments" / "images" / f"{image}.Dockerfile").read_text(encoding="utf-8")
        (build,) = (step["with"] for step in job["steps"] if step.get("uses", "").startswith("docker/build-push"))
        for argument in re.findall(r"^(\w+)=", build["build-args"], re.MULTILINE):
            assert re.search(rf"^ARG {argument}\b", dockerfile, re.MULTILINE), f"{image}: {argument}"


def test_expressions_name_what_is_there() -> None:
    known = re.compile(
        r"github\.(ref|sha|actor)|secrets\.GITHUB_TOKEN|matrix\.(image|python)|steps\.name\.outputs\.(image|version)"
    )
    for path in FILES:
        for found in EXPRESSION.findall(path.read_text(encoding="utf-8")):
            assert known.fullmatch(found.strip()), f"{path.name}: {found}"
