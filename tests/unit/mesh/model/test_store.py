"""The Store: ranking, staging, remove-then-insert, and which policies concern a workload."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mesh.model.authorization import Action, Authorization, PolicyScope
from mesh.model.service import Service, ServicePort, Visibility
from mesh.model.store import Changed, Store
from mesh.model.workload import (
    CidrAddress,
    NamespacedHostname,
    NetworkAddress,
    NetworkMode,
    TunnelProtocol,
    Workload,
)

WEB = NamespacedHostname("shop", "web.shop.svc.cluster.local")


def pod(name: str, *ips: str, namespace: str = "shop", **fields: object) -> Workload:
    uid = f"Kubernetes//Pod/{namespace}/{name}"
    return Workload(uid, name, namespace, ips, **fields)  # type: ignore[arg-type]


def service(name: str = "web", *vips: str, namespace: str = "shop", **fields: object) -> Service:
    return Service(
        name,
        namespace,
        fields.pop("hostname", f"{name}.{namespace}.svc.cluster.local"),  # type: ignore[arg-type]
        tuple(NetworkAddress("", vip) for vip in vips),
        ports={80: ServicePort(80, 8080)},
        **fields,  # type: ignore[arg-type]
    )


def at(ip: str, network: str = "") -> NetworkAddress:
    return NetworkAddress(network, ip)


def test_workload_is_found_by_uid_address_and_pod_name() -> None:
    store = Store()
    a = pod("a", "10.0.0.1", "fd00::1", node="n1", service_account="sa")
    changed = store.apply_addresses([a], [])
    assert changed == Changed(workloads=frozenset({a.uid}))
    assert store.workload_by_uid(a.uid) is a
    assert store.workload_by_address(at("10.0.0.1")) is a
    assert store.workload_by_address(at("fd00::1")) is a
    assert store.workload_by_address(at("10.0.0.1", "other")) is None
    assert store.workload_by_pod("shop", "a", "sa", "n1") is a
    assert store.workload_by_pod("shop", "a", "sa") is a
    assert store.workload_by_pod("shop", "a", "sa", "n2") is None
    assert store.workload_by_pod("shop", "a", "default", "n1") is None


def test_replacing_a_workload_leaves_nothing_of_the_old_one() -> None:
    store = Store()
    old = pod("a", "10.0.0.1", hostname="old.example", services={str(WEB): {80: 1}})
    new = pod("a", "10.0.0.2")
    store.apply_addresses([service(), old], [])
    store.apply_addresses([new], [])
    assert store.workload_by_address(at("10.0.0.1")) is None
    assert store.workload_by_hostname("old.example") is None
    assert store.endpoints(WEB) == ()
    assert store.workload_by_address(at("10.0.0.2")) is new


def test_an_equal_resource_changes_nothing() -> None:
    store = Store()
    store.apply_addresses([pod("a", "10.0.0.1"), service()], [])
    assert not store.apply_addresses([pod("a", "10.0.0.1"), service()], ["nobody"])


def test_resources_come_before_removals() -> None:
    store = Store()
    a = pod("a", "10.0.0.1")
    assert store.apply_addresses([a], [a.uid]).workloads == {a.uid}
    assert store.workload_by_uid(a.uid) is None


def test_a_pod_wins_a_shared_address_then_one_that_speaks_hbone() -> None:
    entry = Workload("c/networking.istio.io/WorkloadEntry/shop/e", "e", "shop", ("10.0.0.1",))
    hbone = replace(entry, uid=entry.uid + "h", tunnel_protocol=TunnelProtocol.HBONE)
    a = pod("a", "10.0.0.1")
    store = Store()
    store.apply_addresses([entry, hbone], [])
    assert store.workload_by_address(at("10.0.0.1")) is hbone
    store.apply_addresses([a], [])
    assert store.workload_by_address(at("10.0.0.1")) is a
    store.apply_addresses([], [a.uid, hbone.uid])
    assert store.workload_by_address(at("10.0.0.1")) is entry


def test_host_network_workloads_own_no_address() -> None:
    store = Store()
    store.apply_addresses([pod("a", "10.0.0.1", network_mode=NetworkMode.HOST_NETWORK)], [])
    assert store.workload_by_address(at("10.0.0.1")) is None


def test_endpoints_wait_for_their_service_and_survive_its_update() -> None:
    store = Store()
    a = pod("a", "10.0.0.1", services={str(WEB): {80: 8080}})
    store.apply_addresses([a], [])
    assert store.endpoints(WEB) == ()
    assert store.staged_endpoints() == {str(WEB): (a.uid,)}
    store.apply_addresses([service()], [])
    assert [each.workload for each in store.endpoints(WEB)] == [a]
    assert store.staged_endpoints() == {}
    store.apply_addresses([service("web", "10.96.0.1")], [])
    assert store.endpoints(WEB)[0].ports == {80: 8080}
    store.apply_addresses([], [str(WEB)])
    assert store.endpoints(WEB) == ()
    assert store.staged_endpoints() == {str(WEB): (a.uid,)}
    assert store.service_by_vip(at("10.96.0.1"), "shop") is None
    assert store.services_by_hostname(WEB.hostname) == ()


def test_the_endpoint_view_follows_changes() -> None:
    store = Store()
    a = pod("a", "10.0.0.1", services={str(WEB): {80: 8080}})
    b = pod("b", "10.0.0.2", services={str(WEB): {80: 8080}})
    store.apply_addresses([service(), a], [])
    assert len(store.endpoints(WEB)) == 1
    store.apply_addresses([b], [])
    assert {each.workload.name for each in store.endpoints(WEB)} == {"a", "b"}
    store.apply_addresses([], [a.uid])
    assert [each.workload for each in store.endpoints(WEB)] == [b]
    assert store.is_endpoint(WEB, b.uid)
    assert not store.is_endpoint(WEB, a.uid)


@pytest.mark.parametrize(
    ("client", "expected"),
    [("one", "one"), ("two", "two"), ("elsewhere", "three")],
)
def test_services_that_share_an_address_are_ranked(client: str, expected: str) -> None:
    store = Store()
    shared = [service("web", "10.96.0.1", namespace=each) for each in ("one", "two")]
    canonical = service("web", "10.96.0.1", namespace="three", canonical=True)
    store.apply_addresses([*shared, canonical], [])
    found = store.service_by_vip(at("10.96.0.1"), client)
    assert found is not None
    assert found.namespace == expected


def test_services_that_share_a_hostname_are_ranked() -> None:
    store = Store()
    hosts = [service("e", namespace=each, hostname="api.example") for each in ("b", "a", "c")]
    store.apply_addresses(hosts, [])

    def winner(client: str, preferred: str = "") -> str:
        found = store.service_by_hostname("API.example", client, preferred)
        assert found is not None
        return found.namespace

    assert winner("c") == "c"
    assert winner("x", "c") == "c"
    assert winner("x") == "a"
    store.apply_addresses([replace(hosts[0], canonical=True)], [])
    assert winner("x", "c") == "b"


def test_a_service_of_namespace_visibility_is_hidden_from_others() -> None:
    store = Store()
    store.apply_addresses([service("web", "10.96.0.1", visibility=Visibility.NAMESPACE)], [])
    assert store.service_by_vip(at("10.96.0.1"), "shop") is not None
    assert store.service_by_vip(at("10.96.0.1"), "other") is None
    assert store.service_by_hostname(WEB.hostname, "other") is None


def cidr(name: str, prefix: str, **fields: object) -> Service:
    return service(name, cidr_addresses=(CidrAddress("", prefix),), **fields)


def test_ranges_are_asked_after_exact_addresses() -> None:
    store = Store()
    wide, narrow = cidr("wide", "10.0.0.0/8"), cidr("narrow", "10.1.0.0/16")
    exact = service("exact", "10.1.2.3", visibility=Visibility.NAMESPACE)
    six = cidr("six", "fd00::/64")
    store.apply_addresses([wide, narrow, exact, six], [])

    def owner(ip: str, client: str = "shop") -> str | None:
        found = store.service_by_vip(at(ip), client)
        return found.name if found else None

    assert owner("10.1.2.3") == "exact"
    # Hidden from this client, so the exact entry is no hit.
    assert owner("10.1.2.3", "other") == "narrow"
    assert owner("10.1.9.9") == "narrow"
    assert owner("10.2.0.1") == "wide"
    assert owner("11.0.0.1") is None
    assert owner("fd00::5") == "six"
    assert store.service_by_vip(NetworkAddress("n2", "10.1.9.9"), "shop") is None
    store.apply_addresses([], [str(each.key) for each in (wide, narrow, six)])
    assert owner("10.1.9.9") is None
    assert owner("fd00::5") is None


def test_own_namespace_beats_a_longer_prefix_which_beats_canonical() -> None:
    store = Store()
    store.apply_addresses(
        [
            cidr("mine", "10.0.0.0/8", namespace="mine"),
            cidr("long", "10.1.0.0/16", namespace="a"),
            cidr("canonical", "10.0.0.0/9", namespace="b", canonical=True),
        ],
        [],
    )
    assert store.service_by_vip(at("10.1.0.1"), "mine").name == "mine"  # type: ignore[union-attr]
    assert store.service_by_vip(at("10.1.0.1"), "x").name == "long"  # type: ignore[union-attr]
    assert store.service_by_vip(at("10.2.0.1"), "x").name == "canonical"  # type: ignore[union-attr]


def policy(name: str, namespace: str, scope: PolicyScope) -> Authorization:
    return Authorization(name, namespace, scope, Action.DENY)


def test_policies_that_concern_a_workload() -> None:
    store = Store()
    mesh_wide = policy("all", "istio-system", PolicyScope.GLOBAL)
    own = policy("ns", "shop", PolicyScope.NAMESPACE)
    other = policy("ns", "bank", PolicyScope.NAMESPACE)
    named = policy("sel", "shop", PolicyScope.WORKLOAD_SELECTOR)
    unnamed = policy("sel2", "shop", PolicyScope.WORKLOAD_SELECTOR)
    a = pod("a", authorization_policies=("shop/sel", "shop/ns", "shop/missing"))
    before = store.policies_version
    store.apply_policies([mesh_wide, own, other, named, unnamed], [])
    assert store.policies_version > before
    assert store.policies_for(a) == [mesh_wide, own, named]
    changed = store.apply_policies([], ["shop/sel", "shop/nothing"])
    assert changed == Changed(policies=frozenset({"shop/sel"}))
    assert store.policies_for(a) == [mesh_wide, own]


def test_a_policy_may_change_its_scope() -> None:
    store = Store()
    store.apply_policies([policy("p", "shop", PolicyScope.GLOBAL)], [])
    store.apply_policies([policy("p", "shop", PolicyScope.NAMESPACE)], [])
    assert store.policies_for(pod("a", namespace="bank")) == []
    assert len(store.policies_for(pod("a"))) == 1


def test_services_of_a_workload() -> None:
    store = Store()
    a = pod("a", services={str(WEB): {80: 8080}, "shop/unknown.example": {80: 1}})
    store.apply_addresses([service(), a], [])
    assert [each.name for each in store.services_of(a)] == ["web"]
