"""Statuses in a real directory follow what a real client of xDS acknowledges and refuses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import trio
from prometheus_client import CollectorRegistry

from istiod_lite.index import ClusterIndex
from istiod_lite.publisher import Publisher
from istiod_lite.status_writer import StatusWriter
from istiod_lite.workloads import Mesh
from mesh.cluster.api import Ref
from mesh.cluster.directory import DirectoryCluster
from mesh.proto.discovery_pb2 import DeltaDiscoveryRequest, Node
from mesh.xds.client import DELTA_AGGREGATED_RESOURCES
from mesh.xds.translate import TRAFFIC_TYPE
from tests.support.gateways import (
    USE,
    authorization,
    gateway,
    namespace,
    route,
    service,
    waypoint_pod,
)
from tests.support.istiod import mint, now, running_istiod


async def test_a_status_says_what_the_waypoint_acknowledged(tmp_path: Path) -> None:
    path = tmp_path / "cluster"
    path.mkdir()
    cluster = DirectoryCluster(path, writable=True)
    labels = {"gateway.networking.k8s.io/gateway-name": "wp"}
    for each in (
        namespace("shop", **{USE: "wp"}),
        gateway(),
        service("wp", app="wp", labels=labels),
        waypoint_pod(),
        service(),
        route(),
        authorization(),
    ):
        await cluster.apply(each)
    writers: list[StatusWriter] = []

    def look() -> None:
        for each in writers:
            each.look()

    async def condition(kind: str, name: str, wanted: str, of: Callable[[dict], list]) -> dict:
        with trio.fail_after(30):
            while True:
                found = await cluster.get(Ref(kind, "shop", name))
                assert found is not None
                for each in of(found.get("status", {})):
                    if f"{each['type']} {each['status']} {each['reason']}" == wanted:
                        return each
                await trio.sleep(0.02)

    def top(status: dict) -> list:
        return status.get("conditions", [])

    index = ClusterIndex(Mesh())
    async with (
        running_istiod(tmp_path, on_answer=look) as istiod,
        trio.open_nursery() as nursery,
    ):
        publisher = Publisher(index, istiod.ads, CollectorRegistry(), look)
        await nursery.start(publisher.follow, cluster)
        writers.append(StatusWriter(index, istiod.ads, now))
        nursery.start_soon(writers[0].run, cluster)
        await condition("Gateway", "wp", "Programmed False Pending", top)
        await condition("AuthorizationPolicy", "p", "WaypointAccepted Unknown Pending", top)
        node = Node(id="waypoint~10.0.9.9~wp-1.shop~shop.svc.cluster.local")
        async with (
            istiod.channel(mint("shop", "wp", "wp-1"))() as channel,
            channel.stream(DELTA_AGGREGATED_RESOURCES) as stream,
        ):
            answers = stream.__aiter__()
            await stream.send(DeltaDiscoveryRequest(node=node, type_url=TRAFFIC_TYPE))
            first = await anext(answers)
            await stream.send(
                DeltaDiscoveryRequest(type_url=TRAFFIC_TYPE, response_nonce=first.nonce)
            )
            accepted = await condition(
                "AuthorizationPolicy", "p", "WaypointAccepted True Accepted", top
            )
            assert "applied on 1 of 1" in accepted["message"]
            await condition("Gateway", "wp", "Programmed True Programmed", top)
            await condition("Service", "web", "istio.io/WaypointBound True WaypointAccepted", top)
            await condition(
                "HTTPRoute", "r", "Accepted True Accepted", lambda s: s["parents"][0]["conditions"]
            )
            await cluster.apply(authorization(rules=[{}]))
            second = await anext(answers)
            refusal = DeltaDiscoveryRequest(type_url=TRAFFIC_TYPE, response_nonce=second.nonce)
            refusal.error_detail.message = "not understood"
            await stream.send(refusal)
            refused = await condition(
                "AuthorizationPolicy", "p", "WaypointAccepted False Invalid", top
            )
            assert "not understood" in refused["message"]
        # Nobody is connected any more, so nobody enforces it.
        await condition("AuthorizationPolicy", "p", "WaypointAccepted Unknown Pending", top)
        nursery.cancel_scope.cancel()
