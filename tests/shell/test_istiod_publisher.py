"""The controller's loop over a real directory: what is published, and what a fault may not do."""

from __future__ import annotations

import fcntl
import json
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import pytest
import trio
from prometheus_client import CollectorRegistry

from istiod_lite import root_certificate
from istiod_lite.ads import AdsService
from istiod_lite.index import ClusterIndex
from istiod_lite.publisher import Publisher
from istiod_lite.root_certificate import RootCertificate
from istiod_lite.workloads import Mesh
from mesh.cluster import directory as directory_module
from mesh.cluster.api import Ref
from mesh.cluster.directory import DirectoryCluster
from mesh.errors import ConfigError
from mesh.xds.translate import ADDRESS_TYPE, AUTHORIZATION_TYPE

POD = """\
apiVersion: v1
kind: Pod
metadata: {name: a, namespace: shop}
status: {phase: Running, podIP: 10.0.0.1}
"""
POLICY = """\
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: p, namespace: shop}
spec: {rules: [{}]}
"""
UID = "Kubernetes//Pod/shop/a"


class Followed:
    def __init__(self) -> None:
        self.index = ClusterIndex(Mesh())
        self.ads = AdsService(None)
        self.registry = CollectorRegistry()
        self.pushes = 0
        self.changed = trio.Event()
        self.publisher = Publisher(self.index, self.ads, self.registry, self._on_push)

    def _on_push(self) -> None:
        self.pushes += 1
        self.changed.set()
        self.changed = trio.Event()

    def names(self, type_url: str = ADDRESS_TYPE) -> set[str]:
        assert self.ads.snapshot is not None
        return set(self.ads.snapshot.of(type_url))

    async def until(self, is_true) -> None:
        with trio.fail_after(30):
            while not is_true():
                await self.changed.wait()


@asynccontextmanager
async def followed(path: Path):
    state = Followed()
    async with trio.open_nursery() as nursery:
        await nursery.start(state.publisher.follow, DirectoryCluster(path))
        yield state
        nursery.cancel_scope.cancel()


async def test_nothing_before_everything_and_then_what_changes(tmp_path):
    (tmp_path / "pod.yaml").write_text(POD)
    (tmp_path / "policy.yaml").write_text(POLICY)
    async with followed(tmp_path) as state:
        assert state.pushes == 1
        assert state.names() == {UID}
        assert state.names(AUTHORIZATION_TYPE) == {"shop/p"}
        (tmp_path / "b.yaml").write_text(POD.replace("name: a", "name: b"))
        await state.until(lambda: len(state.names()) == 2)
        (tmp_path / "policy.yaml").unlink()
        await state.until(lambda: not state.names(AUTHORIZATION_TYPE))


async def test_a_burst_is_one_push(tmp_path):
    async with followed(tmp_path) as state:
        for index in range(100):
            (tmp_path / f"{index}.yaml").write_text(POD.replace("name: a", f"name: p{index}"))
        await state.until(lambda: len(state.names()) == 100)
        assert state.pushes <= 6


async def test_a_fault_never_removes_what_worked(tmp_path):
    (tmp_path / "pod.yaml").write_text(POD)
    (tmp_path / "policy.yaml").write_text(POLICY)
    async with followed(tmp_path) as state:
        (tmp_path / "pod.yaml").write_text("{")
        (tmp_path / "policy.yaml").write_text(POLICY.replace("rules", "rulez"))
        await state.until(lambda: len(state.publisher.findings()) == 2)
        assert state.names() == {UID}
        assert state.names(AUTHORIZATION_TYPE) == {"shop/p"}
        policy = state.index.policies["shop/p"]
        assert len(policy.rules) == 1
        texts = sorted(str(each) for each in state.publisher.findings())
        assert texts[0].startswith(f"{tmp_path}/pod.yaml:")
        assert texts[1].startswith(
            f"{tmp_path}/policy.yaml:4:8: AuthorizationPolicy shop/p: spec.rulez: unknown field"
        )
        (tmp_path / "pod.yaml").write_text(POD)
        (tmp_path / "policy.yaml").write_text(POLICY)
        await state.until(lambda: not state.publisher.findings())


async def test_no_directory_is_an_error_at_once(tmp_path):
    state = Followed()
    with pytest.raises(ConfigError, match="not a directory"):
        await state.publisher.follow(DirectoryCluster(tmp_path / "none"))


# -- the root certificate ------------------------------------------------------------


def written(path: Path, namespace: str) -> str | None:
    try:
        text = (path / "ConfigMap" / namespace / "istio-ca-root-cert.json").read_text()
    except FileNotFoundError:
        return None
    return json.loads(text)["data"]["root-cert.pem"]


async def becomes_true(is_true) -> None:
    with trio.fail_after(30):
        while not is_true():
            await trio.sleep(0.01)


async def test_every_namespace_gets_the_root(tmp_path, monkeypatch):
    monkeypatch.setattr(root_certificate, "CHECK_SECONDS", 0.05)
    namespaces = ["shop"]
    root = RootCertificate(b"PEM", "istio-system", lambda: namespaces)
    published = trio.Event()
    async with trio.open_nursery() as nursery:
        cluster = DirectoryCluster(tmp_path, writable=True)
        nursery.start_soon(root.run, cluster, published.set)
        with trio.fail_after(30):
            await published.wait()
        assert [written(tmp_path, name) for name in ("istio-system", "shop")] == ["PEM", "PEM"]
        namespaces.append("new")
        root.look()
        await becomes_true(lambda: written(tmp_path, "new") == "PEM")
        # What is deleted or tampered with is written again.
        await cluster.delete(Ref("ConfigMap", "shop", "istio-ca-root-cert"))
        await cluster.patch(
            Ref("ConfigMap", "new", "istio-ca-root-cert"), {"data": {"root-cert.pem": "OTHER"}}
        )
        await becomes_true(lambda: written(tmp_path, "shop") == written(tmp_path, "new") == "PEM")
        nursery.cancel_scope.cancel()


async def test_a_cluster_that_takes_no_writes_is_served_all_the_same(tmp_path):
    root = RootCertificate(b"PEM", "istio-system", list)
    published = trio.Event()
    with trio.fail_after(30):
        await root.run(DirectoryCluster(tmp_path), published.set)
    assert published.is_set()
    assert written(tmp_path, "istio-system") is None


async def test_a_writer_that_is_in_the_way_is_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr(directory_module, "_LOCK_SECONDS", 0.05)
    monkeypatch.setattr(root_certificate, "_RETRY_SECONDS", 0.02)
    root = RootCertificate(b"PEM", "istio-system", list)
    published = trio.Event()
    with (tmp_path / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        async with trio.open_nursery() as nursery:
            cluster = DirectoryCluster(tmp_path, writable=True)
            nursery.start_soon(partial(root.run, cluster, published.set))
            await trio.sleep(0.2)
            assert not published.is_set()
            fcntl.flock(lock, fcntl.LOCK_UN)
            with trio.fail_after(30):
                await published.wait()
            nursery.cancel_scope.cancel()
