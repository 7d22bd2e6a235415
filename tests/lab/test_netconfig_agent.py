"""The whole node agent on a live directory of objects, real namespaces and a small proxy."""

from __future__ import annotations

import contextlib
import errno
import gc
import json
import os
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from mesh import netns, zds
from mesh.cluster.api import Ref
from mesh.cluster.directory import DirectoryCluster
from mesh.cluster.objects import REDIRECTION
from mesh.errors import KernelError
from mesh.runtime.config import load
from netconfig import kernel, nft
from netconfig.app import serve
from netconfig.config import NetconfigConfig
from tests.support.node_proxy import NodeProxy, running_proxy
from tests.support.pairs import OUTSIDE_IPS, POD_IPS, Pair, alive, dial, joined, listen

pytestmark = [pytest.mark.lab, pytest.mark.usefixtures("no_leak")]

LABEL = "istio.io/dataplane-mode"
WEB = Ref("Pod", "shop", "web")
SHOP = Ref("Namespace", "", "shop")


class Node:
    """A live directory, pods' namespaces and, in `agent()`, the node agent."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.netns_dir = path / "netns"
        self.netns_dir.mkdir()
        (path / "cluster").mkdir()
        self.cluster = DirectoryCluster(path / "cluster", writable=True)
        self.zds = path / "zds.sock"
        self.settings: dict[str, str] = {}

    def config(self) -> NetconfigConfig:
        environment = {
            "NODE_NAME": "node1",
            "CLUSTER_DIR": str(self.path / "cluster"),
            "NETNS_DIR": str(self.netns_dir),
            "ZTUNNEL_UDS_ADDRESS": str(self.zds),
            "CNI_AGENT_RUN_DIR": str(self.path / "cni"),
            "HEALTH_PORT": "0",
            "MONITORING_PORT": "0",
            "DRAIN_SETTLE_SECONDS": "0.1",
            "DRIFT_SECONDS": "0.2",
            "CNI_DEADLINE_SECONDS": "0.7",
            **self.settings,
        }
        return load(NetconfigConfig, [], environment)

    @asynccontextmanager
    async def agent(self) -> AsyncIterator[None]:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(serve, self.config(), self.cluster)
            yield
            nursery.cancel_scope.cancel()

    async def namespace(self, *, ambient: bool) -> None:
        await self.cluster.apply(
            {
                "apiVersion": "v1",
                "kind": "Namespace",
                "metadata": {"name": "shop", "labels": {LABEL: "ambient"} if ambient else {}},
            }
        )

    async def pod(self, name: str, fd: int | None, **metadata: Any) -> None:
        uid = f"uid-{name}"
        if fd is not None:
            self.mount(uid, fd)
        await self.cluster.apply(
            {
                "apiVersion": "v1",
                "kind": "Pod",
                "metadata": {"name": name, "namespace": "shop", "uid": uid, **metadata},
                "spec": {"nodeName": "node1", "serviceAccountName": "web"},
                "status": {"phase": "Running", "podIP": POD_IPS[0]},
            }
        )

    def mount(self, uid: str, fd: int) -> None:
        """Stand-in for the bind mount: a path that opens the namespace."""
        (self.netns_dir / uid).symlink_to(f"/proc/self/fd/{fd}")

    async def annotation(self, ref: Ref = WEB) -> str | None:
        found = await self.cluster.get(ref)
        assert found is not None
        value = found["metadata"].get("annotations", {}).get(REDIRECTION)
        assert value is None or isinstance(value, str)
        return value

    async def is_annotated(self, value: str | None, ref: Ref = WEB) -> None:
        await eventually(lambda: self._has(ref, value))

    async def _has(self, ref: Ref, value: str | None) -> bool:
        return await self.annotation(ref) == value


async def eventually(claim: Callable[[], Awaitable[bool]], seconds: float = 45.0) -> None:
    with trio.move_on_after(seconds):
        while not await claim():
            await trio.sleep(0.01)
        return
    pytest.fail("it did not become true in time")


async def until(claim: Callable[[], bool], seconds: float = 45.0) -> None:
    async def later() -> bool:
        return claim()

    await eventually(later, seconds)


@pytest.fixture
def no_leak() -> Iterator[None]:
    """As `no_fd_leak`, but trio's idle worker threads may keep one of their own namespace."""
    here = os.readlink("/proc/thread-self/ns/net")
    before = len(descriptors(here))
    yield
    gc.unfreeze()
    gc.collect()
    assert len(descriptors(here)) == before, f"left open: {descriptors(here)}"


