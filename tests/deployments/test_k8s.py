"""The manifests of deployments/k8s: each against the schemas of Kubernetes, all against each other and the server."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import jsonschema
import kubernetes_validate
import pytest
import yaml
from pydantic import AliasChoices
from pydantic_settings import BaseSettings

from bentos.metrics import LANES, ServeMetrics
from bentos.settings import ServeSettings
from flows.settings import FlowSettings
from tests.bentos.test_registry_client import Registry
from tests.deployments.manifests import (
    FLOW_RUN,
    JOB_TEMPLATE,
    K8S,
    ROOT,
    Manifests,
    NoKustomizeError,
    Pod,
    count_bytes,
    find_env,
    flow_run,
    render,
    secret_references,
)

OLDEST, NEWEST = (
    "1.32",
    "1.37",
)  # of Kubernetes: what deployments/README.md promises, and the newest whose schemas are here
OVERLAYS = ("small", "large")
README = ROOT / "deployments" / "README.md"
BATCHES_S = 15  # for the batches that run when the last request is answered
DOOR, WORKER_PORT = "encoder", 8080
SECRET_WORDS = re.compile(r"PASSWORD|SECRET|TOKEN|AUTH|CREDENTIAL|_KEYS?$")

# What the Prometheus Operator's own definitions allow, of the fields that are used here: any other name is refused.
LABELS = {"type": "object", "additionalProperties": {"type": "string"}}
DURATION = {"type": "string", "pattern": r"^(\d+(ms|[smhdwy]))+$"}
MONITOR_SPEC = {
    "type": "object",
    "required": ["selector", "endpoints"],
    "additionalProperties": False,
    "properties": {
        "selector": {"type": "object", "additionalProperties": False, "properties": {"matchLabels": LABELS}},
        "targetLabels": {"type": "array", "items": {"type": "string"}},
        "endpoints": {
            "type": "array",
            "minItems": 1,
            "items": {
                "type": "object",
                "required": ["port"],
                "additionalProperties": False,
                "properties": {
                    "port": {"type": "string"},
                    "path": {"type": "string", "pattern": "^/"},
                    "interval": DURATION,
                    "scrapeTimeout": DURATION,
                    "relabelings": {
                        "type": "array",
                        "items": {
                            "type": "object",
                            "additionalProperties": False,
                            "properties": {"targetLabel": {"type": "string"}, "replacement": {"type": "string"}},
                        },
                    },
                },
            },
        },
    },
}
RULES_SPEC = {
    "type": "object",
    "required": ["groups"],
    "additionalProperties": False,
    "properties": {
        "groups": {
            "type": "array",
            "minItems": 1,
            "items": {
                "type": "object",
                "required": ["name", "rules"],
                "additionalProperties": False,
                "properties": {
                    "name": {"type": "string", "minLength": 1},
                    "interval": DURATION,
                    "rules": {
                        "type": "array",
                        "items": {
                            "type": "object",
                            "required": ["expr"],
                            "oneOf": [{"required": ["alert"]}, {"required": ["record"]}],
                            "additionalProperties": False,
                            "properties": {
                                "alert": {"type": "string"},
                                "record": {"type": "string"},
                                "expr": {"type": ["string", "integer"]},
                                "for": DURATION,
                                "keep_firing_for": DURATION,
                                "labels": LABELS,
                                "annotations": LABELS,
                            },
                        },
                    },
                },
            },
        }
    },
}


@pytest.fixture(scope="module", params=OVERLAYS)
def manifests(request: pytest.FixtureRequest) -> Manifests:
    return rendered(request.param)


@pytest.fixture(scope="module")
def large() -> Manifests:
    return rendered("large")


def rendered(overlay: str) -> Manifests:
    try:
        return render(overlay)
    except NoKustomizeError as error:
        pytest.skip(f"{error}: nothing renders the manifests here")


# --- each by itself


@pytest.mark.parametrize("version", [OLDEST, NEWEST])
def test_every_document_is_one_that_kubernetes_takes(manifests: Manifests, version: str) -> None:
    known = [document for document in manifests.documents if document["kind"] != "ServiceMonitor"]
    for document in [*known, flow_run()]:
        kubernetes_validate.validate(document, version, strict=True)
    assert len(known) > 20


def test_the_schemas_refuse_what_is_misspelt(large: Manifests) -> None:
    wrong = json.loads(json.dumps(large.one("Deployment", "encoder")))
    wrong["spec"]["template"]["spec"]["terminationGraceSeconds"] = 90
    with pytest.raises(kubernetes_validate.ValidationError, match="terminationGraceSeconds"):
        kubernetes_validate.validate(wrong, OLDEST, strict=True)


def test_service_monitors_have_only_fields_that_there_are(large: Manifests) -> None:
    monitors = large.all("ServiceMonitor")
    assert {monitor["metadata"]["name"] for monitor in monitors} == {"encoder", "line-exporter"}
    for monitor in monitors:
        assert monitor["apiVersion"] == "monitoring.coreos.com/v1"
        jsonschema.validate(monitor["spec"], MONITOR_SPEC)


def test_the_small_overlay_needs_nothing_but_kubernetes() -> None:
    small = rendered("small")
    groups = {document["apiVersion"].rpartition("/")[0] for document in small.documents}
    assert groups <= {"", "apps", "autoscaling", "batch", "networking.k8s.io", "policy", "rbac.authorization.k8s.io"}
    (metric,) = small.one("HorizontalPodAutoscaler", "encoder")["spec"]["metrics"]
    assert metric["type"] == "ContainerResource", "metrics-server alone gives it"


def test_everything_is_in_the_namespace(manifests: Manifests) -> None:
    (namespace,) = manifests.names("Namespace")
    for document in manifests.documents:
        assert document["kind"] == "Namespace" or document["metadata"]["namespace"] == namespace
    labels = manifests.one("Namespace", namespace)["metadata"]["labels"]
    assert labels["pod-security.kubernetes.io/enforce"] == "restricted"
    template = json.loads(JOB_TEMPLATE.read_text(encoding="utf-8"))
    assert template["variables"]["properties"]["namespace"]["default"] == namespace


# --- pods


def test_every_container_is_locked_down(manifests: Manifests) -> None:
    for pod in manifests.pods:
        context = pod.spec["securityContext"]
        assert context["runAsNonRoot"] is True, pod.owner
        assert context["runAsUser"] == context["runAsGroup"] == 10001, "the user of the images"
        assert context["seccompProfile"] == {"type": "RuntimeDefault"}
        assert not {"hostNetwork", "hostPID", "hostIPC"} & pod.spec.keys()
        for container in pod.containers:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }, (pod.owner, container["name"])


def test_what_a_container_writes_to_is_a_volume(manifests: Manifests) -> None:
    """The images write to /tmp and /state, and to nothing else."""
    for pod in manifests.pods:
        volumes = {volume["name"]: volume for volume in pod.spec["volumes"]}
        for container in pod.containers:
            mounts = {mount["mountPath"]: mount for mount in container["volumeMounts"]}
            assert {mount["name"] for mount in mounts.values()} <= volumes.keys(), pod.owner
            assert not {"/tmp", "/state"} - mounts.keys(), (pod.owner, container["name"])
            writable = {path for path, mount in mounts.items() if not mount.get("readOnly")}
            assert writable == {"/tmp", "/state"}
            for path in writable:
                assert {"emptyDir", "persistentVolumeClaim"} & volumes[mounts[path]["name"]].keys()
        for volume in volumes.values():
            if "emptyDir" in volume:
                assert volume["emptyDir"]["sizeLimit"], "or one pod fills the disk of its node"
            if "configMap" in volume:
                assert volume["configMap"]["name"] in manifests.names("ConfigMap")
            if "persistentVolumeClaim" in volume:
                assert volume["persistentVolumeClaim"]["claimName"] in manifests.names("PersistentVolumeClaim")


def test_every_container_says_what_it_needs(manifests: Manifests) -> None:
    for pod in manifests.pods:
        for container in pod.containers:
            resources = container["resources"]
            assert {"cpu", "memory"} <= resources["requests"].keys(), (pod.owner, container["name"])
            assert count_bytes(resources["limits"]["memory"]) >= count_bytes(resources["requests"]["memory"])
    encoders = [pod for pod in manifests.pods if pod.name == DOOR]
    for pod in encoders:
        (encoder,) = pod.spec["containers"]
        shelf_mb = int(str(manifests.environment(pod, DOOR)["EKIBEN_SHELF_MB"]))
        assert count_bytes(encoder["resources"]["limits"]["memory"]) >= (shelf_mb + 512) * 2**20
        sizes = [count_bytes(volume["emptyDir"]["sizeLimit"]) for volume in pod.spec["volumes"] if "emptyDir" in volume]
        assert count_bytes(encoder["resources"]["limits"]["ephemeral-storage"]) > sum(sizes), (
            "else it is evicted earlier"
        )
        assert find_env(pod, DOOR, "EKIBEN_THREADS")["valueFrom"]["resourceFieldRef"] == {
            "containerName": DOOR,
            "resource": "requests.cpu",
        }, "as many threads as cores that it asks for"
        assert "cpu" not in encoder["resources"]["limits"]


def test_images_have_a_version(manifests: Manifests) -> None:
    for pod in manifests.pods:
        if pod.owner == FLOW_RUN:
            continue  # setup.py puts the version in
        for container in pod.containers:
            found = re.fullmatch(r"[a-z0-9./:-]+/(ekiben-\w+):([\w.-]+)", container["image"])
            assert found, container["image"]
            assert found[2] not in ("latest", "unset", "master", "main")


def test_prefect_fills_the_job_of_a_flow_run() -> None:
    job = flow_run()
    assert "{{" not in json.dumps(job), "all its variables have a value"
    (container,) = job["spec"]["template"]["spec"]["containers"]
    assert container["name"] == "prefect-job", "prefect-kubernetes refuses any other name"
    assert job["spec"]["backoffLimit"] == 0, "retries are Prefect's"


def test_the_worker_serves_a_pool_that_is_made(manifests: Manifests) -> None:
    (worker,) = manifests.pod("line-worker").spec["containers"]
    command = worker["command"]
    assert command[command.index("--pool") + 1] == JOB_TEMPLATE.stem == command[command.index("--type") + 1]
    assert "--no-create-pool-if-not-found" in command, "else it would make one whose jobs are not locked down"


def test_nobody_holds_a_token_but_who_starts_jobs(manifests: Manifests) -> None:
    for pod in manifests.pods:
        assert pod.spec["serviceAccountName"] in manifests.names("ServiceAccount")
        assert pod.spec["automountServiceAccountToken"] is (pod.owner == "Deployment/line-worker"), pod.owner
    for account in manifests.all("ServiceAccount"):
        assert account["automountServiceAccountToken"] is False


def test_the_worker_may_do_what_it_does_and_no_more(manifests: Manifests) -> None:
    (binding,) = manifests.all("RoleBinding")
    assert binding["roleRef"]["name"] in manifests.names("Role")
    assert [subject["name"] for subject in binding["subjects"]] == ["line-worker"]
    assert {subject["namespace"] for subject in binding["subjects"]} == manifests.names("Namespace")
    assert not manifests.all("ClusterRole") + manifests.all("ClusterRoleBinding")
    (role,) = manifests.all("Role")
    allowed = {(resource, verb) for rule in role["rules"] for resource in rule["resources"] for verb in rule["verbs"]}
    jobs = {("jobs", verb) for verb in ("create", "delete", "get", "list", "watch")}
    assert allowed == jobs | {("pods", "get"), ("pods", "list"), ("pods", "watch"), ("pods/log", "get")}
    namespaces = find_env(manifests.pod("line-worker"), "worker", "PREFECT_INTEGRATIONS_KUBERNETES_OBSERVER_NAMESPACES")
    assert namespaces["valueFrom"]["fieldRef"]["fieldPath"] == "metadata.namespace", "it may not watch others"


# --- settings and secrets


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


KEY_FILES = ("EKIBEN_API_KEYS_FILE", "EKIBEN_ADMIN_KEYS_FILE")


# --- serving


def routes_of_the_server() -> set[str]:
    document = json.loads((ROOT / "docs" / "openapi.json").read_text(encoding="utf-8"))
    return set(document["paths"])


def test_probes_ask_what_there_is(manifests: Manifests) -> None:
    for pod in manifests.pods:
        if pod.owner == FLOW_RUN:
            continue
        (container,) = pod.spec["containers"]
        for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
            asked = container[probe]
            port = (asked.get("httpGet") or asked["tcpSocket"])["port"]
            assert port in pod.port_names, (pod.owner, probe)
            if "httpGet" in asked:
                routes = routes_of_the_server() if container["name"] == DOOR else {"/health"}  # Prefect's worker
                assert asked["httpGet"]["path"] in routes, (pod.owner, probe)
    (encoder,) = manifests.pod(DOOR).spec["containers"]
    assert encoder["readinessProbe"]["httpGet"]["path"] == "/readyz", "only right vectors are ready"
    assert encoder["livenessProbe"]["httpGet"]["path"] == "/livez", "a restart mends no wrong vectors"
    assert encoder["startupProbe"]["periodSeconds"] * encoder["startupProbe"]["failureThreshold"] >= 60


def test_a_pod_that_ends_has_time_for_what_it_is_doing(manifests: Manifests, monkeypatch: pytest.MonkeyPatch) -> None:
    for pod in manifests.pods:
        if pod.name != DOOR:
            continue
        for name, value in manifests.environment(pod, DOOR).items():
            if value is not None:
                monkeypatch.setenv(name, value)
        settings = ServeSettings()
        (encoder,) = pod.spec["containers"]
        leaving_s = encoder["lifecycle"]["preStop"]["sleep"]["seconds"]
        assert leaving_s >= 5, "until nobody sends requests here any more"
        longest_s = settings.body_timeout_s + settings.timeout_s + settings.send_timeout_s
        assert pod.spec["terminationGracePeriodSeconds"] >= leaving_s + longest_s + BATCHES_S


def test_a_new_pod_is_ready_before_an_old_one_goes(manifests: Manifests) -> None:
    strategy = manifests.one("Deployment", DOOR)["spec"]["strategy"]
    assert strategy["rollingUpdate"]["maxUnavailable"] == 0
    assert strategy["rollingUpdate"]["maxSurge"] not in (0, "0%")


def test_every_selector_means_pods(manifests: Manifests) -> None:
    for owner in manifests.all("Deployment"):
        (pod,) = manifests.matching(owner["spec"]["selector"])
        assert pod.owner == f"Deployment/{owner['metadata']['name']}", "its own pods and no others"
        for spread in pod.spec.get("topologySpreadConstraints", []):
            assert manifests.matching(spread["labelSelector"]) == [pod]
    for service in manifests.all("Service"):
        (pod,) = manifests.matching({"matchLabels": service["spec"]["selector"]})
        for port in service["spec"]["ports"]:
            assert port["targetPort"] in pod.port_names
    for budget in manifests.all("PodDisruptionBudget"):
        assert manifests.matching(budget["spec"]["selector"])


def test_versions_of_different_tracks_have_different_addresses(large: Manifests) -> None:
    for name, track in ((DOOR, "stable"), (f"{DOOR}-canary", "canary")):
        (pod,) = large.matching({"matchLabels": large.one("Service", name)["spec"]["selector"]})
        assert pod.owner == f"Deployment/{name}"
        assert pod.labels["track"] == track
    canary = large.pod(f"{DOOR}-canary")
    assert large.environment(canary, DOOR)["EKIBEN_FOLLOW"] == "", "it stays with the version of its image"
    assert large.environment(large.pod(DOOR), DOOR)["EKIBEN_SHADOW"] == "challenger"
    assert canary.spec["containers"][0]["image"] != large.pod(DOOR).spec["containers"][0]["image"]


def test_evictions_leave_somebody_and_never_wait_for_ever(manifests: Manifests) -> None:
    (budget,) = manifests.all("PodDisruptionBudget")
    (pod,) = manifests.matching(budget["spec"]["selector"])
    scaler = manifests.one("HorizontalPodAutoscaler", pod.owner.partition("/")[2])
    replicas = scaler["spec"]["minReplicas"]
    allowed = budget["spec"]["maxUnavailable"]
    if isinstance(allowed, str):
        allowed = math.ceil(replicas * int(allowed.removesuffix("%")) / 100)
    assert allowed >= 1
    assert replicas == 1 or allowed < replicas


def test_zones_are_spread_over(large: Manifests) -> None:
    spreads = large.pod(DOOR).spec["topologySpreadConstraints"]
    strict = {spread["topologyKey"] for spread in spreads if spread["whenUnsatisfiable"] == "DoNotSchedule"}
    assert strict == {"topology.kubernetes.io/zone"}
    assert large.one("HorizontalPodAutoscaler", DOOR)["spec"]["minReplicas"] >= 3, "one a zone"


# --- scaling and monitoring


def metric_names() -> set[str]:
    """The series that the server has from its first scrape on."""
    families = ServeMetrics(["/encode"]).registry.collect()
    return {sample.name for family in families for sample in family.samples}


def test_the_autoscaler_scales_what_there_is(manifests: Manifests) -> None:
    (scaler,) = manifests.all("HorizontalPodAutoscaler")
    target = scaler["spec"]["scaleTargetRef"]
    deployment = manifests.one(target["kind"], target["name"])
    assert target["apiVersion"] == deployment["apiVersion"]
    assert "replicas" not in deployment["spec"], "each `apply` would undo what the autoscaler did"
    assert scaler["spec"]["minReplicas"] < scaler["spec"]["maxReplicas"]
    containers = {container["name"] for container in manifests.pod(target["name"]).spec["containers"]}
    for metric in scaler["spec"]["metrics"]:
        if metric["type"] == "ContainerResource":
            assert metric["containerResource"]["container"] in containers
    assert scaler["spec"]["behavior"]["scaleDown"]["stabilizationWindowSeconds"] >= 300


def test_the_autoscaler_counts_the_texts_that_wait(large: Manifests) -> None:
    waiting, cpu = large.one("HorizontalPodAutoscaler", DOOR)["spec"]["metrics"]
    (rule,) = yaml.safe_load((K8S / "monitoring" / "adapter-rules.yaml").read_text(encoding="utf-8"))["rules"]["custom"]
    assert waiting["pods"]["metric"]["name"] == rule["name"]["as"]
    assert cpu["type"] == "ContainerResource", "goes on when the adapter does not answer"
    (series, selector) = re.fullmatch(r"(\w+)\{(.*)\}", rule["seriesQuery"]).groups()  # type: ignore[union-attr]
    assert series in metric_names()
    (lane,) = re.findall(r'lane="(\w+)"', selector)
    assert lane in LANES
    assert f'lane="{lane}"' in rule["metricsQuery"]
    assert rule["resources"]["overrides"].keys() == {"namespace", "pod"}
    threads = large.pod(DOOR).spec["containers"][0]["resources"]["requests"]["cpu"]
    assert waiting["pods"]["target"] == {"type": "AverageValue", "averageValue": threads}


def test_service_monitors_find_their_services(large: Manifests) -> None:
    for monitor in large.all("ServiceMonitor"):
        wanted = monitor["spec"]["selector"]["matchLabels"]
        services = [one for one in large.all("Service") if wanted.items() <= one["metadata"]["labels"].items()]
        assert services, monitor["metadata"]["name"]
        for endpoint in monitor["spec"]["endpoints"]:
            assert endpoint["path"] == "/metrics"
            for service in services:
                assert endpoint["port"] in {port["name"] for port in service["spec"]["ports"]}
    assert "/metrics" in routes_of_the_server()


def test_the_rules_find_the_jobs_that_they_name(large: Manifests) -> None:
    jobs = set()
    for monitor in large.all("ServiceMonitor"):
        for endpoint in monitor["spec"]["endpoints"]:
            named = [one["replacement"] for one in endpoint.get("relabelings", []) if one["targetLabel"] == "job"]
            jobs.add(named[0] if named else monitor["metadata"]["name"])  # by default that of the Service
    rules = (ROOT / "deployments" / "prometheus" / "rules.yml").read_text(encoding="utf-8")
    assert set(re.findall(r'job="(\w+)"', rules)) <= jobs


def test_the_alerts_are_those_of_prometheus_itself() -> None:
    done = subprocess.run([K8S / "monitoring" / "prometheus-rule.sh"], capture_output=True, text=True, check=True)
    document = yaml.safe_load(done.stdout)
    rules = yaml.safe_load((ROOT / "deployments" / "prometheus" / "rules.yml").read_text(encoding="utf-8"))
    assert (document["apiVersion"], document["kind"]) == ("monitoring.coreos.com/v1", "PrometheusRule")
    assert document["spec"] == rules
    jsonschema.validate(document["spec"], RULES_SPEC)


# --- the network


def policies_of(manifests: Manifests, pod: Pod, direction: str) -> list[dict[str, Any]]:
    """The rules of a direction, `ingress` or `egress`, that hold for a pod."""
    policies = [one["spec"] for one in manifests.all("NetworkPolicy")]
    return [
        rule
        for policy in policies
        if pod in manifests.matching(policy["podSelector"])
        for rule in policy.get(direction, [])
    ]


def open_ports(manifests: Manifests, pod: Pod, direction: str) -> set[int | str]:
    return {port["port"] for rule in policies_of(manifests, pod, direction) for port in rule["ports"]}


def test_what_is_not_named_is_not_reached(manifests: Manifests) -> None:
    closed = [one["spec"] for one in manifests.all("NetworkPolicy") if not one["spec"]["podSelector"]]
    assert {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]} in closed
    for policy in manifests.all("NetworkPolicy"):
        pods = manifests.matching(policy["spec"]["podSelector"])
        assert pods, policy["metadata"]["name"]
        for rule in policy["spec"].get("ingress", []):
            assert rule["from"], "nobody may come from anywhere"
            for port in rule["ports"]:
                assert all(port["port"] in pod.port_names for pod in pods)


def test_callers_reach_the_doors(manifests: Manifests) -> None:
    for service in manifests.all("Service"):
        (pod,) = manifests.matching({"matchLabels": service["spec"]["selector"]})
        assert {port["targetPort"] for port in service["spec"]["ports"]} <= open_ports(manifests, pod, "ingress")


def test_pods_reach_the_servers_that_they_are_told_of(manifests: Manifests) -> None:
    asked = {
        "Deployment/encoder": ["MLFLOW_TRACKING_URI"],
        "Deployment/line-worker": ["PREFECT_API_URL"],
        "Deployment/line-exporter": ["PREFECT_API_URL", "MLFLOW_TRACKING_URI"],
        FLOW_RUN: ["PREFECT_API_URL", "MLFLOW_TRACKING_URI", "AWS_ENDPOINT_URL_S3"],
    }
    for pod in manifests.pods:
        reached = open_ports(manifests, pod, "egress")
        assert 53 in reached, "names are looked up"
        environment = manifests.environment(pod, pod.spec["containers"][0]["name"])
        for name in asked.get(pod.owner, []):
            assert urlsplit(str(environment[name])).port in reached, (pod.owner, name)
    assert open_ports(manifests, manifests.pod(DOOR), "egress") == {53, 5000}, "MLflow and names, nothing else"


# --- what a pod does before it serves


@pytest.fixture
def registry(tiny_lunchbox_path: Path, tmp_path: Path) -> Iterator[tuple[Registry, str]]:
    """An MLflow server's answers, at an address."""
    answers = Registry(tiny_lunchbox_path, tmp_path / "home")

    class Answers(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            answer = answers.answer(httpx.Request("GET", f"http://registry{self.path}"))
            self.send_response(answer.status_code)
            for name, value in answer.headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(answer.content)

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Answers) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield answers, f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def fetch(image: Path, state: Path, uri: str, follow: str) -> subprocess.CompletedProcess[str]:
    image.mkdir(exist_ok=True)
    environment = {
        "PYTHONPATH": str(ROOT),
        "EKIBEN_FOLLOW": follow,
        "EKIBEN_SHELF_FOLDER": str(state),
        "MLFLOW_TRACKING_URI": uri,
        "BENTOML_HOME": str(image / "home"),
    }
    command = [sys.executable, str(K8S / "base" / "serving" / "fetch.py")]
    return subprocess.run(command, cwd=image, env=environment, capture_output=True, text=True, timeout=120, check=False)


