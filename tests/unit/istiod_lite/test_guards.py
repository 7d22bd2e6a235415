"""L7 policy is not passed by: what node proxies are told to refuse."""

from __future__ import annotations

from istiod_lite import guards
from mesh import authz
from mesh.authz import ConnectionContext
from mesh.identity import SpiffeId
from tests.support.gateways import (
    USE,
    Held,
    authorization,
    gateway,
    namespace,
    pod,
    rate_limit,
    route,
    service,
    target,
    waypoint_pod,
)

KEY = "shop/ambit_waypoint_only_web_8080"


def bound(*more) -> Held:
    parts = [namespace("shop", **{USE: "wp"}), service(), gateway(), waypoint_pod(), pod("a")]
    return Held(*parts, *more)


def admits(held: Held, account: str | None, port: int = 8080, name: str = "a") -> bool:
    """What a ztunnel would say to a caller of that account in `shop`."""
    policies = [held.index.policies[key] for key in held.workload(name).authorization_policies]
    source = SpiffeId("cluster.local", "shop", account) if account else None
    context = ConnectionContext(source, "10.9.9.9", "10.0.0.1", port)
    return isinstance(authz.evaluate(policies, context), authz.Permit)


def test_without_l7_policy_nothing_is_guarded():
    held = bound(route())
    assert held.guards() == {}
    assert held.workload("a").authorization_policies == ()


def test_only_the_waypoint_gets_through_at_the_ports_behind_the_service():
    held = bound(authorization())
    assert held.workload("a").authorization_policies == (KEY,)
    assert admits(held, "wp")
    assert not admits(held, "somebody")
    assert not admits(held, None)
    assert admits(held, "somebody", port=9090)
    held.delete("AuthorizationPolicy", "p")
    assert held.guards() == {}
    assert admits(held, "somebody")


def test_a_waypoint_that_is_not_there_lets_nobody_in():
    held = bound(authorization())
    held.delete("Pod", "wp-1")
    assert admits(held, "wp")
    assert not admits(held, "somebody")
    held.put(service(labels={USE: "none"}))
    assert not admits(held, "wp")
    assert not admits(held, "somebody")


def test_each_kind_of_policy_and_target_guards():
    held = bound(route())
    for policy in (
        rate_limit(),
        rate_limit(refs=[target("r", "HTTPRoute")]),
        authorization(refs=[target("wp", "Gateway")]),
    ):
        held.put(policy)
        assert list(held.guards()) == [KEY], policy
        held.delete(policy["kind"], policy["metadata"]["name"])
        assert held.guards() == {}


def test_the_owner_may_opt_out():
    held = bound(authorization())
    held.put(service(annotations={guards.OPT_OUT: "false"}))
    assert held.guards() == {}
    held.put(service(annotations={guards.OPT_OUT: "yes"}))
    assert list(held.guards()) == [KEY]


def test_each_pod_is_guarded_at_the_port_that_it_names():
    held = bound(authorization())
    held.put(service(target="http"), pod("b", ip="10.0.0.2", port=9000))
    assert set(held.guards()) == {KEY, "shop/ambit_waypoint_only_web_9000"}
    assert not admits(held, "somebody", 9000, "b")
    assert admits(held, "somebody", 8080, "b")
    assert not admits(held, "somebody", 8080, "a")
    held.delete("Pod", "b")
    assert set(held.guards()) == {KEY}
    held.put(pod("a", port=9001))
    assert not admits(held, "somebody", 9001)


def test_a_pod_that_comes_later_is_guarded():
    held = bound(authorization())
    held.put(pod("later", ip="10.0.0.7"), pod("other", app="db", ip="10.0.0.8"))
    assert held.workload("later").authorization_policies == (KEY,)
    assert held.workload("other").authorization_policies == ()


def test_a_waypoint_is_not_shut_by_policy_on_its_own_service():
    labels = {"gateway.networking.k8s.io/gateway-name": "wp"}
    held = bound(service("wp", app="wp", labels=labels), authorization(refs=[target("wp")]))
    assert held.guards() == {}
