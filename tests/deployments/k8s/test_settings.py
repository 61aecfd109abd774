"""The settings and secrets of the pods, against those who read them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from pydantic import AliasChoices
from pydantic_settings import BaseSettings

from bentos.settings import ServeSettings
from flows.settings import FlowSettings
from tests.deployments.k8s.manifests import DOOR, ROOT, Manifests, secret_references

README = ROOT / "deployments" / "README.md"
SECRET_WORDS = re.compile(r"PASSWORD|SECRET|TOKEN|AUTH|CREDENTIAL|_KEYS?$")
KEY_FILES = ("EKIBEN_API_KEYS_FILE", "EKIBEN_ADMIN_KEYS_FILE")


def setting_names(settings: type[BaseSettings]) -> set[str]:
    """The variables that a class of settings reads."""
    names = set()
    for name, field in settings.model_fields.items():
        alias = field.validation_alias
        assert not isinstance(alias, AliasChoices)
        names.add(str(alias) if alias else f"{settings.model_config['env_prefix']}{name.upper()}")
    return names


def test_every_setting_is_one_that_somebody_reads(manifests: Manifests) -> None:
    serving, line = setting_names(ServeSettings), setting_names(FlowSettings)
    for pod in manifests.pods:
        known = serving if pod.name == DOOR else line
        for container in pod.containers:
            names = {name for name in manifests.environment(pod, container["name"]) if name.startswith("EKIBEN_")}
            assert names <= known, (pod.owner, container["name"])


def test_the_server_understands_its_settings(manifests: Manifests, monkeypatch: pytest.MonkeyPatch) -> None:
    pod = manifests.pod(DOOR)
    for name, value in manifests.environment(pod, DOOR).items():
        if value is not None:
            monkeypatch.setenv(name, value)
    settings = ServeSettings()
    assert settings.follow == "champion"
    assert settings.registry_uri == "http://mlflow:5000"
    mounts = {mount["mountPath"]: mount["name"] for mount in pod.spec["containers"][0]["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in pod.spec["volumes"]}
    assert "emptyDir" in volumes[mounts[str(settings.shelf_folder)]], "fetched versions have a place"
    for file in (settings.api_keys_file, settings.admin_keys_file):
        assert file is not None
        assert "secret" in volumes[mounts[str(file.parent)]], (
            "keys are files of a secret: they change without a restart"
        )


def documented_secrets() -> dict[str, set[str]]:
    """Name and keys of every secret that deployments/README.md says how to make."""
    commands = re.sub(r"\\\n\s*", " ", README.read_text(encoding="utf-8")).splitlines()
    made: dict[str, set[str]] = {}
    for command in commands:
        if (found := re.search(r"kubectl .*create secret generic (\S+)(.*)", command)) is not None:
            made[found[1]] = set(re.findall(r"--from-(?:literal|file)=([\w-]+)=", found[2]))
    return made


def test_every_secret_is_documented_and_none_is_here(manifests: Manifests) -> None:
    documented = documented_secrets()
    references = set(secret_references(manifests))
    assert {name for name, _ in references} == documented.keys()
    for name, key in references:
        assert key == "*" or key in documented[name], f"how to make {key} of the secret {name}"
    line = documented["line-secrets"]  # all of it becomes variables of the flow runs
    assert {"EKIBEN_STUDY_STORAGE", "MLFLOW_TRACKING_PASSWORD", "PREFECT_API_AUTH_STRING"} < line
    assert {name for name in line if name.startswith("EKIBEN_")} <= setting_names(FlowSettings)
    keys = {Path(str(manifests.environment(manifests.pod(DOOR), DOOR)[name])).name for name in KEY_FILES}
    assert keys == documented["encoder-keys"]
    assert not manifests.all("Secret")
    for pod in manifests.pods:
        for container in pod.containers:
            for name, value in manifests.environment(pod, container["name"]).items():
                if SECRET_WORDS.search(name) and not name.endswith(("_SECRET_NAME", "_SECRET_KEY")):
                    assert value is None, f"{name} of {pod.owner} is written down"
    for data in manifests.all("ConfigMap"):
        for value in data["data"].values():
            assert not re.search(r"://[^/\s@]*:[^/\s@]+@", value), "a password in an address"
