"""A scripted control plane for one node proxy: fixed xDS answers, an authority that trusts
everybody, and a node agent's ZDS socket. The real ones are in istiod_lite and netconfig.
"""

from __future__ import annotations

import contextlib
import datetime
import ipaddress
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path

import trio
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from mesh import netns
from mesh.errors import Unavailable
from mesh.grpc.server import Call, serve_grpc
from mesh.http.stream import StreamReset
from mesh.identity import SpiffeId
from mesh.model.authorization import Authorization
from mesh.model.l7_policy import TrafficConfig
from mesh.model.service import Service
from mesh.model.workload import Workload
from mesh.proto import ca_pb2
from mesh.proto.discovery_pb2 import DeltaDiscoveryRequest, DeltaDiscoveryResponse
from mesh.secrets import CREATE_CERTIFICATE
from mesh.tls.certificate import Certificate, issued_certificate, new_request
from mesh.tls.context import control_plane_server
from mesh.xds.client import DELTA_AGGREGATED_RESOURCES
from mesh.xds.translate import ADDRESS_TYPE, AUTHORIZATION_TYPE, TRAFFIC_TYPE, encode, resource_name

Resource = Workload | Service | Authorization | TrafficConfig


class ControlPlane:
    """Answers each type once with what it was given, then with what `push` adds."""

    def __init__(self, resources: Sequence[Resource] = ()) -> None:
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "scripted root")])
        self._root = self._sign(self._name, self._key.public_key(), None)
        self._resources = list(resources)
        self._streams: list[trio.MemorySendChannel[DeltaDiscoveryResponse]] = []
        self._nonce = 0
        self.requests: list[DeltaDiscoveryRequest] = []
        self.tokens: set[str] = set()
        self.issued: list[str] = []
        self.own_identity = ""
        """Whom a token stands for that asks for a certificate without naming one."""

    @property
    def root_pem(self) -> bytes:
        return self._root.public_bytes(serialization.Encoding.PEM)

    async def push(self, *resources: Resource, removed_policies: Sequence[str] = ()) -> None:
        """Send changes of one type to every stream."""
        kind = AUTHORIZATION_TYPE if removed_policies else _type_of(resources[0])
        response = self._response(kind, resources, removed_policies)
        for stream in self._streams:
            await stream.send(response)

    async def apply(self, *resources: Resource) -> None:
        """The same, and wait until a stream has acknowledged it."""
        await self.push(*resources)
        nonce = str(self._nonce)
        with trio.fail_after(20):
            while not any(each.response_nonce == nonce for each in self.requests):
                await trio.sleep(0.005)
        (told,) = (each for each in self.requests if each.response_nonce == nonce)
        assert not told.HasField("error_detail"), told.error_detail.message

    async def serve(
        self, namespace: int, *, task_status: trio.TaskStatus[object] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Serve 127.0.0.1:15012 in `namespace`."""
        with netns.inside(namespace):
            listener = socket.create_server(("127.0.0.1", 15012))
        await self.serve_on(listener, task_status=task_status)

    async def serve_on(
        self,
        listener: socket.socket,
        *,
        task_status: trio.TaskStatus[object] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Serve on a listener at 127.0.0.1."""
        key = ec.generate_private_key(ec.SECP256R1())
        names = [x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
        leaf = self._sign(x509.Name([]), key.public_key(), names)
        context = control_plane_server(
            leaf.public_bytes(serialization.Encoding.PEM) + self.root_pem, _key_pem(key)
        )
        methods = {DELTA_AGGREGATED_RESOURCES: self._discover, CREATE_CERTIFICATE: self._create}
        await serve_grpc(listener, context, methods, task_status=task_status)

    async def _discover(
        self,
        requests: AsyncIterator[DeltaDiscoveryRequest],
        send: Callable[[DeltaDiscoveryResponse], Awaitable[None]],
        call: Call,
    ) -> None:
        self.tokens.add(call.metadata.get("authorization", ""))
        outgoing, pushed = trio.open_memory_channel[DeltaDiscoveryResponse](100)
        self._streams.append(outgoing)
        async with trio.open_nursery() as nursery:

            async def write() -> None:
                async for response in pushed:
                    await send(response)

            nursery.start_soon(write)
            # The proxy ends its stream by cutting it.
            with contextlib.suppress(StreamReset, Unavailable):
                async for request in requests:
                    self.requests.append(request)
                    if not request.response_nonce:
                        await outgoing.send(self._first(request.type_url))
            self._streams.remove(outgoing)
            nursery.cancel_scope.cancel()

    def _first(self, type_url: str) -> DeltaDiscoveryResponse:
        wanted = [each for each in self._resources if _type_of(each) == type_url]
        return self._response(type_url, wanted, ())

    def _response(
        self, type_url: str, resources: Sequence[Resource], removed: Sequence[str]
    ) -> DeltaDiscoveryResponse:
        self._nonce += 1
        response = DeltaDiscoveryResponse(
            type_url=type_url, nonce=str(self._nonce), removed_resources=removed
        )
        for each in resources:
            resource = response.resources.add(name=resource_name(each))
            resource.resource.type_url = response.type_url
            resource.resource.value = encode(each)
        return response

    async def _create(
        self, request: ca_pb2.IstioCertificateRequest, _call: Call
    ) -> ca_pb2.IstioCertificateResponse:
        csr = x509.load_pem_x509_csr(request.csr.encode())
        impersonated = "ImpersonatedIdentity"
        identity = self.own_identity
        if impersonated in request.metadata:
            identity = str(request.metadata[impersonated])
        self.issued.append(identity)
        names = [x509.UniformResourceIdentifier(identity)]
        leaf = self._sign(x509.Name([]), csr.public_key(), names)
        chain = [leaf.public_bytes(serialization.Encoding.PEM).decode(), self.root_pem.decode()]
        return ca_pb2.IstioCertificateResponse(cert_chain=chain)

    def issue(self, identity: SpiffeId) -> Certificate:
        """A certificate of this authority, as a proxy would hold it."""
        key_pem, csr_pem = new_request(identity)
        csr = x509.load_pem_x509_csr(csr_pem)
        leaf = self._sign(
            x509.Name([]), csr.public_key(), [x509.UniformResourceIdentifier(str(identity))]
        )
        chain = [leaf.public_bytes(serialization.Encoding.PEM).decode(), self.root_pem.decode()]
        return issued_certificate(chain, key_pem, identity)

    def _sign(
        self, subject: x509.Name, public_key: object, names: Sequence[x509.GeneralName] | None
    ) -> x509.Certificate:
        now = datetime.datetime.now(datetime.UTC)
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(public_key)  # type: ignore[arg-type]
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(minutes=2))
            .not_valid_after(now + datetime.timedelta(hours=1))
            .add_extension(x509.BasicConstraints(ca=names is None, path_length=None), critical=True)
        )
        if names is not None:
            both = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
            builder = builder.add_extension(
                x509.SubjectAlternativeName(names), critical=True
            ).add_extension(x509.ExtendedKeyUsage(both), critical=False)
        return builder.sign(self._key, hashes.SHA256())


def _type_of(resource: Resource) -> str:
    if isinstance(resource, TrafficConfig):
        return TRAFFIC_TYPE
    return AUTHORIZATION_TYPE if isinstance(resource, Authorization) else ADDRESS_TYPE


def write_secrets(directory: Path, root_pem: bytes, token: str) -> None:
    """The files a node proxy finds below its working directory."""
    secrets = directory / "var/run/secrets"
    (secrets / "istio").mkdir(parents=True)
    (secrets / "tokens").mkdir()
    (secrets / "istio/root-cert.pem").write_bytes(root_pem)
    (secrets / "tokens/istio-token").write_text(token + "\n")


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
