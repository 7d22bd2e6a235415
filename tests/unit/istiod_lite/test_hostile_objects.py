"""Objects that a hostile tenant writes: large, many, odd. Others go on, and nothing is loosened."""

from __future__ import annotations

import pytest

from mesh.cluster.api import Ref, ref_of
from mesh.cluster.validate import Severity
from mesh.errors import ConfigError
from tests.support.gateways import USE, Held, authorization, gateway, namespace, pod, route, service
from tests.support.gateways import waypoint_pod as waypoint

WEB = "shop/web.shop.svc.cluster.local"
KEY = f"shop/wp/{WEB}"


def held(*more) -> Held:
    return Held(namespace("shop", **{USE: "wp"}), gateway(), waypoint(), service(), pod("a"), *more)


def errors(found: Held) -> list[str]:
    return [str(each) for each in found.index.findings() if each.severity is Severity.ERROR]


def rule(number: int) -> dict:
    path = {"type": "PathPrefix", "value": f"/{number}"}
    return {"matches": [{"path": path}], "backendRefs": [{"name": "web", "port": 80}]}


def test_a_route_of_ten_thousand_rules_is_refused_and_the_one_before_stays():
    found = held(route(rules=[rule(0)]))
    (before,) = found.index.traffic.configs[KEY].routes
    found.put(route(rules=[rule(number) for number in range(10_000)]))
    (told,) = errors(found)
    assert "spec.rules" in told
    assert len(told) < 1000
    assert found.index.traffic.configs[KEY].routes == (before,)
    found.put(service("other", app="other"))
    assert found.index.addresses["shop/other.shop.svc.cluster.local"]


@pytest.mark.parametrize(
    "rules",
    [
        [{"from": [{"source": {"principals": ["x" * 1_000_000]}}]}],
        [{"from": [{"source": {"ipBlocks": ["10.0.0.0/8" for _ in range(50_000)]}}]}],
        [{"to": [{"operation": {"paths": ["/" + "{" * 100_000]}}]}],
        [{"when": [{"key": "k" * 100_000, "values": ["v"]}]}],
        [{}] * 10_000,
    ],
    ids=["long value", "many values", "odd path", "long key", "many rules"],
)
def test_enormous_policies_never_open_what_was_closed(rules):
    """It is refused, and what it said before stays, or it is in force; others are told as ever."""
    deny = authorization(action="DENY", rules=[{"to": [{"operation": {"methods": ["GET"]}}]}])
    found = held(deny, pod("b", "bank"))
    (before,) = found.index.traffic.configs[KEY].authorizations
    found.put(authorization(action="DENY", rules=rules))
    config = found.index.traffic.configs[KEY]
    assert len(config.authorizations) == 1
    if errors(found):
        assert config.authorizations == (before,)
        assert all(len(each) < 2000 for each in errors(found))
    else:
        assert config.authorizations[0].rules
    assert found.index.addresses["Kubernetes//Pod/bank/b"]


def test_what_is_deep_is_refused_by_its_place():
    deep: dict = {}
    for _ in range(900):
        deep = {"a": deep}
    found = held(route(rules=[rule(0)]))
    found.put(route(rules=[{**rule(0), "filters": [deep]}]))
    assert len(errors(found)) == 1
    assert len(found.index.traffic.configs[KEY].routes) == 1


def test_backends_of_others_need_a_grant_and_a_parent_of_others_is_told_so():
    found = held(service("vault", "bank", "vault"), pod("v", "bank", "vault"))
    stolen = [{"name": "vault", "namespace": "bank", "port": 80}]
    found.put(route(backends=stolen))
    (told,) = found.index.traffic.configs[KEY].routes
    problems = [each.problem for each in told.rules[0].backends]
    assert [each.partition(":")[0] for each in problems] == ["RefNotPermitted"]
    attached = found.index.traffic.outcomes[Ref("Service", "shop", "web")].attachments
    (entry,) = attached[Ref("HTTPRoute", "shop", "r")]
    assert entry.refs_reason == "RefNotPermitted"


@pytest.mark.parametrize(
    "name", ["../../etc/passwd", "a/b", "a\x00b", "a\nb", "", "A" * 300, "\u202eevil", "x y", "%2e"]
)
@pytest.mark.parametrize("field", ["name", "namespace"])
def test_names_with_odd_characters_are_no_names(name, field):
    odd = service()
    odd["metadata"][field] = name
    if field == "namespace" and name == "":
        assert ref_of(odd).namespace == "default"
        return
    with pytest.raises(ConfigError) as refused:
        ref_of(odd)
    assert len(str(refused.value)) < 1000
    assert str(refused.value).isprintable()


@pytest.mark.parametrize("name", ["../x", "a/b", "wp\n", "*", "A", "x" * 300])
def test_a_waypoint_of_an_odd_name_is_none_and_told_so(name):
    found = held(service("odd", labels={USE: name}))
    assert found.index.addresses["shop/odd.shop.svc.cluster.local"].waypoint is None
    binding = found.index.traffic.bindings[Ref("Service", "shop", "odd")]
    assert binding.reason == "WaypointIsNotReady"
