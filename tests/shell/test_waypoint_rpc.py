"""A waypoint over real gRPC and TLS: its token says whose traffic it is told, its claims do not."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio

from istiod_lite.snapshot import build
from mesh.grpc.codec import Code, GrpcError
from mesh.model.l7_policy import TrafficConfig
from mesh.proto.discovery_pb2 import DeltaDiscoveryRequest, DeltaDiscoveryResponse, Node
from mesh.xds.client import DELTA_AGGREGATED_RESOURCES
from mesh.xds.translate import TRAFFIC_TYPE
from tests.support.istiod import Istiod, mint, running_istiod

pytestmark = pytest.mark.usefixtures("no_fd_leak")

CONFIGS = (TrafficConfig("shop/wp"), TrafficConfig("shop/wp", "shop/a"), TrafficConfig("x/wp"))


async def first_answer(istiod: Istiod, token: str, **claims: str) -> DeltaDiscoveryResponse:
    namespace = claims.get("NAMESPACE", "shop")
    node = Node(id=f"waypoint~10.0.0.9~wp-1.{namespace}~{namespace}.svc.cluster.local")
    node.metadata.update(claims)
    with trio.fail_after(30):
        async with (
            istiod.channel(token)() as channel,
            channel.stream(DELTA_AGGREGATED_RESOURCES) as stream,
        ):
            await stream.send(DeltaDiscoveryRequest(node=node, type_url=TRAFFIC_TYPE))
            async for response in stream:
                assert isinstance(response, DeltaDiscoveryResponse)
                return response
    raise AssertionError("no answer")


async def test_each_is_told_what_its_token_is_for(tmp_path: Path) -> None:
    async with running_istiod(tmp_path) as istiod:
        istiod.ads.publish(build({}, {}, None, {each.key: each for each in CONFIGS}))
        own = await first_answer(istiod, mint("shop", "wp", "wp-1"))
        assert {each.name for each in own.resources} == {"shop/wp", "shop/wp/shop/a"}
        # The namespace's other pods, and a node proxy, are told nothing.
        other = await first_answer(istiod, mint("shop", "web", "web-1"), GATEWAY_NAME="wp")
        assert list(other.resources) == []
        ztunnel = await first_answer(istiod, mint(), NAMESPACE="istio-system")
        assert list(ztunnel.resources) == []


async def test_nobody_may_say_that_it_is_another(tmp_path: Path) -> None:
    async with running_istiod(tmp_path) as istiod:
        istiod.ads.publish(build({}, {}, None, {each.key: each for each in CONFIGS}))
        for claims in ({"SERVICE_ACCOUNT": "wp"}, {"NAMESPACE": "x"}):
            with pytest.raises(GrpcError) as refused:
                await first_answer(istiod, mint("shop", "web", "web-1"), **claims)
            assert refused.value.code == Code.PERMISSION_DENIED
