"""A real kube-apiserver over a real etcd, on loopback, for tests; `make kube` builds it.

AMBIT_KUBECONFIG names a cluster to use instead (its current context): an empty one, because the
mesh is installed into it and taken out again. What needs to restart the server is not run there.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import ssl
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import trustme
import yaml
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa

from mesh.cluster.api_server import Access

ROOT = Path(__file__).parents[2]
CACHE = ROOT / ".cache" / "kube"
BINARY = CACHE / "apiserver"
GATEWAY_API = CACHE / "gateway-api"
ADMIN = "admin-of-the-tests"
GIVEN = os.environ.get("AMBIT_KUBECONFIG", "")
ISSUER = "https://kubernetes.default.svc"


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


class Failed(Exception):
    """The server said no: `code` is its HTTP status."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(f"{code}: {message}")
        self.code = code


class KubeServer:
    """The two processes, and a plain client of its own, so that ours is not tested by itself."""

    is_given = False

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.port, self.etcd_port = free_port(), free_port()
        self.url = f"https://127.0.0.1:{self.port}"
        self.process: subprocess.Popen[bytes] | None = None
        self.etcd: subprocess.Popen[bytes] | None = None
        authority = trustme.CA()
        authority.cert_pem.write_to_path(directory / "ca.pem")
        leaf = authority.issue_cert("127.0.0.1", "localhost")
        leaf.private_key_pem.write_to_path(directory / "server.key")
        with (directory / "server.pem").open("wb") as file:
            file.writelines(part.bytes() for part in leaf.cert_chain_pems)
        key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
        (directory / "sa.key").write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.TraditionalOpenSSL,
                serialization.NoEncryption(),
            )
        )
        (directory / "tokens.csv").write_text(f"{ADMIN},admin,admin,system:masters\n")
        self._context = ssl.create_default_context(cafile=str(directory / "ca.pem"))

    # -- processes ---------------------------------------------------------------------

    def start_etcd(self) -> None:
        url = f"http://127.0.0.1:{self.etcd_port}"
        peer = f"http://127.0.0.1:{free_port()}"
        self.etcd = self._spawn(
            "etcd",
            f"--data-dir={self.directory / 'etcd'}",
            f"--listen-client-urls={url}",
            f"--advertise-client-urls={url}",
            f"--listen-peer-urls={peer}",
            f"--initial-advertise-peer-urls={peer}",
            f"--initial-cluster=default={peer}",
            "--unsafe-no-fsync",
            "--log-level=warn",
        )

    def start(self) -> None:
        """Start the API server and wait until it is ready."""
        here = self.directory
        self.process = self._spawn(
            "kube-apiserver",
            f"--etcd-servers=http://127.0.0.1:{self.etcd_port}",
            f"--secure-port={self.port}",
            "--bind-address=127.0.0.1",
            "--advertise-address=127.0.0.1",
            "--endpoint-reconciler-type=none",
            f"--tls-cert-file={here / 'server.pem'}",
            f"--tls-private-key-file={here / 'server.key'}",
            f"--token-auth-file={here / 'tokens.csv'}",
            "--authorization-mode=RBAC",
            "--service-cluster-ip-range=10.96.0.0/16",
            f"--service-account-issuer={ISSUER}",
            f"--service-account-signing-key-file={here / 'sa.key'}",
            f"--service-account-key-file={here / 'sa.key'}",
            # No controller manager makes the default accounts that this plugin waits for.
            "--disable-admission-plugins=ServiceAccount",
            "--allow-privileged=true",
            "--profiling=false",
            "--shutdown-delay-duration=0s",
            "--v=1",
        )
        deadline = time.monotonic() + 120
        while True:
            assert self.process.poll() is None, self.said()
            try:
                self.request("GET", "/readyz")
                return
            except (OSError, Failed):
                assert time.monotonic() < deadline, self.said()
                time.sleep(0.1)

    def stop(self) -> None:
        """End the API server at once; etcd lives on."""
        assert self.process is not None
        self.process.send_signal(signal.SIGCONT)
        self.process.kill()
        self.process.wait()

    def pause(self) -> None:
        """Let it fall silent with its connections open, as a machine does that loses power."""
        assert self.process is not None
        self.process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGCONT)

    def compact(self) -> None:
        """Let etcd forget all history."""
        subprocess.run([BINARY, "compact", f"127.0.0.1:{self.etcd_port}"], check=True, timeout=60)

    def close(self) -> None:
        self.stop()
        assert self.etcd is not None
        self.etcd.kill()
        self.etcd.wait()

    def said(self) -> str:
        """The end of both logs."""
        logs = sorted(self.directory.glob("*.log"))
        return "\n".join(f"{log.name}: {log.read_text(errors='replace')[-3000:]}" for log in logs)

    def _spawn(self, *arguments: str) -> subprocess.Popen[bytes]:
        with (self.directory / f"{arguments[0]}.log").open("ab") as log:
            return subprocess.Popen(
                [BINARY, *arguments],
                stdout=log,
                stderr=log,
                cwd=self.directory,
                env={"PATH": os.environ["PATH"], "HOME": str(self.directory), "GOMAXPROCS": "2"},
            )

    # -- a client ----------------------------------------------------------------------

    def request(
        self,
        method: str,
        path: str,
        body: Any = None,
        *,
        token: str = ADMIN,
        content: str = "application/json",
    ) -> Any:
        """Raises Failed, OSError. A server that is busy is asked again."""
        deadline = time.monotonic() + 60
        while True:
            try:
                return self._request(method, path, body, token, content)
            except Failed as exc:
                if exc.code != 429 or time.monotonic() > deadline:
                    raise
                time.sleep(0.2)

    def _request(self, method: str, path: str, body: Any, token: str, content: str) -> Any:
        token, context = self._credentials(token)
        bearer = {"Authorization": f"Bearer {token}"} if token else {}
        request = urllib.request.Request(
            f"{self.url}{path}",
            method=method,
            data=None if body is None else json.dumps(body).encode(),
            headers={**bearer, "Content-Type": content},
        )
        try:
            with urllib.request.urlopen(request, context=context, timeout=30) as answer:
                data = answer.read()
        except urllib.error.HTTPError as exc:
            with exc:
                raise Failed(exc.code, exc.read().decode("utf-8", "replace")[:500]) from None
        try:
            return json.loads(data)
        except ValueError:
            return data.decode()

    def _credentials(self, token: str) -> tuple[str, ssl.SSLContext]:
        """What to say who we are with."""
        return token, self._context

    def apply(self, obj: Mapping[str, Any]) -> Any:
        """Server-side apply with kubectl's field manager, by path made from the object."""
        return self.request(
            "PATCH",
            f"{path_of(obj)}?fieldManager=kubectl&force=true",
            obj,
            content="application/apply-patch+yaml",
        )

    def delete(self, obj: Mapping[str, Any]) -> Any:
        return self.request("DELETE", f"{path_of(obj)}?gracePeriodSeconds=0")

    def set_status(self, obj: Mapping[str, Any], status: Mapping[str, Any]) -> Any:
        return self.request(
            "PATCH",
            f"{path_of(obj)}/status",
            {"status": status},
            content="application/merge-patch+json",
        )

    def namespace(self, name: str, **labels: str) -> str:
        metadata = {"name": name, "labels": labels}
        self.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": metadata})
        return name

    def token(self, namespace: str, account: str, pod: Mapping[str, Any] | None, *audiences: str):
        """A projected token, as the kubelet asks for it."""
        spec: dict[str, Any] = {"audiences": list(audiences), "expirationSeconds": 3600}
        if pod is not None:
            metadata = pod["metadata"]
            spec["boundObjectRef"] = {
                "apiVersion": "v1",
                "kind": "Pod",
                "name": metadata["name"],
                "uid": metadata["uid"],
            }
        answer = self.request(
            "POST",
            f"/api/v1/namespaces/{namespace}/serviceaccounts/{account}/token",
            {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": spec},
        )
        return answer["status"]["token"]

    def kubeconfig(self, token: str = ADMIN, name: str = "admin") -> Path:
        """A kubeconfig of whoever has `token`."""
        path = self.directory / f"{name}.kubeconfig"
        cluster = {
            "server": self.url,
            "certificate-authority": str(self.directory / "ca.pem"),
        }
        content = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "test", "cluster": cluster}],
            "users": [{"name": name, "user": {"token": token}}],
            "contexts": [{"name": "test", "context": {"cluster": "test", "user": name}}],
            "current-context": "test",
        }
        path.write_text(yaml.safe_dump(content))
        path.chmod(0o600)
        return path

    def access(self, token: str = ADMIN, name: str = "admin") -> Access:
        return Access(self.kubeconfig(token, name))


