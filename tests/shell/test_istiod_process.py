"""The controller as a process over a directory, read by a client that is not ours (grpcio)."""

from __future__ import annotations

import json
import os
import queue
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtensionOID

from mesh.proto.authorization_pb2 import Authorization
from mesh.proto.ca_pb2 import IstioCertificateRequest, IstioCertificateResponse
from mesh.proto.discovery_pb2 import DeltaDiscoveryRequest, DeltaDiscoveryResponse, Node
from mesh.proto.workload_pb2 import Address
from tests.support.istiod import KEY, NAME, mint

ADDRESS = "type.googleapis.com/istio.workload.Address"
POLICY = "type.googleapis.com/istio.security.Authorization"
UID = "Kubernetes//Pod/demo/sleep-1"
HOST = "demo/sleep.demo.svc.cluster.local"


def pod(name: str = "sleep-1", namespace: str = "demo", **annotations: str) -> dict:
    account = "ztunnel" if namespace == "istio-system" else "sleep"
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "name": name,
            "namespace": namespace,
            "uid": "uid-1",
            "labels": {"app": "sleep"},
            "annotations": {"ambit.dev/source": "shop.yaml:12", **annotations},
        },
        "spec": {
            "nodeName": "n1",
            "serviceAccountName": account,
            "containers": [{"ports": [{"name": "http", "containerPort": 8080}]}],
        },
        "status": {
            "phase": "Running",
            "podIPs": [{"ip": "10.244.1.5"}, {"ip": "fd00:10:244:1::5"}],
            "conditions": [{"type": "Ready", "status": "True"}],
        },
    }


SERVICE = {
    "apiVersion": "v1",
    "kind": "Service",
    "metadata": {"name": "sleep", "namespace": "demo"},
    "spec": {
        "clusterIPs": ["10.96.0.20", "fd00:10:96::20"],
        "ipFamilies": ["IPv4", "IPv6"],
        "selector": {"app": "sleep"},
        "ports": [{"port": 80, "targetPort": "http"}],
    },
}


def policy(**spec: object) -> dict:
    return {
        "apiVersion": "security.istio.io/v1",
        "kind": "AuthorizationPolicy",
        "metadata": {"name": "p", "namespace": "demo"},
        "spec": spec,
    }


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


class Running:
    """A controller process, its directory, and what it says of itself."""

    def __init__(self, directory: Path) -> None:
        self.cluster = directory / "cluster"
        self.cluster.mkdir()
        self.ca = directory / "ca"
        self.port, self.monitoring = free_port(), free_port()
        keys = directory / "keys.json"
        keys.write_text(json.dumps({"keys": [KEY.as_dict(private=False)]}))
        self.environment = {
            "PATH": os.environ["PATH"],
            "PYTHONPATH": str(Path(__file__).parents[2]),
            "CLUSTER_DIR": str(self.cluster),
            "CA_DIR": str(self.ca),
            "TOKEN_ISSUER_KEYS": str(keys),
            "CA_TRUSTED_NODE_ACCOUNTS": "istio-system/ztunnel",
            "XDS_PORT": str(self.port),
            "XDS_HOST": "127.0.0.1",
            "MONITORING_PORT": str(self.monitoring),
            "LOG_FORMAT": "json",
        }
        self.process: subprocess.Popen[bytes] | None = None
        self.log = directory / "log"

    def write(self, obj: dict) -> Path:
        metadata = obj["metadata"]
        path = self.cluster / obj["kind"] / metadata["namespace"] / f"{metadata['name']}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_name(".new")
        beside.write_text(json.dumps(obj))
        beside.rename(path)
        return path

    def start(self, **environment: str) -> subprocess.Popen[bytes]:
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "istiod_lite"],
                env={**self.environment, **environment},
                stdout=log,
                stderr=log,
            )
        return self.process

    def wait_ready(self) -> None:
        deadline = time.monotonic() + 45
        while self.get("/ready")[0] != 200:
            assert self.process is not None
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.05)

    def get(self, path: str) -> tuple[int, bytes]:
        url = f"http://127.0.0.1:{self.monitoring}{path}"
        try:
            with urllib.request.urlopen(url, timeout=10) as answer:
                return answer.status, answer.read()
        except urllib.error.HTTPError as exc:
            with exc:
                return exc.code, exc.read()
        except OSError:
            return 0, b""

    def json(self, path: str):
        status, body = self.get(path)
        assert status == 200
        return json.loads(body)

    def root(self) -> bytes:
        path = self.cluster / "ConfigMap" / "istio-system" / "istio-ca-root-cert.json"
        return json.loads(path.read_text())["data"]["root-cert.pem"].encode()

    def channel(self) -> grpc.Channel:
        credentials = grpc.ssl_channel_credentials(self.root())
        options = [("grpc.ssl_target_name_override", NAME), ("grpc.default_authority", NAME)]
        return grpc.secure_channel(f"127.0.0.1:{self.port}", credentials, options)


