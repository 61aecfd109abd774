"""The Kubernetes manifests, rendered as `kubectl apply -k` would send them, and questions that tests ask them."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from prefect.utilities.templating import apply_values

ROOT = Path(__file__).parents[3]
K8S = ROOT / "deployments" / "k8s"
JOB_TEMPLATE = ROOT / "deployments" / "prefect" / "kubernetes.json"
FLOW_RUN = "Job/flow-run"
DOOR = "encoder"
RUN_LABELS = {"prefect.io/flow-run-id": "of-a-run"}  # Prefect's worker labels each job and its pod so

Document = dict[str, Any]


class NoKustomizeError(Exception):
    """There is no program here that renders a kustomization."""


@dataclass(frozen=True)
class Pod:
    """A pod as some document makes it."""

    owner: str  # e.g. `Deployment/encoder`
    labels: Mapping[str, str]
    spec: Document

    @property
    def name(self) -> str | None:
        """What it is, by the label that all of ours have."""
        return self.labels.get("app.kubernetes.io/name")

    @property
    def containers(self) -> list[Document]:
        """Those of the start included."""
        return [*self.spec.get("initContainers", []), *self.spec["containers"]]

    @property
    def port_names(self) -> set[str]:
        """Of all containers."""
        return {port["name"] for container in self.containers for port in container.get("ports", [])}


@dataclass(frozen=True)
class Manifests:
    """All documents of one overlay."""

    name: str
    documents: tuple[Document, ...]

    def all(self, kind: str) -> list[Document]:
        """The documents of a kind."""
        return [document for document in self.documents if document["kind"] == kind]

    def one(self, kind: str, name: str) -> Document:
        """A document by kind and name."""
        (found,) = [document for document in self.all(kind) if document["metadata"]["name"] == name]
        return found

    def names(self, kind: str) -> set[str]:
        """Of the documents of a kind."""
        return {document["metadata"]["name"] for document in self.all(kind)}

    @property
    def pods(self) -> list[Pod]:
        """Every pod: those of the deployments, and that of a flow run."""
        made = [(f"{owner['kind']}/{owner['metadata']['name']}", owner) for owner in self.all("Deployment")]
        templates = [(name, owner["spec"]["template"]) for name, owner in [*made, (FLOW_RUN, flow_run())]]
        return [Pod(name, template["metadata"]["labels"], template["spec"]) for name, template in templates]

    def pod(self, deployment: str) -> Pod:
        """The pod of a deployment."""
        (found,) = [pod for pod in self.pods if pod.owner == f"Deployment/{deployment}"]
        return found

    def matching(self, selector: Mapping[str, Any]) -> list[Pod]:
        """The pods that a selector means; an empty one means all."""
        assert set(selector) <= {"matchLabels", "matchExpressions"}
        wanted, conditions = selector.get("matchLabels", {}), selector.get("matchExpressions", [])
        assert all(condition["operator"] == "Exists" for condition in conditions), "no other is understood here"
        keys = {condition["key"] for condition in conditions}
        return [pod for pod in self.pods if wanted.items() <= pod.labels.items() and keys <= pod.labels.keys()]

    def environment(self, pod: Pod, container: str) -> dict[str, str | None]:
        """The variables of a container; None for what comes from a secret or from the pod itself."""
        (described,) = [each for each in pod.containers if each["name"] == container]
        found: dict[str, str | None] = {}
        for source in described.get("envFrom", []):
            if "configMapRef" in source:
                found |= self.one("ConfigMap", source["configMapRef"]["name"])["data"]
        for variable in described.get("env", []):
            found[variable["name"]] = variable.get("value")
        return found


def flow_run() -> Document:
    """The job that Prefect makes of the pool's template, with all defaults."""
    template = json.loads(JOB_TEMPLATE.read_text(encoding="utf-8"))
    about = template["variables"]["properties"]
    values = {name: each["default"] for name, each in about.items() if "default" in each}
    values |= {"name": "wet-cat", "command": ["prefect", "flow-run", "execute"], "labels": RUN_LABELS}
    values["env"] = [{"name": name, "value": value} for name, value in values["env"].items() if value is not None]
    job = dict(apply_values(template["job_configuration"]["job_manifest"], values))
    pod = job["spec"]["template"]
    pod.setdefault("metadata", {}).setdefault("labels", {}).update(RUN_LABELS)  # as the worker does
    for name in ("parallelism", "completions"):  # Prefect's own template has them here, where Kubernetes overlooks them
        pod["spec"].pop(name, None)
    return job


def render(overlay: str) -> Manifests:
    """Render an overlay.

    Raises:
        NoKustomizeError: there is neither kubectl nor kustomize.
    """
    commands = {"kubectl": ["kubectl", "kustomize"], "kustomize": ["kustomize", "build"]}
    command = next((words for name, words in commands.items() if shutil.which(name)), None)
    if command is None:
        raise NoKustomizeError("neither kubectl nor kustomize is installed")
    done = subprocess.run(
        [*command, str(K8S / "overlays" / overlay)], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return Manifests(overlay, tuple(yaml.safe_load_all(done.stdout)))


def find_env(pod: Pod, container: str, name: str) -> Document:
    """A variable of a container, as it is written down."""
    (described,) = [each for each in pod.containers if each["name"] == container]
    (found,) = [variable for variable in described["env"] if variable["name"] == name]
    return dict(found)


def secret_references(manifests: Manifests) -> Iterator[tuple[str, str]]:
    """Name and key of every secret that a variable comes from; the key is `*` where all of them are taken."""
    for pod in manifests.pods:
        for container in pod.containers:
            for source in container.get("envFrom", []):
                if "secretRef" in source:
                    yield source["secretRef"]["name"], "*"
            for variable in container.get("env", []):
                if (reference := variable.get("valueFrom", {}).get("secretKeyRef")) is not None:
                    yield reference["name"], reference["key"]
        for volume in pod.spec.get("volumes", []):
            if "secret" in volume:
                yield volume["secret"]["secretName"], "*"


def count_bytes(quantity: str) -> int:
    """Bytes of a quantity such as `512Mi`."""
    found = re.fullmatch(r"(\d+)(Ki|Mi|Gi)", quantity)
    assert found, quantity
    return int(found[1]) * 1024 ** (["Ki", "Mi", "Gi"].index(found[2]) + 1)


def routes_of_the_server() -> set[str]:
    document = json.loads((ROOT / "docs" / "openapi.json").read_text(encoding="utf-8"))
    return set(document["paths"])
