"""docker-compose.yml as the stack test reads it: every service's command, environment, health check and volumes.

Only what that file uses is understood, and anything else is an error: a setting that the test would not see must not
pass for one that was tested.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

VARIABLE = re.compile(r"\$(?:\$|\{(?P<name>\w+)(?:(?P<kind>:-|:\?)(?P<word>[^}]*))?\})")
SERVICE_KEYS = {
    "build",
    "command",
    "depends_on",
    "deploy",
    "environment",
    "healthcheck",
    "image",
    "init",
    "logging",
    "networks",
    "ports",
    "read_only",
    "restart",
    "security_opt",
    "shm_size",
    "stop_grace_period",
    "tmpfs",
    "volumes",
}


@dataclass(frozen=True)
class Service:
    """One service, with all variables put in."""

    name: str
    image: str
    command: list[str]
    environment: dict[str, str]
    health: list[str]  # a command; empty: none
    volumes: dict[str, str]  # path in the container -> name of a volume, or path on this machine
    tmpfs: list[str]
    depends_on: dict[str, str]  # service -> condition
    is_built: bool
    networks: frozenset[str]


def load_services(path: Path, variables: Mapping[str, str]) -> dict[str, Service]:
    """Read a compose file as `docker compose` would with these variables and no others.

    Raises:
        KeyError: a variable that the file asks for is not set.
        ValueError: the file uses what is not understood here.
    """
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    return {name: _read_service(name, _fill(raw, variables)) for name, raw in content["services"].items()}


def interpolate(text: str, variables: Mapping[str, str]) -> str:
    """Put variables in: `${NAME}`, `${NAME:-default}`, `${NAME:?message}`, and `$$` for a dollar."""

    def put(match: re.Match[str]) -> str:
        if match["name"] is None:
            return "$"
        value = variables.get(match["name"], "")
        if value:
            return value
        if match["kind"] == ":-":
            return str(match["word"])
        raise KeyError(f"{match['name']}: {match['word'] or 'not set'}")

    return VARIABLE.sub(put, text)


def _fill(node: Any, variables: Mapping[str, str]) -> Any:
    if isinstance(node, str):
        return interpolate(node, variables)
    if isinstance(node, list):
        return [_fill(item, variables) for item in node]
    if isinstance(node, dict):
        return {key: _fill(value, variables) for key, value in node.items()}
    return node


def _read_service(name: str, raw: dict[str, Any]) -> Service:
    unknown = set(raw) - SERVICE_KEYS
    if unknown:
        raise ValueError(f"{name}: {', '.join(sorted(unknown))} is not understood by tests/stack/compose.py")
    volumes = {}
    for volume in raw.get("volumes", []):
        source, target, *_ = volume.split(":")
        volumes[target] = source
    return Service(
        name=name,
        image=raw["image"],
        command=[str(part) for part in raw.get("command", [])],
        environment={key: str(value) for key, value in raw.get("environment", {}).items()},
        health=_read_health(name, raw.get("healthcheck")),
        volumes=volumes,
        tmpfs=raw.get("tmpfs", []),
        depends_on={other: how["condition"] for other, how in raw.get("depends_on", {}).items()},
        is_built="build" in raw,
        networks=frozenset(raw.get("networks", ["default"])),
    )


def _read_health(name: str, raw: dict[str, Any] | None) -> list[str]:
    if raw is None:
        return []
    kind, *words = raw["test"]
    if kind == "CMD":
        return [str(word) for word in words]
    if kind == "CMD-SHELL":
        return ["sh", "-c", *words]
    raise ValueError(f"{name}: a health check is CMD or CMD-SHELL, not {shlex.quote(str(kind))}")
