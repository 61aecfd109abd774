"""How the encoder is probed, replaced, spread and ended."""

from __future__ import annotations

import math

import pytest

from bentos.settings import ServeSettings
from tests.deployments.k8s.manifests import DOOR, FLOW_RUN, Manifests, routes_of_the_server

BATCHES_S = 15  # for the batches that run when the last request is answered


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
