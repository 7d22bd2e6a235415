"""A controller that starts with a silent source, as grpcio's client sees it: the whole state that
its predecessor told, waypoints' policy included, to who starts anew, and not a word to who has it.
"""

from __future__ import annotations

import json
import queue
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import pytest
import trio
import yaml

from istiod_lite import app, last_known_good
from istiod_lite.authority import open_authority
from istiod_lite.config import IstiodConfig
from mesh import sockets
from mesh.cluster.api import Cluster, Event
from mesh.cluster.directory import DirectoryCluster
from mesh.proto.discovery_pb2 import DeltaDiscoveryRequest, DeltaDiscoveryResponse
from mesh.runtime.config import load
from mesh.runtime.lifecycle import Shutdown
from mesh.xds.client import DELTA_AGGREGATED_RESOURCES, NodeInfo
from mesh.xds.translate import ADDRESS_TYPE, AUTHORIZATION_TYPE, TRAFFIC_TYPE
from tests.support.gateways import (
    USE,
    authorization,
    gateway,
    namespace,
    pod,
    service,
    waypoint_pod,
)
from tests.support.istiod import KEY, NAME, mint, now

pytestmark = pytest.mark.interop

TYPES = (ADDRESS_TYPE, AUTHORIZATION_TYPE, TRAFFIC_TYPE)
Held = dict[str, dict[str, str]]


class SilentCluster(DirectoryCluster):
    """An API server that accepts a watch and says nothing."""

    @asynccontextmanager
    async def watch(self, kinds: object) -> AsyncIterator[trio.MemoryReceiveChannel[Event]]:
        send, receive = trio.open_memory_channel[Event](0)
        async with send, receive:
            yield receive


def ask(root: bytes, port: int, token: str, node: NodeInfo, held: Mapping[str, object]) -> Held:
    """What is told of each type, by name and version, to a client that holds `held`."""
    requests: queue.Queue[DeltaDiscoveryRequest | None] = queue.Queue()
    found: Held = {}

    def outgoing() -> Iterator[DeltaDiscoveryRequest]:
        while (request := requests.get(timeout=30)) is not None:
            yield request

    credentials = grpc.ssl_channel_credentials(root)
    options = [("grpc.ssl_target_name_override", NAME)]
    with grpc.secure_channel(f"127.0.0.1:{port}", credentials, options) as channel:
        call = channel.stream_stream(
            DELTA_AGGREGATED_RESOURCES.path,
            request_serializer=DeltaDiscoveryRequest.SerializeToString,
            response_deserializer=lambda data: data,
        )
        for each in TYPES:
            requests.put(
                DeltaDiscoveryRequest(
                    node=node.message(),
                    type_url=each,
                    initial_resource_versions=held.get(each, {}),  # type: ignore[arg-type]
                )
            )
        metadata = [("authorization", f"Bearer {token}"), ("clusterid", "Kubernetes")]
        for data in call(outgoing(), metadata=metadata, timeout=30):
            response = DeltaDiscoveryResponse.FromString(data)
            assert not response.removed_resources
            found[response.type_url] = {each.name: each.version for each in response.resources}
            requests.put(
                DeltaDiscoveryRequest(type_url=response.type_url, response_nonce=response.nonce)
            )
            if found.keys() == {*TYPES}:
                requests.put(None)
    return found


@asynccontextmanager
async def controller(directory: Path, cluster: Cluster) -> AsyncIterator[tuple[bytes, int]]:
    listener = sockets.open_listener(0, host="127.0.0.1")
    port = listener.getsockname()[1]
    listener.close()
    keys = directory / "keys.json"
    keys.write_text(json.dumps({"keys": [KEY.as_dict(private=False)]}))
    environment = {
        "CLUSTER_DIR": str(directory / "cluster"),
        "CA_DIR": str(directory / "ca"),
        "TOKEN_ISSUER_KEYS": str(keys),
        "XDS_HOST": "127.0.0.1",
        "XDS_PORT": str(port),
        "MONITORING_PORT": "0",
        "STATE_WAIT": "0",
    }
    config = load(IstiodConfig, [], environment)
    root = open_authority(config.ca_dir, config.trust_domain, now()).root_pem
    async with trio.open_nursery() as nursery:
        nursery.start_soon(app.serve, config, cluster, Shutdown())
        with trio.fail_after(60):
            while True:
                try:
                    await (await trio.open_tcp_stream("127.0.0.1", port)).aclose()
                    break
                except OSError:
                    await trio.sleep(0.02)
        yield root, port
        nursery.cancel_scope.cancel()


async def test_the_whole_state_and_nothing_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(last_known_good, "SAVE_SECONDS", 0.0)
    proxy = pod("ztunnel-n1", "istio-system", "ztunnel", ip="10.0.0.9", account="ztunnel")
    proxy["metadata"]["uid"] = "uid-1"
    waypoint = waypoint_pod()
    waypoint["metadata"]["uid"] = "uid-2"
    closed = authorization(rules=[{"to": [{"operation": {"methods": ["GET"]}}]}])
    objects = [namespace("shop", **{USE: "wp"}), gateway(), service(), pod("a"), closed]
    (tmp_path / "cluster").mkdir()
    (tmp_path / "cluster" / "all.yaml").write_text(yaml.safe_dump_all([*objects, proxy, waypoint]))
    saved = tmp_path / "ca" / "last-known-good"
    callers = (
        (mint(), NodeInfo("ztunnel-n1", "istio-system", "n1")),
        (mint("shop", "wp", "wp-1", "uid-2"), NodeInfo("wp-1", "shop", "n1")),
    )
    before = []
    async with controller(tmp_path, DirectoryCluster(tmp_path / "cluster")) as (root, port):
        for token, node in callers:
            before.append(await trio.to_thread.run_sync(ask, root, port, token, node, {}))
        with trio.fail_after(60):
            while not saved.exists():
                await trio.sleep(0.02)
    assert before[1][TRAFFIC_TYPE]
    assert not before[0][TRAFFIC_TYPE]
    assert any("web" in name for name in before[0][AUTHORIZATION_TYPE])
    assert saved.stat().st_mode & 0o777 == 0o600
    async with controller(tmp_path, SilentCluster(tmp_path / "cluster")) as (root, port):
        for (token, node), told in zip(callers, before, strict=True):
            anew = await trio.to_thread.run_sync(ask, root, port, token, node, {})
            assert anew == told
            again = await trio.to_thread.run_sync(ask, root, port, token, node, told)
            assert again == {each: {} for each in TYPES}
