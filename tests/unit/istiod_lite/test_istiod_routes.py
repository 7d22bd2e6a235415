"""Routes as a waypoint is told of them: bound, ordered by kind, with backends looked up."""

from __future__ import annotations

from istiod_lite.routes import Attachment
from mesh.cluster.api import Ref
from mesh.model.route import Backend
from tests.support.gateways import (
    GATEWAY_API,
    USE,
    Held,
    gateway,
    namespace,
    obj,
    parent,
    route,
    service,
    waypoint_pod,
)

WEB = "shop/web.shop.svc.cluster.local"
TWO = {"http": 80, "grpc": 7070}


def bound(*more) -> Held:
    parts = [namespace("shop", **{USE: "wp"}), gateway(allowed={"from": "All"}), waypoint_pod()]
    return Held(*parts, service(), *more)


def routes(held: Held, name: str = "web"):
    config = held.config(name)
    assert config is not None
    return config.routes


def attachment(held: Held, name: str = "r", kind: str = "HTTPRoute") -> Attachment:
    outcome = held.index.traffic.outcomes[Ref("Service", "shop", "web")]
    (found,) = outcome.attachments[Ref(kind, "shop", name)]
    return found


def backend(held: Held) -> Backend:
    return routes(held)[0].rules[0].backends[0]


def test_a_route_is_told_with_its_backends_looked_up():
    held = bound(route())
    (found,) = routes(held)
    assert (found.kind, found.key, found.ports, found.is_consumer) == (
        "HTTPRoute", "shop/r", (), False,
    )  # fmt: skip
    assert found.source == "r.yaml:3"
    assert found.rules[0].backends == (Backend(WEB, 80),)
    assert attachment(held).is_accepted
    held.delete("HTTPRoute", "r")
    assert routes(held) == ()


def test_a_backend_that_is_not_there_keeps_its_share_and_says_why():
    held = bound(route(backends=[{"name": "v2", "port": 80, "weight": 3}]))
    assert backend(held).weight == 3
    assert backend(held).problem.startswith("BackendNotFound: there is no Service shop/v2")
    assert attachment(held).refs_reason == "BackendNotFound"
    assert attachment(held).is_accepted
    held.put(service("v2"))
    assert backend(held).problem == ""
    held.put(service("v2", ports={"http": 81}))
    assert "has no port 80" in backend(held).problem
    held.delete("Service", "v2")
    assert "there is no Service" in backend(held).problem


def test_other_kinds_are_no_backends():
    held = bound(route(backends=[{"group": "x.io", "kind": "Bucket", "name": "b"}]))
    assert attachment(held).refs_reason == "InvalidKind"


def test_another_namespace_must_grant():
    there = {"name": "db", "namespace": "far", "port": 80}
    held = bound(service("db", "far"), route(backends=[there]))
    assert backend(held).problem.startswith("RefNotPermitted")
    source = {"group": "gateway.networking.k8s.io", "kind": "HTTPRoute", "namespace": "shop"}
    spec = {"from": [source], "to": [{"group": "", "kind": "Service", "name": "db"}]}
    held.put(obj("ReferenceGrant", "g", "far", GATEWAY_API, spec=spec))
    assert backend(held).problem == ""
    spec = {"from": [{**source, "kind": "GRPCRoute"}], "to": [{"group": "", "kind": "Service"}]}
    held.put(obj("ReferenceGrant", "g", "far", GATEWAY_API, spec=spec))
    assert backend(held).problem.startswith("RefNotPermitted")
    spec = {"from": [source], "to": [{"group": "", "kind": "Service"}]}
    held.put(obj("ReferenceGrant", "g", "far", GATEWAY_API, spec=spec))
    assert backend(held).problem == ""
    held.delete("ReferenceGrant", "g", "far")
    assert backend(held).problem.startswith("RefNotPermitted")


def test_a_consumer_may_refer_to_what_it_consumes_without_a_grant():
    there = {"name": "web", "namespace": "shop", "port": 80}
    mine = route("c", "buyer", parents=[parent(namespace="shop")], backends=[there])
    held = bound(mine, route())
    producer, consumer = sorted(routes(held), key=lambda each: each.is_consumer)
    assert (producer.namespace, consumer.namespace) == ("shop", "buyer")
    assert consumer.rules[0].backends[0].problem == ""


def test_ports_and_sections_of_the_parent():
    held = bound()
    held.put(service(ports=TWO))
    for ref, ports in (
        (parent(port=80), (80,)),
        (parent(sectionName="grpc"), (7070,)),
        (parent(sectionName="http", port=80), (80,)),
        (parent(), ()),
    ):
        held.put(route(parents=[ref]))
        assert [each.ports for each in routes(held)] == [ports]
    for ref in (parent(port=81), parent(sectionName="x"), parent(sectionName="grpc", port=80)):
        held.put(route(parents=[ref]))
        assert routes(held) == ()
        assert attachment(held).reason == "NoMatchingParent"


def test_one_kind_of_route_has_a_port():
    held = bound(route(), route("g", kind="GRPCRoute"), route("t", kind="TCPRoute"))
    assert [each.kind for each in routes(held)] == ["GRPCRoute"]
    assert attachment(held).reason == "Conflicted"
    assert attachment(held, "t", "TCPRoute").reason == "Conflicted"
    held.put(service(ports=TWO), route("g", kind="GRPCRoute", parents=[parent(port=7070)]))
    assert {each.kind: each.ports for each in routes(held)} == {
        "GRPCRoute": (7070,),
        "HTTPRoute": (80,),
    }
    held.delete("GRPCRoute", "g")
    assert {each.kind: each.ports for each in routes(held)} == {"HTTPRoute": ()}


def test_consumers_and_producers_do_not_compete():
    mine = route("c", "buyer", kind="GRPCRoute", parents=[parent(namespace="shop")])
    held = bound(route(), mine)
    assert {each.kind for each in routes(held)} == {"GRPCRoute", "HTTPRoute"}


def test_older_routes_come_first():
    held = bound(
        route("b", created="2026-01-02T00:00:00Z"), route("a", created="2026-01-03T00:00:00Z")
    )
    assert [each.name for each in routes(held)] == ["b", "a"]


def test_names_choose_among_tls_routes_only():
    held = bound(route(hostnames=["x.example"]))
    assert routes(held)[0].hostnames == ()
    held.delete("HTTPRoute", "r")
    held.put(route(kind="TLSRoute", hostnames=["x.example"]))
    assert routes(held)[0].hostnames == ("x.example",)


def test_a_mirror_is_looked_up_too():
    mirror = {"type": "RequestMirror", "requestMirror": {"backendRef": {"name": "m", "port": 80}}}
    rules = [{"filters": [mirror], "backendRefs": [{"name": "web", "port": 80}]}]
    held = bound(route(rules=rules))
    found = routes(held)[0].rules[0].filters[0].mirror
    assert found is not None
    assert found.backend.service == "shop/m.shop.svc.cluster.local"
    assert found.backend.problem
    assert attachment(held).refs_reason == "BackendNotFound"


def test_a_route_that_cannot_be_read_leaves_the_one_before_in_force():
    held = bound(route())
    before = routes(held)
    held.put(route(rules=[{"filters": [{"type": "Surprise"}]}]))
    assert routes(held) == before
    assert any("Surprise" in each for each in held.findings())
