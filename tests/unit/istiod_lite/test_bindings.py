"""Which waypoint is told for a service or pod, and when one that is not there closes."""

from __future__ import annotations

import pytest

from istiod_lite.bindings import Binding
from mesh.cluster.api import Ref
from tests.support.gateways import (
    GATEWAY_API,
    USE,
    Held,
    authorization,
    gateway,
    namespace,
    obj,
    pod,
    service,
    target,
    waypoint_pod,
)

WP = "shop/wp.shop.svc.cluster.local:15008"


def reason(held: Held, name: str = "web", home: str = "shop", kind: str = "Service") -> str:
    return held.index.traffic.bindings.get(Ref(kind, home, name), Binding()).reason


def test_a_service_goes_through_the_waypoint_of_its_namespace():
    held = Held(namespace("shop", **{USE: "wp"}), service(), gateway(), waypoint_pod())
    assert held.waypoint_of() == WP
    assert held.config() is not None
    # Not by default the pods behind it: the waypoint is for services.
    held.put(pod("a"))
    assert held.workload("a").waypoint is None


@pytest.mark.parametrize("order", [1, -1])
def test_in_any_order(order):
    parts = [namespace("shop", **{USE: "wp"}), service(), gateway(), waypoint_pod()]
    held = Held()
    for each in parts[::order]:
        held.put(each)
    assert held.waypoint_of() == WP


def test_the_object_goes_before_its_namespace_and_none_opts_out():
    held = Held(
        namespace("shop", **{USE: "wp"}),
        service(labels={USE: "none"}),
        service("other", labels={USE: "own"}),
        gateway(),
        waypoint_pod(),
        gateway("own"),
        waypoint_pod("own"),
    )
    assert held.waypoint_of() == ""
    assert held.waypoint_of("other") == "shop/own.shop.svc.cluster.local:15008"
    held.put(namespace("shop"))
    held.put(service())
    assert held.waypoint_of() == ""


def test_one_that_is_not_ready_is_not_told_and_comes_and_stays():
    held = Held(namespace("shop", **{USE: "wp"}), service(), gateway())
    assert (held.waypoint_of(), reason(held)) == ("", "WaypointIsNotReady")
    # But it is told of the service already, so that it knows it before traffic comes.
    assert held.config() is not None
    held.put(waypoint_pod(ready=False))
    assert held.waypoint_of() == ""
    held.put(waypoint_pod())
    assert (held.waypoint_of(), reason(held)) == (WP, "")
    held.delete("Pod", "wp-1")
    assert held.waypoint_of() == ""
    # Its address was once written into its status: then it is referred to for good.
    held.put(gateway(addresses=("wp.shop.svc.cluster.local",)))
    assert held.waypoint_of() == WP
    held.delete("Gateway", "wp")
    assert held.waypoint_of() == ""
    assert held.config() is None


def test_a_ready_pod_of_another_account_makes_no_waypoint_ready():
    held = Held(namespace("shop", **{USE: "wp"}), service(), gateway())
    impostor = waypoint_pod()
    impostor["spec"]["serviceAccountName"] = "somebody"
    held.put(impostor)
    assert held.waypoint_of() == ""


def test_with_l7_policy_a_missing_waypoint_closes():
    held = Held(namespace("shop", **{USE: "wp"}), service(), authorization())
    assert held.waypoint_of() == WP
    held.put(gateway())
    assert held.waypoint_of() == WP
    held.delete("AuthorizationPolicy", "p")
    assert held.waypoint_of() == ""


def test_policy_on_the_gateway_counts_for_all_that_goes_through_it():
    held = Held(namespace("shop", **{USE: "wp"}), service(), gateway())
    held.put(authorization(refs=[target("wp", "Gateway")]))
    assert held.waypoint_of() == WP
    held.put(
        authorization(refs=[target("other", "Gateway")]),
        authorization("c", "istio-system", [target("istio-waypoint", "GatewayClass")]),
    )
    assert held.waypoint_of() == WP
    held.delete("AuthorizationPolicy", "c", "istio-system")
    assert held.waypoint_of() == ""
    # A class is the mesh's: only the root namespace may speak for it.
    held.put(authorization("c", "shop", [target("istio-waypoint", "GatewayClass")]))
    assert held.waypoint_of() == ""


