"""Conditions are what proxies acknowledged; and they go into a status without harm to others."""

from __future__ import annotations

from dataclasses import replace

import pytest

from istiod_lite.conditions import Condition, Fragment, ParentStatus, merged
from istiod_lite.status import changed, statuses
from istiod_lite.subscriptions import Share
from mesh.cluster.api import Ref, merge_patch
from mesh.cluster.routes import ParentRef
from tests.support.gateways import (
    SECURITY,
    USE,
    Held,
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
    waypoint_pod,
)

ALL, NONE, SOME = Share(2, 2), Share(0, 0), Share(1, 2)
REFUSED = Share(1, 2, "no such thing as redaction")


def bound(*more) -> Held:
    own = service("wp", app="wp", labels={"gateway.networking.k8s.io/gateway-name": "wp"})
    parts = [namespace("shop", **{USE: "wp"}), gateway(), waypoint_pod(), own, service()]
    return Held(*parts, *more)


def said(held: Held, kind: str, name: str, share: Share = ALL, home: str = "shop"):
    fragment = statuses(held.index, lambda *_: share)[Ref(kind, home, name)]
    return {each.type: each for each in fragment.conditions}


def short(condition: Condition) -> str:
    return f"{condition.status} {condition.reason}"


@pytest.mark.parametrize(
    ("share", "expected"),
    [
        (ALL, "True Accepted"),
        (SOME, "Unknown Pending"),
        (NONE, "Unknown Pending"),
        (REFUSED, "False Invalid"),
    ],
)
def test_a_policy_is_accepted_when_all_that_enforce_it_have_it(share, expected):
    held = bound(authorization(), obj("AuthorizationPolicy", "l4", "shop", SECURITY, spec={}))
    l7 = said(held, "AuthorizationPolicy", "p", share)["WaypointAccepted"]
    l4 = said(held, "AuthorizationPolicy", "l4", share)["ZtunnelAccepted"]
    assert (short(l7), short(l4)) == (expected, expected)
    if share.refusal:
        assert "no such thing" in l7.message
    else:
        assert f"applied on {share.held} of {share.total} " in l7.message


def test_only_the_proxies_that_matter_are_asked():
    held = bound(authorization())
    asked = []

    def shares(type_url, names, account):
        asked.append((set(names), account))
        return ALL

    statuses(held.index, shares)
    key = held.config().key
    assert ({key}, "shop/wp") in asked
    assert ({key, "shop/wp"}, "shop/wp") in asked


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        (rate_limit(refs=[target("nobody")]), "False TargetNotFound"),
        (rate_limit(refs=[target("r", "HTTPRoute")]), "False TargetNotFound"),
        (rate_limit(refs=[target("free")]), "False AncestorNotBound"),
        (rate_limit(refs=[target(), target("free")]), "True PartiallyInvalid"),
        (rate_limit(refs=[{"kind": "Bucket", "name": "x"}]), "False TargetNotFound"),
        (rate_limit(rules=[{"oops": 1}]), "False Invalid"),
    ],
)
def test_targets_that_are_not_there(policy, expected):
    held = bound(service("free", labels={USE: "none"}), policy)
    assert short(said(held, "RateLimitPolicy", "l")["WaypointAccepted"]) == expected


def test_what_a_tunnel_cannot_see_is_said():
    rule = {"to": [{"operation": {"methods": ["GET"]}}]}
    spec = {"action": "DENY", "rules": [rule]}
    held = bound(obj("AuthorizationPolicy", "p", "shop", SECURITY, spec=spec))
    found = said(held, "AuthorizationPolicy", "p")["ZtunnelAccepted"]
    assert short(found) == "False UnsupportedValue"
    assert "methods" in found.message


def test_a_gateway():
    held = bound(route())
    found = said(held, "Gateway", "wp")
    assert {key: short(each) for key, each in found.items()} == {
        "Accepted": "True Accepted",
        "Programmed": "True Programmed",
    }
    fragment = statuses(held.index, lambda *_: ALL)[Ref("Gateway", "shop", "wp")]
    assert fragment.addresses == (
        ("Hostname", "wp.shop.svc.cluster.local"), ("IPAddress", "10.96.0.1"),
    )  # fmt: skip
    assert fragment.listeners[0].attached_routes == 1
    assert short(said(held, "Gateway", "wp", SOME)["Programmed"]) == "False Pending"
    held.delete("Pod", "wp-1")
    assert short(said(held, "Gateway", "wp")["Programmed"]) == "False AddressNotAssigned"
    held.put(gateway(listeners=[{"name": "m", "port": 15008, "protocol": "HTTP"}]))
    assert short(said(held, "Gateway", "wp")["Accepted"]) == "False ListenersNotValid"


def test_a_service():
    held = bound(pod("a"))
    found = said(held, "Service", "web")
    assert [short(each) for each in found.values()] == ["True WaypointAccepted"]
    held.put(authorization())
    required = said(held, "Service", "web")["ambit.dev/WaypointRequired"]
    assert short(required) == "False PodsNotCaptured"
    captured = pod("a")
    captured["metadata"]["annotations"] = {"ambient.istio.io/redirection": "enabled"}
    held.put(captured)
    required = said(held, "Service", "web")["ambit.dev/WaypointRequired"]
    assert short(required) == "True Enforced"
    held.put(service(annotations={"ambit.dev/waypoint-required": "false"}))
    required = said(held, "Service", "web")["ambit.dev/WaypointRequired"]
    assert short(required) == "False OptedOut"
    held.delete("Pod", "wp-1")
    bound_to = said(held, "Service", "web")["istio.io/WaypointBound"]
    assert short(bound_to) == "False WaypointIsNotReady"