def descriptors(except_for: str) -> list[str]:
    found = []
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            found.append(os.readlink(f"/proc/self/fd/{name}"))
    return [what for what in found if what != except_for]


@pytest.fixture
def node(tmp_path: Path) -> Node:
    return Node(tmp_path)


@pytest.fixture
def pair() -> Iterator[Pair]:
    try:
        with joined() as made:
            yield made
    except KernelError as exc:
        if exc.errno != errno.EPERM:
            raise
        pytest.skip(f"network namespaces cannot be made here: {exc}")


def captured(proxy: NodeProxy, port: int) -> socket.socket:
    listener = proxy.pods["uid-web"][port]
    listener.settimeout(2)
    sock, _ = listener.accept()
    sock.settimeout(2)
    return sock


# --- in -------------------------------------------------------------------------------------


async def test_a_label_on_the_namespace_captures_a_running_pod(node: Node, pair: Pair) -> None:
    await node.namespace(ambient=False)
    await node.pod("web", pair.pod)
    async with node.agent(), running_proxy(node.zds) as proxy:
        await proxy.has_snapshot.wait()
        assert proxy.uids(zds.Add) == []
        await node.cluster.patch(SHOP, {"metadata": {"labels": {LABEL: "ambient"}}})
        await node.is_annotated("enabled")
        # Announced only when everything is in place.
        assert proxy.uids(zds.Add) == ["uid-web"]
        assert kernel.rules_hash(pair.pod) is not None
        with dial(pair.pod, OUTSIDE_IPS[0], 9) as app, captured(proxy, 15001) as caught:
            assert alive(app, caught)
        added = proxy.heard[-1]
        assert isinstance(added, zds.Add)
        assert (added.name, added.namespace, added.service_account) == ("web", "shop", "web")


async def test_nothing_is_redirected_without_a_proxy(node: Node, pair: Pair) -> None:
    await node.namespace(ambient=True)
    await node.pod("web", pair.pod)
    async with node.agent():
        await node.is_annotated("pending")
        await trio.sleep(0.3)
        assert kernel.rules_hash(pair.pod) is None
        async with running_proxy(node.zds):
            await node.is_annotated("enabled")
            assert kernel.rules_hash(pair.pod) is not None


async def test_a_pod_that_the_proxy_refuses_is_pending_until_it_consents(
    node: Node, pair: Pair
) -> None:
    await node.namespace(ambient=True)
    async with node.agent(), running_proxy(node.zds) as proxy:
        await proxy.has_snapshot.wait()
        proxy.refusal = "no room"
        await node.pod("web", pair.pod)
        await node.is_annotated("pending")
        await until(lambda: len(proxy.uids(zds.Add)) > 2)
        assert kernel.rules_hash(pair.pod) is None
        proxy.refusal = ""
        await node.is_annotated("enabled")


async def test_a_pod_is_captured_once_its_namespace_is_there(node: Node, pair: Pair) -> None:
    await node.namespace(ambient=True)
    await node.pod("web", None)
    async with node.agent(), running_proxy(node.zds) as proxy:
        await proxy.has_snapshot.wait()
        await trio.sleep(0.1)
        assert await node.annotation() is None
        (node.netns_dir / "uid-web").write_text("")  # as before a bind mount
        await trio.sleep(0.1)
        (node.netns_dir / "uid-web").unlink()
        node.mount("uid-web", pair.pod)
        await node.is_annotated("enabled")


async def test_many_pods_are_captured_at_a_time(node: Node) -> None:
    with ExitStack() as stack:
        await node.namespace(ambient=False)
        for number in range(20):
            fd = netns.create()
            stack.callback(os.close, fd)
            await node.pod(f"p{number}", fd)
        async with node.agent(), running_proxy(node.zds) as proxy:
            await proxy.has_snapshot.wait()
            await node.cluster.patch(SHOP, {"metadata": {"labels": {LABEL: "ambient"}}})
            for number in range(20):
                await node.is_annotated("enabled", Ref("Pod", "shop", f"p{number}"))
            assert len(proxy.pods) == 20


async def test_changed_settings_change_the_rules_in_place(node: Node, pair: Pair) -> None:
    await node.namespace(ambient=True)
    await node.pod("web", pair.pod)
    async with node.agent(), running_proxy(node.zds) as proxy:
        await node.is_annotated("enabled")
        before = kernel.rules_hash(pair.pod)
        await node.cluster.patch(
            WEB, {"metadata": {"annotations": {"ambient.istio.io/dns-capture": "false"}}}
        )
        await until(lambda: kernel.rules_hash(pair.pod) != before)
        assert await node.annotation() == "enabled"
        assert proxy.uids(zds.Del) == []


async def test_a_broken_pod_object_changes_nothing(node: Node, pair: Pair) -> None:
    await node.namespace(ambient=True)
    await node.pod("web", pair.pod)
    async with node.agent(), running_proxy(node.zds) as proxy:
        await node.is_annotated("enabled")
        await node.cluster.patch(WEB, {"status": {"podIP": "nonsense"}})
        await trio.sleep(0.3)
        assert kernel.rules_hash(pair.pod) is not None
        assert proxy.uids(zds.Del) == []


# --- out ------------------------------------------------------------------------------------


async def test_leaving_waits_for_open_connections(node: Node, pair: Pair) -> None:
    await node.namespace(ambient=True)
    await node.pod("web", pair.pod)
    async with node.agent(), running_proxy(node.zds) as proxy:
        await node.is_annotated("enabled")
        with dial(pair.pod, OUTSIDE_IPS[0], 9) as app, captured(proxy, 15001) as caught:
            await node.cluster.patch(SHOP, {"metadata": {"labels": {LABEL: None}}})
            await node.is_annotated(None)
            await trio.sleep(0.6)
            assert alive(app, caught)
            assert proxy.uids(zds.Del) == []
            with (
                listen(pair.outside, 9) as direct,
                dial(pair.pod, OUTSIDE_IPS[0], 9),
                direct.accept()[0],
            ):
                pass
        await until(lambda: proxy.uids(zds.Del) == ["uid-web"])
        assert kernel.rules_hash(pair.pod) is None
        assert proxy.pods == {}


async def test_leaving_ends_at_the_deadline(node: Node, pair: Pair) -> None:
    node.settings["DRAIN_SECONDS"] = "0.5"
    await node.namespace(ambient=True)
    await node.pod("web", pair.pod)
    async with node.agent(), running_proxy(node.zds) as proxy:
        await node.is_annotated("enabled")
        with dial(pair.pod, OUTSIDE_IPS[0], 9), captured(proxy, 15001):
            await node.cluster.patch(SHOP, {"metadata": {"labels": {LABEL: None}}})
            await until(lambda: proxy.uids(zds.Del) == ["uid-web"])
            assert kernel.rules_hash(pair.pod) is None


async def test_a_draining_pod_comes_back_without_losing_a_connection(
    node: Node, pair: Pair
) -> None:
    await node.namespace(ambient=True)
    await node.pod("web", pair.pod)
    async with node.agent(), running_proxy(node.zds) as proxy:
        await node.is_annotated("enabled")
        whole = kernel.rules_hash(pair.pod)
        with dial(pair.pod, OUTSIDE_IPS[0], 9) as app, captured(proxy, 15001) as caught:
            await node.cluster.patch(SHOP, {"metadata": {"labels": {LABEL: None}}})
            await node.is_annotated(None)
            await until(lambda: kernel.rules_hash(pair.pod) != whole)
            await node.cluster.patch(SHOP, {"metadata": {"labels": {LABEL: "ambient"}}})
            await node.is_annotated("enabled")
            assert kernel.rules_hash(pair.pod) == whole
            assert alive(app, caught)
            assert proxy.uids(zds.Del) == []


async def test_a_pod_that_was_only_pending_leaves_without_a_trace(node: Node, pair: Pair) -> None:
    await node.namespace(ambient=True)
    await node.pod("web", pair.pod)
    async with node.agent():
        await node.is_annotated("pending")
        await node.cluster.patch(SHOP, {"metadata": {"labels": {LABEL: None}}})
        await node.is_annotated(None)
        async with running_proxy(node.zds) as proxy:
            await proxy.has_snapshot.wait()
            await trio.sleep(0.1)
            assert proxy.uids(zds.Add) == []


async def test_a_deleted_pod_is_let_go_at_once(node: Node) -> None:
    pod = netns.create()
    identity = netns.identity(pod)
    await node.namespace(ambient=True)
    await node.pod("web", pod)
    async with node.agent(), running_proxy(node.zds) as proxy:
        await node.is_annotated("enabled")
        (node.netns_dir / "uid-web").unlink()
        os.close(pod)
        await node.cluster.delete(WEB)
        await until(lambda: proxy.uids(zds.Del) == ["uid-web"])
        await until(lambda: identity not in open_namespaces())


