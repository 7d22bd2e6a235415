"""When what was last known is served: after a silence, until the source has spoken."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest
import trio
from prometheus_client import CollectorRegistry

from istiod_lite import last_known_good
from istiod_lite.ads import AdsService
from istiod_lite.index import ClusterIndex
from istiod_lite.last_known_good import LastKnownGood
from istiod_lite.publisher import Publisher
from istiod_lite.saved_state import TokenKeys
from istiod_lite.workloads import Mesh
from mesh.cluster.api import Object
from mesh.cluster.directory import DirectoryCluster
from mesh.xds.translate import ADDRESS_TYPE

MESH = Mesh("Kubernetes", "cluster.local", "cluster.local", "", "istio-system")
KEYS = TokenKeys("https://issuer", b'{"keys": []}')


def pod(name: str) -> Object:
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "namespace": "demo", "uid": f"uid-{name}"},
        "spec": {"nodeName": "n1", "serviceAccountName": "sleep"},
        "status": {"phase": "Running", "podIPs": [{"ip": "10.244.1.5"}]},
    }


class Controller:
    """The part of one that publishes and remembers; its source may be held back."""

    def __init__(self, directory: Path, wait_seconds: float) -> None:
        self.registry = CollectorRegistry()
        self.index = ClusterIndex(MESH)
        self.ads = AdsService(None)
        self.cluster = DirectoryCluster(directory / "cluster", writable=True)
        self.source_answers = trio.Event()
        self.now = 1_900_000_000.0
        self.state = LastKnownGood(
            directory / "state" / "file",
            self.index,
            self.ads,
            self.registry,
            lambda: self.now,
            wait_seconds=wait_seconds,
            max_age_seconds=3600.0,
        )
        self.publisher = Publisher(self.index, self.ads, self.registry, on_push=self.state.look)
        self.was_stale = False

    async def _publish(self, *, task_status: trio.TaskStatus[None]) -> None:
        await self.source_answers.wait()
        await self.publisher.follow(self.cluster, task_status=task_status)

    async def start(self, nursery: trio.Nursery) -> None:
        def on_stale() -> None:
            self.was_stale = True

        await nursery.start(self.state.follow, self._publish, on_stale)

    def pods(self) -> set[str]:
        assert self.ads.snapshot is not None
        return {name.rpartition("/")[2] for name in self.ads.snapshot.of(ADDRESS_TYPE)}

    def gauge(self, name: str) -> float | None:
        return self.registry.get_sample_value(name)


@pytest.fixture
async def saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory in which a controller has run over one pod."""
    monkeypatch.setattr(last_known_good, "SAVE_SECONDS", 0.0)
    (tmp_path / "cluster").mkdir()
    first = Controller(tmp_path, 0.0)
    await first.cluster.apply(pod("a"))
    first.source_answers.set()
    async with trio.open_nursery() as nursery:
        await first.start(nursery)
        assert not first.was_stale
        first.state.keys = KEYS
        await first.state.save()
        nursery.cancel_scope.cancel()
    path = tmp_path / "state" / "file"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [each.name for each in path.parent.iterdir()] == ["file"]
    return tmp_path


async def test_a_silent_source_and_then_one_that_answers(saved: Path) -> None:
    second = Controller(saved, 0.0)
    second.now += 60.0
    async with trio.open_nursery() as nursery:
        with trio.fail_after(30):
            await second.start(nursery)
        assert second.was_stale
        assert second.pods() == {"a"}
        assert second.gauge("ambit_istiod_stale") == 1.0
        assert second.state.saved_at == 1_900_000_000.0
        assert "2030-03-17T17:46:40Z" in second.state.findings()[0].message
        assert second.state.keys == KEYS
        known = second.state.pod("demo", "a")
        assert known is not None
        assert (known.uid, known.node, known.service_account) == ("uid-a", "n1", "sleep")
        assert list(second.state.pods_on_node("n1")) == [known]
        assert list(second.state.pods_on_node("n2")) == []
        # What is only remembered is not saved as if it were new.
        before = (saved / "state" / "file").stat().st_mtime_ns
        second.state.look()
        await second.state.save()
        assert (saved / "state" / "file").stat().st_mtime_ns == before
        # Meanwhile the pod was replaced by another.
        await second.cluster.apply(pod("b"))
        (saved / "cluster" / "Pod" / "demo" / "a.yaml").unlink(missing_ok=True)
        for path in (saved / "cluster").rglob("*a.*"):
            path.unlink()
        second.source_answers.set()
        with trio.fail_after(30):
            await second.state.synced.wait()
        assert second.pods() == {"b"}
        assert second.gauge("ambit_istiod_stale") == 0.0
        assert second.state.saved_at is None
        assert second.state.findings() == []
        assert second.state.pod("demo", "a") is None
        nursery.cancel_scope.cancel()


async def test_a_source_that_answers_in_time_is_all_that_counts(saved: Path) -> None:
    second = Controller(saved, 60.0)
    second.source_answers.set()
    async with trio.open_nursery() as nursery:
        with trio.fail_after(30):
            await second.start(nursery)
        assert not second.was_stale
        assert second.state.synced.is_set()
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("spoil", ["damaged", "old", "absent"])
async def test_without_a_usable_file_nothing_is_served_early(saved: Path, spoil: str) -> None:
    second = Controller(saved, 0.0)
    path = saved / "state" / "file"
    if spoil == "damaged":
        path.write_bytes(path.read_bytes()[:-3])
    elif spoil == "old":
        second.now += 7200.0
    else:
        path.unlink()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(second.start, nursery)
        await trio.testing.wait_all_tasks_blocked(0.2)
        assert second.ads.snapshot is None
        assert not second.was_stale
        second.source_answers.set()
        with trio.fail_after(30):
            await second.state.synced.wait()
        assert second.pods() == {"a"}
        nursery.cancel_scope.cancel()


async def test_every_publication_is_kept(saved: Path) -> None:
    second = Controller(saved, 60.0)
    second.source_answers.set()
    async with trio.open_nursery() as nursery:
        await second.start(nursery)
        nursery.start_soon(second.state.keep)
        await second.cluster.apply(pod("later"))
        path = saved / "state" / "file"
        with trio.fail_after(30):
            while True:
                third = Controller(saved, 0.0)
                if {each.name for each in third.state._read(path).pods} == {"a", "later"}:
                    break
                await trio.sleep(0.02)
        nursery.cancel_scope.cancel()


async def test_a_file_that_cannot_be_written_costs_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "cluster").mkdir()
    (tmp_path / "state").write_text("in the way")
    only = Controller(tmp_path, 60.0)
    only.source_answers.set()
    async with trio.open_nursery() as nursery:
        await only.start(nursery)
        await only.state.save()
        nursery.cancel_scope.cancel()
