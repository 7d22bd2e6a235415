"""The mesh on a real API server: installed, with daemons as processes that have its rights."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import yaml

from istiod_lite.seat import LEASE
from mesh.cli import values
from mesh.cluster.kubernetes import KubernetesCluster
from tests.support.kube import GATEWAY_API, Failed, KubeServer, eventually_served, free_port

ROOT = Path(__file__).parents[2]
HOME = "istio-system"
CONFIG_MAP = f"/api/v1/namespaces/{HOME}/configmaps/{values.ROOT_CERTIFICATE}"
LEASE_PATH = f"/apis/coordination.k8s.io/v1/namespaces/{HOME}/leases/{LEASE}"


def ambit(kube: KubeServer, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "mesh.cli", *arguments],
        env={
            "PATH": os.environ["PATH"],
            "PYTHONPATH": str(ROOT),
            "KUBECONFIG": str(kube.kubeconfig()),
        },
        capture_output=True,
        text=True,
        timeout=120,
    )


def install(kube: KubeServer) -> None:
    """Gateway API and the mesh, with the objects of a small node."""
    for path in sorted(GATEWAY_API.glob("*.yaml")):
        for each in yaml.safe_load_all(path.read_text()):
            if each:
                kube.apply(each)
    eventually_served(kube, "/apis/gateway.networking.k8s.io/v1/gatewayclasses")
    done = ambit(kube, "install", "--image", "example/ambit:test")
    assert done.returncode == 0, done.stderr
    kube.apply({"apiVersion": "v1", "kind": "Node", "metadata": {"name": "n1"}})
    kube.namespace("demo", **{"istio.io/dataplane-mode": "ambient"})


def pod(namespace: str, name: str, account: str, node: str) -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "namespace": namespace, "labels": {"app": account}},
        "spec": {
            "nodeName": node,
            "serviceAccountName": account,
            "containers": [{"name": "c", "image": "c"}],
        },
    }


def put_pod(kube: KubeServer, obj: dict[str, Any], ip: str) -> dict[str, Any]:
    metadata = obj["metadata"]
    account = {"name": obj["spec"]["serviceAccountName"], "namespace": metadata["namespace"]}
    kube.apply({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": account})
    made: dict[str, Any] = kube.apply(obj)
    kube.set_status(
        obj,
        {
            "phase": "Running",
            "podIP": ip,
            "podIPs": [{"ip": ip}],
            "conditions": [{"type": "Ready", "status": "True"}],
        },
    )
    return made


def as_account(kube: KubeServer, account: str, **narrowed: Any) -> KubernetesCluster:
    token = kube.token(HOME, account, None)
    return KubernetesCluster(kube.access(token, account), **narrowed)


class Daemon:
    """A daemon as a process, with the rights of its service account."""

    def __init__(
        self, kube: KubeServer, directory: Path, module: str, token: str = "", **variables: str
    ) -> None:
        account = {"istiod_lite": "istiod"}.get(module, module)
        token = self.token = token or kube.token(HOME, account, None)
        self.log = directory / "log"
        self.health = free_port()
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", module],
                env={
                    "PATH": os.environ["PATH"],
                    "PYTHONPATH": str(ROOT),
                    "CLUSTER_SOURCE": "kubernetes",
                    "KUBECONFIG": str(kube.kubeconfig(token, f"{account}-{self.health}")),
                    "LOG_FORMAT": "json",
                    **variables,
                    **self._ports(module),
                },
                stdout=log,
                stderr=log,
            )

    def _ports(self, module: str) -> dict[str, str]:
        if module == "netconfig":
            return {"HEALTH_PORT": str(self.health), "MONITORING_PORT": "0"}
        return {"MONITORING_PORT": str(self.health)}

    def wait_ready(self, path: str, seconds: float = 90.0) -> None:
        deadline = time.monotonic() + seconds
        while True:
            assert self.process.poll() is None, self.log.read_text()
            try:
                with urllib.request.urlopen(
                    f"http://127.0.0.1:{self.health}{path}", timeout=5
                ) as answer:
                    assert answer.status == 200
                    return
            except (OSError, urllib.error.HTTPError):
                assert time.monotonic() < deadline, self.log.read_text()
                time.sleep(0.1)

    def end(self, number: int = signal.SIGTERM) -> None:
        if self.process.poll() is None:
            self.process.send_signal(number)
            try:
                self.process.wait(30)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()


def start_istiod(
    kube: KubeServer, directory: Path, name: str, token: str = "", **variables: str
) -> tuple[Daemon, int]:
    directory = directory / name
    directory.mkdir(exist_ok=True)
    port = free_port()
    daemon = Daemon(
        kube,
        directory,
        "istiod_lite",
        token,
        CA_DIR=str(directory / "ca"),
        CA_SECRET=values.CA_SECRET,
        CA_TRUSTED_NODE_ACCOUNTS=f"{HOME}/ztunnel",
        POD_NAME=name,
        XDS_PORT=str(port),
        XDS_HOST="127.0.0.1",
        **variables,
    )
    return daemon, port


def eventually(check: Any, seconds: float = 60.0) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := check()):
        assert time.monotonic() < deadline, "it never came to be"
        time.sleep(0.1)
    return found


def leader(kube: KubeServer) -> str:
    try:
        return str(kube.request("GET", LEASE_PATH)["spec"].get("holderIdentity") or "")
    except (Failed, OSError):
        return ""
