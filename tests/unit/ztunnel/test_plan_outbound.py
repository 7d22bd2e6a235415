"""Outbound routing as literals: one mesh, many destinations."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace

import pytest

from mesh.errors import Refusal
from mesh.identity import SpiffeId
from mesh.model.service import (
    HealthPolicy,
    IpFamilies,
    LoadBalancing,
    Mode,
    Scope,
    Service,
    ServicePort,
    WeightedWaypoint,
)
from mesh.model.store import Store
from mesh.model.workload import (
    ApplicationTunnel,
    GatewayAddress,
    Locality,
    NamespacedHostname,
    NetworkAddress,
    NetworkMode,
    TunnelProtocol,
    Workload,
    WorkloadStatus,
)
from mesh.sockets import SocketAddress
from ztunnel.plan import Carrier, NextHop, OutboundPlan, plan_elsewhere, plan_outbound

RNG = random.Random(1)
WEB_HOST = "web.shop.svc.cluster.local"
WEB_KEY = NamespacedHostname("shop", WEB_HOST)
WAYPOINT_KEY = NamespacedHostname("shop", "waypoint.shop.svc.cluster.local")
HBONE = TunnelProtocol.HBONE


def pod(name: str, *ips: str, **fields: object) -> Workload:
    defaults: dict[str, object] = {"service_account": name, "node": "n1", "tunnel_protocol": HBONE}
    return Workload(
        f"Kubernetes//Pod/shop/{name}",
        name,
        "shop",
        ips,
        **(defaults | fields),  # type: ignore[arg-type]
    )


def spiffe(account: str) -> SpiffeId:
    return SpiffeId("cluster.local", "shop", account)


SOURCE = pod("curl", "10.0.0.1", "fd00::1")
WEB1 = pod("web1", "10.0.0.2", services={str(WEB_KEY): {80: 8080}})
WEB = Service(
    "web",
    "shop",
    WEB_HOST,
    (NetworkAddress("", "10.96.0.1"),),
    ports={80: ServicePort(80, 8080)},
)
WAYPOINT_POD = pod("waypoint", "10.0.0.9", services={str(WAYPOINT_KEY): {15008: 15008}})
WAYPOINT = Service(
    "waypoint",
    "shop",
    WAYPOINT_KEY.hostname,
    (NetworkAddress("", "10.96.0.9"),),
    ports={15008: ServicePort(15008, 15008)},
)
BY_HOST = GatewayAddress(WAYPOINT_KEY, 15008)
BY_VIP = GatewayAddress(NetworkAddress("", "10.96.0.9"), 15008)
BY_IP = GatewayAddress(NetworkAddress("", "10.0.0.9"), 15008)


def plan(
    ip: str, port: int, *resources: Workload | Service, source: Workload = SOURCE
) -> OutboundPlan | Refusal:
    store = Store()
    store.apply_addresses([source, *resources], [])
    return plan_outbound(source, SocketAddress(ip, port), store, RNG)


def planned(
    ip: str, port: int, *resources: Workload | Service, source: Workload = SOURCE
) -> OutboundPlan:
    found = plan(ip, port, *resources, source=source)
    assert isinstance(found, OutboundPlan), found
    return found


def refused(
    ip: str, port: int, *resources: Workload | Service, source: Workload = SOURCE
) -> Refusal:
    found = plan(ip, port, *resources, source=source)
    assert isinstance(found, Refusal), found
    assert found.flag == "CONNECT"
    return found


# -- what is not known


def test_unknown_destination_passes_through() -> None:
    assert plan("1.2.3.4", 443) == OutboundPlan(Carrier.TCP, NextHop("1.2.3.4", 443))


def test_a_workload_on_another_network_is_unknown_by_its_address() -> None:
    remote = pod("remote", "10.9.0.1", network="remote")
    assert planned("10.9.0.1", 80, remote).carrier is Carrier.TCP


def test_host_network_workloads_are_not_found_by_address() -> None:
    host = pod("host", "172.18.0.1", network_mode=NetworkMode.HOST_NETWORK)
    assert planned("172.18.0.1", 80, host).workload is None


# -- workloads by address


def test_known_hbone_workload() -> None:
    assert plan("10.0.0.2", 8080, WEB1) == OutboundPlan(
        Carrier.HBONE,
        NextHop("10.0.0.2", 15008),
        authority="10.0.0.2:8080",
        expected=frozenset({spiffe("web1")}),
        workload=WEB1,
    )


def test_a_workload_of_the_same_node_takes_the_same_path() -> None:
    assert planned("10.0.0.1", 8080).next_hop == NextHop("10.0.0.1", 15008)


def test_known_tcp_workload() -> None:
    plain = replace(WEB1, tunnel_protocol=TunnelProtocol.NONE)
    assert plan("10.0.0.2", 8080, plain) == OutboundPlan(
        Carrier.TCP, NextHop("10.0.0.2", 8080), workload=plain
    )


def test_ipv6_authority_is_bracketed() -> None:
    six = pod("six", "fd00::2")
    found = planned("fd00::2", 80, six)
    assert (str(found.next_hop), found.authority) == ("[fd00::2]:15008", "[fd00::2]:80")


# -- services


def test_service_leads_to_the_target_port_of_its_endpoint() -> None:
    assert plan("10.96.0.1", 80, WEB, WEB1) == OutboundPlan(
        Carrier.HBONE,
        NextHop("10.0.0.2", 15008),
        authority="10.0.0.2:8080",
        expected=frozenset({spiffe("web1")}),
        workload=WEB1,
        service=WEB,
    )


def test_subject_alt_names_of_the_service_are_accepted_too() -> None:
    named = replace(WEB, subject_alt_names=("spiffe://cluster.local/ns/shop/sa/x", "web.example"))
    assert planned("10.96.0.1", 80, named, WEB1).expected == {spiffe("web1"), spiffe("x")}


@pytest.mark.parametrize(
    ("endpoint", "described", "tunnel", "expected"),
    [
        ({80: 1111}, 2222, None, 1111),
        ({}, 2222, None, 2222),
        ({80: 0}, 2222, None, 2222),
        ({}, 0, ApplicationTunnel("PROXY", 15088), 80),
    ],
)
def test_target_port(
    endpoint: dict[int, int], described: int, tunnel: ApplicationTunnel | None, expected: int
) -> None:
    service = replace(WEB, ports={80: ServicePort(80, described)})
    web = replace(WEB1, services={str(WEB_KEY): endpoint}, application_tunnel=tunnel)
    assert planned("10.96.0.1", 80, service, web).authority == f"10.0.0.2:{expected}"


def test_service_without_that_port() -> None:
    refusal = refused("10.96.0.1", 81, WEB, WEB1)
    assert refusal.reason == f"service shop/{WEB_HOST} has no port 81"


def test_endpoint_without_the_port() -> None:
    web = replace(WEB1, services={str(WEB_KEY): {}})
    refused("10.96.0.1", 80, replace(WEB, ports={80: ServicePort(80, 0)}), web)


def test_empty_service_is_refused_not_passed_through() -> None:
    refusal = refused("10.96.0.1", 80, WEB)
    assert refusal.reason == f"no healthy endpoint for {WEB_HOST}:80 (0 endpoints, 0 unready)"
    assert "services -n shop" in refusal.hint


def test_unhealthy_endpoints_are_left_out() -> None:
    ill = replace(WEB1, status=WorkloadStatus.UNHEALTHY)
    assert "1 endpoints, 1 unready" in refused("10.96.0.1", 80, WEB, ill).reason
    lax = replace(WEB, load_balancing=LoadBalancing(health_policy=HealthPolicy.ALLOW_ALL))
    assert planned("10.96.0.1", 80, lax, ill).workload == ill


def test_a_service_of_another_namespace_is_seen() -> None:
    other = replace(SOURCE, namespace="bank", uid="Kubernetes//Pod/bank/curl")
    assert planned("10.96.0.1", 80, WEB, WEB1, source=other).workload == WEB1


def test_an_address_that_is_workload_and_vip_is_resolved_as_service() -> None:
    both = replace(WEB, addresses=(NetworkAddress("", "10.0.0.7"),), waypoint=BY_HOST)
    seven = pod("seven", "10.0.0.7")
    # The workload was found first, so the service's waypoint is not asked.
    found = planned("10.0.0.7", 80, both, seven, WEB1, WAYPOINT, WAYPOINT_POD)
    assert (found.workload, found.is_via_waypoint) == (WEB1, False)


def test_endpoints_on_other_networks_are_not_candidates() -> None:
    remote = replace(WEB1, uid="r", network="remote", addresses=())
    assert planned("10.96.0.1", 80, WEB, WEB1, remote).workload == WEB1
    assert "other networks" in refused("10.96.0.1", 80, WEB, remote).reason


def test_passthrough_service_keeps_the_destination() -> None:
    through = replace(WEB, load_balancing=LoadBalancing(mode=Mode.PASSTHROUGH))
    assert plan("10.96.0.1", 80, through, WEB1) == OutboundPlan(
        Carrier.TCP, NextHop("10.96.0.1", 80), service=through
    )
    assert planned("10.96.0.1", 9999, through).next_hop.port == 9999


def test_passthrough_service_with_a_waypoint_goes_to_it() -> None:
    through = replace(WEB, load_balancing=LoadBalancing(mode=Mode.PASSTHROUGH), waypoint=BY_HOST)
    assert planned("10.96.0.1", 80, through, WAYPOINT, WAYPOINT_POD).is_via_waypoint


def test_an_endpoint_known_by_name_only() -> None:
    external = replace(
        WEB1, addresses=(), hostname="api.example", tunnel_protocol=TunnelProtocol.NONE
    )
    found = planned("10.96.0.1", 80, WEB, external)
    assert found.next_hop == NextHop("api.example", 8080, is_hostname=True)


def test_an_endpoint_without_any_address_is_no_candidate() -> None:
    refused("10.96.0.1", 80, WEB, replace(WEB1, addresses=()))


def test_host_network_endpoints_of_a_service_are_reached() -> None:
    host = replace(WEB1, network_mode=NetworkMode.HOST_NETWORK, tunnel_protocol=TunnelProtocol.NONE)
    assert planned("10.96.0.1", 80, WEB, host).next_hop == NextHop("10.0.0.2", 8080)


# -- choice of address


@pytest.mark.parametrize(
    ("vip", "families", "expected"),
    [
        ("10.96.0.1", IpFamilies.AUTOMATIC, "10.0.0.2"),
        ("fd00:10:96::1", IpFamilies.AUTOMATIC, "fd00::2"),
        ("10.96.0.1", IpFamilies.IPV6_ONLY, "fd00::2"),
        ("fd00:10:96::1", IpFamilies.IPV4_ONLY, "10.0.0.2"),
        ("fd00:10:96::1", IpFamilies.DUAL, "fd00::2"),
    ],
)
def test_address_families(vip: str, families: IpFamilies, expected: str) -> None:
    web = replace(WEB1, addresses=("10.0.0.2", "fd00::2"))
    vips = (NetworkAddress("", "10.96.0.1"), NetworkAddress("", "fd00:10:96::1"))
    service = replace(WEB, addresses=vips, ip_families=families)
    assert planned(vip, 80, service, web).next_hop.host == expected


def test_the_address_that_was_asked_for_is_used() -> None:
    many = pod("many", "10.0.0.5", "10.0.0.6")
    assert planned("10.0.0.6", 80, many).next_hop.host == "10.0.0.6"


def test_the_other_family_is_better_than_none() -> None:
    vips = (NetworkAddress("", "fd00:10:96::1"),)
    assert planned("fd00:10:96::1", 80, replace(WEB, addresses=vips), WEB1).next_hop.host == (
        "10.0.0.2"
    )


# -- waypoints


@pytest.mark.parametrize("gateway", [BY_HOST, BY_VIP, BY_IP])
def test_service_waypoint_gets_the_original_target(gateway: GatewayAddress) -> None:
    service = replace(WEB, waypoint=gateway)
    assert plan("10.96.0.1", 80, service, WEB1, WAYPOINT, WAYPOINT_POD) == OutboundPlan(
        Carrier.HBONE,
        NextHop("10.0.0.9", 15008),
        authority="10.96.0.1:80",
        expected=frozenset({spiffe("waypoint")}),
        workload=WAYPOINT_POD,
        service=service,
        is_via_waypoint=True,
    )


def test_a_waypoint_known_as_workload_hostname() -> None:
    named = replace(WAYPOINT_POD, services={}, hostname=WAYPOINT_KEY.hostname)
    found = planned("10.96.0.1", 80, replace(WEB, waypoint=BY_HOST), named)
    assert found.next_hop == NextHop("10.0.0.9", 15008)


def test_the_waypoints_service_may_map_its_port() -> None:
    mapped = replace(WAYPOINT_POD, services={str(WAYPOINT_KEY): {15008: 16008}})
    found = planned("10.96.0.1", 80, replace(WEB, waypoint=BY_HOST), WAYPOINT, mapped)
    assert found.next_hop == NextHop("10.0.0.9", 16008)


def test_subject_alt_names_of_the_waypoints_service_are_accepted() -> None:
    sans = replace(WAYPOINT, subject_alt_names=("spiffe://cluster.local/ns/shop/sa/wp2",))
    found = planned("10.96.0.1", 80, replace(WEB, waypoint=BY_HOST), sans, WAYPOINT_POD)
    assert found.expected == {spiffe("waypoint"), spiffe("wp2")}


@pytest.mark.parametrize("gateway", [BY_HOST, BY_VIP, BY_IP])
def test_an_unknown_waypoint_fails_closed(gateway: GatewayAddress) -> None:
    refusal = refused("10.96.0.1", 80, replace(WEB, waypoint=gateway), WEB1)
    assert "waypoint" in refusal.reason
    refused("10.0.0.2", 80, replace(WEB1, waypoint=gateway))


def test_a_waypoint_on_another_network_is_refused_by_name() -> None:
    away = GatewayAddress(NetworkAddress("remote", "10.0.0.9"), 15008)
    assert "network 'remote'" in refused("10.96.0.1", 80, replace(WEB, waypoint=away)).reason
    named = replace(WAYPOINT_POD, services={}, hostname=WAYPOINT_KEY.hostname, network="remote")
    assert "network 'remote'" in (
        refused("10.96.0.1", 80, replace(WEB, waypoint=BY_HOST), named).reason
    )


def test_weighted_waypoints() -> None:
    second_key = NamespacedHostname("shop", "canary.shop.svc.cluster.local")
    second = replace(WAYPOINT, hostname=second_key.hostname, addresses=())
    second_pod = pod("canary", "10.0.0.8", services={str(second_key): {15008: 15008}})
    service = replace(
        WEB,
        waypoint=BY_IP,
        weighted_waypoints=(
            WeightedWaypoint(BY_HOST, 0),
            WeightedWaypoint(GatewayAddress(second_key, 15008), 5),
        ),
    )
    mesh = (service, WAYPOINT, WAYPOINT_POD, second, second_pod)
    hops = {planned("10.96.0.1", 80, *mesh).next_hop.host for _ in range(20)}
    assert hops == {"10.0.0.8"}
    # All weights zero: the plain reference.
    zero = replace(service, weighted_waypoints=(WeightedWaypoint(BY_HOST, 0),))
    assert planned("10.96.0.1", 80, zero, WAYPOINT_POD).workload == WAYPOINT_POD


def test_workload_waypoint_for_workload_addressed_traffic() -> None:
    web = replace(WEB1, waypoint=BY_HOST)
    found = planned("10.0.0.2", 8080, web, WAYPOINT, WAYPOINT_POD)
    assert (found.workload, found.authority) == (WAYPOINT_POD, "10.0.0.2:8080")


def test_workload_waypoint_is_not_used_for_service_addressed_traffic() -> None:
    web = replace(WEB1, waypoint=BY_HOST)
    assert planned("10.96.0.1", 80, WEB, web, WAYPOINT, WAYPOINT_POD).workload == web


def test_the_sources_own_waypoint_is_not_used() -> None:
    source = replace(SOURCE, waypoint=BY_HOST)
    found = planned("10.0.0.2", 80, WEB1, WAYPOINT, WAYPOINT_POD, source=source)
    assert found.workload == WEB1


@pytest.mark.parametrize("gateway", [BY_HOST, BY_VIP, BY_IP])
def test_the_waypoint_itself_goes_straight_to_the_workload(gateway: GatewayAddress) -> None:
    web = replace(WEB1, waypoint=gateway)
    found = planned("10.0.0.2", 8080, web, WAYPOINT, source=WAYPOINT_POD)
    assert (found.workload, found.is_via_waypoint) == (web, False)


# -- load balancing


def endpoints(*localities: tuple[str, str, str]) -> list[Workload]:
    """Endpoints at (network, region, zone), named e0, e1, ..."""
    return [
        pod(
            f"e{index}",
            f"10.0.1.{index}",
            network=network,
            locality=Locality(region, zone),
            services={str(WEB_KEY): {80: 8080}},
        )
        for index, (network, region, zone) in enumerate(localities)
    ]


LOCAL = replace(SOURCE, locality=Locality("r1", "z1"))
NETWORK_REGION_ZONE = (Scope.NETWORK, Scope.REGION, Scope.ZONE)


def spread(policy: LoadBalancing, *resources: Workload, count: int = 60) -> Counter[str]:
    service = replace(WEB, load_balancing=policy)
    store = Store()
    store.apply_addresses([LOCAL, service, *resources], [])
    names: Counter[str] = Counter()
    for _ in range(count):
        found = plan_outbound(LOCAL, SocketAddress("10.96.0.1", 80), store, RNG)
        names[
            found.workload.name if isinstance(found, OutboundPlan) and found.workload else ""
        ] += 1
    return names


def test_without_a_preference_all_endpoints_share() -> None:
    assert set(spread(LoadBalancing(), *endpoints(("", "r1", "z1"), ("", "r2", "z9")))) == {
        "e0",
        "e1",
    }


def test_failover_takes_the_closest_group() -> None:
    policy = LoadBalancing(NETWORK_REGION_ZONE, Mode.FAILOVER)
    far, same_region, here, here2 = endpoints(
        ("", "r2", "z1"), ("", "r1", "z2"), ("", "r1", "z1"), ("", "r1", "z1")
    )
    assert set(spread(policy, far, same_region, here, here2)) == {"e2", "e3"}
    assert set(spread(policy, far, same_region)) == {"e1"}
    assert set(spread(policy, far)) == {"e0"}
    ill = replace(here, status=WorkloadStatus.UNHEALTHY)
    assert set(spread(policy, ill, same_region, far)) == {"e1"}


def test_strict_takes_nothing_else() -> None:
    policy = LoadBalancing((Scope.NODE,), Mode.STRICT)
    here, there = endpoints(("", "", ""), ("", "", ""))
    there = replace(there, node="n2")
    assert set(spread(policy, here, there)) == {"e0"}
    assert set(spread(policy, there)) == {""}


def test_capacity_weighs() -> None:
    heavy, light, never = endpoints(*[("", "", "")] * 3)
    heavy, never = replace(heavy, capacity=9), replace(never, capacity=0)
    counts = spread(LoadBalancing(), heavy, light, never, count=400)
    assert counts["e0"] > 5 * counts["e1"] > 0
    assert counts["e2"] == 0
    assert set(spread(LoadBalancing(), never)) == {""}


# -- loops


@pytest.mark.parametrize("port", [15001, 15006, 15008])
@pytest.mark.parametrize("ip", ["127.0.0.1", "::1", "127.9.9.9", "10.0.0.1", "fd00::1"])
def test_the_proxys_own_ports_are_refused(ip: str, port: int) -> None:
    assert "port of this proxy" in refused(ip, port).reason


def test_those_ports_elsewhere_are_none_of_our_business() -> None:
    assert planned("10.0.0.2", 15008, WEB1).authority == "10.0.0.2:15008"
    assert planned("1.2.3.4", 15001).carrier is Carrier.TCP


# -- a next hop that could not be reached


def elsewhere(*resources: Workload | Service, to: str, unreached: set[str]) -> OutboundPlan | None:
    store = Store()
    store.apply_addresses([SOURCE, *resources], [])
    return plan_elsewhere(SOURCE, SocketAddress(to, 80), store, RNG, unreached)


@pytest.mark.parametrize("gateway", [BY_HOST, BY_VIP])
def test_another_replica_of_the_waypoint_is_found(gateway: GatewayAddress) -> None:
    second = replace(WAYPOINT_POD, uid="second", name="waypoint-2", addresses=("10.0.0.10",))
    service = replace(WEB, waypoint=gateway)
    known = (service, WAYPOINT, WAYPOINT_POD, second)
    for _ in range(20):
        found = elsewhere(*known, to="10.96.0.1", unreached={WAYPOINT_POD.uid})
        assert found is not None
        assert found.next_hop == NextHop("10.0.0.10", 15008)
        assert found.authority == "10.96.0.1:80"
    assert elsewhere(*known, to="10.96.0.1", unreached={WAYPOINT_POD.uid, "second"}) is None


def test_another_endpoint_is_found_but_only_through_a_tunnel() -> None:
    web2 = replace(WEB1, uid="web2", name="web2", addresses=("10.0.0.3",))
    found = elsewhere(WEB, WEB1, web2, to="10.96.0.1", unreached={WEB1.uid})
    assert found is not None
    assert found.workload == web2
    plain = replace(web2, tunnel_protocol=TunnelProtocol.NONE)
    assert elsewhere(WEB, WEB1, plain, to="10.96.0.1", unreached={WEB1.uid}) is None
    assert elsewhere(WEB, WEB1, to="10.96.0.1", unreached={WEB1.uid}) is None
    assert elsewhere(WEB1, to="10.0.0.2", unreached={WEB1.uid}) is None


@pytest.mark.parametrize("mode", [Mode.FAILOVER, Mode.STRICT])
def test_who_is_farther_away_stands_in_unless_that_is_forbidden(mode: Mode) -> None:
    near = LoadBalancing((Scope.NODE,), mode)
    service = replace(WEB, load_balancing=near)
    web1 = replace(WEB1, node=SOURCE.node)
    web2 = replace(WEB1, uid="web2", addresses=("10.0.0.3",), node="far")
    found = elsewhere(service, web1, web2, to="10.96.0.1", unreached={WEB1.uid})
    assert (None if found is None else found.workload) == (web2 if mode is Mode.FAILOVER else None)


def test_who_has_no_capacity_does_not_stand_in() -> None:
    idle = replace(WEB1, uid="web2", addresses=("10.0.0.3",), capacity=0)
    assert elsewhere(WEB, WEB1, idle, to="10.96.0.1", unreached={WEB1.uid}) is None
