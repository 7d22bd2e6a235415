"""What `ambit check` says about waypoints, routes and what is attached to them."""

from __future__ import annotations

import pytest

from mesh.cluster.validate import check
from tests.support.gateways import (
    GATEWAY_API,
    SECURITY,
    USE,
    authorization,
    gateway,
    namespace,
    obj,
    parent,
    pod,
    rate_limit,
    route,
    service,
    target,
)


def remarks(*objects) -> list[str]:
    found = check([(each, None) for each in objects])
    return [f"{each.ref}: {each.field}: {each.message}" for each in found]


def told(*objects) -> list[str]:
    """What is said beyond what is said of a set that is well."""
    account = {"apiVersion": "v1", "kind": "ServiceAccount"}
    wp = {**account, "metadata": {"name": "wp", "namespace": "shop"}}
    base = [namespace("shop", **{USE: "wp"}), gateway(), service(), pod("a"), wp]
    names = {(each["kind"], each["metadata"]["name"]) for each in objects}
    kept = [each for each in base if (each["kind"], each["metadata"]["name"]) not in names]
    return remarks(*kept, *objects)


def test_a_set_that_is_well():
    assert told(route(), authorization(rules=[{}]), rate_limit()) == []


@pytest.mark.parametrize(
    ("labels", "text"),
    [
        ({USE: "gone"}, "there is no waypoint shop/gone"),
        ({USE: "wp", "istio.io/use-waypoint-namespace": "far"}, "there is no waypoint far/wp"),
        ({USE: "edge"}, "is of class nginx, and no waypoint"),
        ({USE: "none"}, ""),
    ],
)
def test_unknown_waypoints(labels, text):
    found = told(service(labels=labels), gateway("edge", class_name="nginx"))
    assert len(found) == bool(text)
    assert text in "".join(found)
    edge = gateway("edge", class_name="nginx")
    assert text in "".join(told(namespace("shop", **labels), edge))


def test_ports_that_the_mesh_keeps_for_itself():
    found = told(pod("a", port=15008), service(target=15008))
    assert ["port 15008 is the mesh's own" in each for each in found] == [True]
    host = pod("a", port=15008)
    host["spec"]["hostNetwork"] = True
    assert told(host, service(target=15008)) == []


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        ({"parents": [parent("gone")]}, "spec.parentRefs[0].name: there is no Service shop/gone"),
        ({"parents": [parent(port=81)]}, "has no port 81"),
        ({"parents": [parent(sectionName="x")]}, 'has no port "x"'),
        ({"backends": [{"name": "gone", "port": 80}]}, "spec.rules[0].backendRefs[0].name"),
        ({"backends": [{"name": "web", "port": 81}]}, "has no port 81"),
        ({"backends": [{"kind": "Bucket", "group": "x", "name": "b"}]}, "is no Service"),
        ({"rules": [{}]}, "without backends every request is answered 500"),
        (
            {"backends": [{"name": "web", "port": 80, "weight": 0}]},
            "every weight is 0",
        ),
    ],
)
def test_routes_that_refer_to_nothing(changed, text):
    found = told(route(**changed))
    assert len(found) == 1
    assert text in found[0]


def test_a_route_on_a_service_without_a_waypoint():
    found = told(route(), service(labels={USE: "none"}))
    assert len(found) == 1
    assert "the route has no effect" in found[0]


def test_a_backend_elsewhere_needs_a_grant():
    far = [namespace("far"), service("db", "far"), pod("d", "far")]
    there = route(backends=[{"name": "db", "namespace": "far", "port": 80}])
    found = told(there, *far)
    assert ["no ReferenceGrant in far" in each for each in found] == [True]
    source = {"group": "gateway.networking.k8s.io", "kind": "HTTPRoute", "namespace": "shop"}
    spec = {"from": [source], "to": [{"group": "", "kind": "Service"}]}
    assert told(there, *far, obj("ReferenceGrant", "g", "far", GATEWAY_API, spec=spec)) == []


def rule(*paths: str, **more):
    matches = [{"path": {"value": each}, **more} for each in paths]
    return {"matches": matches, "backendRefs": [{"name": "web", "port": 80}]}


def test_rules_that_no_request_can_reach():
    found = told(route(rules=[rule("/a"), rule("/a/"), rule("/b", "/a"), rule("/a", method="GET")]))
    assert found == [
        "HTTPRoute shop/r: spec.rules[1].matches: never reached: rule 0 matches the same and "
        "goes first"
    ]


def test_an_older_route_goes_first():
    old = route("z", created="2026-01-01T00:00:00Z")
    new = route("a", created="2026-02-01T00:00:00Z")
    assert told(new, old) == [
        "HTTPRoute shop/a: spec.rules[0].matches: never reached: rule 0 of HTTPRoute shop/z "
        "matches the same and goes first"
    ]
    # Consumers and producers never meet, nor do routes on different ports.
    other = [namespace("buyer"), route("c", "buyer", parents=[parent(namespace="shop")],
             backends=[{"name": "web", "namespace": "shop", "port": 80}])]  # fmt: skip
    assert told(route(), *other) == []


def test_kinds_that_share_a_port():
    found = told(route(), route("g", kind="GRPCRoute"))
    assert found == [
        "HTTPRoute shop/r: spec.parentRefs: port 80 of Service shop/web has a GRPCRoute, which "
        "goes before a HTTPRoute"
    ]


@pytest.mark.parametrize(
    ("ref", "text"),
    [
        (target("gone"), "there is no Service shop/gone: nothing is enforced"),
        (target("gone", "HTTPRoute"), "there is no HTTPRoute shop/gone"),
        (target(namespace="far"), "objects of its own namespace"),
        ({"kind": "Pod", "name": "a"}, "cannot be attached to Pod"),
        (target("r", "HTTPRoute", sectionName="x"), "has no rule named x"),
    ],
)
def test_policies_that_are_attached_to_nothing(ref, text):
    found = told(route(), rate_limit(refs=[ref]))
    assert len(found) == 1
    assert text in found[0]


def test_a_policy_that_nobody_can_enforce():
    found = told(rate_limit(), service(labels={USE: "none"}))
    assert len(found) == 1
    assert "nobody gets through" in found[0]


def test_tokens_that_nobody_checks():
    tokens = obj("RequestAuthentication", "j", "shop", SECURITY, spec={})
    assert ["tokens are not checked" in each for each in told(tokens)] == [True]


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ({"host": "web"}, []),
        ({"host": "*.shop.svc.cluster.local"}, []),
        ({"host": "example.com.hosts.elsewhere"}, []),
        ({"host": "gone"}, ["spec.host: there is no Service shop/gone"]),
        ({"host": "web.far.svc.cluster.local"}, ["spec.host: there is no Service far/web"]),
        ({"host": "web", "subsets": [{"name": "v1"}]}, ["spec.subsets: it has no effect here"]),
    ],
)
def test_destination_rules_without_effect(spec, expected):
    found = told(obj("DestinationRule", "r", "shop", "networking.istio.io/v1", spec=spec))
    assert found == [f"DestinationRule shop/r: {each}" for each in expected]
