"""Addresses that ServiceEntries are given, and waypoints before external hosts."""

from __future__ import annotations

import random
from ipaddress import ip_address

import pytest

from istiod_lite import auto_addresses, status
from istiod_lite.auto_addresses import NETWORKS, allocate
from istiod_lite.subscriptions import Share
from mesh.cluster.api import Ref
from mesh.cluster.entries import parse_service_entry
from tests.support.gateways import USE, Held, gateway, namespace, obj, waypoint_pod

VERSION = "networking.istio.io/v1"
PORT = {"number": 443, "name": "tls", "protocol": "TLS"}
ENTRY = Ref("ServiceEntry", "shop", "out")
KEY = "shop/api.example"


def entry(name="out", *, labels=None, status=None, created="", **spec):
    metadata = {"labels": labels or {}}
    if created:
        metadata["creationTimestamp"] = created
    spec = {"hosts": ["api.example"], "ports": [PORT], "resolution": "DNS", **spec}
    more = {"status": status} if status else {}
    return obj("ServiceEntry", name, "shop", VERSION, metadata=metadata, spec=spec, **more)


def views(*objects):
    return [parse_service_entry(each) for each in objects]


def addresses(held: Held, key: str = KEY) -> list[str]:
    return [each.address for each in held.index.addresses[key].addresses]


def test_each_host_has_an_address_of_either_family():
    held = Held(entry(hosts=["api.example", "b.example"]))
    one, other = addresses(held), addresses(held, "shop/b.example")
    for listed in (one, other):
        assert [ip_address(each) in net for each, net in zip(listed, NETWORKS, strict=True)] == [
            True,
            True,
        ]
    assert not {*one} & {*other}


@pytest.mark.parametrize(
    "changes",
    [
        {"addresses": ["198.51.100.1"]},
        {"resolution": "NONE"},
        {"labels": {auto_addresses.ENABLE: "false"}},
    ],
)
def test_who_gets_none(changes):
    assert allocate(views(entry(**changes))) == {}


def test_replicas_and_restarts_agree_whatever_the_order(monkeypatch):
    monkeypatch.setattr(auto_addresses, "_PLACES", 97)  # so that they meet
    listed = [entry(f"e{n}", hosts=[f"h{n}.example"]) for n in range(60)]
    first = allocate(views(*listed))
    assert len({address for pairs in first.values() for _, address in pairs}) == 120
    for seed in range(5):
        random.Random(seed).shuffle(listed)
        assert allocate(views(*listed)) == first


def test_what_is_in_the_status_stays_and_cannot_be_taken(monkeypatch):
    mine = [{"host": "api.example", "value": "240.240.0.7"}]
    old = entry("old", created="2026-01-01T00:00:00Z", status={"addresses": mine})
    forged = entry("new", created="2026-02-01T00:00:00Z", hosts=["x.example"])
    forged["status"] = {"addresses": [{"host": "x.example", "value": "240.240.0.7"}]}
    found = allocate(views(forged, old))
    assert ("api.example", "240.240.0.7") in found[Ref("ServiceEntry", "shop", "old")]
    assert ("x.example", "240.240.0.7") not in found[Ref("ServiceEntry", "shop", "new")]


def test_a_full_network_leaves_hosts_without(monkeypatch):
    monkeypatch.setattr(auto_addresses, "_PLACES", 4)
    found = allocate(views(*(entry(f"e{n}", hosts=[f"h{n}.example"]) for n in range(20))))
    assert len(found) == 4


def test_the_status_tells_them():
    held = Held(entry())
    fragment = status.statuses(held.index, lambda *_: Share(0, 0))[ENTRY]
    assert [value for _, value in fragment.assigned] == addresses(held)
    held.put(entry(status={"addresses": [{"host": "api.example", "value": "240.240.9.9"}]}))
    assert addresses(held)[0] == "240.240.9.9"


POLICY = {
    "targetRefs": [{"group": "networking.istio.io", "kind": "ServiceEntry", "name": "out"}],
    "action": "ALLOW",
    "rules": [{"to": [{"operation": {"methods": ["GET"]}}]}],
}


def policy():
    return obj("AuthorizationPolicy", "p", "shop", "security.istio.io/v1", spec=POLICY)


def test_a_waypoint_serves_the_hosts_of_an_entry():
    held = Held(gateway(), waypoint_pod(), entry(labels={USE: "wp"}), policy())
    assert str(held.index.addresses[KEY].waypoint.destination) == "shop/wp.shop.svc.cluster.local"
    (key,) = held.index.traffic.config_keys(ENTRY)
    assert [each.name for each in held.index.traffic.configs[key].authorizations] == ["p"]
    (condition,) = status.statuses(held.index, lambda *_: Share(1, 1))[ENTRY].conditions
    assert (condition.type, condition.status) == ("istio.io/WaypointBound", "True")
    held.delete("ServiceEntry", "out")
    assert key not in held.index.traffic.configs
    assert held.index.traffic.config_keys(ENTRY) == ()


def test_by_the_label_of_its_namespace_and_back():
    held = Held(gateway(), waypoint_pod(), entry(), namespace("shop"))
    assert held.index.addresses[KEY].waypoint is None
    held.put(namespace("shop", **{USE: "wp"}))
    assert held.index.addresses[KEY].waypoint is not None
    held.put(namespace("shop"))
    assert held.index.addresses[KEY].waypoint is None
    assert held.index.traffic.config_keys(ENTRY) == ()


def test_policy_closes_while_the_waypoint_is_away():
    held = Held(gateway(), entry(labels={USE: "wp"}))
    assert held.index.addresses[KEY].waypoint is None
    held.put(policy())
    assert held.index.addresses[KEY].waypoint is not None


def test_what_is_passed_through_does_not_go_through_a_waypoint_unless_policy_closes_it():
    held = Held(gateway(), waypoint_pod(), entry(labels={USE: "wp"}, resolution="NONE"))
    assert held.index.addresses[KEY].waypoint is None
    assert held.index.traffic.bindings[ENTRY].reason == "UnsupportedTrafficType"
    held.put(policy())
    assert held.index.addresses[KEY].waypoint is not None
