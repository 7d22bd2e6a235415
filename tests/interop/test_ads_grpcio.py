"""grpcio's client against the ADS and certificate services: the wire as others read it."""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest
import trio

from istiod_lite.snapshot import build
from mesh.identity import SpiffeId
from mesh.model.workload import Workload
from mesh.proto.ca_pb2 import IstioCertificateRequest, IstioCertificateResponse
from mesh.proto.discovery_pb2 import DeltaDiscoveryRequest, DeltaDiscoveryResponse
from mesh.secrets import CREATE_CERTIFICATE
from mesh.tls.certificate import issued_certificate, new_request
from mesh.xds.client import DELTA_AGGREGATED_RESOURCES, NodeInfo
from mesh.xds.translate import ADDRESS_TYPE, AUTHORIZATION_TYPE
from tests.support.istiod import NAME, Istiod, mint, running_istiod

pytestmark = pytest.mark.interop

SLEEP = Workload(uid="K//Pod/demo/sleep", name="sleep", namespace="demo")
IDENTITY = SpiffeId("cluster.local", "demo", "sleep")
NODE = NodeInfo("ztunnel-n1", "istio-system", "n1").message()


def channel_to(istiod: Istiod) -> grpc.Channel:
    # grpcio's BoringSSL offers TLS 1.3 by itself.
    credentials = grpc.ssl_channel_credentials(istiod.authority.root_pem)
    options = [("grpc.ssl_target_name_override", NAME)]
    return grpc.secure_channel(f"127.0.0.1:{istiod.port}", credentials, options)


def metadata(token: str) -> list[tuple[str, str]]:
    return [("authorization", f"Bearer {token}"), ("clusterid", "Kubernetes")]


def talk(istiod: Istiod, publish: Callable[[Workload], None]) -> list[DeltaDiscoveryResponse]:
    """Open both types, acknowledge, wait for a change; runs in a thread."""
    requests: queue.Queue[DeltaDiscoveryRequest | None] = queue.Queue()
    found = []

    def outgoing() -> Iterator[DeltaDiscoveryRequest]:
        while (request := requests.get(timeout=10)) is not None:
            yield request

    with channel_to(istiod) as channel:
        call = channel.stream_stream(
            DELTA_AGGREGATED_RESOURCES.path,
            request_serializer=DeltaDiscoveryRequest.SerializeToString,
            response_deserializer=DeltaDiscoveryResponse.FromString,
        )
        requests.put(DeltaDiscoveryRequest(node=NODE, type_url=ADDRESS_TYPE))
        requests.put(DeltaDiscoveryRequest(node=NODE, type_url=AUTHORIZATION_TYPE))
        responses = call(outgoing(), metadata=metadata(mint()), timeout=10)
        for response in responses:
            found.append(response)
            requests.put(
                DeltaDiscoveryRequest(type_url=response.type_url, response_nonce=response.nonce)
            )
            if len(found) == 2:
                publish(Workload(uid="K//Pod/demo/new", name="new", namespace="demo"))
            if len(found) == 3:
                requests.put(None)
    return found


async def test_grpcio_reads_state_and_changes(tmp_path: Path) -> None:
    async with running_istiod(tmp_path) as istiod:
        istiod.ads.publish(build({SLEEP.uid: SLEEP}, {}))

        def publish(new: Workload) -> None:
            snapshot = build({SLEEP.uid: SLEEP, new.uid: new}, {}, istiod.ads.snapshot)
            trio.from_thread.run_sync(istiod.ads.publish, snapshot)

        found = await trio.to_thread.run_sync(talk, istiod, publish)
        assert [r.type_url for r in found] == [ADDRESS_TYPE, AUTHORIZATION_TYPE, ADDRESS_TYPE]
        assert [[e.name for e in r.resources] for r in found] == [
            [SLEEP.uid],
            [],
            ["K//Pod/demo/new"],
        ]
        with trio.fail_after(30):
            while istiod.ads.clients():
                await trio.sleep(0.01)


async def test_grpcio_gets_a_certificate_and_a_refusal(tmp_path: Path) -> None:
    key, csr = new_request(IDENTITY)
    request = IstioCertificateRequest(csr=csr.decode(), validity_duration=600)
    request.metadata.update({"ImpersonatedIdentity": str(IDENTITY)})

    def ask(istiod: Istiod, token: str) -> IstioCertificateResponse:
        with channel_to(istiod) as channel:
            create = channel.unary_unary(
                CREATE_CERTIFICATE.path,
                request_serializer=IstioCertificateRequest.SerializeToString,
                response_deserializer=IstioCertificateResponse.FromString,
            )
            response: IstioCertificateResponse = create(
                request, metadata=metadata(token), timeout=10
            )
            return response

    async with running_istiod(tmp_path) as istiod:
        answer = await trio.to_thread.run_sync(ask, istiod, mint())
        assert issued_certificate(list(answer.cert_chain), key, IDENTITY).identity == IDENTITY
        with pytest.raises(grpc.RpcError) as refused:
            await trio.to_thread.run_sync(ask, istiod, mint(uid="other"))
        assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED
