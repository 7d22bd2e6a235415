"""Sessions with the node agent: acknowledgements, failures that are retried, no lost descriptor."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
import trio
from prometheus_client import CollectorRegistry

from mesh import netns, sockets
from mesh.runtime.admin import Readiness
from mesh.runtime.metrics import WorkloadManagerMetrics
from mesh.zds import Add, Listener, Session, ZdsServer
from mesh.zds.codec import encode_request
from tests.support.captured import CapturedMesh, can_make_namespaces, captured_mesh
from ztunnel.pods import Pods
from ztunnel.workloads import DRAINING

pytestmark = [
    pytest.mark.lab,
    pytest.mark.skipif(not can_make_namespaces(), reason="no permission for namespaces"),
]


@dataclass
class Agent:
    """The test as node agent, and the pods that the proxy serves."""

    mesh: CapturedMesh
    pods: Pods
    readiness: Readiness
    sessions: trio.MemoryReceiveChannel[Session]

    async def session(self) -> Session:
        with trio.fail_after(30):
            return await self.sessions.receive()

    async def is_ready(self, expected: bool) -> None:
        with trio.fail_after(30):
            while bool(self.readiness.pending()) is expected:
                await trio.sleep(0.01)


@contextlib.asynccontextmanager
async def agent(tmp_path: Path) -> AsyncIterator[Agent]:
    path = str(tmp_path / "zds.sock")
    async with captured_mesh(inpod_uds=path) as mesh:
        send, sessions = trio.open_memory_channel[Session](5)

        async def on_session(session: Session) -> None:
            await send.send(session)
            await session.closed.wait()

        readiness = Readiness()
        pods = Pods(mesh.node, WorkloadManagerMetrics(CollectorRegistry()), readiness)
        await mesh.nursery.start(ZdsServer().serve, path, on_session)
        mesh.nursery.start_soon(pods.run)
        yield Agent(mesh, pods, readiness, sessions)
        mesh.nursery.cancel_scope.cancel()


def add(name: str, fd: int) -> Add:
    return Add(f"uid-{name}", name, "shop", name, (fd,))


def is_listening(fd: int, port: int) -> bool:
    with netns.inside(fd):
        probe = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    with probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


async def test_listeners_are_open_before_the_answer(tmp_path: Path) -> None:
    async with agent(tmp_path) as each:
        pod = each.mesh.add("a", enrolled=False)
        session = await each.session()
        assert await session.add(add("a", pod.fd)) is None
        assert all(is_listening(pod.fd, port) for port in (15001, 15006, 15008, 15053))
        await each.is_ready(expected=False)
        assert await session.snapshot_sent() is None
        await each.is_ready(expected=True)
        assert await session.delete("uid-a") is None
        assert not any(is_listening(pod.fd, port) for port in (15001, 15006, 15008, 15053))


async def test_a_port_that_is_taken_is_told_and_tried_again(tmp_path: Path) -> None:
    async with agent(tmp_path) as each:
        pod = each.mesh.add("a", enrolled=False)
        with netns.inside(pod.fd):
            squatter = socket.create_server(("127.0.0.1", 15008))
        session = await each.session()
        error = await session.add(add("a", pod.fd))
        assert error is not None
        assert "15008" in error
        # Whole or not at all.
        assert not is_listening(pod.fd, 15001)
        await session.snapshot_sent()
        assert [state for _, state, _ in each.pods] == ["Pending"]
        squatter.close()
        assert await session.add(add("a", pod.fd)) is None
        await each.is_ready(expected=True)


async def test_no_descriptor_is_lost(tmp_path: Path) -> None:
    async with agent(tmp_path) as each:
        pod = each.mesh.add("a", enrolled=False)
        session = await each.session()
        assert await session.add(add("a", pod.fd)) is None
        await session.snapshot_sent()
        before = len(os.listdir("/proc/self/fd"))
        for _ in range(10):
            assert await session.add(add("a", pod.fd)) is None
        assert len(os.listdir("/proc/self/fd")) == before
        other = each.mesh.add("b", enrolled=False)
        for index in range(10):
            # The same pod in another namespace, and back: restarted each time.
            assert await session.add(add("a", (other, pod)[index % 2].fd)) is None
        assert is_listening(pod.fd, 15008)
        assert not is_listening(other.fd, 15008)
        # One for the namespace that add() keeps in the test itself.
        assert len(os.listdir("/proc/self/fd")) == before + 1


async def test_pods_survive_a_lost_session(tmp_path: Path) -> None:
    async with agent(tmp_path) as each:
        pod = each.mesh.add("a", enrolled=False)
        session = await each.session()
        await session.add(add("a", pod.fd))
        await session.snapshot_sent()
        await each.is_ready(expected=True)
        session.close()
        await each.is_ready(expected=False)
        assert is_listening(pod.fd, 15008)
        session = await each.session()
        await session.snapshot_sent()
        await each.is_ready(expected=True)
        assert not is_listening(pod.fd, 15008)


def keep(into: dict[int, int]) -> Callable[[Mapping[int, int]], None]:
    """Become the owner of listeners, in place of those that were kept."""

    def take(given: Mapping[int, int]) -> None:
        for fd in into.values():
            os.close(fd)
        into.clear()
        into.update(given)

    return take


def add_keeping(name: str, fd: int, kept: Mapping[int, int]) -> Add:
    return Add(f"uid-{name}", name, "shop", name, (fd, *kept.values()), tuple(kept))


async def test_the_next_proxy_accepts_what_the_last_one_left_waiting(tmp_path: Path) -> None:
    kept: dict[int, int] = {}
    async with agent(tmp_path) as first:
        pod = first.mesh.add("a", enrolled=False)
        fd = os.dup(pod.fd)
        session = await first.session()
        assert await session.add(add_keeping("a", fd, kept), keep(kept)) is None
        assert sorted(kept) == list(Listener)
        # Again, from an agent that restarted and has none: it gets the same sockets.
        inodes = {kind: os.fstat(each).st_ino for kind, each in kept.items()}
        again: dict[int, int] = {}
        assert await session.add(add_keeping("a", fd, {}), keep(again)) is None
        assert {kind: os.fstat(each).st_ino for kind, each in again.items()} == inodes
        keep(again)({})
    assert is_listening(fd, 15001)
    async with agent(tmp_path) as second:
        session = await second.session()
        before = len(os.listdir("/proc/self/fd"))
        assert await session.add(add_keeping("a", fd, kept), keep(kept)) is None
        assert {kind: os.fstat(each).st_ino for kind, each in kept.items()} == inodes
        # Its namespace and its own listeners, and soon nothing else: the call of is_listening,
        # which it found waiting, is given up for want of a workload.
        with trio.fail_after(60):
            while len(os.listdir("/proc/self/fd")) != before + 1 + len(Listener):
                await trio.sleep(0.05)
        # Both have a duplicate: what the proxy closes stays open for the one after it.
        await session.snapshot_sent()
        await second.pods.drain(0)
        assert is_listening(fd, 15001)
        assert await session.add(add_keeping("b", fd, {}), keep({})) == DRAINING
        assert await session.delete("uid-a") is None
    keep(kept)({})
    assert not is_listening(fd, 15001)
    os.close(fd)


async def test_without_a_keeper_two_proxies_may_overlap(tmp_path: Path) -> None:
    async with agent(tmp_path) as each:
        pod = each.mesh.add("a", enrolled=False)
        session = await each.session()
        assert await session.add(add("a", pod.fd)) is None
        sockets.open_listener(15001, namespace=pod.fd, shares_port=True).close()
        await each.pods.drain(0)
        with trio.fail_after(30):
            while is_listening(pod.fd, 15001):
                await trio.sleep(0.01)


async def test_an_agent_without_our_addition_sees_the_protocol_it_knows(tmp_path: Path) -> None:
    path = str(tmp_path / "zds.sock")
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(path)
        listener.listen(1)
        async with captured_mesh(inpod_uds=path) as mesh:
            pod = mesh.add("a", enrolled=False)
            pods = Pods(mesh.node, WorkloadManagerMetrics(CollectorRegistry()), Readiness())
            mesh.nursery.start_soon(pods.run)
            await trio.lowlevel.wait_readable(listener)
            peer, _ = listener.accept()
            with peer:
                await trio.lowlevel.wait_readable(peer)
                assert peer.recv(1024).startswith(bytes.fromhex("0801"))
                socket.send_fds(peer, [encode_request(add("a", pod.fd))], [pod.fd])
                await trio.lowlevel.wait_readable(peer)
                data, fds, _, _ = socket.recv_fds(peer, 1024, 10)
                assert (data, fds) == (bytes.fromhex("0a00"), [])
            mesh.nursery.cancel_scope.cancel()
