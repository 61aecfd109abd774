"""The autoscaler, the monitors and the alerts, against the metrics and services that there are."""

from __future__ import annotations

import re
import subprocess

import jsonschema
import yaml

from bentos.metrics import LANES, ServeMetrics
from tests.deployments.k8s.manifests import DOOR, K8S, ROOT, Manifests, routes_of_the_server
from tests.deployments.k8s.operator_schemas import RULES_SPEC


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
