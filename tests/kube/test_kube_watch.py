"""Watches over a real API server that is restarted, paused, compacted and short of permissions."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import trio

from mesh.cluster.api import Conflict, Fault, NotFound, Put, Ref
from mesh.cluster.kubernetes import KubernetesCluster
from mesh.cluster.reflector import PAGE_LIMIT
from mesh.errors import ConfigError
from tests.support.kube import KubeServer
from tests.support.watched import watched

pytestmark = [pytest.mark.kube, pytest.mark.timeout(300)]


def config_map(namespace: str, name: str, **data: str) -> dict:
    metadata = {"name": name, "namespace": namespace}
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": data}


@pytest.fixture
def namespace(kube: KubeServer, request: pytest.FixtureRequest) -> Iterator[str]:
    name = request.node.name.split("[")[0].removeprefix("test_").replace("_", "-")[:60].strip("-")
    kube.namespace(name)
    yield name
    kube.request("DELETE", f"/api/v1/namespaces/{name}/configmaps")


class Reports:
    """What the cluster reports beside events."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def __call__(self, event: str, _fields: object) -> None:
        self.said.append(event)


async def in_thread(do, *args):
    return await trio.to_thread.run_sync(do, *args)


async def test_writes_come_back_as_events(kube: KubeServer, namespace: str) -> None:
    cluster = KubernetesCluster(kube.access())
    ref = Ref("ConfigMap", namespace, "a")
    async with watched(cluster, "ConfigMap") as watch:
        await cluster.apply(config_map(namespace, "a", x="1", y="1"))
        await watch.until(lambda w: ref in w.objects)
        await cluster.patch(ref, {"data": {"x": "2"}, "metadata": {"labels": {"l": "v"}}})
        await watch.until(lambda w: w.objects[ref]["data"]["x"] == "2")
        # What we no longer apply is ours to take away.
        await cluster.apply(config_map(namespace, "a", x="3"))
        await watch.until(lambda w: w.objects[ref]["data"].get("x") == "3")
        assert "y" not in watch.objects[ref]["data"]
        assert "managedFields" not in watch.objects[ref]["metadata"]
        assert (await cluster.get(ref))["data"] == watch.objects[ref]["data"]
        await cluster.delete(ref)
        await watch.until(lambda w: ref not in w.objects)
        await cluster.delete(ref)
        assert await cluster.get(ref) is None
        with pytest.raises(NotFound):
            await cluster.patch(ref, {"data": {}})


async def test_what_the_server_refuses_says_why(kube: KubeServer, namespace: str) -> None:
    cluster = KubernetesCluster(kube.access())
    bad = config_map(namespace, "a")
    bad["data"] = {"no spaces": "1"}
    with pytest.raises(ConfigError, match="no spaces"):
        await cluster.apply(bad)
    with pytest.raises(ConfigError, match="does not serve"):
        await cluster.apply({"apiVersion": "no.such/v1", "kind": "X", "metadata": {"name": "a"}})
    made = await cluster.create(config_map(namespace, "b", x="1"))
    with pytest.raises(Conflict):
        await cluster.create(config_map(namespace, "b", x="1"))
    await cluster.replace({**made, "data": {"x": "2"}})
    with pytest.raises(Conflict):
        await cluster.replace({**made, "data": {"x": "3"}})


async def test_calls_that_fail_or_are_given_up_cost_others_nothing(
    kube: KubeServer, namespace: str
) -> None:
    cluster = KubernetesCluster(kube.access())
    kube.apply(config_map(namespace, "there", x="1"))

    async def look(number: int) -> None:
        for _ in range(10):
            if number % 3 == 0:
                assert await cluster.get(Ref("ConfigMap", namespace, "absent")) is None
            elif number % 3 == 1:
                assert await cluster.get(Ref("ConfigMap", namespace, "there")) is not None
            else:
                with trio.move_on_after(0.001 * (number % 7)):
                    await cluster.get(Ref("ConfigMap", namespace, "there"))

    async with trio.open_nursery() as nursery:
        for number in range(30):
            nursery.start_soon(look, number)


