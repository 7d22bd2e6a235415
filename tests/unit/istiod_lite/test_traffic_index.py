"""What each waypoint is told for each service, and what a mistake may not open."""

from __future__ import annotations

import pytest

from istiod_lite import l7_policies, snapshot
from istiod_lite.relation import Relation
from mesh.cluster.api import Ref, ref_of
from mesh.model.l7_policy import L7Operation, L7Rule, L7Source
from mesh.model.service import service_key
from mesh.xds.translate import TRAFFIC_TYPE
from tests.support.gateways import (
    OURS,
    SECURITY,
    USE,
    Held,
    authorization,
    gateway,
    namespace,
    obj,
    rate_limit,
    route,
    service,
    target,
    waypoint_pod,
)


def bound(*more) -> Held:
    parts = [namespace("shop", **{USE: "wp"}), gateway(), waypoint_pod(), service()]
    return Held(*parts, *more)


def config(held: Held):
    found = held.config()
    assert found is not None
    return found


def test_a_relation_is_kept_both_ways():
    a, b, c = (Ref("X", "n", name) for name in "abc")
    relation = Relation()
    assert relation.set(a, [b, c, b]) == (b, c)
    assert relation.set(b, [c]) == (c,)
    assert relation.to(c) == (a, b)
    assert relation.set(a, [b]) == (b, c)
    assert (relation.of(a), relation.to(c)) == ((b,), (b,))
    relation.set(b, [])
    assert relation.to(c) == ()


def test_a_waypoint_and_each_service_have_a_resource_even_without_anything_to_say():
    held = bound()
    assert set(held.index.traffic.configs) == {"shop/wp", config(held).key}
    assert config(held).routes == config(held).authorizations == ()


def test_a_service_that_moves_to_another_waypoint_leaves_the_first():
    held = bound(gateway("two"), waypoint_pod("two"))
    held.put(service(labels={USE: "two"}))
    assert held.config() is None
    assert held.config(waypoint="shop/two") is not None
    held.delete("Service", "web")
    assert set(held.index.traffic.configs) == {"shop/wp", "shop/two"}


def test_an_authorization_is_told_as_it_is_written():
    rule = {
        "from": [{"source": {"requestPrincipals": ["iss/*"], "notPrincipals": ["a"]}}],
        "to": [{"operation": {"methods": ["GET"], "ports": ["80"], "paths": ["/x*"]}}],
        "when": [{"key": "source.serviceAccount", "values": ["sa", "other/sa"]}],
    }
    held = bound(authorization(action="DENY", rules=[rule]))
    (found,) = config(held).authorizations
    assert (found.action, found.source, found.problem) == ("DENY", "p.yaml:3", "")
    (told,) = found.rules
    assert told.sources == (L7Source(request_principals=("iss/*",), not_principals=("a",)),)
    assert told.operations == (L7Operation(methods=("GET",), ports=("80",), paths=("/x*",)),)
    assert told.conditions[0].values == ("shop/sa", "other/sa")
    # It is the waypoint's alone.
    assert "shop/p" not in held.index.policies


def test_what_cannot_be_carried_out_denies():
    held = bound(authorization(action="CUSTOM", provider={"name": "opa"}, rules=[{}]))
    (found,) = config(held).authorizations
    assert found.provider is not None
    assert "opa is not known here (ConfigMap istio names none)" in found.provider.problem
    assert found.rules == (L7Rule(),)


HTTP = """
extensionProviders:
- name: opa
  envoyExtAuthzHttp: {service: %s, port: 8000, timeout: 2s}
"""


def mesh_config(text: str, home: str = "istio-system", name: str = "istio"):
    return obj("ConfigMap", name, home, "v1", data={"mesh": text})


@pytest.mark.parametrize(
    ("service", "key"),
    [
        ("opa.auth.svc.cluster.local", "auth/opa.auth.svc.cluster.local"),
        ("opa.auth.svc", "auth/opa.auth.svc.cluster.local"),
        ("opa.auth", "auth/opa.auth.svc.cluster.local"),
        ("far/opa.example.com", "far/opa.example.com"),
    ],
)
def test_a_custom_policy_is_told_whom_to_ask(service, key):
    held = bound(authorization(action="CUSTOM", provider={"name": "opa"}, rules=[{}]))
    held.put(mesh_config(HTTP % service))
    (found,) = config(held).authorizations
    assert found.provider is not None
    assert (found.provider.service, found.provider.problem) == (key, "")
    assert found.provider.timeout_seconds == 2.0