def test_what_was_said_of_a_service_is_taken_back():
    stale = service(labels={USE: "none"})
    stale["status"] = {"conditions": [{"type": "istio.io/WaypointBound", "status": "True"}]}
    held = bound(stale)
    fragment = statuses(held.index, lambda *_: ALL)[Ref("Service", "shop", "web")]
    assert fragment == Fragment()
    assert merged(stale, fragment, NEW) == {"conditions": []}


def test_a_route_for_each_parent():
    parents = [parent(), parent(port=81, name="web"), parent("gone"), {"name": "a-gateway"}]
    held = bound(route(parents=parents, backends=[{"name": "x", "port": 80}]))
    fragment = statuses(held.index, lambda *_: ALL)[Ref("HTTPRoute", "shop", "r")]
    assert fragment.parents is not None
    told = {
        (each.parent.name, each.parent.port): [short(c) for c in each.conditions]
        for each in fragment.parents
    }
    assert told == {
        ("web", 0): ["True Accepted", "False BackendNotFound", "True ResolvedWaypoints"],
        ("web", 81): ["False NoMatchingParent", "False BackendNotFound", "True ResolvedWaypoints"],
        ("gone", 0): ["False NoMatchingParent"],
    }
    held.put(namespace("shop"))
    fragment = statuses(held.index, lambda *_: ALL)[Ref("HTTPRoute", "shop", "r")]
    assert fragment.parents is not None
    assert short(fragment.parents[0].conditions[2]) == "False MissingUseWaypointLabel"


OLD, NEW = "2026-01-01T00:00:00Z", "2026-02-02T00:00:00Z"
YES = Condition("Accepted", "True", "Accepted")


def apply(live, fragment, now):
    patch = merged(live, fragment, now)
    return merge_patch(live, {"status": patch}) if patch else live


def test_a_status_is_written_once_and_turns_when_it_flips():
    live = {"metadata": {"generation": 3}, "status": {"conditions": [{"type": "Theirs"}]}}
    first = apply(live, Fragment((YES,)), OLD)
    theirs, ours = first["status"]["conditions"]
    assert theirs == {"type": "Theirs"}
    assert (ours["observedGeneration"], ours["lastTransitionTime"]) == (3, OLD)
    assert merged(first, Fragment((YES,)), NEW) is None
    told = apply(first, Fragment((replace(YES, message="m"),)), NEW)
    assert told["status"]["conditions"][1]["lastTransitionTime"] == OLD
    flipped = apply(told, Fragment((replace(YES, status="False"),)), NEW)
    assert flipped["status"]["conditions"][1]["lastTransitionTime"] == NEW
    assert apply(flipped, Fragment(), NEW)["status"]["conditions"] == [{"type": "Theirs"}]


def test_a_waypoints_address_is_never_withdrawn():
    live = apply({}, Fragment((YES,), addresses=(("Hostname", "h"),)), OLD)
    later = apply(live, Fragment((replace(YES, status="False"),)), NEW)
    assert later["status"]["addresses"] == [{"type": "Hostname", "value": "h"}]


def test_other_controllers_entries_of_a_route_stay():
    theirs = {"parentRef": {"name": "gw"}, "controllerName": "x.io/y", "conditions": []}
    ours = ParentStatus(ParentRef("", "Service", "shop", "web", port=80), (YES,))
    live = apply({"status": {"parents": [theirs]}}, Fragment(parents=(ours,)), OLD)
    first, second = live["status"]["parents"]
    assert first == theirs
    assert second["parentRef"] == {
        "group": "", "kind": "Service", "namespace": "shop", "name": "web", "port": 80,
    }  # fmt: skip
    assert merged(live, Fragment(parents=(ours,)), NEW) is None
    assert apply(live, Fragment(parents=()), NEW)["status"]["parents"] == [theirs]


def test_only_what_changed_is_written():
    a, b = Ref("Service", "n", "a"), Ref("HTTPRoute", "n", "b")
    old = {a: Fragment((YES,)), b: Fragment(parents=())}
    assert list(changed(old, dict(old))) == []
    assert dict(changed(old, {})) == {a: Fragment(), b: Fragment(parents=())}
    assert dict(changed({}, old)) == old


def test_a_policy_says_when_its_authorizer_is_unknown_and_when_the_mesh_config_is_broken():
    custom = authorization(action="CUSTOM", provider={"name": "opa"}, rules=[{}])
    held = bound(custom)
    found = said(held, "AuthorizationPolicy", "p")["WaypointAccepted"]
    assert short(found) == "False UnknownProvider"
    assert "opa is not known here" in found.message
    assert "are denied" in found.message

    text = "extensionProviders: [{name: opa, envoyExtAuthzHttp: {service: o.auth, port: 1}}]"
    good = obj("ConfigMap", "istio", "istio-system", "v1", data={"mesh": text})
    held.put(good)
    assert short(said(held, "AuthorizationPolicy", "p")["WaypointAccepted"]) == "True Accepted"
    held.put({**good, "data": {"mesh": "extensionProviders: 1"}})
    found = said(held, "AuthorizationPolicy", "p")["WaypointAccepted"]
    assert short(found) == "True PartiallyInvalid"
    assert "state before stays in force: data.mesh.extensionProviders" in found.message