async def test_pages(kube: KubeServer, namespace: str) -> None:
    count = PAGE_LIMIT + 20
    cluster = KubernetesCluster(kube.access())
    async with trio.open_nursery() as nursery:
        limit = trio.CapacityLimiter(8)

        async def make(number: int) -> None:
            async with limit:
                await cluster.apply(config_map(namespace, f"m{number}"))

        for number in range(count):
            nursery.start_soon(make, number)
    async with watched(cluster, "ConfigMap") as watch:
        assert len(watch.names(namespace)) == count


async def test_a_restart_of_the_server_loses_nothing(
    stoppable: KubeServer, kube: KubeServer, namespace: str
) -> None:
    reports = Reports()
    cluster = KubernetesCluster(kube.access(), report=reports)
    kube.apply(config_map(namespace, "stays"))
    kube.apply(config_map(namespace, "goes"))
    async with watched(cluster, "ConfigMap", "Namespace") as watch:
        before = len(watch.events)
        await in_thread(kube.stop)
        await in_thread(kube.start)
        await in_thread(kube.delete, config_map(namespace, "goes"))
        await in_thread(kube.apply, config_map(namespace, "comes"))
        await watch.until(lambda w: w.names(namespace) >= {"stays", "comes"})
        await watch.until(lambda w: "goes" not in w.names(namespace))
        await watch.until(lambda w: not w.faults)
        again = [event for event in watch.events[before:] if isinstance(event, Put)]
        # What did not change is not told again.
        assert Ref("ConfigMap", namespace, "stays") not in [event.ref for event in again]
    assert "watch_interrupted" in reports.said


async def test_a_server_that_is_away_is_a_fault_until_it_is_back(
    stoppable: KubeServer, kube: KubeServer, namespace: str
) -> None:
    cluster = KubernetesCluster(kube.access())
    async with watched(cluster, "ConfigMap") as watch:
        await in_thread(kube.stop)
        await watch.until(lambda w: bool(w.faults))
        assert "does not answer" in watch.faults[0]
        await in_thread(kube.start)
        await watch.until(lambda w: not w.faults)
        await in_thread(kube.apply, config_map(namespace, "a"))
        await watch.until(lambda w: "a" in w.names(namespace))


async def test_compacted_history_is_read_anew(
    stoppable: KubeServer, kube: KubeServer, namespace: str
) -> None:
    reports = Reports()
    cluster = KubernetesCluster(kube.access(), report=reports)
    kube.apply(config_map(namespace, "goes"))
    async with watched(cluster, "ConfigMap") as watch:
        # While nobody watches, the object goes and all memory of it with it.
        await in_thread(kube.stop)
        await in_thread(kube.start)
        await in_thread(kube.delete, config_map(namespace, "goes"))
        await in_thread(kube.apply, config_map(namespace, "comes"))
        await in_thread(kube.compact)
        await in_thread(kube.stop)
        await in_thread(kube.start)
        await watch.until(lambda w: w.names(namespace) == {"comes"})