@pytest.fixture
def istiod(tmp_path: Path) -> Iterator[Running]:
    running = Running(tmp_path)
    running.write(SERVICE)
    running.write(pod())
    running.write(pod("ztunnel-n1", "istio-system"))
    yield running
    process = running.process
    if process is not None and process.poll() is None:
        process.kill()
    if process is not None:
        process.wait(10)


def call_metadata(**claims: str) -> list[tuple[str, str]]:
    """Of a call by the node proxy. Its token lasts ten minutes, the suite longer."""
    return [("authorization", f"Bearer {mint(**claims)}"), ("clusterid", "Kubernetes")]


class DeltaClient:
    """A delta client in threads of grpcio's, with everything it was told."""

    def __init__(self, channel: grpc.Channel, metadata=None) -> None:
        self._requests: queue.Queue[DeltaDiscoveryRequest | None] = queue.Queue()
        call = channel.stream_stream(
            "/envoy.service.discovery.v3.AggregatedDiscoveryService/DeltaAggregatedResources",
            request_serializer=DeltaDiscoveryRequest.SerializeToString,
            response_deserializer=DeltaDiscoveryResponse.FromString,
        )
        metadata = call_metadata() if metadata is None else metadata
        self.call = call(iter(self._requests.get, None), metadata=metadata)
        self.responses: queue.Queue[DeltaDiscoveryResponse] = queue.Queue()
        self.resources: dict[str, bytes] = {}
        self.error: grpc.RpcError | None = None
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        try:
            for response in self.call:
                self.responses.put(response)
        except grpc.RpcError as exc:
            self.error = exc

    def subscribe(self, type_url: str) -> None:
        node = Node(id="ztunnel~127.0.0.1~ztunnel-n1.istio-system~istio-system.svc.cluster.local")
        node.metadata.update({"NAMESPACE": "istio-system", "NODE_NAME": "n1"})
        self._requests.put(DeltaDiscoveryRequest(node=node, type_url=type_url))

    def next(self, seconds: float = 45.0) -> DeltaDiscoveryResponse:
        response = self.responses.get(timeout=seconds)
        for resource in response.resources:
            self.resources[resource.name] = resource.resource.value
        for name in response.removed_resources:
            self.resources.pop(name, None)
        self._requests.put(
            DeltaDiscoveryRequest(type_url=response.type_url, response_nonce=response.nonce)
        )
        return response

    def close(self) -> None:
        self._requests.put(None)
        self.call.cancel()
        self._reader.join(10)


def errors(istiod: Running) -> list[dict]:
    return [each for each in istiod.json("/debug/findings") if each["severity"] == "error"]


def test_the_whole_of_it(istiod: Running) -> None:
    process = istiod.start()
    istiod.wait_ready()
    with istiod.channel() as channel:
        client = DeltaClient(channel)
        client.subscribe(ADDRESS)
        first = client.next()
        assert {each.name for each in first.resources} == {
            UID,
            "Kubernetes//Pod/istio-system/ztunnel-n1",
            HOST,
        }
        workload = Address.FromString(client.resources[UID]).workload
        assert workload.uid == UID
        assert [len(each) for each in workload.addresses] == [4, 16]
        assert workload.tunnel_protocol == 0
        assert workload.services[HOST].ports[0].target_port == 8080
        service = Address.FromString(client.resources[HOST]).service
        assert [len(each.address) for each in service.addresses] == [4, 16]
        client.subscribe(POLICY)
        assert list(client.next().resources) == []

        # An edit arrives: the node agent marks the pod.
        times = []
        for value in ("enabled", "pending", "enabled"):
            before = time.monotonic()
            istiod.write(pod(**{"ambient.istio.io/redirection": value}))
            (changed,) = client.next().resources
            times.append(time.monotonic() - before)
            assert changed.name == UID
            protocol = Address.FromString(changed.resource.value).workload.tunnel_protocol
            assert protocol == (value == "enabled")
        assert min(times) < 0.3, times

        # A policy: first the workload that names it or the policy, in one push each.
        selector = {"matchLabels": {"app": "sleep"}}
        istiod.write(policy(selector=selector, rules=[{}]))
        both = [client.next(), client.next()]
        assert {each.type_url for each in both} == {ADDRESS, POLICY}
        assert Authorization.FromString(client.resources["demo/p"]).scope == 2
        workload = Address.FromString(client.resources[UID]).workload
        assert list(workload.authorization_policies) == ["demo/p"]

        # What cannot be read changes nothing, and is told with its place.
        path = istiod.write(policy(selector=selector, rulez=[]))
        deadline = time.monotonic() + 45
        while not (found := errors(istiod)):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert [(f["severity"], f["field"], f["message"]) for f in found] == [
            ("error", "spec.rulez", "unknown field")
        ]
        assert found[0]["source"] == str(path)
        istiod.cluster.joinpath("Pod", "demo", "sleep-1.json").write_text("{")
        with pytest.raises(queue.Empty):
            client.next(0.5)
        path.unlink()
        istiod.write(pod(**{"ambient.istio.io/redirection": "enabled"}))
        while (
            "demo/p" in client.resources
            or Address.FromString(client.resources[UID]).workload.authorization_policies
        ):
            client.next()

        # Deletion.
        istiod.cluster.joinpath("Pod", "demo", "sleep-1.json").unlink()
        assert list(client.next().removed_resources) == [UID]

        # What it shows of itself.
        (shown,) = istiod.json("/debug/syncz")
        assert shown["account"] == "istio-system/ztunnel"
        told = istiod.json("/debug/workloadz")
        assert [each["hostname"] for each in told["services"]] == ["sleep.demo.svc.cluster.local"]
        metrics = istiod.get("/metrics")[1].decode()
        assert "pilot_xds 1.0" in metrics
        assert 'ambit_istiod_resources{type="service"} 1.0' in metrics

        # SIGTERM ends the stream, then the process.
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 0
        client.close()
        assert client.error is not None
        assert client.error.code() is grpc.StatusCode.UNAVAILABLE
    assert "Traceback" not in istiod.log.read_text()


