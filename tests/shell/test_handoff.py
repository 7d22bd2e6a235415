"""Which proxy is told what: snapshots, the newest proxy, all proxies."""

from __future__ import annotations

import fcntl
import os
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio
import trio.testing

from mesh import netns, sockets, zds
from mesh.cluster.api import Ref
from mesh.errors import Unavailable
from netconfig.handoff import HandOff
from netconfig.plan import Target
from netconfig.ruleset import Capture

pytestmark = pytest.mark.usefixtures("no_fd_leak")

SIOCSIFFLAGS, IFF_UP = 0x8914, 1


@pytest.fixture(scope="module", autouse=True)
def way_home() -> None:
    """`netns.inside` keeps the thread's way home open from the first time on: no leak."""
    fd = netns.create()
    with netns.inside(fd):
        pass
    os.close(fd)


def target(name: str) -> Target:
    return Target(f"uid-{name}", Ref("Pod", "shop", name), "sa", Capture())


@pytest.fixture
def namespace(no_fd_leak: None) -> Iterator[int]:
    fd = netns.create()
    with netns.inside(fd):
        control = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    with control:
        fcntl.ioctl(control, SIOCSIFFLAGS, struct.pack("16sh", b"lo", IFF_UP))
    yield fd
    os.close(fd)


class Proxy:
    """A proxy that consents to everything and notes it."""

    def __init__(self) -> None:
        self.heard: list[str] = []
        self.refusal = ""

    async def run(
        self, path: Path, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        with await zds.connect(path) as connection:
            while True:
                message = await connection.receive()
                kind = type(message).__name__
                self.heard.append(f"{kind} {getattr(message, 'uid', '')}".strip())
                if isinstance(message, zds.Add):
                    message.close()
                await connection.ack(self.refusal if isinstance(message, zds.Add) else "")
                if isinstance(message, zds.SnapshotSent):
                    task_status.started()


async def begin(nursery: trio.Nursery, handoff: HandOff, path: Path) -> None:
    handoff.begin()
    await nursery.start(handoff.serve, path)


async def test_a_snapshot_names_every_pod(
    nursery: trio.Nursery, tmp_path: Path, namespace: int
) -> None:
    connected = trio.Event()
    handoff = HandOff(on_connected=connected.set)
    handoff.register(target("a"), namespace)
    handoff.register(target("b"), None)
    handoff.register(target("gone"), namespace)
    handoff.forget("uid-gone")
    await begin(nursery, handoff, tmp_path / "s")
    proxy = Proxy()
    await nursery.start(proxy.run, tmp_path / "s")
    assert proxy.heard == ["Add uid-a", "Keep uid-b", "SnapshotSent"]
    await connected.wait()


async def test_no_snapshot_before_the_pods_are_known(
    nursery: trio.Nursery, tmp_path: Path, namespace: int
) -> None:
    handoff = HandOff()
    await nursery.start(handoff.serve, tmp_path / "s")
    proxy = Proxy()
    nursery.start_soon(proxy.run, tmp_path / "s")
    await trio.sleep(0.1)
    assert proxy.heard == []
    handoff.register(target("a"), namespace)
    handoff.begin()
    with trio.fail_after(30):
        while "SnapshotSent" not in proxy.heard:
            await trio.sleep(0.01)
    assert proxy.heard[0] == "Add uid-a"


async def test_a_refusal_in_the_snapshot_does_not_end_it(
    nursery: trio.Nursery, tmp_path: Path, namespace: int
) -> None:
    handoff = HandOff()
    handoff.register(target("a"), namespace)
    await begin(nursery, handoff, tmp_path / "s")
    proxy = Proxy()
    proxy.refusal = "no room"
    await nursery.start(proxy.run, tmp_path / "s")
    assert await handoff.add(target("b"), namespace) == "no room"
    assert handoff.connected == 1


async def test_new_pods_go_to_the_newest_proxy_and_deletions_to_all(
    nursery: trio.Nursery, tmp_path: Path, namespace: int
) -> None:
    handoff = HandOff()
    await begin(nursery, handoff, tmp_path / "s")
    old, new = Proxy(), Proxy()
    await nursery.start(old.run, tmp_path / "s")
    await nursery.start(new.run, tmp_path / "s")
    assert await handoff.add(target("a"), namespace) is None
    await handoff.delete("uid-a")
    await handoff.delete("uid-never")
    assert new.heard == ["SnapshotSent", "Add uid-a", "Del uid-a", "Del uid-never"]
    assert old.heard == ["SnapshotSent", "Del uid-a", "Del uid-never"]
    assert handoff.pods() == []


async def test_when_the_newest_leaves_the_older_is_asked_again(
    nursery: trio.Nursery, tmp_path: Path, namespace: int
) -> None:
    handoff = HandOff()
    await begin(nursery, handoff, tmp_path / "s")
    old, new = Proxy(), Proxy()
    await nursery.start(old.run, tmp_path / "s")
    async with trio.open_nursery() as inner:
        await inner.start(new.run, tmp_path / "s")
        inner.cancel_scope.cancel()
    with trio.fail_after(30):
        while handoff.connected != 1:
            await trio.sleep(0.01)
    assert await handoff.add(target("a"), namespace) is None
    assert old.heard[-1] == "Add uid-a"


async def test_without_a_proxy_a_pod_is_kept_for_the_snapshot(
    nursery: trio.Nursery, tmp_path: Path, namespace: int
) -> None:
    handoff = HandOff()
    await begin(nursery, handoff, tmp_path / "s")
    with pytest.raises(Unavailable, match="no node proxy"):
        await handoff.add(target("a"), namespace)
    await handoff.delete("uid-nobody-hears")
    proxy = Proxy()
    await nursery.start(proxy.run, tmp_path / "s")
    assert proxy.heard == ["Add uid-a", "SnapshotSent"]


# ---- keeper of listeners


class Listening(Proxy):
    """A proxy that takes listeners, opens what it did not get, and can be killed."""

    def __init__(self, outside: int | None = None) -> None:
        super().__init__()
        self.listeners: dict[str, socket.socket] = {}
        self.given: dict[str, list[int]] = {}
        self._outside = outside

    async def run(
        self, path: Path, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        try:
            with await zds.connect(path, takes_listeners=True) as connection:
                while True:
                    message = await connection.receive()
                    back = self._open(message) if isinstance(message, zds.Add) else {}
                    await connection.ack("", back)
                    if isinstance(message, zds.SnapshotSent):
                        task_status.started()
        finally:
            for each in self.listeners.values():
                each.close()

    def _open(self, message: zds.Add) -> dict[int, int]:
        assert message.keeps_listeners
        handed, inside = message.listener_fds(), message.fds[0]
        self.given[message.uid] = list(handed)
        if handed:
            fd = handed[zds.Listener.OUTBOUND]
            opened = sockets.adopt_listener(fd, 15001, namespace=inside)
        else:
            where = inside if self._outside is None else self._outside
            opened = sockets.open_listener(15001, namespace=where)
        self.listeners[message.uid] = opened
        message.close()
        return {zds.Listener.OUTBOUND: opened.fileno()}


def dial(namespace: int) -> socket.socket:
    """A connection to the pod's own port 15001. Raises ConnectionRefusedError."""
    with netns.inside(namespace):
        made = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    try:
        made.connect(("127.0.0.1", 15001))
    except BaseException:
        made.close()
        raise
    return made


async def test_a_dead_proxys_queue_is_served_by_the_next(
    nursery: trio.Nursery, tmp_path: Path, namespace: int
) -> None:
    handoff = HandOff()
    await begin(nursery, handoff, tmp_path / "s")
    async with trio.open_nursery() as first:
        await first.start(Listening().run, tmp_path / "s")
        assert await handoff.add(target("a"), namespace) is None
        first.cancel_scope.cancel()
    assert handoff.listeners("uid-a") == [zds.Listener.OUTBOUND]
    with dial(namespace) as waiting:
        waiting.sendall(b"hello")
        proxy = Listening()
        await nursery.start(proxy.run, tmp_path / "s")
        assert proxy.given == {"uid-a": [zds.Listener.OUTBOUND]}
        accepted, _ = proxy.listeners["uid-a"].accept()
        with accepted:
            assert accepted.recv(10) == b"hello"
    await handoff.delete("uid-a")


async def test_a_pods_end_ends_what_is_kept_for_it(
    nursery: trio.Nursery, tmp_path: Path, namespace: int
) -> None:
    handoff = HandOff()
    await begin(nursery, handoff, tmp_path / "s")
    async with trio.open_nursery() as first:
        await first.start(Listening().run, tmp_path / "s")
        assert await handoff.add(target("a"), namespace) is None
        first.cancel_scope.cancel()
    dial(namespace).close()
    # Registered anew in the same namespace, it keeps them; in another, or forgotten, it does not.
    handoff.register(target("a"), namespace)
    dial(namespace).close()
    other = netns.create()
    handoff.register(target("a"), other)
    assert handoff.listeners("uid-a") == []
    with pytest.raises(ConnectionRefusedError):
        dial(namespace)
    handoff.forget("uid-a")
    os.close(other)


async def test_a_proxy_that_takes_none_can_open_its_own(
    nursery: trio.Nursery, tmp_path: Path, namespace: int
) -> None:
    handoff = HandOff()
    await begin(nursery, handoff, tmp_path / "s")
    async with trio.open_nursery() as first:
        await first.start(Listening().run, tmp_path / "s")
        assert await handoff.add(target("a"), namespace) is None
        first.cancel_scope.cancel()
    proxy = Proxy()
    await nursery.start(proxy.run, tmp_path / "s")
    assert proxy.heard == ["Add uid-a", "SnapshotSent"]
    with pytest.raises(ConnectionRefusedError):
        dial(namespace)


async def test_listeners_of_another_pod_are_not_kept(
    nursery: trio.Nursery, tmp_path: Path, namespace: int
) -> None:
    handoff = HandOff()
    await begin(nursery, handoff, tmp_path / "s")
    other = netns.create()
    await nursery.start(Listening(other).run, tmp_path / "s")
    assert await handoff.add(target("a"), namespace) is None
    assert handoff.listeners("uid-a") == []
    os.close(other)