def open_namespaces() -> set[tuple[int, int]]:
    found = set()
    for name in os.listdir("/proc/self/fd"):
        try:
            found.add(netns.identity(int(name)))
        except OSError:
            continue
    return found


# --- restarts -------------------------------------------------------------------------------


async def test_the_agents_restart_leaves_no_gap(node: Node, pair: Pair) -> None:
    await node.namespace(ambient=True)
    await node.pod("web", pair.pod)
    seen: list[str | None] = []
    async with running_proxy(node.zds) as proxy:
        async with node.agent():
            await node.is_annotated("enabled")
        rules = kernel.rules_hash(pair.pod)
        assert rules is not None
        with dial(pair.pod, OUTSIDE_IPS[0], 9) as app, captured(proxy, 15001) as caught:
            proxy.has_snapshot = trio.Event()
            async with node.agent():
                while not proxy.has_snapshot.is_set():
                    seen.append(await node.annotation())
                    assert kernel.rules_hash(pair.pod) == rules
                    await trio.sleep(0.005)
                assert alive(app, caught)
                # Not named in the snapshot, the proxy would have closed everything.
                assert list(proxy.pods) == ["uid-web"]
                assert set(seen) == {"enabled"}


async def test_a_restarted_agent_without_a_proxy_keeps_what_is_captured(
    node: Node, pair: Pair
) -> None:
    await node.namespace(ambient=True)
    await node.pod("web", pair.pod)
    async with running_proxy(node.zds), node.agent():
        await node.is_annotated("enabled")
    async with node.agent():
        await trio.sleep(0.3)
        assert await node.annotation() == "enabled"
        assert kernel.rules_hash(pair.pod) is not None


async def test_a_label_removed_while_the_agent_was_away(node: Node, pair: Pair) -> None:
    await node.namespace(ambient=True)
    await node.pod("web", pair.pod)
    async with running_proxy(node.zds) as proxy:
        async with node.agent():
            await node.is_annotated("enabled")
        await node.cluster.patch(SHOP, {"metadata": {"labels": {LABEL: None}}})
        async with node.agent():
            await node.is_annotated(None)
            await until(lambda: proxy.uids(zds.Del) == ["uid-web"])
            assert kernel.rules_hash(pair.pod) is None


async def test_a_drain_is_taken_up_again_after_a_restart(node: Node, pair: Pair) -> None:
    await node.namespace(ambient=True)
    await node.pod("web", pair.pod)
    async with running_proxy(node.zds) as proxy:
        with ExitStack() as stack:
            async with node.agent():
                await node.is_annotated("enabled")
                app = stack.enter_context(dial(pair.pod, OUTSIDE_IPS[0], 9))
                caught = stack.enter_context(captured(proxy, 15001))
                await node.cluster.patch(SHOP, {"metadata": {"labels": {LABEL: None}}})
                await node.is_annotated(None)
                await trio.sleep(0.3)
            proxy.has_snapshot = trio.Event()
            async with node.agent():
                await proxy.has_snapshot.wait()
                await trio.sleep(0.4)
                assert alive(app, caught)
                stack.close()
                await until(lambda: proxy.uids(zds.Del) == ["uid-web"])
                assert kernel.rules_hash(pair.pod) is None


async def test_a_new_proxy_is_told_of_every_pod(node: Node, pair: Pair) -> None:
    await node.namespace(ambient=True)
    await node.pod("web", pair.pod)
    async with node.agent():
        async with running_proxy(node.zds):
            await node.is_annotated("enabled")
        assert await node.annotation() == "enabled"
        async with running_proxy(node.zds) as successor:
            await successor.has_snapshot.wait()
            assert successor.uids(zds.Add) == ["uid-web"]
            with dial(pair.pod, OUTSIDE_IPS[0], 9), captured(successor, 15001):
                pass


async def test_a_recreated_sandbox_is_captured_anew(node: Node, pair: Pair) -> None:
    await node.namespace(ambient=True)
    old = netns.create()
    await node.pod("web", old)
    async with node.agent(), running_proxy(node.zds) as proxy:
        await node.is_annotated("enabled")
        (node.netns_dir / "uid-web").unlink()
        os.close(old)
        node.mount("uid-web", pair.pod)
        await until(lambda: kernel.rules_hash(pair.pod) is not None)
        await until(lambda: proxy.namespaces.get("uid-web") == netns.identity(pair.pod))