def test_certificates_for_this_nodes_pods_only(istiod: Running) -> None:
    istiod.start()
    istiod.wait_ready()
    for path in istiod.ca.iterdir():
        assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0 or "cert" in path.name
    key = ec.generate_private_key(ec.SECP256R1())
    csr = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
    pem = csr.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM).decode()

    def ask(identity: str, metadata) -> list[str]:
        request = IstioCertificateRequest(csr=pem, validity_duration=3600)
        request.metadata.update({"ImpersonatedIdentity": identity})
        with istiod.channel() as channel:
            create = channel.unary_unary(
                "/istio.v1.auth.IstioCertificateService/CreateCertificate",
                request_serializer=IstioCertificateRequest.SerializeToString,
                response_deserializer=IstioCertificateResponse.FromString,
            )
            return list(create(request, metadata=metadata, timeout=10).cert_chain)

    chain = ask("spiffe://cluster.local/ns/demo/sa/sleep", call_metadata())
    leaf = x509.load_pem_x509_certificate(chain[0].encode())
    names = leaf.extensions.get_extension_for_oid(ExtensionOID.SUBJECT_ALTERNATIVE_NAME).value
    assert [each.value for each in names] == ["spiffe://cluster.local/ns/demo/sa/sleep"]
    assert chain[-1].encode() == istiod.root()
    for identity, metadata in (
        ("spiffe://cluster.local/ns/demo/sa/nobody", call_metadata()),
        ("spiffe://cluster.local/ns/demo/sa/sleep", call_metadata(account="other")),
        ("spiffe://cluster.local/ns/demo/sa/sleep", []),
    ):
        with pytest.raises(grpc.RpcError) as refused:
            ask(identity, metadata)
        assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED


def test_a_restart_keeps_the_root_and_the_versions(istiod: Running) -> None:
    process = istiod.start()
    istiod.wait_ready()
    root = istiod.root()

    def versions() -> dict[str, str]:
        with istiod.channel() as channel:
            client = DeltaClient(channel)
            client.subscribe(ADDRESS)
            found = {each.name: each.version for each in client.next().resources}
            client.close()
            return found

    before = versions()
    process.terminate()
    assert process.wait(10) == 0
    istiod.start()
    istiod.wait_ready()
    assert istiod.root() == root
    assert versions() == before


def test_a_caller_without_a_token_is_refused(istiod: Running) -> None:
    istiod.start()
    istiod.wait_ready()
    with istiod.channel() as channel:
        client = DeltaClient(channel, [])
        client.subscribe(ADDRESS)
        with pytest.raises(grpc.RpcError) as refused:
            client.call.result(10)
        assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED
        client.close()


def test_debug_answers_callers_from_here_wherever_it_listens(istiod: Running) -> None:
    istiod.start(MONITORING_HOST="0.0.0.0")
    istiod.wait_ready()
    assert istiod.get("/debug/workloadz")[0] == 200
    assert istiod.get("/metrics")[0] == 200


@pytest.mark.parametrize(
    ("variable", "value", "says"),
    [
        ("CLUSTER_DIR", "/nowhere", "not a directory"),
        ("XDS_PORT", "http", "XDS_PORT"),
        ("XDS_PORT", "0", "is no port"),
        ("TOKEN_ISSUER_KEYS", "/nowhere", "/nowhere: cannot be read"),
        ("CA_TRUSTED_NODE_ACCOUNTS", "ztunnel", "'ztunnel' is no namespace/name"),
        ("TRUST_DOMAIN", "a b", "not a trust domain"),
    ],
)
def test_a_wrong_setting_is_one_clear_line(istiod: Running, variable, value, says) -> None:
    assert istiod.start(**{variable: value}).wait(20) == 2
    text = istiod.log.read_text()
    lines = [line for line in text.splitlines() if line.startswith("istiod: ")]
    assert says in lines[0], text
    assert "Traceback" not in text
