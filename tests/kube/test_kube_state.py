"""A controller that is killed and starts again while there is no API server."""

from __future__ import annotations

import json
import queue
import signal
import urllib.request
from pathlib import Path
from typing import Any

import grpc
import pytest
import trio

from istiod_lite import saved_state
from mesh.grpc.client import open_channel
from mesh.grpc.codec import GrpcError
from mesh.identity import SpiffeId
from mesh.proto.discovery_pb2 import DeltaDiscoveryRequest, DeltaDiscoveryResponse, Node
from mesh.secrets import fetch_certificate
from mesh.tls.context import control_plane_client
from mesh.xds.client import call_metadata
from tests.support.istiod import NAME
from tests.support.kube import KubeServer
from tests.support.kube_mesh import (
    CONFIG_MAP,
    HOME,
    Daemon,
    eventually,
    pod,
    put_pod,
    start_istiod,
)

pytestmark = [pytest.mark.kube, pytest.mark.timeout(300)]

ADDRESS = "type.googleapis.com/istio.workload.Address"


def ask_all(port: int, root: bytes, token: str) -> dict[str, str]:
    """Names and versions of every Address, as grpcio is told them. Raises grpc.RpcError."""
    options = [("grpc.ssl_target_name_override", NAME), ("grpc.default_authority", NAME)]
    credentials = grpc.ssl_channel_credentials(root)
    node = Node(id="ztunnel~127.0.0.1~ztunnel-s.istio-system~istio-system.svc.cluster.local")
    node.metadata.update({"NAMESPACE": HOME, "NODE_NAME": "n1"})
    with grpc.secure_channel(f"127.0.0.1:{port}", credentials, options) as channel:
        call = channel.stream_stream(
            "/envoy.service.discovery.v3.AggregatedDiscoveryService/DeltaAggregatedResources",
            request_serializer=DeltaDiscoveryRequest.SerializeToString,
            response_deserializer=DeltaDiscoveryResponse.FromString,
        )
        requests: queue.Queue[DeltaDiscoveryRequest | None] = queue.Queue()
        requests.put(DeltaDiscoveryRequest(node=node, type_url=ADDRESS))
        stream = call(
            iter(requests.get, None), metadata=[("authorization", f"Bearer {token}")], timeout=30
        )
        found = {each.name: each.version for each in next(stream).resources}
        requests.put(None)
        stream.cancel()
        return found


def page(daemon: Daemon, path: str) -> Any:
    url = f"http://127.0.0.1:{daemon.health}{path}"
    with urllib.request.urlopen(url, timeout=30) as answer:
        body = answer.read()
    return json.loads(body) if path.startswith("/debug") else body.decode()


def is_saved(path: Path, name: str) -> bool:
    """Whether the file holds that resource, and the keys of tokens."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return False
    mesh = {"cluster_id": "Kubernetes", "trust_domain": "cluster.local"}
    state = saved_state.decode(content, **mesh, now=0.0, max_age_seconds=1.0)
    return name in state.snapshot.of(ADDRESS) and b"kid" in state.keys.jwks


async def test_it_serves_what_it_knew_until_the_server_is_back(
    stoppable: KubeServer, installed: KubeServer, tmp_path: Path
) -> None:
    kube = installed
    put_pod(kube, pod("demo", "kept", "kept", "n1"), "10.0.1.1")
    put_pod(kube, pod("demo", "elsewhere", "elsewhere", "n2"), "10.0.1.2")
    proxy = put_pod(kube, pod(HOME, "ztunnel-s", "ztunnel", "n1"), "10.0.1.3")
    token = kube.token(HOME, "ztunnel", proxy, "istio-ca")
    unbound = kube.token(HOME, "ztunnel", None, "istio-ca")
    daemon, port = start_istiod(kube, tmp_path, "istiod-s", STATE_WAIT="1")
    state = tmp_path / "istiod-s" / "ca" / "last-known-good"
    try:
        daemon.wait_ready("/ready")
        root = eventually(lambda: kube.request("GET", CONFIG_MAP))["data"]["root-cert.pem"].encode()
        wanted = "Kubernetes//Pod/demo/kept"

        def told() -> dict[str, str]:
            found = ask_all(port, root, token)
            return found if wanted in found else {}

        before = eventually(told)
        eventually(lambda: is_saved(state, wanted))
    finally:
        daemon.end(signal.SIGKILL)
    kube.stop()
    again, port = start_istiod(kube, tmp_path, "istiod-s", STATE_WAIT="1", token=daemon.token)
    try:
        again.wait_ready("/ready")
        said = again.log.read_text()
        assert "serving_last_known_good" in said
        assert "authority_from_working_copy" in said
        assert ask_all(port, root, token) == before

        def channel(bearer: str):
            metadata = call_metadata(bearer, "Kubernetes")
            return lambda: open_channel(
                "127.0.0.1", port, control_plane_client(root), NAME, metadata
            )

        kept = SpiffeId("cluster.local", "demo", "kept")
        certificate = await fetch_certificate(channel(token), kept, 600)
        assert certificate.identity == kept
        assert certificate.roots_pem.strip() == root.strip()
        elsewhere = SpiffeId("cluster.local", "demo", "elsewhere")
        for identity, bearer in (
            (elsewhere, token),  # not on its node
            (kept, unbound),  # nobody can say whether it is still good
            (kept, token[:-8] + "AAAAAAAA"),
        ):
            with pytest.raises(GrpcError):
                await fetch_certificate(channel(bearer), identity, 600)
        assert "ambit_istiod_stale 1.0" in page(again, "/metrics")
        assert page(again, "/debug/versionz")["lastKnownGoodOf"] > 1e9
        for text in (said, state.read_bytes().decode("latin-1")):
            assert "PRIVATE KEY" not in text

        # It is replaced by what is, as soon as that is known.
        kube.start()
        await trio.to_thread.run_sync(
            lambda: put_pod(kube, pod("demo", "newer", "newer", "n1"), "10.0.1.4")
        )
        eventually(lambda: "source_synced" in again.log.read_text())
        eventually(lambda: "Kubernetes//Pod/demo/newer" in ask_all(port, root, token))
        assert "ambit_istiod_stale 0.0" in page(again, "/metrics")
        assert "lastKnownGoodOf" not in page(again, "/debug/versionz")
        said = again.log.read_text()
        assert token[-40:] not in said
        assert "forbidden" not in said
    finally:
        again.end()
        for name, namespace in (("kept", "demo"), ("elsewhere", "demo"), ("ztunnel-s", HOME)):
            kube.delete(pod(namespace, name, name, "n1"))
