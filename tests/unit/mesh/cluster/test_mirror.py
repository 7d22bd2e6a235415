"""Lists and changes to events: each told once, and nothing outlives a list."""

from __future__ import annotations

from mesh.cluster.api import Deleted, Fault, Put, Ref
from mesh.cluster.mirror import Mirror, Resource, failure_of_status

PODS = Resource("Pod", "", "v1", "pods", is_namespaced=True)


def pod(name: str, version: str, **metadata: object) -> dict:
    return {"metadata": {"name": name, "namespace": "shop", "resourceVersion": version, **metadata}}


def full(name: str, version: str) -> dict:
    return {"apiVersion": "v1", "kind": "Pod", **pod(name, version)}


def ref(name: str) -> Ref:
    return Ref("Pod", "shop", name)


def listed(mirror: Mirror, *items: dict) -> list:
    mirror.begin_list()
    return [*mirror.take_page(PODS, items), *mirror.end_list()]


def test_items_of_a_list_get_what_the_list_says_and_lose_what_nobody_reads() -> None:
    (event,) = listed(Mirror(), pod("a", "1", managedFields=[{"manager": "x"}]))
    assert event == Put(ref("a"), full("a", "1"))


def test_a_new_list_tells_only_what_differs_and_what_is_gone() -> None:
    mirror = Mirror()
    listed(mirror, pod("a", "1"), pod("b", "2"), pod("c", "3"))
    again = listed(mirror, pod("a", "1"), pod("c", "9"))
    assert again == [Put(ref("c"), full("c", "9")), Deleted(ref("b"))]
    assert len(mirror) == 2


def test_a_list_that_began_anew_forgets_what_the_first_attempt_saw_as_gone() -> None:
    mirror = Mirror()
    listed(mirror, pod("a", "1"), pod("b", "2"))
    mirror.begin_list()
    assert mirror.take_page(PODS, [pod("a", "1")]) == []
    assert listed(mirror, pod("b", "2")) == [Deleted(ref("a"))]


def test_changes_are_told_once() -> None:
    mirror = Mirror()
    listed(mirror, pod("a", "1"))
    assert mirror.take_change("ADDED", full("a", "1")) == []
    assert mirror.take_change("MODIFIED", full("a", "2")) == [Put(ref("a"), full("a", "2"))]
    assert mirror.take_change("DELETED", full("a", "3")) == [Deleted(ref("a"))]
    assert mirror.take_change("DELETED", full("a", "3")) == []


def test_an_object_that_cannot_be_named_is_one_fault_and_costs_nothing_else() -> None:
    mirror = Mirror()
    bad = {"metadata": {"name": "../x", "namespace": "shop"}}
    events = listed(mirror, bad, pod("a", "1"))
    assert isinstance(events[0], Fault)
    assert events[1:] == [Put(ref("a"), full("a", "1"))]
    assert listed(mirror, dict(bad), pod("a", "1"), "text") != []
    assert listed(mirror, dict(bad), pod("a", "1"), "text") == []


def test_paths() -> None:
    routes = Resource("HTTPRoute", "gateway.networking.k8s.io", "v1", "httproutes", True)
    base = "/apis/gateway.networking.k8s.io/v1"
    assert routes.path() == f"{base}/httproutes"
    assert routes.path("shop", "web", "status") == f"{base}/namespaces/shop/httproutes/web/status"
    assert PODS.path("shop", "web") == "/api/v1/namespaces/shop/pods/web"
    nodes = Resource("Node", "", "v1", "nodes", is_namespaced=False)
    assert nodes.path("shop", "n1") == "/api/v1/nodes/n1"
    assert (routes.name, nodes.name) == ("httproutes.gateway.networking.k8s.io", "nodes")


def test_what_a_watch_says_of_its_end() -> None:
    assert failure_of_status({"code": 410, "message": "too old"}).code == 410
    assert failure_of_status({"code": "x"}).code == 500
    assert failure_of_status(None).code == 500
