"""The verbs of the command line against a real API server: the same as for a lab."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from mesh.cli.main import ambit as cli
from tests.support.kube import Failed, KubeServer, free_port, path_of
from tests.support.kube_mesh import HOME, ambit, eventually, pod, put_pod, start_istiod
from tests.support.kubelet import Kubelet, running_kubelet

pytestmark = [pytest.mark.kube, pytest.mark.timeout(300)]


def verb(kube: KubeServer, *arguments: str, code: int = 0) -> Any:
    """Run a verb on this server, whatever else is up here; what it printed."""
    environment = {"KUBECONFIG": str(kube.kubeconfig())}
    done = CliRunner().invoke(cli, [*arguments, "--context", "test"], env=environment)
    assert done.exit_code == code, done.output
    return done


def labels(kube: KubeServer, namespace: str) -> dict[str, str]:
    found = kube.request("GET", f"/api/v1/namespaces/{namespace}")["metadata"]["labels"]
    return {key: value for key, value in found.items() if key.startswith("istio.io/")}


def test_a_namespace_is_enrolled_and_leaves(installed: KubeServer) -> None:
    installed.namespace("joins")
    verb(installed, "enroll", "joins")
    assert labels(installed, "joins") == {"istio.io/dataplane-mode": "ambient"}
    verb(installed, "unenroll", "joins")
    assert labels(installed, "joins") == {}
    missing = verb(installed, "enroll", "nowhere", code=3)
    assert "no namespace 'nowhere' in context test" in missing.stderr
    assert "joins" in missing.stderr
    refused = verb(installed, "enroll", "joins", "--write", code=2)
    assert "a cluster keeps no files" in refused.stderr


def test_a_cluster_that_is_not_there(installed: KubeServer, tmp_path: Path) -> None:
    # As a process, once: this is what a user runs.
    no_context = ambit(installed, "enroll", "demo", "--context", "elsewhere")
    assert no_context.returncode == 2
    assert "elsewhere" in no_context.stderr
    both = verb(installed, "enroll", "demo", "--lab", "x", code=2)
    assert "either --lab" in both.stderr
    config = tmp_path / "config"
    text = installed.kubeconfig().read_text()
    # Its port is closed.
    config.write_text(text.replace(installed.url, f"https://127.0.0.1:{free_port()}"))
    away = CliRunner().invoke(cli, ["enroll", "demo", "--kubeconfig", str(config)])
    assert away.exit_code == 4
    assert "does not answer" in away.stderr


def test_a_waypoint_from_birth_to_death(installed: KubeServer) -> None:
    kube = installed
    kube.namespace("ways")
    verb(kube, "waypoint", "apply", "-n", "ways", "--name", "l7", "--enroll-namespace")
    gateway = {
        "apiVersion": "gateway.networking.k8s.io/v1",
        "kind": "Gateway",
        "metadata": {"name": "l7", "namespace": "ways"},
    }
    found = kube.request("GET", path_of(gateway))
    assert found["spec"]["gatewayClassName"] == "istio-waypoint"
    assert labels(kube, "ways") == {"istio.io/use-waypoint": "l7"}
    late = ("waypoint", "status", "-n", "ways", "l7", "--waypoint-timeout", "0.1")
    assert "does not serve after" in verb(kube, *late, code=4).stderr
    programmed = {"type": "Programmed", "status": "True", "reason": "Programmed", "message": ""}
    changed = {**programmed, "lastTransitionTime": "2026-01-01T00:00:00Z"}
    kube.set_status(gateway, {"conditions": [changed]})
    shown = json.loads(verb(kube, "waypoint", "status", "-n", "ways", "-o", "json").stdout)
    assert [(each["name"], each["type"], each["status"]) for each in shown] == [
        ("l7", "Programmed", "True")
    ]
    listed = json.loads(verb(kube, "waypoint", "list", "-A", "-o", "json").stdout)
    assert ("ways", "l7", "service", "True") in [
        (each["namespace"], each["name"], each["traffic_type"], each["programmed"])
        for each in listed
    ]
    verb(kube, "waypoint", "delete", "-n", "ways", "l7")
    with pytest.raises(Failed) as gone:
        kube.request("GET", path_of(gateway))
    assert gone.value.code == 404
    assert labels(kube, "ways") == {}
    assert "ambit waypoint apply" in verb(kube, "waypoint", "delete", "-n", "ways", code=3).stderr


@pytest.fixture
def kubelet() -> Iterator[Kubelet]:
    with running_kubelet() as found:
        yield found


def test_the_whole_mesh_on_one_screen(
    installed: KubeServer, kubelet: Kubelet, tmp_path: Path
) -> None:
    kube = installed
    node = {"apiVersion": "v1", "kind": "Node", "metadata": {"name": "n7"}}
    kube.apply(node)
    kube.set_status(node, kubelet.status())
    daemon, _ = start_istiod(kube, tmp_path, "istiod-7", MONITORING_HOST="::")
    made = []
    try:
        daemon.wait_ready("/ready")
        for name, app in (("istiod-7", "istiod"), ("ztunnel-7", "ztunnel"), ("cni-7", "netconfig")):
            obj = pod(HOME, name, app, "n7")
            made.append(put_pod(kube, obj, "10.0.7.1"))
        kubelet.ports[f"{HOME}/istiod-7", 15014] = daemon.health
        odd = {
            "apiVersion": "gateway.networking.k8s.io/v1",
            "kind": "HTTPRoute",
            "metadata": {"name": "lost", "namespace": "demo"},
            "spec": {"parentRefs": [{"group": "", "kind": "Service", "name": "nobody-has-it"}]},
        }
        kube.apply(odd)

        def told() -> Any:
            report = json.loads(verb(kube, "status", "-o", "json").stdout)
            return (
                report
                if any("nobody-has-it" in each["message"] for each in report["attention"])
                else 0
            )

        report = eventually(told)
        kube.delete(odd)
        assert report["mesh"] == "context test"
        assert report["phase"] == "ready"
        assert report["controllerVersion"]
        messages = [f"{each['object']}: {each['message']}" for each in report["attention"]]
        # Its pod is there, and nothing behind its port: that is said, and hides nothing else.
        assert any("ztunnel-7" in each and "nobody listens" in each for each in messages), messages
        assert "ztunnel@n7: is not connected to the controller" in messages
        assert not any("istiod-7" in each for each in messages), messages
        shown = verb(kube, "status")
        assert shown.stdout.startswith("context test: ready, ")
        nodes = verb(kube, "workloads", "--node", "n7", code=4)
        assert "n7" in nodes.stderr
    finally:
        daemon.end()
        for each in made:
            kube.delete({"apiVersion": "v1", "kind": "Pod", **each})
        kube.delete(node)
