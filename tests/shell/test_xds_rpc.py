"""The xDS client and the ADS service over real gRPC and TLS on loopback."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import trio

from istiod_lite.snapshot import Snapshot, build
from mesh.errors import IdentityError
from mesh.grpc.client import open_channel
from mesh.grpc.codec import Code, GrpcError
from mesh.model.authorization import Action, Authorization, PolicyScope
from mesh.model.service import Service
from mesh.model.store import Changed, Store
from mesh.model.workload import Workload
from mesh.proto.discovery_pb2 import DeltaDiscoveryRequest, Node
from mesh.tls.context import control_plane_client
from mesh.xds.client import DELTA_AGGREGATED_RESOURCES, NodeInfo, run_xds
from mesh.xds.translate import ADDRESS_TYPE, AUTHORIZATION_TYPE, resource_name
from tests.support.certs import make_ca
from tests.support.istiod import Istiod, mint, running_istiod

pytestmark = pytest.mark.usefixtures("no_fd_leak")

NODE = NodeInfo("ztunnel-n1", "istio-system", "n1", addresses=("127.0.0.1",))
SLEEP = Workload(uid="K//Pod/demo/sleep", name="sleep", namespace="demo", addresses=("10.0.0.1",))
DENY = Authorization("deny", "demo", PolicyScope.NAMESPACE, Action.DENY)


@pytest.fixture
async def istiod(tmp_path: Path) -> AsyncIterator[Istiod]:
    async with running_istiod(tmp_path) as running:
        yield running


def snapshot(*resources: Workload | Authorization) -> Snapshot:
    return build(
        {r.uid: r for r in resources if isinstance(r, Workload)},
        {r.key: r for r in resources if isinstance(r, Authorization)},
    )


class RecordingStore(Store):
    """A store that remembers what it was sent, changed or not."""

    def __init__(self) -> None:
        super().__init__()
        self.received: list[list[str]] = []

    def apply_addresses(
        self, updated: Sequence[Workload | Service], removed: Sequence[str]
    ) -> Changed:
        self.received.append([resource_name(resource) for resource in updated])
        return super().apply_addresses(updated, removed)


class Proxy:
    """A node proxy's xDS side, and everything it was told."""

    def __init__(self, istiod: Istiod, token: str) -> None:
        self.store = RecordingStore()
        self.ready: list[str] = []
        self.events: list[tuple[str, Mapping[str, object]]] = []
        self.connections = 0
        self.messages: list[str] = []
        self.ended: list[str] = []
        self._changed = trio.Event()
        self.istiod = istiod
        self._token = token

    async def run(self) -> None:
        await run_xds(
            lambda: self.istiod.channel(self._token)(),
            NODE,
            self.store,
            on_change=self._on_change,
            on_ready=self._on_ready,
            observer=self,
            report=lambda event, fields: self.events.append((event, fields)),
        )

    def _on_ready(self, type_url: str) -> None:
        self.ready.append(type_url)
        self._on_change(Changed())

    def _on_change(self, _changed: Changed) -> None:
        event, self._changed = self._changed, trio.Event()
        event.set()

    def connected(self) -> None:
        self.connections += 1

    def terminated(self, reason: str) -> None:
        self.ended.append(reason)

    def message(self, url: str, size_bytes: int) -> None:
        assert size_bytes > 0
        self.messages.append(url)

    def rejected(self, url: str) -> None:
        raise AssertionError(url)

    async def until(self, condition: Any) -> None:
        with trio.fail_after(30):
            while not condition():
                await self._changed.wait()


async def test_state_arrives_and_follows(istiod: Istiod, nursery: trio.Nursery) -> None:
    proxy = Proxy(istiod, mint())
    istiod.ads.publish(snapshot(SLEEP))
    nursery.start_soon(proxy.run)
    await proxy.until(lambda: AUTHORIZATION_TYPE in proxy.ready)
    assert [w.uid for w in proxy.store.workloads()] == [SLEEP.uid]
    assert proxy.ready == [ADDRESS_TYPE, AUTHORIZATION_TYPE]

    istiod.ads.publish(snapshot(replace(SLEEP, node="n9"), DENY))
    await proxy.until(lambda: proxy.store.workload_by_uid(SLEEP.uid).node == "n9")  # type: ignore[union-attr]
    await proxy.until(lambda: list(proxy.store.policies()) == [DENY])

    istiod.ads.publish(snapshot())
    await proxy.until(lambda: not list(proxy.store.workloads()))
    await proxy.until(lambda: not list(proxy.store.policies()))
    assert proxy.messages.count(ADDRESS_TYPE) == 3


async def test_the_controller_knows_its_clients(istiod: Istiod, nursery: trio.Nursery) -> None:
    proxy = Proxy(istiod, mint())
    istiod.ads.publish(snapshot(SLEEP))
    nursery.start_soon(proxy.run)
    with trio.fail_after(30):
        while not (istiod.ads.clients() and _is_settled(istiod)):
            await trio.sleep(0.01)
    (client,) = istiod.ads.clients()
    assert client.node is not None
    assert (client.node.pod, client.node.node_name) == ("ztunnel-n1", "n1")
    assert client.account == "istio-system/ztunnel"
    status = client.types[ADDRESS_TYPE]
    assert set(status.versions) == {SLEEP.uid}
    assert (status.is_wildcard, status.pending, status.nacks) == (True, 0, 0)


