"""One contract for both keepers of objects: a directory, and the API server.

The same objects go in, the same events come out, and the controller makes the same resources
of them. What a server adds of its own (uids, versions, defaults) is all that may differ.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from copy import deepcopy
from pathlib import Path

import pytest
import trio

from istiod_lite.index import ClusterIndex
from istiod_lite.workloads import Mesh
from mesh.cluster.api import Cluster, Deleted, NotFound, Object, Put, Ref, Synced
from mesh.cluster.directory import DirectoryCluster
from mesh.errors import ConfigError
from tests.support.watched import Watched, watched

pytestmark = [pytest.mark.timeout(300)]

NAMESPACE = "contract"
KINDS = ("Namespace", "Node", "Pod", "Service", "EndpointSlice", "ConfigMap")
DIRECTORY = pytest.param("directory")
KUBERNETES = pytest.param("kubernetes", marks=pytest.mark.kube)


def metadata(name: str, **labels: str) -> Object:
    return {"name": name, "namespace": NAMESPACE} | ({"labels": labels} if labels else {})


def namespace() -> Object:
    return {
        "apiVersion": "v1",
        "kind": "Namespace",
        "metadata": {"name": NAMESPACE, "labels": {"team": "contract"}},
    }


def node() -> Object:
    labels = {
        "topology.kubernetes.io/region": "r1",
        "topology.kubernetes.io/zone": "z1",
    }
    return {"apiVersion": "v1", "kind": "Node", "metadata": {"name": "n1", "labels": labels}}


def pod(name: str, ip: str, *, ready: bool = True) -> Object:
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            **metadata(name, app="web", version="v1"),
            "annotations": {"ambient.istio.io/redirection": "enabled"},
        },
        "spec": {
            "nodeName": "n1",
            "serviceAccountName": "web",
            "containers": [
                {
                    "name": "web",
                    "image": "web",
                    "ports": [{"name": "http", "containerPort": 8080}],
                }
            ],
        },
        "status": {
            "phase": "Running",
            "podIP": ip,
            "podIPs": [{"ip": ip}],
            "conditions": [{"type": "Ready", "status": str(ready)}],
        },
    }


def service() -> Object:
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": metadata("web"),
        "spec": {
            "clusterIP": "10.96.7.7",
            "clusterIPs": ["10.96.7.7"],
            "ipFamilies": ["IPv4"],
            "selector": {"app": "web"},
            "ports": [{"name": "http", "port": 80, "targetPort": "http"}],
        },
    }


def headless() -> Object:
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": metadata("outside"),
        "spec": {
            "clusterIP": "None",
            # Without it, a server takes both families for a Service that selects nothing.
            "ipFamilyPolicy": "SingleStack",
            "ipFamilies": ["IPv4"],
            "ports": [{"port": 5432}],
        },
    }


def endpoints() -> Object:
    return {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": metadata("outside-1", **{"kubernetes.io/service-name": "outside"}),
        "addressType": "IPv4",
        "ports": [{"port": 5432, "protocol": "TCP"}],
        "endpoints": [{"addresses": ["192.0.2.7"], "conditions": {"ready": True}}],
    }


def config_map(**data: str) -> Object:
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata("c"), "data": data}


ALL = (
    namespace(),
    node(),
    service(),
    headless(),
    endpoints(),
    pod("web-1", "10.244.7.1"),
    pod("web-2", "10.244.7.2", ready=False),
)


def ours(ref: Ref) -> bool:
    """Not what the server made for itself."""
    return ref.namespace == NAMESPACE or ref in (
        Ref("Namespace", "", NAMESPACE),
        Ref("Node", "", "n1"),
    )


@asynccontextmanager
async def cluster_of(kind: str, request: pytest.FixtureRequest) -> AsyncIterator[Cluster]:
    """An empty one; on the API server, what a test leaves there is taken away."""
    if kind == "directory":
        tmp_path: Path = request.getfixturevalue("tmp_path")
        yield DirectoryCluster(tmp_path, writable=True)
        return
    from mesh.cluster.kubernetes import KubernetesCluster

    server = request.getfixturevalue("kube")
    cluster = KubernetesCluster(server.access())
    await cluster.apply(namespace())
    for each in KINDS[2:]:
        async with watched(cluster, each) as watch:
            for ref in [ref for ref in watch.objects if ref.namespace == NAMESPACE]:
                if ref.kind == "Pod":
                    name = f"/api/v1/namespaces/{NAMESPACE}/pods/{ref.name}"
                    await trio.to_thread.run_sync(
                        server.request, "DELETE", f"{name}?gracePeriodSeconds=0"
                    )
                else:
                    await cluster.delete(ref)
            await watch.until(lambda w: not w.names(NAMESPACE))
    yield cluster


@pytest.fixture(params=[DIRECTORY, KUBERNETES])
async def cluster(request: pytest.FixtureRequest) -> AsyncIterator[Cluster]:
    async with cluster_of(request.param, request) as made:
        await made.apply(namespace())
        yield made


async def test_a_watch_tells_all_then_synced_then_changes(cluster: Cluster) -> None:
    for obj in ALL:
        await cluster.apply(deepcopy(obj))
    web = Ref("Pod", NAMESPACE, "web-1")
    async with cluster.watch(KINDS) as receive:
        watch = Watched(receive)
        await watch.until(lambda w: w.is_synced)
        told = [each for each in watch.events if not isinstance(each, Synced) and ours(each.ref)]
        assert all(isinstance(each, Put) for each in told)
        assert {each.ref for each in told} == {
            Ref("Namespace", "", NAMESPACE),
            Ref("Node", "", "n1"),
            Ref("Service", NAMESPACE, "web"),
            Ref("Service", NAMESPACE, "outside"),
            Ref("EndpointSlice", NAMESPACE, "outside-1"),
            web,
            Ref("Pod", NAMESPACE, "web-2"),
        }
        assert len({each.ref for each in told}) == len(told)
        assert isinstance(watch.events[-1], Synced)
        for obj in ALL:
            held = watch.objects[ref_in(obj)]
            for key in ("apiVersion", "kind"):
                assert held[key] == obj[key]
            assert includes(held, obj), f"{held} lacks some of {obj}"
        await cluster.patch(web, {"status": {"phase": "Succeeded"}})
        await watch.until(lambda w: w.objects[web]["status"]["phase"] == "Succeeded")
        await cluster.patch(web, {"metadata": {"annotations": {"a": "b", "gone": None}}})
        await watch.until(lambda w: w.objects[web]["metadata"]["annotations"].get("a") == "b")
        service_ref = Ref("Service", NAMESPACE, "outside")
        await cluster.delete(service_ref)
        await watch.until(lambda w: service_ref not in w.objects)
        assert watch.events[-1] == Deleted(service_ref)
        assert watch.faults == []


async def test_only_the_kinds_that_were_asked_for(cluster: Cluster) -> None:
    await cluster.apply(config_map(x="1"))
    await cluster.apply(service())
    async with watched(cluster, "Service") as watch:
        await cluster.apply(config_map(x="2"))
        await cluster.delete(Ref("Service", NAMESPACE, "web"))
        await watch.until(lambda w: not w.names(NAMESPACE))
    assert {each.ref.kind for each in watch.events if not isinstance(each, Synced)} == {"Service"}


async def test_single_objects(cluster: Cluster) -> None:
    ref = Ref("ConfigMap", NAMESPACE, "c")
    assert await cluster.get(ref) is None
    await cluster.delete(ref)
    with pytest.raises(NotFound):
        await cluster.patch(ref, {"data": {"x": "1"}})
    await cluster.apply(config_map(x="1", y="1"))
    await cluster.apply(config_map(x="2"))
    found = await cluster.get(ref)
    assert found is not None
    assert found["data"] == {"x": "2"}
    await cluster.patch(ref, {"data": {"x": None, "z": "3"}})
    found = await cluster.get(ref)
    assert found is not None
    assert found["data"] == {"z": "3"}
    await cluster.delete(ref)
    assert await cluster.get(ref) is None


async def test_no_patch_is_lost(cluster: Cluster) -> None:
    ref = Ref("ConfigMap", NAMESPACE, "c")
    await cluster.apply(config_map(x="1"))
    async with trio.open_nursery() as nursery:
        for number in range(20):
            nursery.start_soon(cluster.patch, ref, {"data": {f"k{number}": "v"}})
    found = await cluster.get(ref)
    assert found is not None
    assert set(found["data"]) == {"x", *(f"k{number}" for number in range(20))}


@pytest.mark.parametrize(
    "wrong",
    [
        {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "../x"}},
        {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {}},
        {"apiVersion": "v1", "kind": "../x", "metadata": {"name": "x"}},
        {"kind": "ConfigMap", "metadata": {"name": "x"}},
    ],
)
async def test_what_is_no_object_is_refused(cluster: Cluster, wrong: Object) -> None:
    with pytest.raises(ConfigError):
        await cluster.apply(wrong)


@pytest.mark.kube
async def test_the_same_objects_make_the_same_resources(request: pytest.FixtureRequest) -> None:
    made = []
    for kind in ("directory", "kubernetes"):
        async with cluster_of(kind, request) as cluster:
            for obj in ALL:
                await cluster.apply(deepcopy(obj))
            index = ClusterIndex(Mesh("Kubernetes", "cluster.local", "cluster.local", "", "root"))
            async with cluster.watch(KINDS) as events:
                while not isinstance(event := await events.receive(), Synced):
                    if ours(event.ref):
                        index.receive(event)
                index.settle()
            made.append((index.addresses, index.policies, index.findings()))
    for directory, kubernetes in zip(made[0], made[1], strict=True):
        assert kubernetes == directory
    addresses, _, findings = made[0]
    assert len(addresses) == 5
    assert findings == []


def ref_in(obj: Object) -> Ref:
    is_namespaced = "namespace" in obj["metadata"]
    return Ref(obj["kind"], NAMESPACE if is_namespaced else "", obj["metadata"]["name"])


def includes(held: object, wanted: object) -> bool:
    """Whether everything wanted is there; a server may add to it."""
    if isinstance(wanted, dict):
        return isinstance(held, dict) and all(
            includes(held.get(key), each) for key, each in wanted.items()
        )
    if isinstance(wanted, list):
        return (
            isinstance(held, list)
            and len(held) == len(wanted)
            and all(includes(a, b) for a, b in zip(held, wanted, strict=True))
        )
    return held == wanted
