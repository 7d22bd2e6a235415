"""L7 policy is not passed by, in a whole mesh: while its waypoint is not there, nobody gets in."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator

import pytest

from tests.support.labs import TestLab, eventually, running_lab

pytestmark = pytest.mark.lab

SHOP = """
apiVersion: v1
kind: Namespace
metadata: {name: shop, labels: {istio.io/dataplane-mode: ambient}}
---
apiVersion: v1
kind: Pod
metadata: {name: web, namespace: shop, labels: {app: web}}
spec:
  containers:
    - name: web
      image: python:3
      command: [python3, -m, http.server, "8080"]
      ports: [{containerPort: 8080}]
      readinessProbe: {tcpSocket: {port: 8080}, periodSeconds: 1}
---
apiVersion: v1
kind: Service
metadata: {name: web, namespace: shop}
spec:
  selector: {app: web}
  ports: [{port: 80, targetPort: 8080}]
---
apiVersion: v1
kind: Pod
metadata: {name: reader, namespace: shop}
spec:
  containers: [{name: reader, image: python:3, command: [sleep, infinity]}]
"""
POLICY = """
apiVersion: ambit.dev/v1alpha1
kind: RateLimitPolicy
metadata: {name: limit, namespace: shop}
spec:
  targetRefs: [{group: "", kind: Service, name: web}]
  rules: [{limit: {requests: 1000, window: 1m}}]
"""
GET = """
import socket, sys
try:
    with socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=20) as c:
        c.sendall(b"GET / HTTP/1.0\\r\\n\\r\\n")
        print(c.recv(12).decode() or "cut")
except OSError as e:
    print("cut" if isinstance(e, ConnectionError) else repr(e))
"""


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestLab]:
    directory = tmp_path_factory.mktemp("closes")
    (directory / "shop.yaml").write_text(SHOP)
    with running_lab(directory, "--nodes", "1") as running:
        yield running


def get(lab: TestLab, host: str, port: int) -> str:
    return lab.python("shop/reader", GET, host, str(port))


def conditions(lab: TestLab, kind: str, name: str) -> dict[str, tuple[str, str]]:
    found = lab.client.get(kind, "shop", name)
    status = found[0].get("status", {})
    return {each["type"]: (each["status"], each["reason"]) for each in status.get("conditions", [])}


def test_policy_without_a_waypoint_shuts_and_its_end_opens(lab: TestLab) -> None:
    pods = lab.client.status()["pods"]
    (address,) = (each["ips"][0] for each in pods if each["name"] == "web")

    def answers(expected: str) -> None:
        assert [get(lab, "web.shop", 80), get(lab, address, 8080)] == [expected] * 2

    eventually(lambda: answers("HTTP/1.0 200"), seconds=60)
    (lab.directory / "policy.yaml").write_text(POLICY)
    eventually(lambda: answers("cut"), seconds=60)

    def is_said() -> None:
        limit = conditions(lab, "RateLimitPolicy", "limit")
        assert limit.get("WaypointAccepted") == ("False", "AncestorNotBound")
        web = conditions(lab, "Service", "web")
        assert web.get("ambit.dev/WaypointRequired") == ("True", "Enforced")

    eventually(is_said, seconds=60)
    report = lab_status(lab)
    assert any("goes through no waypoint" in each["message"] for each in report["attention"])
    assert {each["sync"] for each in report["proxies"]} == {"in step"}
    assert report["controllerVersion"]
    (lab.directory / "policy.yaml").unlink()
    eventually(lambda: answers("HTTP/1.0 200"), seconds=60)
    eventually(lambda: _says_nothing(lab), seconds=60)


def _says_nothing(lab: TestLab) -> None:
    assert conditions(lab, "Service", "web") == {}


def lab_status(lab: TestLab) -> dict:
    """What `ambit status -o json` prints."""
    command = [sys.executable, "-m", "mesh.cli", "status", "--lab", lab.client.address.name]
    done = subprocess.run([*command, "-o", "json"], capture_output=True, check=True, timeout=60)
    found: dict = json.loads(done.stdout)
    return found


def test_a_gateway_becomes_a_pod_with_an_identity_of_its_own(lab: TestLab) -> None:
    gateway = {
        "apiVersion": "gateway.networking.k8s.io/v1",
        "kind": "Gateway",
        "metadata": {"name": "wp", "namespace": "shop"},
        "spec": {
            "gatewayClassName": "istio-waypoint",
            "listeners": [{"name": "mesh", "port": 15008, "protocol": "HBONE"}],
        },
    }
    (lab.directory / "gateway.yaml").write_text(json.dumps(gateway))

    def is_made() -> None:
        pods = [p for p in lab.client.get("Pod", "shop") if p["metadata"]["name"][:3] == "wp-"]
        assert [each["spec"]["serviceAccountName"] for each in pods] == ["wp"]
        assert lab.client.get("Service", "shop", "wp")[0]["spec"]["clusterIPs"]

    eventually(is_made, seconds=60)
    (lab.directory / "gateway.yaml").unlink()

    def is_gone() -> None:
        for kind in ("Pod", "Service", "Deployment", "ServiceAccount"):
            names = {each["metadata"]["name"] for each in lab.client.get(kind, "shop")}
            assert not any(name.startswith("wp") for name in names), kind

    eventually(is_gone, seconds=60)
