"""docker-compose.yml: valid for two validators that know nothing of each other, and what this stack must keep."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from deployments.stack_env import OPTIONS, SECRETS, complete, read_names
from tests.stack.compose import SERVICE_KEYS, interpolate, load_services

ROOT = Path(__file__).parents[2]
FILE = ROOT / "docker-compose.yml"
OWN_S3 = ROOT / "deployments" / "compose.external-s3.yml"
TEXT = FILE.read_text(encoding="utf-8")
STACK: dict[str, Any] = yaml.safe_load(TEXT)
SERVICES: dict[str, dict[str, Any]] = STACK["services"]
ONE_SHOT = {"setup"}
VARIABLE = re.compile(r"(?<!\$)\$\{(?P<name>\w+)(?P<kind>:-|:\?)?(?P<word>[^}]*)\}")
BARE_VARIABLE = re.compile(r"(?<!\$)\$(?=\w)")
SECRET_NAME = re.compile(r"PASSWORD|SECRET|TOKEN|AUTH_STRING|KEYS?$|KEY_ID$")
PASSWORD_IN_ADDRESS = re.compile(r"://[^/@\s]*:(?P<password>[^@\s]+)@")
# Rules of dclint that this file does not follow, each on purpose; all others, and the schema, hold.
UNWANTED_RULES = (
    "no-build-and-image",  # an image that is built here needs a name, so that one can be pulled in its place
    "service-keys-order",  # most telling first, not by a list
    "services-alphabetical-order",  # in the order in which they start
    "service-dependencies-alphabetical-order",
    "top-level-properties-order",
    "require-quotes-in-ports",  # they are quoted: values are put in before dclint sees the file
)
DCLINT = "dclint@3.1.0"


@pytest.fixture(scope="module")
def secrets() -> dict[str, str]:
    return read_names(complete(""))


# --- what others say of the file


@pytest.fixture(scope="module")
def dclint() -> list[str]:
    """The linter that has the JSON schema of the Compose specification in it."""
    command = ["npx", "--yes", DCLINT]
    if shutil.which("npx") is None:
        pytest.skip("dclint needs npx: install Node.js")
    try:
        here = subprocess.run([*command, "--version"], capture_output=True, text=True, timeout=120, check=False)
    except subprocess.TimeoutExpired:
        pytest.skip("dclint could not be fetched in time")
    if here.returncode:
        pytest.skip(f"dclint could not be fetched: {here.stderr.strip().splitlines()[-1:]}")
    return command


def lint(dclint: list[str], path: Path) -> list[str]:
    command = [*dclint, str(path), "--formatter", "json", "--disable-rule", *UNWANTED_RULES]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    (report,) = json.loads(done.stdout)
    return [f"{found['rule']}: {found['message']}" for found in report["messages"]]


def test_the_schema_of_the_compose_specification_takes_it(
    dclint: list[str], secrets: dict[str, str], tmp_path: Path
) -> None:
    path = tmp_path / FILE.name
    text = interpolate(TEXT, secrets | {"ENCODER_VERSION": "1-1f2e3d4c"})
    path.write_text(text)
    assert lint(dclint, path) == []
    path.write_text(text.replace("start_period:", "start_perod:", 1))
    assert any("invalid-schema" in found for found in lint(dclint, path)), "this validator takes anything"


def compose_commands() -> Iterator[list[str]]:
    if shutil.which("docker-compose"):
        yield ["docker-compose"]
    if shutil.which("docker"):
        done = subprocess.run(["docker", "compose", "version"], capture_output=True, check=False)
        if done.returncode == 0:
            yield ["docker", "compose"]


@pytest.fixture(scope="module", params=["docker-compose", "docker compose"])
def compose(request: pytest.FixtureRequest) -> list[str]:
    """Compose itself; it checks a file without a daemon."""
    for command in compose_commands():
        if " ".join(command) == request.param:
            return command
    pytest.skip(f"there is no {request.param}")


def check_with(
    compose: list[str], text: str, variables: dict[str, str], tmp_path: Path, *more: Path
) -> subprocess.CompletedProcess[str]:
    """`config --quiet` with these variables and none of this process."""
    env_file, path = tmp_path / "env", tmp_path / "docker-compose.yml"
    env_file.write_text("".join(f"{name}={value}\n" for name, value in variables.items()))
    path.write_text(text)
    files = [part for each in (path, *more) for part in ("--file", str(each))]
    command = [*compose, "--env-file", str(env_file), "--project-directory", str(ROOT), *files, "config", "--quiet"]
    home = {"PATH": str(Path(shutil.which(compose[0]) or "").parent), "HOME": str(tmp_path)}
    return subprocess.run(command, env=home, capture_output=True, text=True, timeout=120, check=False)


def readable_by(compose: list[str]) -> str:
    """Version 1, which Debian 12 has, knows all of the file but the key `name`."""
    version = subprocess.run([*compose, "version", "--short"], capture_output=True, text=True, check=False).stdout
    return re.sub(r"^name: .*\n", "", TEXT, flags=re.MULTILINE) if version.startswith("1.") else TEXT


def test_compose_takes_it(compose: list[str], secrets: dict[str, str], tmp_path: Path) -> None:
    text = readable_by(compose)
    taken = check_with(compose, text, secrets, tmp_path)
    assert taken.returncode == 0, taken.stderr
    refused = check_with(compose, text.replace("depends_on:", "depend_on:", 1), secrets, tmp_path)
    assert refused.returncode != 0, "this validator takes anything"


def test_compose_starts_nothing_while_one_secret_is_empty(
    compose: list[str], secrets: dict[str, str], tmp_path: Path
) -> None:
    refused = check_with(compose, readable_by(compose), secrets | {"GRAFANA_PASSWORD": ""}, tmp_path)
    assert refused.returncode != 0
    assert "make stack-env" in refused.stderr


def test_compose_takes_it_with_an_s3_of_your_own(compose: list[str], secrets: dict[str, str], tmp_path: Path) -> None:
    if readable_by(compose) != TEXT:
        pytest.skip("compose 1 does not know !override")
    taken = check_with(compose, TEXT, secrets | {"S3_ENDPOINT": "https://s3.example.com"}, tmp_path, OWN_S3)
    assert taken.returncode == 0, taken.stderr


# --- what it must keep for this stack


def test_the_stack_tests_understand_all_of_it(secrets: dict[str, str]) -> None:
    services = load_services(FILE, secrets)
    assert set(services) == set(SERVICES)
    assert {key for key in STACK if not key.startswith("x-")} == {"name", "services", "networks", "volumes"}


def test_the_stack_tests_refuse_what_they_do_not_understand(secrets: dict[str, str], tmp_path: Path) -> None:
    path = tmp_path / FILE.name
    path.write_text(interpolate(TEXT, secrets).replace("stop_grace_period: 75s", "network_mode: host"))
    assert "network_mode" not in SERVICE_KEYS
    with pytest.raises(ValueError, match="network_mode"):
        load_services(path, secrets)


@pytest.mark.parametrize("name", SERVICES)
def test_images_are_pinned(name: str, secrets: dict[str, str]) -> None:
    image, _, tag = interpolate(SERVICES[name]["image"], secrets).rpartition(":")
    assert image, f"{tag} has no tag"
    assert "minio" not in image, "its licence and its images have changed: any other S3"
    if image.startswith("ekiben-"):
        assert tag
    else:
        assert re.fullmatch(r"v?\d+(\.\d+)+", tag), f"{image}:{tag} may be another image tomorrow"
        assert tag.count(".") >= 1
        assert "build" not in SERVICES[name]


def test_the_line_has_the_version_of_the_project() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    defaults = {match["word"] for match in VARIABLE.finditer(TEXT) if match["name"] == "EKIBEN_VERSION"}
    assert defaults == {version}


@pytest.mark.parametrize("name", SERVICES)
def test_every_service_is_restarted_watched_and_limited(name: str) -> None:
    service = SERVICES[name]
    if name in ONE_SHOT:
        assert service["restart"] == "no"
        assert "healthcheck" not in service
    else:
        assert service["restart"] == "unless-stopped"
        health = service["healthcheck"]
        assert health["test"][0] in ("CMD", "CMD-SHELL")
        assert set(health) == {"test", "interval", "timeout", "retries", "start_period"}
    limits = service["deploy"]["resources"]["limits"]
    assert set(limits) == {"cpus", "memory"}
    assert "no-new-privileges:true" in service["security_opt"]
    assert set(service["logging"]["options"]) == {"max-size", "max-file"}, "logs would fill the disk"
    assert {"privileged", "cap_add", "network_mode", "pid", "devices"}.isdisjoint(service)


@pytest.mark.parametrize("name", SERVICES)
def test_who_is_waited_for_exists_and_can_be_waited_for(name: str) -> None:
    for other, how in SERVICES[name].get("depends_on", {}).items():
        if other in ONE_SHOT:
            assert how["condition"] == "service_completed_successfully"
        else:
            assert how["condition"] == "service_healthy"
            assert "healthcheck" in SERVICES[other]


def test_nobody_waits_for_himself() -> None:
    before = {name: set(service.get("depends_on", {})) for name, service in SERVICES.items()}
    while ready := {name for name, others in before.items() if not others}:
        before = {name: others - ready for name, others in before.items() if name not in ready}
    assert before == {}


def test_every_variable_is_a_secret_that_must_be_there_or_has_a_default() -> None:
    found = [(match["name"], match["kind"], match["word"]) for match in VARIABLE.finditer(TEXT)]
    assert {name for name, kind, _ in found if kind == ":?"} == set(SECRETS)
    assert {name for name, kind, _ in found if kind != ":?"}.isdisjoint(SECRETS)
    assert all(kind == ":-" for name, kind, _ in found if name not in SECRETS)
    assert {word for _, kind, word in found if kind == ":?"} == {"run make stack-env"}
    assert not BARE_VARIABLE.search(TEXT), "$NAME has no default"


def test_every_default_is_one_value_and_the_one_that_the_env_file_shows() -> None:
    defaults: dict[str, str] = {}
    for match in VARIABLE.finditer(TEXT):
        if match["kind"] == ":-":
            assert defaults.setdefault(match["name"], match["word"]) == match["word"], match["name"]
    shown = {
        name: value.split("#")[0].strip()
        for name, _, value in (line.lstrip("#").partition("=") for line in OPTIONS.splitlines() if "=" in line)
    }
    of_the_checkout = {"EKIBEN_VERSION", "EKIBEN_REVISION"}
    del shown["COMPOSE_FILE"]  # read by compose itself
    assert set(defaults) - of_the_checkout == set(shown)
    own_s3 = {"S3_ENDPOINT"}  # there is an example of another server
    assert {name: shown[name] for name in set(shown) - own_s3} == {name: defaults[name] for name in set(shown) - own_s3}


def test_no_secret_stands_in_the_file() -> None:
    for name, service in SERVICES.items():
        for variable, value in service.get("environment", {}).items():
            if SECRET_NAME.search(variable):
                assert ":?" in str(value), f"{name}: {variable}"
            for match in PASSWORD_IN_ADDRESS.finditer(str(value)):
                assert match["password"].startswith("${"), f"{name}: {variable}"


@pytest.mark.parametrize("name", SERVICES)
def test_no_secret_stands_in_a_command_where_every_user_of_the_machine_could_read_it(name: str) -> None:
    service = SERVICES[name]
    words = [*service.get("command", []), *service.get("healthcheck", {}).get("test", [])]
    assert not {match["name"] for word in words for match in VARIABLE.finditer(word)} & set(SECRETS)


def test_ports_are_bound_to_one_address_and_meet_nowhere(secrets: dict[str, str]) -> None:
    ports = [port for service in SERVICES.values() for port in service.get("ports", [])]
    assert all(port.startswith("${STACK_BIND:-127.0.0.1}:${") for port in ports)
    published = [interpolate(port, secrets).split(":")[1] for port in ports]
    assert len(set(published)) == len(published)
    assert {name for name, service in SERVICES.items() if "ports" in service} == {
        "encoder",
        "grafana",
        "mlflow",
        "prefect",
        "prometheus",
    }, "databases, files and the exporter are for the other services only"


def test_who_talks_to_callers_reaches_neither_databases_nor_files() -> None:
    networks = {name: set(service["networks"]) for name, service in SERVICES.items()}
    assert set.union(*networks.values()) == set(STACK["networks"])
    assert networks["encoder"].isdisjoint(networks["postgres"] | networks["s3"] | networks["prefect"])
    for name, service in SERVICES.items():
        assert all(networks[name] & networks[other] for other in service.get("depends_on", {})), name
    for asker, asked in (("encoder", "mlflow"), ("prometheus", "encoder"), ("worker", "encoder"), ("worker", "s3")):
        assert networks[asker] & networks[asked], f"{asker} does not reach {asked}"


def test_volumes_are_declared_used_and_nothing_of_the_checkout_is_written() -> None:
    defaults = dict.fromkeys(SECRETS, "secret")
    volumes = [volume for service in SERVICES.values() for volume in service.get("volumes", [])]
    used = [interpolate(volume, defaults).split(":") for volume in volumes]
    assert {source for source, *_ in used if not source.startswith(".")} == set(STACK["volumes"])
    for source, _, *options in (volume for volume in used if volume[0].startswith(".")):
        assert options == ["ro"]
        assert (ROOT / source).is_dir()


def test_whoever_keeps_something_keeps_it_in_a_volume() -> None:
    keepers = {name for name, service in SERVICES.items() if "volumes" in service}
    assert keepers == set(STACK["volumes"])


@pytest.mark.parametrize("name", [".gitignore", ".dockerignore"])
def test_the_env_file_gets_neither_into_git_nor_into_an_image(name: str) -> None:
    assert {".env", "**/.env*"} & set((ROOT / name).read_text(encoding="utf-8").splitlines())
