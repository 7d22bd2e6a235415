"""Which proxy is told what: snapshots, the newest proxy, all proxies."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio
import trio.testing

from mesh import netns, zds
from mesh.cluster.api import Ref
from mesh.errors import Unavailable
from netconfig.handoff import HandOff
from netconfig.plan import Target
from netconfig.ruleset import Capture

pytestmark = pytest.mark.usefixtures("no_fd_leak")


def target(name: str) -> Target:
    return Target(f"uid-{name}", Ref("Pod", "shop", name), "sa", Capture())


@pytest.fixture
def namespace(no_fd_leak: None) -> Iterator[int]:
    fd = netns.create()
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
    with trio.fail_after(2):
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
    with trio.fail_after(2):
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
