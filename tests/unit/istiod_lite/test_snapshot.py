"""Versions, differences, and the keys by which on-demand clients ask."""

from __future__ import annotations

from dataclasses import replace

from istiod_lite.snapshot import Delta, Snapshot, build, diff, version_of
from mesh.model.authorization import Action, Authorization, PolicyScope
from mesh.model.service import Service
from mesh.model.workload import (
    CidrAddress,
    GatewayAddress,
    NamespacedHostname,
    NetworkAddress,
    Workload,
)
from mesh.xds.translate import ADDRESS_TYPE, AUTHORIZATION_TYPE, encode, resource_name

HOST = "httpbin.demo.svc.cluster.local"
WAYPOINT_HOST = "waypoint.demo.svc.cluster.local"
SLEEP = Workload(
    uid="K//Pod/demo/sleep", name="sleep", namespace="demo", addresses=("10.0.0.1",), node="n1"
)
HTTPBIN = Workload(
    uid="K//Pod/demo/httpbin",
    name="httpbin",
    namespace="demo",
    addresses=("10.0.0.2", "fd00::2"),
    node="n2",
    services={f"demo/{HOST}": {80: 8080}},
)
PROXY = Workload(
    uid="K//Pod/demo/waypoint",
    name="waypoint",
    namespace="demo",
    addresses=("10.0.0.3",),
    services={f"demo/{WAYPOINT_HOST}": {15008: 15008}},
)
SERVICE = Service(
    "httpbin",
    "demo",
    HOST,
    addresses=(NetworkAddress("", "10.96.0.2"),),
    cidr_addresses=(CidrAddress("", "10.97.0.0/16"),),
    waypoint=GatewayAddress(NamespacedHostname("demo", WAYPOINT_HOST), 15008),
)
WAYPOINT = Service("waypoint", "demo", WAYPOINT_HOST, addresses=(NetworkAddress("", "10.96.0.3"),))
DENY = Authorization("deny", "demo", PolicyScope.NAMESPACE, Action.DENY)
ALL = (SLEEP, HTTPBIN, PROXY, SERVICE, WAYPOINT)


def snapshot(
    *resources: Workload | Service | Authorization, previous: Snapshot | None = None
) -> Snapshot:
    policies = {r.key: r for r in resources if isinstance(r, Authorization)}
    addresses = {resource_name(r): r for r in resources if not isinstance(r, Authorization)}
    return build(addresses, policies, previous)


def test_a_version_is_a_hash_of_the_bytes() -> None:
    entry = snapshot(SLEEP).of(ADDRESS_TYPE)[SLEEP.uid]
    assert entry.version == version_of(encode(SLEEP))
    assert len(entry.version) == 16
    assert (entry.message.name, entry.message.version) == (SLEEP.uid, entry.version)
    assert entry.message.resource.type_url == ADDRESS_TYPE
    assert entry.message.resource.value == encode(SLEEP)


def test_an_unchanged_resource_is_shared_with_the_previous_snapshot() -> None:
    first = snapshot(SLEEP, HTTPBIN)
    second = snapshot(replace(SLEEP), replace(HTTPBIN, node="n9"), previous=first)
    assert second.of(ADDRESS_TYPE)[SLEEP.uid] is first.of(ADDRESS_TYPE)[SLEEP.uid]
    assert second.of(ADDRESS_TYPE)[HTTPBIN.uid] is not first.of(ADDRESS_TYPE)[HTTPBIN.uid]


def test_diff_tells_changed_and_removed_by_type() -> None:
    old = snapshot(SLEEP, HTTPBIN)
    new = snapshot(replace(SLEEP, node="n3"), SERVICE, DENY)
    assert diff(old, new) == {
        ADDRESS_TYPE: Delta(frozenset({SLEEP.uid, f"demo/{HOST}"}), frozenset({HTTPBIN.uid})),
        AUTHORIZATION_TYPE: Delta(frozenset({"demo/deny"}), frozenset()),
    }
    assert diff(new, new) == {}


def test_a_resource_that_cannot_be_encoded_is_left_out_and_told() -> None:
    bad = replace(HTTPBIN, addresses=("not an address",))
    made = snapshot(SLEEP, bad)
    assert set(made.of(ADDRESS_TYPE)) == {SLEEP.uid}
    assert [str(fault) for fault in made.faults] == ["not an IP address: 'not an address'"]


def test_a_resource_under_the_wrong_key_is_left_out() -> None:
    made = build({"wrong": SLEEP}, {})
    assert made.of(ADDRESS_TYPE) == {}
    assert len(made.faults) == 1


def test_find_by_uid_and_by_address() -> None:
    made = snapshot(*ALL)
    assert made.find(SLEEP.uid) == {SLEEP.uid}
    assert made.find("/10.0.0.1") == {SLEEP.uid}
    assert made.find("/fd00:0::2") == {HTTPBIN.uid}
    assert made.find("other/10.0.0.1") == frozenset()


def test_find_a_service_brings_endpoints_and_waypoint() -> None:
    made = snapshot(*ALL)
    everything = {f"demo/{HOST}", HTTPBIN.uid, f"demo/{WAYPOINT_HOST}", PROXY.uid}
    assert made.find(f"demo/{HOST}") == everything
    assert made.find("/10.96.0.2") == everything
    assert made.find("/10.97.0.0/16") == everything


def test_find_what_nobody_knows() -> None:
    assert snapshot(*ALL).find("demo/nobody") == frozenset()
    assert Snapshot().find("/10.0.0.1") == frozenset()


def test_waypoints_that_refer_to_each_other_end() -> None:
    loop = replace(PROXY, waypoint=GatewayAddress(NetworkAddress("", "10.0.0.3"), 15008))
    assert snapshot(loop).find(PROXY.uid) == {PROXY.uid}


def test_the_workloads_of_a_node() -> None:
    made = snapshot(*ALL)
    assert made.on_node("n1") == {SLEEP.uid}
    assert made.on_node("") == frozenset()
    assert made.on_node("unknown") == frozenset()