# --- repair ---------------------------------------------------------------------------------


async def test_rules_that_somebody_changed_are_repaired(node: Node, pair: Pair) -> None:
    await node.namespace(ambient=True)
    await node.pod("web", pair.pod)
    async with node.agent(), running_proxy(node.zds):
        await node.is_annotated("enabled")
        whole = kernel.rules_hash(pair.pod)
        for damage in ("delete table inet ambient", "insert rule inet ambient out_nat accept"):
            await trio.sleep(0.3)
            with netns.inside(pair.pod):
                nft.run(damage)
            assert kernel.rules_hash(pair.pod) != whole
            await until(lambda: kernel.rules_hash(pair.pod) == whole)


async def test_an_annotation_that_was_overwritten_is_written_again(node: Node, pair: Pair) -> None:
    await node.namespace(ambient=True)
    await node.pod("web", pair.pod)
    async with node.agent(), running_proxy(node.zds):
        await node.is_annotated("enabled")
        await node.cluster.patch(WEB, {"metadata": {"annotations": {REDIRECTION: None}}})
        await node.is_annotated("enabled")


# --- the CNI plugin -------------------------------------------------------------------------


async def cmdadd(node: Node, body: bytes) -> tuple[int, str]:
    stream = await trio.open_unix_socket(node.path / "cni" / "pluginevent.sock")
    async with stream:
        head = f"POST /cmdadd HTTP/1.1\r\nhost: cni\r\ncontent-length: {len(body)}\r\n"
        await stream.send_all(head.encode() + b"connection: close\r\n\r\n" + body)
        answer = b""
        while data := await stream.receive_some():
            answer += data
    head_bytes, _, text = answer.partition(b"\r\n\r\n")
    return int(head_bytes.split()[1]), text.decode()


def request(fd: int | None, **changes: Any) -> bytes:
    path = f"/proc/self/fd/{fd}" if fd is not None else "/nowhere"
    body = {"Netns": path, "PodName": "web", "PodNamespace": "shop", "IPs": None, **changes}
    return json.dumps(body).encode()


async def plugin_is_served(node: Node) -> None:
    await until((node.path / "cni" / "pluginevent.sock").exists)


async def test_a_new_pod_is_captured_before_the_plugin_is_answered(node: Node, pair: Pair) -> None:
    await node.namespace(ambient=True)
    async with node.agent(), running_proxy(node.zds) as proxy:
        await plugin_is_served(node)
        await proxy.has_snapshot.wait()
        await node.pod("web", None)
        assert await cmdadd(node, request(pair.pod)) == (200, "\n")
        assert await node.annotation() == "enabled"
        assert kernel.rules_hash(pair.pod) is not None
        assert proxy.uids(zds.Add) == ["uid-web"]
        # Asked again, nothing changes.
        assert (await cmdadd(node, request(pair.pod)))[0] == 200
        await trio.sleep(0.5)
        assert proxy.uids(zds.Del) == []
        assert await node.annotation() == "enabled"


async def test_without_a_proxy_the_plugin_is_told_why(node: Node, pair: Pair) -> None:
    await node.namespace(ambient=True)
    await node.pod("web", None)
    async with node.agent():
        await plugin_is_served(node)
        status, text = await cmdadd(node, request(pair.pod))
        assert status == 500
        assert "no node proxy is connected" in text
        async with running_proxy(node.zds):
            await node.is_annotated("enabled")


async def test_a_pod_that_is_not_enrolled_is_none_of_our_business(node: Node, pair: Pair) -> None:
    await node.namespace(ambient=False)
    await node.pod("web", None)
    async with node.agent():
        await plugin_is_served(node)
        assert (await cmdadd(node, request(pair.pod)))[0] == 200
        assert kernel.rules_hash(pair.pod) is None


async def test_what_the_plugin_may_get_wrong(node: Node, pair: Pair) -> None:
    await node.namespace(ambient=True)
    await node.pod("web", None)
    async with node.agent(), running_proxy(node.zds):
        await plugin_is_served(node)
        assert (await cmdadd(node, b"{}"))[0] == 400
        assert (await cmdadd(node, request(pair.pod, PodName="other")))[0] == 400
        status, text = await cmdadd(node, request(None))
        assert status == 500
        assert "no network namespace" in text