_PLURALS = {
    "NetworkPolicy": "networkpolicies",
    "AuthorizationPolicy": "authorizationpolicies",
    "RateLimitPolicy": "ratelimitpolicies",
    "RedactionPolicy": "redactionpolicies",
    "Gateway": "gateways",
    "GatewayClass": "gatewayclasses",
}
_CLUSTER_SCOPED = {
    "Namespace",
    "Node",
    "ClusterRole",
    "ClusterRoleBinding",
    "CustomResourceDefinition",
    "GatewayClass",
    "ValidatingAdmissionPolicy",
    "ValidatingAdmissionPolicyBinding",
}


def path_of(obj: Mapping[str, Any]) -> str:
    kind = obj["kind"]
    plural = _PLURALS.get(kind)
    if plural is None:
        lower = kind.lower()
        plural = f"{lower[:-1]}ies" if lower.endswith("y") else f"{lower}s"
    version = obj["apiVersion"]
    root = f"/apis/{version}" if "/" in version else f"/api/{version}"
    where = ""
    if kind not in _CLUSTER_SCOPED:
        where = f"/namespaces/{obj['metadata'].get('namespace', 'default')}"
    return f"{root}{where}/{plural}/{obj['metadata']['name']}"


@contextmanager
def running_kube(directory: Path) -> Iterator[KubeServer]:
    """An API server of its own, or the cluster of AMBIT_KUBECONFIG. Skips the test if there is
    neither.
    """
    if GIVEN:
        from tests.support.kube_given import GivenCluster

        yield GivenCluster(directory, Path(GIVEN))
        return
    if not BINARY.exists():
        pytest.skip("no kube-apiserver has been built: make kube")
    server = KubeServer(directory)
    server.start_etcd()
    try:
        server.start()
        yield server
    finally:
        server.close()


def eventually_served(server: KubeServer, path: str, seconds: float = 60.0) -> Any:
    """What is at `path`, when it is there."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            return server.request("GET", path)
        except Failed as exc:
            if exc.code not in (403, 404, 503) or time.monotonic() > deadline:
                raise
            time.sleep(0.1)
