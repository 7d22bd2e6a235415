"""What waypoints are told of DestinationRule and XBackendTrafficPolicy, and what is said back."""

from __future__ import annotations

from typing import Any

import pytest

from istiod_lite.backends import KINDS
from istiod_lite.conditions import merged
from istiod_lite.features import FEATURES
from istiod_lite.index import KINDS as WATCHED
from istiod_lite.status import changed, statuses
from istiod_lite.subscriptions import Share
from mesh.cluster.api import Ref
from mesh.model.route import DEFAULT_BACKEND, BackendSettings, SessionPersistence
from mesh.xds.traffic import traffic_from_proto, traffic_to_proto
from tests.support.gateways import (
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

ALL, SOME = Share(2, 2), Share(1, 2)
NETWORKING = "networking.istio.io/v1"
EXPERIMENTAL = "gateway.networking.x-k8s.io/v1alpha1"


def _rule(name: str = "r", home: str = "shop", host: str = "web", simple: str = "RANDOM",
          created: str = "", **spec: Any) -> dict[str, Any]:  # fmt: skip
    metadata = {"creationTimestamp": created} if created else {}
    policy = {"loadBalancer": {"simple": simple}}
    return obj("DestinationRule", name, home, NETWORKING, metadata=metadata,
               spec={"host": host, "trafficPolicy": policy, **spec})  # fmt: skip


def _policy(name: str = "b", created: str = "", target: str = "web", **spec: Any) -> dict[str, Any]:
    metadata = {"creationTimestamp": created} if created else {}
    refs = [{"group": "", "kind": "Service", "name": target}]
    return obj("XBackendTrafficPolicy", name, "shop", EXPERIMENTAL, metadata=metadata,
               spec={"targetRefs": refs, **spec})  # fmt: skip


def _bound(*more: dict[str, Any]) -> Held:
    own = service("wp", app="wp")
    parts = [namespace("shop", **{USE: "wp"}), gateway(), waypoint_pod(), own, service()]
    return Held(*parts, *more)


def _kind(held: Held) -> str:
    found = held.config()
    assert found is not None
    return found.backend.balancing.kind


@pytest.mark.parametrize(
    "host", ["web", "web.shop", "web.shop.svc", "web.shop.svc.cluster.local", "WEB",
             "*.shop.svc.cluster.local", "*"],
)  # fmt: skip
def test_hosts_that_mean_the_service(host: str) -> None:
    assert _kind(_bound(_rule(host=host))) == "RANDOM"


@pytest.mark.parametrize(
    ("home", "host"), [("shop", "other"), ("shop", "web.other"), ("other", "web.shop"),
                       ("other", "*"), ("shop", "*.other.svc.cluster.local")],
)  # fmt: skip
def test_hosts_and_namespaces_that_do_not(home: str, host: str) -> None:
    assert _kind(_bound(_rule(home=home, host=host))) == "LEAST_REQUEST"


def test_they_are_watched() -> None:
    assert set(KINDS) <= set(WATCHED)


def test_who_goes_first_and_what_follows_when_it_goes() -> None:
    held = _bound(
        _rule("all", "istio-system", "*", simple="RANDOM"),
        _rule("late", simple="RANDOM", created="2026-02-01T00:00:00Z"),
        _rule("early", simple="ROUND_ROBIN", created="2026-01-01T00:00:00Z"),
        _rule("vague", host="*.shop.svc.cluster.local", created="2025-01-01T00:00:00Z"),
    )
    assert _kind(held) == "ROUND_ROBIN"
    assert held.delete("DestinationRule", "early")
    assert _kind(held) == "RANDOM"
    for name in ("late", "vague"):
        held.delete("DestinationRule", name)
    assert _kind(held) == "RANDOM"
    held.delete("DestinationRule", "all", "istio-system")
    assert held.config().backend == DEFAULT_BACKEND  # type: ignore[union-attr]


def test_a_budget_and_a_session_go_before_the_rule_and_travel() -> None:
    held = _bound(
        _rule(),
        _policy(retryConstraint={"budget": {"percent": 5}},
                sessionPersistence={"type": "Header", "header": {"name": "s"}}),
        _policy("older", target="other"),
    )  # fmt: skip
    found = held.config()
    assert found is not None
    backend = found.backend
    assert backend.balancing.kind == "RANDOM"
    assert (backend.limits.retry_budget_percent, backend.limits.retry_interval_seconds) == (5, 10)
    assert backend.session == SessionPersistence(kind="Header", name="s")
    assert traffic_from_proto(traffic_to_proto(found)) == found


def test_backends_of_routes_bring_theirs_whoever_serves_them() -> None:
    held = _bound(
        service("v2", "lib"), namespace("lib"), _rule("r", "lib", "v2"),
        obj("ReferenceGrant", "g", "lib", "gateway.networking.k8s.io/v1beta1",
            spec={"from": [{"group": "gateway.networking.k8s.io", "kind": "HTTPRoute",
                            "namespace": "shop"}], "to": [{"group": "", "kind": "Service"}]}),
        route(parents=[parent()], backends=[{"name": "v2", "namespace": "lib", "port": 80}]),
    )  # fmt: skip

    def told() -> dict[str, BackendSettings]:
        found = held.config()
        assert found is not None
        assert traffic_from_proto(traffic_to_proto(found)) == found
        return dict(found.backends)

    assert told()["lib/v2.lib.svc.cluster.local"].balancing.kind == "RANDOM"
    held.put(_rule("r", "lib", "v2", "ROUND_ROBIN"))
    assert told()["lib/v2.lib.svc.cluster.local"].balancing.kind == "ROUND_ROBIN"
    held.delete("DestinationRule", "r", "lib")
    assert told() == {}


def _said(held: Held, name: str = "r", share: Share = ALL, home: str = "shop") -> tuple[str, str]:
    fragment = statuses(held.index, lambda *_: share)[Ref("DestinationRule", home, name)]
    (condition,) = fragment.conditions
    assert condition.type == "WaypointAccepted"
    return f"{condition.status} {condition.reason}", condition.message


def test_rules_are_told_whether_they_hold() -> None:
    held = _bound(_rule(), _rule("second", created="2027-01-01T00:00:00Z"),
                  _rule("lost", host="nobody"), _rule("far", "other", "web.shop"))  # fmt: skip
    assert _said(held)[0] == "True Accepted"
    assert _said(held, share=SOME)[0] == "Unknown Pending"
    assert _said(held, "second")[0] == "False Conflicted"
    assert _said(held, "lost")[0] == "False TargetNotFound"
    assert _said(held, "far", home="other")[0] == "False TargetNotFound"
    held.put(_rule(subsets=[{"name": "v1"}]))
    state, message = _said(held)
    assert state == "True PartiallyInvalid"
    assert message == "no effect here: spec.subsets; applied on 2 of 2 waypoint proxies"
    held.put(_rule(simple="BEST"))
    assert _said(held)[0] == "False Invalid"
    alone = Held(namespace("shop"), service(), _rule())
    assert _said(alone)[0] == "False AncestorNotBound"


def test_our_class_and_mesh_say_what_we_can_do() -> None:
    held = _bound(
        obj("GatewayClass", "istio-waypoint", "", "gateway.networking.k8s.io/v1",
            spec={"controllerName": "istio.io/mesh-controller"}),
        obj("GatewayClass", "theirs", "", "gateway.networking.k8s.io/v1",
            spec={"controllerName": "example.com/gateway"}),
        obj("XMesh", "ambit", "", EXPERIMENTAL,
            spec={"controllerName": "istio.io/mesh-controller"}),
    )  # fmt: skip
    found = statuses(held.index, lambda *_: ALL)
    assert Ref("GatewayClass", "", "theirs") not in found
    for ref in (Ref("GatewayClass", "", "istio-waypoint"), Ref("XMesh", "", "ambit")):
        patch = merged({"metadata": {"generation": 1}}, found[ref], "2026-05-01T00:00:00Z")
        assert patch is not None
        assert [each["reason"] for each in patch["conditions"]] == ["Accepted"]
        names = [each["name"] for each in patch["supportedFeatures"]]
        assert names == sorted(set(names))
        assert len(names) <= 64
        assert sum(name.startswith("Mesh") for name in names) == 1 + 9
    assert set(names) == set(FEATURES)


def test_policies_of_the_gateway_api_are_told_for_each_target() -> None:
    held = _bound(_policy(created="2026-01-01T00:00:00Z"), _policy("late", "2026-02-01T00:00:00Z"),
                  _policy("lost", target="nobody"))  # fmt: skip
    found = statuses(held.index, lambda *_: ALL)

    def reason(name: str) -> str:
        (entry,) = found[Ref("XBackendTrafficPolicy", "shop", name)].ancestors or ()
        return entry.conditions[0].reason

    assert [reason(name) for name in ("b", "late", "lost")] == [
        "Accepted", "Conflicted", "TargetNotFound",
    ]  # fmt: skip
    fragment = found[Ref("XBackendTrafficPolicy", "shop", "b")]
    foreign = {"ancestorRef": {"name": "x"}, "controllerName": "else/where", "conditions": []}
    live = {"metadata": {"generation": 4}, "status": {"ancestors": [foreign]}}
    patch = merged(live, fragment, "2026-05-01T00:00:00Z")
    assert patch is not None
    kept, ours = patch["ancestors"]
    assert kept == foreign
    assert ours["ancestorRef"] == {"group": "", "kind": "Service", "name": "web"}
    assert ours["conditions"][0]["observedGeneration"] == 4
    again = {"metadata": {"generation": 4}, "status": patch}
    assert merged(again, fragment, "2027-01-01T00:00:00Z") is None
    ((ref, gone),) = changed({Ref("X", "shop", "b"): fragment}, {})
    assert merged(again, gone, "2027-01-01T00:00:00Z") == {"ancestors": [foreign]}
    assert ref.name == "b"
