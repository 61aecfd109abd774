"""What the pods may do and what they are given: users, volumes, memory, images, tokens."""

from __future__ import annotations

import json
import re

from tests.deployments.k8s.manifests import DOOR, FLOW_RUN, JOB_TEMPLATE, Manifests, count_bytes, find_env, flow_run


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
