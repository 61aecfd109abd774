"""Each document of the manifests by itself: against the schemas of Kubernetes and of the Prometheus Operator."""

from __future__ import annotations

import json

import jsonschema
import kubernetes_validate
import pytest

from tests.deployments.k8s.manifests import JOB_TEMPLATE, Manifests, flow_run
from tests.deployments.k8s.operator_schemas import MONITOR_SPEC

# Of Kubernetes: what deployments/README.md promises, and the newest whose schemas are here.
OLDEST, NEWEST = "1.32", "1.37"


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


def test_the_small_overlay_needs_nothing_but_kubernetes(small: Manifests) -> None:
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