@pytest.mark.parametrize(
    ("allowed", "labels", "is_bound"),
    [
        (None, {}, False),
        ({"from": "Same"}, {}, False),
        ({"from": "None"}, {}, False),
        ({"from": "All"}, {}, True),
        ({"from": "Selector", "selector": {"matchLabels": {"tier": "a"}}}, {"tier": "a"}, True),
        ({"from": "Selector", "selector": {"matchLabels": {"tier": "a"}}}, {}, False),
        (
            {
                "from": "Selector",
                "selector": {
                    "matchExpressions": [
                        {"key": "kubernetes.io/metadata.name", "operator": "In", "values": ["o"]},
                        {"key": "banned", "operator": "DoesNotExist"},
                    ]
                },
            },
            {},
            True,
        ),
    ],
)
def test_the_listener_says_who_may_use_a_waypoint(allowed, labels, is_bound):
    use = {USE: "wp", "istio.io/use-waypoint-namespace": "shop"}
    held = Held(
        namespace("o", **use, **labels),
        service("web", "o"),
        gateway(allowed=allowed),
        waypoint_pod(),
    )
    assert held.waypoint_of("web", "o") == (WP if is_bound else "")
    assert (held.config("web", "o") is not None) == is_bound
    if not is_bound:
        assert reason(held, "web", "o") == "AttachmentDenied"
        # Policy does not let one in where one is not admitted: it is not told, but guarded.
        held.put(authorization("p", "o"))
        assert held.waypoint_of("web", "o") == ""
        assert len(held.guards()) == 1


@pytest.mark.parametrize(
    ("traffic", "for_service", "for_pod"),
    [(None, 1, 0), ("service", 1, 0), ("workload", 0, 1), ("all", 1, 1), ("none", 0, 0)],
)
def test_a_waypoint_is_for_services_or_workloads(traffic, for_service, for_pod):
    labels = {"istio.io/waypoint-for": traffic} if traffic else {}
    held = Held(
        namespace("shop", **{USE: "wp"}),
        service(),
        pod("a"),
        gateway(labels=labels),
        waypoint_pod(),
    )
    assert bool(held.waypoint_of()) == bool(for_service)
    assert (held.workload("a").waypoint is not None) == bool(for_pod)
    if not for_service:
        assert reason(held) == "UnsupportedTrafficType"
    # The Gateway's word goes before its class's.
    a_class = {"spec": {"controllerName": "istio.io/mesh-controller"}}
    metadata = {"labels": {"istio.io/waypoint-for": "workload"}}
    held.put(obj("GatewayClass", "istio-waypoint", "", GATEWAY_API, metadata=metadata, **a_class))
    assert bool(held.waypoint_of()) == bool(for_service and traffic)


def test_waypoints_themselves_go_through_none():
    labels = {"gateway.networking.k8s.io/gateway-name": "wp"}
    held = Held(
        namespace("shop", **{USE: "wp"}),
        gateway(labels={"istio.io/waypoint-for": "all"}),
        waypoint_pod(),
        service("wp", app="wp", labels=labels),
        service(),
    )
    assert held.waypoint_of("wp") == ""
    assert held.workload("wp-1").waypoint is None
    assert held.waypoint_of() == WP


@pytest.mark.parametrize(
    "listeners",
    [
        [{"name": "mesh", "port": 15008, "protocol": "HTTP"}],
        [{"name": "mesh", "port": 15009, "protocol": "HBONE"}],
        [
            {"name": "mesh", "port": 15008, "protocol": "HBONE"},
            {"name": "two", "port": 80, "protocol": "HTTP"},
        ],
    ],
)
def test_a_gateway_that_is_no_waypoint_is_never_ready(listeners):
    held = Held(
        namespace("shop", **{USE: "wp"}), service(), gateway(listeners=listeners), waypoint_pod()
    )
    assert (held.waypoint_of(), reason(held)) == ("", "WaypointIsNotReady")


def test_names_that_cannot_be_do_no_harm():
    held = Held(
        service(labels={USE: "../x"}),
        service("b", labels={USE: "UP/" + "x" * 500}),
        authorization(),
    )
    assert held.waypoint_of() == ""
    assert reason(held) == "WaypointIsNotReady"
    assert list(held.guards()) == ["shop/ambit_waypoint_only_web_8080"]