def test_a_pod_fetches_what_it_is_to_serve_before_it_serves(registry: tuple[Registry, str], tmp_path: Path) -> None:
    answers, uri = registry
    done = fetch(tmp_path / "image", tmp_path / "state", uri, "champion")
    assert done.returncode == 0, done.stderr
    place = tmp_path / "state" / f"ekiben-{answers.pointer.bento_version}"
    assert {path.name for path in place.iterdir()} == {path.name for path in answers.box.iterdir() if path.is_file()}
    assert answers.pointer.bento_version in done.stdout


def test_what_the_image_has_is_not_fetched(registry: tuple[Registry, str], tmp_path: Path) -> None:
    answers, uri = registry
    own = tmp_path / "image" / "bento" / "models" / "ekiben-model" / answers.pointer.bento_version
    own.parent.mkdir(parents=True)
    own.symlink_to(answers.box)
    done = fetch(tmp_path / "image", tmp_path / "state", uri, "champion")
    assert done.returncode == 0, done.stderr
    assert not answers.downloads


def test_without_a_champion_or_without_following_the_image_will_do(
    registry: tuple[Registry, str], tmp_path: Path
) -> None:
    _, uri = registry
    for follow, address in (("challenger", uri), ("", "http://127.0.0.1:9")):
        done = fetch(tmp_path / "image", tmp_path / "state", address, follow)
        assert done.returncode == 0, done.stderr
        assert "the image's version will be served" in done.stdout


def test_a_pod_whose_registry_is_away_waits_and_says_why(tmp_path: Path) -> None:
    done = fetch(tmp_path / "image", tmp_path / "state", "http://127.0.0.1:9", "champion")
    assert done.returncode == 1
    assert re.fullmatch(
        r"champion cannot be fetched: the registry http://127.0.0.1:9 cannot be used: .*\n", done.stderr
    )
