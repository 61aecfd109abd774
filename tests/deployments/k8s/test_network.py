"""Who may reach whom."""

from __future__ import annotations

from typing import Any
from urllib.parse import urlsplit

from tests.deployments.k8s.manifests import DOOR, FLOW_RUN, Manifests, Pod


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
