"""The two other processes of bench_controller: the controller on objects that live in its memory,
and many delta-xDS clients. They take orders by lines on stdin and answer by lines of JSON.

    python -m tests.bench.controller_peers serve DIRECTORY SERVICES PODS
    python -m tests.bench.controller_peers clients DIRECTORY PORT COUNT FIRST

The controller is the whole daemon; only where objects come from is replaced, so that reading them
from disk or from an API server is not in the numbers. The clients speak gRPC over TLS with our own
client, each on a connection of its own: two hundred of grpcio's would leave the controller no
processor on a small machine.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import trio

from istiod_lite import app
from istiod_lite.authority import open_authority
from istiod_lite.config import IstiodConfig
from mesh.cluster.api import Event, Object, Put, Ref, Synced, merge_patch, ref_of
from mesh.errors import MeshError
from mesh.grpc.client import ClientStream, open_channel
from mesh.proto.discovery_pb2 import DeltaDiscoveryRequest, DeltaDiscoveryResponse
from mesh.runtime import log
from mesh.runtime.config import load
from mesh.runtime.lifecycle import Shutdown
from mesh.tls.context import control_plane_client
from mesh.xds.client import DELTA_AGGREGATED_RESOURCES, call_metadata
from mesh.xds.translate import ADDRESS_TYPE, AUTHORIZATION_TYPE
from tests.support.istiod import KEY, NAME, mint, now

NODES = 100
SERVICES_OF_NAMESPACE = 20


def say(**told: Any) -> None:
    """One answer."""
    print(json.dumps(told), flush=True)


# -- the controller ------------------------------------------------------------------------


def pod(number: int, services: int, *, ready: bool = True) -> Object:
    """The pod of that number; every service has the same number of them."""
    service = number % services
    namespace = f"ns{service // SERVICES_OF_NAMESPACE}"
    ip = f"10.{number >> 16}.{number >> 8 & 255}.{number & 255}"
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "name": f"s{service}-{number}",
            "namespace": namespace,
            "uid": f"uid-{number}",
            "labels": {"app": f"s{service}", "version": "v1"},
            "annotations": {"ambient.istio.io/redirection": "enabled"},
        },
        "spec": {
            "nodeName": f"n{number % NODES}",
            "serviceAccountName": f"s{service}",
            "containers": [
                {"name": "c", "image": "c", "ports": [{"name": "http", "containerPort": 8080}]}
            ],
        },
        "status": {
            "phase": "Running",
            "podIP": ip,
            "podIPs": [{"ip": ip}],
            "conditions": [{"type": "Ready", "status": str(ready)}],
        },
    }


def objects(services: int, pods: int) -> Iterator[Object]:
    """Everything, in the order that a cluster tells it."""
    for number in range(-(-services // SERVICES_OF_NAMESPACE)):
        metadata: Object = {"name": f"ns{number}", "labels": {"istio.io/dataplane-mode": "ambient"}}
        yield {"apiVersion": "v1", "kind": "Namespace", "metadata": metadata}
    for number in range(NODES):
        labels = {"topology.kubernetes.io/zone": f"z{number % 3}"}
        metadata = {"name": f"n{number}", "labels": labels}
        yield {"apiVersion": "v1", "kind": "Node", "metadata": metadata}
    for number in range(services):
        namespace = f"ns{number // SERVICES_OF_NAMESPACE}"
        yield {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {"name": f"s{number}", "namespace": namespace},
            "spec": {
                "clusterIP": f"10.{96 + (number >> 16)}.{number >> 8 & 255}.{number & 255}",
                "selector": {"app": f"s{number}"},
                "ports": [{"name": "http", "port": 80, "targetPort": "http", "protocol": "TCP"}],
            },
        }
    for number in range(pods):
        yield pod(number, services)


class MemoryCluster:
    """Keeps nothing but what is written; what it tells is put into `changes`."""

    def __init__(self, services: int, pods: int) -> None:
        self._numbers = services, pods
        self._changes: trio.MemorySendChannel[Event] | None = None
        self._written: dict[Ref, Object] = {}

    @asynccontextmanager
    async def watch(self, kinds: Sequence[str]) -> AsyncIterator[trio.MemoryReceiveChannel[Event]]:
        """All objects, `Synced`, then what `change` says."""
        send, receive = trio.open_memory_channel[Event](1000)
        async with trio.open_nursery() as nursery:

            async def tell() -> None:
                for obj in objects(*self._numbers):
                    if obj["kind"] in kinds:
                        await send.send(Put(ref_of(obj), obj))
                await send.send(Synced())
                if "Pod" in kinds:
                    self._changes = send

            nursery.start_soon(tell)
            yield receive
            nursery.cancel_scope.cancel()

    async def change(self, number: int, *, ready: bool) -> None:
        """One pod is ready, or no longer."""
        assert self._changes is not None
        obj = pod(number, self._numbers[0], ready=ready)
        await self._changes.send(Put(ref_of(obj), obj))

    async def get(self, ref: Ref) -> Object | None:
        """What was written."""
        return self._written.get(ref)

    async def apply(self, object: Object) -> None:  # noqa: A002
        """Keep it."""
        self._written[ref_of(object)] = object

    async def patch(self, ref: Ref, merge: Mapping[str, Any]) -> None:
        """Keep it."""
        self._written[ref] = merge_patch(self._written.get(ref, {}), merge)

    async def delete(self, ref: Ref) -> None:
        """Forget it."""
        self._written.pop(ref, None)


async def serve(directory: Path, services: int, pods: int) -> None:
    """The controller, until stdin ends."""
    keys = directory / "keys.json"
    keys.write_text(json.dumps({"keys": [KEY.as_dict(private=False)]}))
    (directory / "key.json").write_text(json.dumps(KEY.as_dict(private=True)))
    listener = trio.socket.socket()
    await listener.bind(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    listener.close()
    environment = {
        "CLUSTER_DIR": str(directory),
        "CA_DIR": str(directory / "ca"),
        "TOKEN_ISSUER_KEYS": str(keys),
        "XDS_HOST": "127.0.0.1",
        "XDS_PORT": str(port),
        "MONITORING_PORT": "0",
    }
    config = load(IstiodConfig, [], environment)
    authority = open_authority(config.ca_dir, config.trust_domain, now())
    (directory / "root.pem").write_bytes(authority.root_pem)
    cluster = MemoryCluster(services, pods)
    started = time.monotonic()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(app.serve, config, cluster, Shutdown())
        while True:
            try:
                await (await trio.open_tcp_stream("127.0.0.1", port)).aclose()
                break
            except OSError:
                await trio.sleep(0.01)
        say(port=port, seconds=time.monotonic() - started)
        async for line in trio.wrap_file(sys.stdin):
            number, ready = json.loads(line)
            say(at=time.monotonic())
            await cluster.change(number, ready=ready)
        nursery.cancel_scope.cancel()


# -- the clients ---------------------------------------------------------------------------


class Client:
    """One node proxy, as far as xDS goes: takes everything and acknowledges it."""

    def __init__(self, number: int, fleet: Fleet) -> None:
        self.number = number
        self.fleet = fleet
        self.versions: dict[str, dict[str, str]] = {ADDRESS_TYPE: {}, AUTHORIZATION_TYPE: {}}

    async def run(self) -> None:
        """One connection after the other, as proxies do, until it is cancelled."""
        while True:
            try:
                await self._connect()
            except MeshError as error:
                log.get("bench").warning("connection_lost", number=self.number, error=str(error))
            await trio.sleep(0.5)

    async def _connect(self) -> None:
        token = mint(pod=f"ztunnel-{self.number}", uid=f"u{self.number}", node="n0")
        fleet = self.fleet
        async with (
            open_channel(
                "127.0.0.1",
                fleet.port,
                control_plane_client(fleet.root),
                NAME,
                call_metadata(token, "Kubernetes"),
            ) as channel,
            channel.stream(DELTA_AGGREGATED_RESOURCES) as call,
        ):
            for type_url, held in self.versions.items():
                request = DeltaDiscoveryRequest(type_url=type_url, initial_resource_versions=held)
                request.node.id = f"ztunnel~10.1.0.1~z{self.number}.istio-system~istio-system"
                request.node.metadata.fields["NODE_NAME"].string_value = f"n{self.number % NODES}"
                await call.send(request)
            async for response in call:
                await self._take(call, response)

    async def _take(
        self,
        call: ClientStream[DeltaDiscoveryRequest, DeltaDiscoveryResponse],
        response: DeltaDiscoveryResponse,
    ) -> None:
        if response.type_url not in self.versions:
            return
        if self.fleet.keeps_versions:
            held = self.versions[response.type_url]
            held.update((each.name, each.version) for each in response.resources)
            for name in response.removed_resources:
                held.pop(name, None)
        await call.send(
            DeltaDiscoveryRequest(type_url=response.type_url, response_nonce=response.nonce)
        )
        if response.type_url == ADDRESS_TYPE:
            self.fleet.acknowledged(response.ByteSize(), len(response.resources))


class Fleet:
    """Many of them; tells when all have acknowledged."""

    def __init__(self, directory: Path, port: int, count: int, first: int) -> None:
        self.root = (directory / "root.pem").read_bytes()
        self.port = port
        # To know what they hold costs memory and time here, and is needed to resume only.
        self.keeps_versions = True
        self.clients = [Client(first + number, self) for number in range(count)]
        self._clear()

    def _clear(self) -> None:
        self._answers = self._bytes = self._resources = 0

    def acknowledged(self, size: int, resources: int) -> None:
        """One of them has taken a response."""
        self._answers += 1
        self._bytes += size
        self._resources += resources
        if self._answers == len(self.clients):
            say(at=time.monotonic(), bytes=self._bytes, resources=self._resources)
            self._clear()

    async def run(self) -> None:
        """Connect at each line on stdin: `fresh`, or `resume` with the versions that are held."""
        lines = trio.wrap_file(sys.stdin)
        await lines.readline()
        while True:
            say(at=time.monotonic())
            async with trio.open_nursery() as nursery:
                for client in self.clients:
                    nursery.start_soon(client.run)
                line = await lines.readline()
                nursery.cancel_scope.cancel()
            if not line:
                return
            if line.strip() == "fresh":
                for client in self.clients:
                    client.versions = {type_url: {} for type_url in client.versions}


def main() -> None:
    """See the module."""
    what, directory, *numbers = sys.argv[1:]
    log.configure(json=True)
    if what == "serve":
        services, pods = map(int, numbers)
        trio.run(serve, Path(directory), services, pods)
    else:
        port, count, first = map(int, numbers)
        key = json.loads((Path(directory) / "key.json").read_text())
        from joserfc.jwk import ECKey

        import tests.support.istiod as support

        support.KEY = ECKey.import_key(key)
        trio.run(Fleet(Path(directory), port, count, first).run)


if __name__ == "__main__":
    main()