@pytest.mark.parametrize("written", ["opa", "opa.auth.svc.other", "opa.auth.pod", "opa.auth.x.y"])
def test_a_service_is_not_guessed(written):
    assert service_key(written, "cluster.local") is None


def test_an_authorizer_whose_namespace_cannot_be_told_denies():
    held = bound(authorization(action="CUSTOM", provider={"name": "opa"}, rules=[{}]))
    held.put(mesh_config(HTTP % "opa.example.com"))
    (found,) = config(held).authorizations
    assert found.provider is not None
    assert "write namespace/opa.example.com" in found.provider.problem


def test_only_the_mesh_config_of_the_mesh_counts():
    held = bound(authorization(action="CUSTOM", provider={"name": "opa"}, rules=[{}]))
    held.put(mesh_config(HTTP % "opa.auth", home="shop"), mesh_config(HTTP % "opa.auth", name="x"))
    (found,) = config(held).authorizations
    assert found.provider is not None
    assert found.provider.problem


def test_a_mistake_in_the_mesh_config_leaves_what_was():
    held = bound(authorization(action="CUSTOM", provider={"name": "opa"}, rules=[{}]))
    held.put(mesh_config(HTTP % "opa.auth"))
    before = config(held)
    held.put(mesh_config("extensionProviders: ["))
    assert config(held) is before
    assert any("not YAML" in str(each) for each in held.index.findings())
    held.put(mesh_config(HTTP % "opa.auth"))
    assert held.index.findings() == []
    held.delete("ConfigMap", "istio", "istio-system")
    (found,) = config(held).authorizations
    assert found.provider is not None
    assert found.provider.problem


def test_a_change_of_the_mesh_config_concerns_who_asks():
    other = service("other")
    held = bound(other, authorization(action="CUSTOM", provider={"name": "opa"}, rules=[{}]))
    traffic = held.index.traffic
    new = held.index.inventory.put(
        ref_of(mesh_config(HTTP % "opa.auth")), mesh_config(HTTP % "opa.auth")
    )
    assert traffic.touched(ref_of(mesh_config("")), None, new) == [Ref("Service", "shop", "web")]
    assert traffic.touched(ref_of(mesh_config("")), new, new) == []


def test_policies_of_the_gateway_are_in_its_own_resource():
    held = bound(authorization(refs=[target("wp", "Gateway")], rules=[{}]))
    assert config(held).authorizations == ()
    (found,) = held.index.traffic.configs["shop/wp"].authorizations
    assert found.name == "p"


def test_tokens_limits_and_redactions_are_told():
    tokens = obj(
        "RequestAuthentication",
        "jwt",
        "shop",
        SECURITY,
        spec={"targetRefs": [target()], "jwtRules": [{"issuer": "me", "jwks": "{}"}]},
    )
    redaction = obj(
        "RedactionPolicy",
        "mail",
        "shop",
        OURS,
        spec={"targetRefs": [target()], "rules": [{"detector": "email"}]},
    )
    held = bound(tokens, rate_limit(), redaction)
    found = config(held)
    assert found.authentications[0].rules[0].issuer == "me"
    assert found.rate_limits[0].rules[0].requests == 10
    assert found.redactions[0].rules[0].detector == "email"
    assert found.redactions[0].source == "mail.yaml:3"


def test_a_policy_on_a_route_concerns_that_route():
    held = bound(rate_limit(refs=[target("r", "HTTPRoute")]))
    assert config(held).rate_limits == ()
    held.put(route())
    (found,) = config(held).rate_limits
    assert found.rules[0].condition.route_rules == ("shop/r",)
    section = target("r", "HTTPRoute", sectionName="one")
    held.put(rate_limit(refs=[section]))
    assert "no rule named one" in config(held).rate_limits[0].problem
    held.put(route(rules=[{"name": "one"}, {"name": "two"}]))
    (found,) = config(held).rate_limits
    assert (found.problem, found.rules[0].condition.route_rules) == ("", ("shop/r/one",))
    held.delete("HTTPRoute", "r")
    assert config(held).rate_limits == ()


BAD = {"rules": [{"limitt": {}}]}