async def test_a_client_that_leaves_is_forgotten(istiod: Istiod) -> None:
    istiod.ads.publish(snapshot(SLEEP))
    proxy = Proxy(istiod, mint())
    async with trio.open_nursery() as nursery:
        nursery.start_soon(proxy.run)
        await proxy.until(lambda: proxy.ready)
        nursery.cancel_scope.cancel()
    with trio.fail_after(30):
        while istiod.ads.clients():
            await trio.sleep(0.01)


async def test_streams_wait_for_the_first_snapshot(istiod: Istiod, nursery: trio.Nursery) -> None:
    proxy = Proxy(istiod, mint())
    nursery.start_soon(proxy.run)
    with trio.fail_after(30):
        while not istiod.ads.clients():
            await trio.sleep(0.01)
    await trio.sleep(0.1)
    assert proxy.messages == []
    istiod.ads.publish(snapshot(SLEEP))
    await proxy.until(lambda: list(proxy.store.workloads()))


async def test_a_reconnect_resumes_with_differences(tmp_path: Path, nursery: trio.Nursery) -> None:
    """The proxy keeps its state while the controller is away, then is sent only the change."""
    async with running_istiod(tmp_path) as first:
        first.ads.publish(snapshot(SLEEP))
        proxy = Proxy(first, mint())
        nursery.start_soon(proxy.run)
        await proxy.until(lambda: AUTHORIZATION_TYPE in proxy.ready)
    with trio.fail_after(30):
        while not proxy.ended:
            await trio.sleep(0.01)
    assert [w.uid for w in proxy.store.workloads()] == [SLEEP.uid]
    assert proxy.store.received == [[SLEEP.uid]]
    other = replace(SLEEP, uid="K//Pod/demo/other", addresses=("10.0.0.2",))
    async with running_istiod(tmp_path) as second:
        second.ads.publish(snapshot(SLEEP, other))
        proxy.istiod = second
        await proxy.until(lambda: len(list(proxy.store.workloads())) == 2)
        assert proxy.store.received == [[SLEEP.uid], [other.uid]]
    assert proxy.ready == [ADDRESS_TYPE, AUTHORIZATION_TYPE]


async def test_a_bad_token_is_refused(istiod: Istiod, nursery: trio.Nursery) -> None:
    istiod.ads.publish(snapshot(SLEEP))
    proxy = Proxy(istiod, mint()[:-6] + "AAAAAA")
    nursery.start_soon(proxy.run)
    with trio.fail_after(30):
        while not proxy.ended:
            await trio.sleep(0.01)
    assert proxy.ended[0] == "Error"
    event, fields = proxy.events[1]
    assert event == "xds_disconnected"
    assert "UNAUTHENTICATED" in str(fields["error"])
    assert istiod.ads.clients() == []


async def _first_status(istiod: Istiod, node: Node, token: str) -> GrpcError:
    try:
        async with (
            istiod.channel(token)() as channel,
            channel.stream(DELTA_AGGREGATED_RESOURCES) as stream,
        ):
            await stream.send(DeltaDiscoveryRequest(node=node, type_url=ADDRESS_TYPE))
            async for _ in stream:
                raise AssertionError("served")
    except GrpcError as refused:
        return refused
    raise AssertionError("not refused")


async def test_a_node_of_another_namespace_is_refused(istiod: Istiod) -> None:
    node = NodeInfo("ztunnel-n1", "demo", "n1").message()
    assert (await _first_status(istiod, node, mint())).code == Code.PERMISSION_DENIED


async def test_a_node_of_another_account_is_refused(istiod: Istiod) -> None:
    node = replace(NODE, metadata={"SERVICE_ACCOUNT": "other"}).message()
    assert (await _first_status(istiod, node, mint())).code == Code.PERMISSION_DENIED


async def test_a_node_without_an_id_is_refused(istiod: Istiod) -> None:
    assert (await _first_status(istiod, Node(), mint())).code == Code.INVALID_ARGUMENT


async def test_a_controller_of_another_root_is_not_believed(istiod: Istiod) -> None:
    context = control_plane_client(make_ca("other").pem)
    with pytest.raises(IdentityError):
        async with open_channel("127.0.0.1", istiod.port, context, "istiod.istio-system.svc"):
            pass


async def test_a_client_that_never_acknowledges_gets_one_response(istiod: Istiod) -> None:
    istiod.ads.publish(snapshot(SLEEP))
    async with (
        istiod.channel(mint())() as channel,
        channel.stream(DELTA_AGGREGATED_RESOURCES) as stream,
    ):
        node = NODE.message()
        await stream.send(DeltaDiscoveryRequest(node=node, type_url=ADDRESS_TYPE))
        first = await stream.__anext__()
        for number in range(50):
            istiod.ads.publish(snapshot(replace(SLEEP, node=str(number))))
        with trio.move_on_after(0.2) as patience:
            await stream.__anext__()
        assert patience.cancelled_caught
        ack = DeltaDiscoveryRequest(type_url=ADDRESS_TYPE, response_nonce=first.nonce)
        await stream.send(ack)
        with trio.fail_after(30):
            second = await stream.__anext__()
        current = istiod.ads.snapshot
        assert current is not None
        expected = current.of(ADDRESS_TYPE)[SLEEP.uid].version
        assert [entry.version for entry in second.resources] == [expected]


def _is_settled(istiod: Istiod) -> bool:
    return all(
        status.acked and not status.in_flight
        for client in istiod.ads.clients()
        for status in client.types.values()
    ) and all(len(client.types) == 2 for client in istiod.ads.clients())
