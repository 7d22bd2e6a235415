"""`ambit install` into a real API server, and the daemons there with exactly the rights it gave.

The daemons are processes with a kubeconfig of their service account; nodes and kubelets there
are none, so pods are what the tests write.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
import trio
import yaml

from istiod_lite import providers
from istiod_lite.index import KINDS
from mesh.cli import definitions, values
from mesh.cluster.api import Ref
from mesh.errors import ConfigError
from mesh.grpc.client import open_channel
from mesh.grpc.codec import Code, GrpcError
from mesh.identity import SpiffeId
from mesh.secrets import fetch_certificate
from mesh.tls.context import control_plane_client
from mesh.xds.client import call_metadata
from tests.support.istiod import NAME
from tests.support.kube import (
    Failed,
    KubeServer,
    eventually_served,
    path_of,
)
from tests.support.kube_mesh import (
    CONFIG_MAP,
    HOME,
    Daemon,
    ambit,
    as_account,
    eventually,
    leader,
    pod,
    put_pod,
    start_istiod,
)
from tests.support.l7_samples import ACCEPTED, LIMIT, REFUSED_BY_RULES, REFUSED_BY_SHAPE, policy
from tests.support.watched import watched

pytestmark = [pytest.mark.kube, pytest.mark.timeout(300)]


def test_installing_again_changes_nothing(installed: KubeServer) -> None:
    path = f"/apis/apps/v1/namespaces/{HOME}/deployments/istiod"
    before = installed.request("GET", path)
    again = ambit(installed, "install", "--image", "example/ambit:test")
    assert again.returncode == 0, again.stderr
    after = installed.request("GET", path)
    assert after["metadata"]["resourceVersion"] == before["metadata"]["resourceVersion"]
    assert after["spec"]["template"]["spec"]["containers"][0]["image"] == "example/ambit:test"


def test_what_the_dry_run_prints_is_what_a_server_takes(installed: KubeServer) -> None:
    printed = ambit(installed, "install", "--dry-run")
    assert printed.returncode == 0
    objects = list(yaml.safe_load_all(printed.stdout))
    assert len(objects) > 20
    for obj in objects:
        namespace = obj["metadata"].get("namespace")
        assert namespace in (None, HOME)
        installed.request(
            "PATCH",
            f"{path_of(obj)}?dryRun=All&fieldManager=t&force=true&fieldValidation=Strict",
            obj,
            content="application/apply-patch+yaml",
        )


def test_istios_own_definitions_are_left_alone(installed: KubeServer) -> None:
    name = "workloadentries.networking.istio.io"
    path = f"/apis/apiextensions.k8s.io/v1/customresourcedefinitions/{name}"
    patch = {"metadata": {"labels": {"app.kubernetes.io/part-of": None, "release": "istio"}}}
    content = "application/merge-patch+json"
    before = installed.request("PATCH", path, patch, content=content)
    assert ambit(installed, "install", "--image", "example/ambit:test").returncode == 0
    after = installed.request("GET", path)
    assert after["metadata"]["resourceVersion"] == before["metadata"]["resourceVersion"]
    patch = {"metadata": {"labels": {"app.kubernetes.io/part-of": "ambit", "release": None}}}
    installed.request("PATCH", path, patch, content=content)


def test_our_definitions_take_and_refuse_what_the_reader_does(installed: KubeServer) -> None:
    for kind, spec in ACCEPTED:
        obj = policy(kind, spec)
        installed.apply(obj)
        installed.delete(obj)
    for kind, spec in (*REFUSED_BY_SHAPE, *REFUSED_BY_RULES):
        with pytest.raises(Failed) as refused:
            installed.apply(policy(kind, spec))
        # 500 is what server-side apply says of a list that is none.
        assert refused.value.code in (422, 500), spec


def test_kubectl_prints_our_columns(installed: KubeServer) -> None:
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        pytest.skip("kubectl is not installed")
    metadata = {"name": "calm", "namespace": "demo"}
    obj = {
        "apiVersion": "ambit.dev/v1alpha1",
        "kind": "RateLimitPolicy",
        "metadata": metadata,
        "spec": {"targetRefs": [{"kind": "Service", "name": "web"}], "rules": [{"limit": LIMIT}]},
    }
    installed.apply(obj)
    condition = {"type": "Accepted", "status": "True", "reason": "Accepted", "message": ""}
    installed.set_status(obj, {"conditions": [condition]})
    done = subprocess.run(
        [kubectl, "--kubeconfig", installed.kubeconfig(), "-n", "demo", "get", "rlp"],
        capture_output=True,
        text=True,
        timeout=60,
        env={"PATH": os.environ["PATH"], "HOME": str(installed.directory)},
    )
    installed.delete(obj)
    heading, row = done.stdout.splitlines()
    assert heading.split() == ["NAME", "TARGET", "ACCEPTED", "AGE"]
    assert row.split()[:3] == ["calm", "web", "True"]


async def test_the_controllers_rights_are_enough_and_no_more(installed: KubeServer) -> None:
    cluster = as_account(installed, "istiod", **providers.scope(HOME))
    config = Ref("ConfigMap", HOME, "istio")
    text = {"apiVersion": "v1", "kind": "ConfigMap", "data": {"mesh": "{}"}}
    for name, home in (("istio", HOME), ("other", HOME), ("istio", "demo")):
        installed.apply(text | {"metadata": {"name": name, "namespace": home}})
    async with watched(cluster, *KINDS) as watch:
        assert watch.faults == []
        assert [each for each in watch.objects if each.kind == "ConfigMap"] == [config]
    installed.delete(text | {"metadata": {"name": "istio", "namespace": HOME}})
    name = values.ROOT_CERTIFICATE
    root = {"apiVersion": "v1", "kind": "ConfigMap", "data": {"root-cert.pem": "x"}}
    await cluster.apply({**root, "metadata": {"name": name, "namespace": "demo"}})
    for refused in (
        cluster.apply({**root, "metadata": {"name": "other", "namespace": "demo"}}),
        cluster.apply(pod("demo", "made", "sleep", "n1")),
        cluster.get(Ref("Secret", HOME, "other")),
        cluster.get(Ref("Secret", "demo", values.CA_SECRET)),
        cluster.delete(Ref("Namespace", "", "demo")),
        cluster.patch(Ref("Pod", "demo", "none"), {"metadata": {"labels": {"a": "b"}}}),
    ):
        with pytest.raises(ConfigError, match="forbidden"):
            await refused


async def test_the_agents_rights_are_enough_and_no_more(installed: KubeServer) -> None:
    cluster = as_account(installed, "netconfig")
    put_pod(installed, pod("demo", "mine", "sleep", "n1"), "10.0.0.5")
    async with watched(cluster, "Pod", "Namespace") as watch:
        assert watch.faults == []
    await cluster.patch(Ref("Pod", "demo", "mine"), {"metadata": {"annotations": {"a": "b"}}})
    for refused in (
        cluster.get(Ref("Secret", HOME, values.CA_SECRET)),
        cluster.delete(Ref("Pod", "demo", "mine")),
        cluster.patch(Ref("Namespace", "", "demo"), {"metadata": {"labels": {"a": "b"}}}),
    ):
        with pytest.raises(ConfigError, match="forbidden"):
            await refused


async def test_the_proxy_has_no_rights_at_all(installed: KubeServer) -> None:
    cluster = as_account(installed, "ztunnel")
    for ref in (Ref("Pod", HOME, "x"), Ref("ConfigMap", HOME, values.ROOT_CERTIFICATE)):
        with pytest.raises(ConfigError, match="forbidden"):
            await cluster.get(ref)


# -- the daemons ---------------------------------------------------------------------------


async def test_who_gets_which_certificate(
    installed: KubeServer, replicas: list[tuple[Daemon, int]]
) -> None:
    kube = installed
    put_pod(kube, pod("demo", "sleep", "sleep", "n1"), "10.0.0.1")
    put_pod(kube, pod("demo", "far", "far", "n2"), "10.0.0.2")
    proxy = put_pod(kube, pod(HOME, "ztunnel-1", "ztunnel", "n1"), "10.0.0.3")
    app = kube.request("GET", "/api/v1/namespaces/demo/pods/sleep")
    root = eventually(lambda: kube.request("GET", CONFIG_MAP))["data"]["root-cert.pem"].encode()
    sleep = SpiffeId("cluster.local", "demo", "sleep")
    far = SpiffeId("cluster.local", "demo", "far")
    bound = kube.token(HOME, "ztunnel", proxy, "istio-ca")

    def channel(port: int, token: str):
        metadata = call_metadata(token, "Kubernetes")
        return lambda: open_channel("127.0.0.1", port, control_plane_client(root), NAME, metadata)

    # Each replica signs for the same root.
    for _, port in replicas:
        with trio.fail_after(60):
            while True:
                try:
                    certificate = await fetch_certificate(channel(port, bound), sleep, 600)
                    break
                except GrpcError:  # the watch may not have told the pods yet
                    await trio.sleep(0.1)
        assert certificate.identity == sleep
        assert certificate.roots_pem.strip() == root.strip()
    for wanted, token in (
        (far, bound),
        (sleep, kube.token(HOME, "ztunnel", None, "istio-ca")),
        (sleep, kube.token(HOME, "ztunnel", proxy, "another-audience")),
        (sleep, kube.token("demo", "sleep", app, "istio-ca")),
        (sleep, bound[:-8] + "AAAAAAAA"),
    ):
        with pytest.raises(GrpcError) as refused:
            await fetch_certificate(channel(replicas[0][1], token), wanted, 600)
        assert refused.value.code == Code.UNAUTHENTICATED
    # The pod is gone, and so is what its token was worth, as soon as the answer is forgotten.
    kube.delete(proxy)
    with trio.fail_after(60):
        while True:
            try:
                await fetch_certificate(channel(replicas[1][1], bound), sleep, 600)
            except GrpcError:
                break
            await trio.sleep(0.2)
    for daemon, _ in replicas:
        said = daemon.log.read_text()
        assert bound[-40:] not in said
        assert '"level": "error"' not in said


def test_one_replica_writes_and_another_takes_over(
    installed: KubeServer, replicas: list[tuple[Daemon, int]]
) -> None:
    kube = installed
    holder = eventually(lambda: leader(kube))
    number = int(holder.split("_")[0].removeprefix("istiod-"))
    other = f"istiod-{1 - number}_"
    # A clean end gives the lease back; it need not run out.
    replicas[number][0].end()
    eventually(lambda: leader(kube).startswith(other))
    kube.request("DELETE", CONFIG_MAP)
    kube.namespace("new")
    path = f"/api/v1/namespaces/new/configmaps/{values.ROOT_CERTIFICATE}"
    found = eventually_served(kube, path)
    assert "BEGIN CERTIFICATE" in found["data"]["root-cert.pem"]


def test_when_the_leader_is_killed_another_writes_on(installed: KubeServer, tmp_path: Path) -> None:
    kube = installed
    # A leader that dies gives nothing back: its lease has to run out.
    both = [
        start_istiod(kube, tmp_path, f"heir-{number}", LEASE_DURATION_SECONDS="2")[0]
        for number in range(2)
    ]
    gateway = {
        "apiVersion": "gateway.networking.k8s.io/v1",
        "kind": "Gateway",
        "metadata": {"name": "orphan", "namespace": "demo"},
        "spec": {
            "gatewayClassName": values.GATEWAY_CLASS,
            "listeners": [{"name": "mesh", "port": 15008, "protocol": "HBONE"}],
        },
    }
    try:
        for daemon in both:
            daemon.wait_ready("/ready")
        holder = eventually(lambda: leader(kube) if leader(kube).startswith("heir-") else "")
        number = int(holder.partition("_")[0].removeprefix("heir-"))
        both[number].end(signal.SIGKILL)
        kube.apply(gateway)
        eventually(lambda: leader(kube).startswith(f"heir-{1 - number}_"))

        def accepted() -> bool:
            status = kube.request("GET", path_of(gateway)).get("status") or {}
            return any(
                each["type"] == "Accepted" and each.get("observedGeneration")
                for each in status.get("conditions") or ()
            )

        eventually(accepted)
        eventually_served(kube, "/apis/apps/v1/namespaces/demo/deployments/orphan")
    finally:
        for daemon in both:
            daemon.end()
        kube.delete(gateway)


def test_a_controller_without_an_api_server_goes_on(
    stoppable: KubeServer, installed: KubeServer, replicas: list[tuple[Daemon, int]]
) -> None:
    kube = installed
    eventually(lambda: leader(kube))
    kube.stop()
    try:
        for daemon, _ in replicas:
            eventually(lambda daemon=daemon: "watch_interrupted" in daemon.log.read_text())
            daemon.wait_ready("/ready")
    finally:
        kube.start()
    kube.namespace("later")
    eventually_served(kube, f"/api/v1/namespaces/later/configmaps/{values.ROOT_CERTIFICATE}")


def test_a_gateway_becomes_a_waypoint_with_a_status(
    installed: KubeServer, replicas: list[tuple[Daemon, int]]
) -> None:
    kube = installed
    gateway = {
        "apiVersion": "gateway.networking.k8s.io/v1",
        "kind": "Gateway",
        "metadata": {"name": "way", "namespace": "demo"},
        "spec": {
            "gatewayClassName": values.GATEWAY_CLASS,
            "listeners": [{"name": "mesh", "port": 15008, "protocol": "HBONE"}],
        },
    }
    kube.apply(gateway)
    deployment = eventually_served(kube, "/apis/apps/v1/namespaces/demo/deployments/way")
    assert deployment["spec"]["template"]["spec"]["serviceAccountName"] == "way"
    for kind in ("services", "serviceaccounts"):
        eventually_served(kube, f"/api/v1/namespaces/demo/{kind}/way")

    def condition() -> str:
        found = kube.request("GET", path_of(gateway))
        conditions = {each["type"]: each for each in found["status"]["conditions"]}
        accepted = conditions.get("Accepted", {})
        return str(accepted.get("status")) if accepted.get("observedGeneration") else ""

    assert eventually(lambda: condition() == "True" and "True") == "True"
    # Drift is repaired, and what belongs to a Gateway goes with it.
    drifted = {"spec": {"template": {"spec": {"serviceAccountName": "default"}}}}
    path = "/apis/apps/v1/namespaces/demo/deployments/way"
    kube.request("PATCH", path, drifted, content="application/merge-patch+json")

    def account() -> str:
        return str(kube.request("GET", path)["spec"]["template"]["spec"]["serviceAccountName"])

    eventually(lambda: account() == "way")

    # Who insists is told so, by name, and is not fought.
    def contested() -> str:
        if account() == "way":
            content = "application/merge-patch+json"
            kube.request("PATCH", f"{path}?fieldManager=gitops", drifted, content=content)
        status = kube.request("GET", path_of(gateway))["status"]
        messages = [each["message"] for each in status["conditions"] if "Sync" in each["type"]]
        return "".join(messages)

    assert "by gitops: left as it is" in eventually(lambda: "gitops" in contested() and contested())
    assert account() == "default"
    kube.delete(gateway)

    def is_gone() -> bool:
        try:
            kube.request("GET", path)
        except Failed as exc:
            return exc.code == 404
        return False

    eventually(is_gone)
    for daemon, _ in replicas:
        assert "forbidden" not in daemon.log.read_text()


def test_the_agent_runs_with_its_rights(installed: KubeServer, tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("the node agent needs root")
    kube = installed
    made = put_pod(kube, pod("demo", "captive", "sleep", "n1"), "10.0.0.9")
    sandbox = subprocess.Popen(["unshare", "--net", "sleep", "600"])
    # As a kubelet's runtime would mount it.
    (tmp_path / made["metadata"]["uid"]).symlink_to(f"/proc/{sandbox.pid}/ns/net")
    daemon = Daemon(
        kube,
        tmp_path,
        "netconfig",
        NODE_NAME="n1",
        NETNS_DIR=str(tmp_path),
        ZTUNNEL_UDS_ADDRESS=str(tmp_path / "zds.sock"),
        CNI_AGENT_RUN_DIR=str(tmp_path / "cni"),
    )
    try:
        daemon.wait_ready("/readyz")

        def annotation() -> str:
            obj = kube.request("GET", "/api/v1/namespaces/demo/pods/captive")
            return str(obj["metadata"].get("annotations", {}).get("ambient.istio.io/redirection"))

        # There is no node proxy to hand it to.
        assert eventually(lambda: annotation() != "None" and annotation()) == "pending"
    finally:
        daemon.end()
        sandbox.kill()
        sandbox.wait()


def test_uninstalling_refuses_to_cut_pods_off(installed: KubeServer) -> None:
    refused = ambit(installed, "uninstall")
    assert refused.returncode == 2
    assert "demo" in refused.stderr
    content = "application/merge-patch+json"
    patch = {"metadata": {"labels": {"istio.io/dataplane-mode": None}}}
    try:
        installed.request("PATCH", "/api/v1/namespaces/demo", patch, content=content)
        done = ambit(installed, "uninstall")
        assert done.returncode == 0, done.stderr
        _check_uninstalled(installed)
    finally:
        # For the tests that come after this one.
        again = ambit(installed, "install", "--image", "example/ambit:test")
        installed.namespace("demo", **{"istio.io/dataplane-mode": "ambient"})
    assert again.returncode == 0, again.stderr


def _check_uninstalled(installed: KubeServer) -> None:
    for path in (
        f"/apis/apps/v1/namespaces/{HOME}/deployments/istiod",
        "/apis/rbac.authorization.k8s.io/v1/clusterroles/ambit-istiod",
    ):
        with pytest.raises(Failed) as gone:
            installed.request("GET", path)
        assert gone.value.code == 404
    # The root's key and everybody's policies are not what an uninstall takes away.
    for definition in definitions.ours():
        name = definition["metadata"]["name"]
        installed.request("GET", f"/apis/apiextensions.k8s.io/v1/customresourcedefinitions/{name}")
    installed.request("GET", f"/api/v1/namespaces/{HOME}")