def test_a_policy_that_was_never_readable_denies_its_target_until_it_is_repaired():
    held = bound(rate_limit(**BAD))
    (found,) = config(held).rate_limits
    assert "limitt" in held.findings()[0]
    assert "cannot be read" in found.problem
    assert held.guards()
    held.put(rate_limit())
    assert config(held).rate_limits[0].problem == ""
    held.put(rate_limit(**BAD))
    # What was good stays in force.
    assert config(held).rate_limits[0].problem == ""
    held.delete("RateLimitPolicy", "l")
    assert config(held).rate_limits == ()
    assert not held.guards()
    held.put(rate_limit(**BAD))
    held.delete("RateLimitPolicy", "l")
    assert config(held).rate_limits == ()


@pytest.mark.parametrize(
    ("kind", "version"),
    [
        ("AuthorizationPolicy", SECURITY),
        ("RequestAuthentication", SECURITY),
        ("RedactionPolicy", OURS),
    ],
)
def test_each_kind_closes_when_unreadable(kind, version):
    held = bound(obj(kind, "x", "shop", version, spec={"targetRefs": [target()], "oops": 1}))
    found = config(held)
    (problem,) = [each.problem for each in (*found.authorizations, *found.redactions)]
    assert "cannot be read" in problem


def test_without_readable_targets_its_namespace_is_closed_where_there_is_a_waypoint():
    held = bound(service("free", labels={USE: "none"}))
    held.put(rate_limit(refs=[{"kindd": "Service"}]))
    assert config(held).rate_limits[0].problem
    assert list(held.guards()) == ["shop/ambit_waypoint_only_web_8080"]
    assert held.config("free") is None


def test_a_policy_with_a_selector_is_no_waypoints_business():
    spec = {"selector": {"matchLabels": {"app": "web"}}, "oops": 1}
    policy = obj("AuthorizationPolicy", "p", "shop", SECURITY, spec=spec)
    assert (
        l7_policies.targets_of_unreadable(Ref("AuthorizationPolicy", "shop", "p"), policy) is None
    )
    held = bound(policy)
    assert config(held).authorizations == ()
    assert "shop/p" in held.index.policies


def test_older_policies_come_first():
    newer, older = rate_limit("a"), rate_limit("b")
    newer["metadata"]["creationTimestamp"] = "2026-02-01T00:00:00Z"
    older["metadata"]["creationTimestamp"] = "2026-01-01T00:00:00Z"
    held = bound(newer, older)
    assert [each.name for each in config(held).rate_limits] == ["b", "a"]


def test_targets_in_other_namespaces_are_not_taken():
    held = bound(rate_limit(home="evil", refs=[target(namespace="shop")]))
    assert config(held).rate_limits == ()
    assert held.guards() == {}


def test_what_changes_is_what_is_touched():
    held = bound(service("other"))
    before = dict(held.index.traffic.configs)
    assert not held.put(service())
    assert held.put(route())
    changed = {key for key, each in held.index.traffic.configs.items() if each != before.get(key)}
    assert changed == {config(held).key}
    # Equal values stay the same objects, which is what a snapshot shares.
    same = held.index.traffic.configs["shop/wp"]
    assert same is before["shop/wp"]


def test_annotations_of_the_gateway():
    held = bound()
    held.put(gateway(annotations={"ambient.istio.io/xfcc-include-client-identity": "true"}))
    assert config(held).shows_client_identity
    held.put(gateway(annotations={"ambit.dev/explain-denials": "true"}))
    assert (config(held).shows_client_identity, config(held).explains_denials) == (False, True)


def test_the_snapshot_carries_them_and_shares_what_is_equal():
    held = bound(route())
    index = held.index
    first = snapshot.build(index.addresses, index.policies, None, index.traffic.configs)
    assert first.of_waypoint("shop/wp") == set(index.traffic.configs)
    assert first.of_waypoint("shop/other") == frozenset()
    held.put(rate_limit())
    second = snapshot.build(index.addresses, index.policies, first, index.traffic.configs)
    deltas = snapshot.diff(first, second)
    assert deltas[TRAFFIC_TYPE].changed == {config(held).key}
    assert second.of(TRAFFIC_TYPE)["shop/wp"] is first.of(TRAFFIC_TYPE)["shop/wp"]