async def test_a_server_that_falls_silent_is_left(
    stoppable: KubeServer, kube: KubeServer, namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mesh.cluster.api_server._CONNECT_SECONDS", 1.0)
    cluster = KubernetesCluster(kube.access(), silence_seconds=1.0)
    async with watched(cluster, "ConfigMap") as watch:
        kube.pause()
        await watch.until(lambda w: bool(w.faults), 120)
        kube.resume()
        await watch.until(lambda w: not w.faults)
        await in_thread(kube.apply, config_map(namespace, "a"))
        await watch.until(lambda w: "a" in w.names(namespace))


def busy_threads() -> int:
    """Threads that are in a call; trio names idle ones `Trio thread N`."""
    return sum("Reflector" in each.name for each in threading.enumerate())


async def test_cancelling_ends_every_thread_and_socket(
    stoppable: KubeServer, kube: KubeServer
) -> None:
    cluster = KubernetesCluster(kube.access())
    with trio.fail_after(30):
        async with watched(cluster, "ConfigMap", "Pod", "Service", "Node", "Namespace"):
            while busy_threads() < 5:
                await trio.sleep(0.01)
    kube.pause()
    # A server that answers nothing: entering a watch, then leaving it, takes no time either.
    with trio.fail_after(30):
        with trio.move_on_after(1.0):
            async with watched(KubernetesCluster(kube.access()), "ConfigMap"):
                raise AssertionError("a server that is paused told everything")
    kube.resume()
    with trio.fail_after(60):
        while busy_threads():
            await trio.sleep(0.05)


async def test_kinds_appear_with_their_definition_and_go_with_it(
    kube: KubeServer, namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mesh.cluster.reflector._ABSENT_SECONDS", 0.5)
    monkeypatch.setattr("mesh.cluster.kubernetes._DISCOVERY_SECONDS", 0.2)
    reports = Reports()
    cluster = KubernetesCluster(kube.access(), report=reports)
    definition = {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": "widgets.tests.ambit.dev"},
        "spec": {
            "group": "tests.ambit.dev",
            "names": {"kind": "Widget", "plural": "widgets"},
            "scope": "Namespaced",
            "versions": [
                {
                    "name": "v1",
                    "served": True,
                    "storage": True,
                    "schema": {
                        "openAPIV3Schema": {
                            "type": "object",
                            "x-kubernetes-preserve-unknown-fields": True,
                        }
                    },
                }
            ],
        },
    }
    entry = {
        "apiVersion": "tests.ambit.dev/v1",
        "kind": "Widget",
        "metadata": {"name": "vm", "namespace": namespace},
        "spec": {"address": "10.0.0.9"},
    }

    async def make_entry() -> None:
        with trio.fail_after(60):
            while True:
                try:
                    await cluster.apply(entry)
                except ConfigError:
                    await trio.sleep(0.1)
                else:
                    return

    async with watched(cluster, "Widget.tests.ambit.dev", "ConfigMap") as watch:
        assert reports.said.count("kind_not_served") == 1
        await in_thread(kube.apply, definition)
        await make_entry()
        await watch.until(lambda w: w.names(namespace, "Widget") == {"vm"})
        await in_thread(kube.delete, definition)
        await watch.until(lambda w: w.names(namespace, "Widget") == set())
        assert watch.faults == []


async def test_what_may_not_be_read_is_named(kube: KubeServer, namespace: str) -> None:
    metadata = {"name": "reader", "namespace": namespace}
    kube.apply({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": metadata})
    token = kube.token(namespace, "reader", None)
    cluster = KubernetesCluster(kube.access(token, "reader"))
    async with cluster.watch(["ConfigMap"]) as events:
        with trio.fail_after(60):
            fault = await events.receive()
        text = str(fault.error)
        assert f"system:serviceaccount:{namespace}:reader" in text
        assert '"configmaps"' in text
        assert "grant" in fault.error.hint
        role = {
            "apiVersion": "rbac.authorization.k8s.io/v1",
            "kind": "ClusterRole",
            "metadata": {"name": f"{namespace}-reader"},
            "rules": [
                {"apiGroups": [""], "resources": ["configmaps"], "verbs": ["get", "list", "watch"]}
            ],
        }
        await in_thread(kube.apply, role)
        binding = {
            "apiVersion": "rbac.authorization.k8s.io/v1",
            "kind": "ClusterRoleBinding",
            "metadata": {"name": f"{namespace}-reader"},
            "roleRef": {
                "apiGroup": "rbac.authorization.k8s.io",
                "kind": "ClusterRole",
                "name": f"{namespace}-reader",
            },
            "subjects": [{"kind": "ServiceAccount", **metadata}],
        }
        await in_thread(kube.apply, binding)
        with trio.fail_after(60):
            while not isinstance(await events.receive(), Fault):
                pass
    with pytest.raises(ConfigError, match="cannot patch"):
        await cluster.apply(config_map(namespace, "a"))


async def test_credentials_that_are_refused(kube: KubeServer) -> None:
    cluster = KubernetesCluster(kube.access("nobody's token", "nobody"))
    async with cluster.watch(["ConfigMap"]) as events:
        with trio.fail_after(60):
            fault = await events.receive()
        assert "Unauthorized" in str(fault.error) or "refused" in str(fault.error)
        assert "expired" in fault.error.hint
