"""A controller's gRPC services on loopback TLS, with tokens that tests can mint."""

from __future__ import annotations

import json
import socket
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import trio
from joserfc import jwt
from joserfc.jwk import ECKey

from istiod_lite.ads import AdsService
from istiod_lite.authenticate import Authenticator, SignedTokenReviewer
from istiod_lite.authority import Authority
from istiod_lite.certificates import CertificateService
from mesh.cluster.api import Ref
from mesh.cluster.objects import Pod
from mesh.grpc.client import Channel, open_channel
from mesh.grpc.server import serve_grpc
from mesh.secrets import CREATE_CERTIFICATE
from mesh.tls.context import control_plane_client, control_plane_server
from mesh.xds.client import DELTA_AGGREGATED_RESOURCES, call_metadata

NAME = "istiod.istio-system.svc"
KEY = ECKey.generate_key("P-256", {"kid": "test"})


def now() -> float:
    return datetime.now(UTC).timestamp()


def mint(
    namespace: str = "istio-system",
    account: str = "ztunnel",
    pod: str = "ztunnel-n1",
    uid: str = "uid-1",
    node: str = "n1",
) -> str:
    """A projected service-account token, as a kubelet would hand it out."""
    claims = {
        "iss": "https://kubernetes.default.svc",
        "aud": ["istio-ca"],
        "exp": int(now()) + 600,
        "sub": f"system:serviceaccount:{namespace}:{account}",
        "kubernetes.io": {
            "namespace": namespace,
            "node": {"name": node},
            "pod": {"name": pod, "uid": uid},
            "serviceaccount": {"name": account},
        },
    }
    return jwt.encode({"alg": "ES256", "kid": "test"}, claims, KEY, algorithms=["ES256"])


def make_pod(namespace: str, name: str, account: str, node: str, uid: str = "") -> Pod:
    return Pod(
        ref=Ref("Pod", namespace, name),
        uid=uid or f"uid-of-{name}",
        service_account=account,
        node=node,
        phase="Running",
    )


@dataclass
class Pods:
    """A pod index that tests fill."""

    pods: list[Pod] = field(default_factory=list)

    def pod(self, namespace: str, name: str) -> Pod | None:
        found = [p for p in self.pods if (p.namespace, p.name) == (namespace, name)]
        return found[0] if found else None

    def pods_on_node(self, node: str) -> Iterable[Pod]:
        return [pod for pod in self.pods if pod.node == node]


@dataclass
class Istiod:
    """A running controller."""

    authority: Authority
    ads: AdsService
    pods: Pods
    port: int

    def channel(self, token: str) -> Callable[[], AbstractAsyncContextManager[Channel]]:
        """A factory of channels that carry `token`."""
        return lambda: open_channel(
            "127.0.0.1",
            self.port,
            control_plane_client(self.authority.root_pem),
            NAME,
            call_metadata(token, "Kubernetes"),
        )


@asynccontextmanager
async def running_istiod(
    directory: Path, on_answer: Callable[[], None] = lambda: None
) -> AsyncIterator[Istiod]:
    """xDS and the CA on a port of 127.0.0.1, keys in `directory`."""
    keys = directory / "keys.json"
    keys.write_text(json.dumps({"keys": [KEY.as_dict(private=False)]}))
    authority = Authority.create("cluster.local", now())
    pods = Pods(
        [
            make_pod("istio-system", "ztunnel-n1", "ztunnel", "n1", "uid-1"),
            make_pod("demo", "sleep-1", "sleep", "n1"),
            make_pod("demo", "httpbin-1", "httpbin", "n2"),
        ]
    )
    authenticator = Authenticator(
        SignedTokenReviewer(keys, audiences=["istio-ca"], clock=now), "Kubernetes"
    )
    ads = AdsService(authenticator, on_answer)
    certificates = CertificateService(
        authority,
        authenticator,
        pods,
        trusted_accounts={"istio-system/ztunnel"},
        clock=now,
    )
    methods = {DELTA_AGGREGATED_RESOURCES: ads.delta, CREATE_CERTIFICATE: certificates.create}
    context = control_plane_server(*authority.serving_certificate([NAME, "localhost"], now()))
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    async with trio.open_nursery() as nursery:

        async def serve(task_status: trio.TaskStatus[object]) -> None:
            await serve_grpc(listener, context, methods, task_status=task_status)

        await nursery.start(serve)
        yield Istiod(authority, ads, pods, port)
        nursery.cancel_scope.cancel()
