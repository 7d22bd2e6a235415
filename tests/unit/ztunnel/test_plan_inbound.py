"""Inbound: what a tunnel may ask of this pod, and which port and source that means."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mesh.authz import ConnectionContext
from mesh.errors import Refusal
from mesh.hbone.head import Authority
from mesh.identity import SpiffeId
from mesh.model.service import Service, ServicePort, WeightedWaypoint
from mesh.model.store import Store
from mesh.model.workload import (
    ApplicationTunnel,
    GatewayAddress,
    NamespacedHostname,
    NetworkAddress,
    Workload,
)
from mesh.sockets import SocketAddress
from ztunnel.plan import InboundConnection, InboundPlan, plan_inbound, plan_plaintext

PEER = SpiffeId("cluster.local", "shop", "curl")
CONNECTION = InboundConnection(
    PEER, SocketAddress("10.0.0.1", 40001), SocketAddress("10.0.0.2", 15008)
)
WEB_KEY = NamespacedHostname("shop", "web.shop.svc.cluster.local")
LOCAL = Workload(
    "Kubernetes//Pod/shop/web",
    "web",
    "shop",
    ("10.0.0.2", "fd00::2"),
    services={str(WEB_KEY): {80: 8080}},
)
CURL = Workload("Kubernetes//Pod/shop/curl", "curl", "shop", ("10.0.0.1",), service_account="curl")
WEB = Service(
    "web",
    "shop",
    WEB_KEY.hostname,
    (NetworkAddress("", "10.96.0.1"),),
    ports={80: ServicePort(80, 0), 81: ServicePort(81, 8181), 82: ServicePort(82, 0)},
)


def store(*resources: Workload | Service) -> Store:
    filled = Store()
    filled.apply_addresses([LOCAL, CURL, WEB, *resources], [])
    return filled


def ip(host: str, port: int = 8080) -> Authority:
    return Authority(host, port, is_ip=True)


def hostname(port: int, host: str = WEB_KEY.hostname) -> Authority:
    return Authority(host, port, is_ip=False)


def planned(
    authority: Authority, local: Workload = LOCAL, filled: Store | None = None
) -> InboundPlan:
    plan = plan_inbound(CONNECTION, authority, local, filled or store())
    assert isinstance(plan, InboundPlan), plan
    return plan


def status(authority: Authority, local: Workload = LOCAL, filled: Store | None = None) -> int:
    plan = plan_inbound(CONNECTION, authority, local, filled or store())
    assert isinstance(plan, Refusal), plan
    return plan.http_status


def test_own_address() -> None:
    assert planned(ip("10.0.0.2")) == InboundPlan(
        upstream=SocketAddress("10.0.0.2", 8080),
        context=ConnectionContext(PEER, "10.0.0.1", "10.0.0.2", 8080),
        spoofed_source="10.0.0.1",
        source_workload=CURL,
        service=WEB,
    )


def test_another_address_is_a_bad_request() -> None:
    assert status(ip("10.0.0.3")) == 400
    # Even our own other address: the tunnel did not arrive there.
    assert status(ip("fd00::2")) == 400
    # And a service of ours that is not reached through us as a waypoint.
    assert status(ip("10.96.0.1", 80)) == 400


@pytest.mark.parametrize(("asked", "expected"), [(80, 8080), (81, 8181)])
def test_hostname_is_mapped_to_the_target_port(asked: int, expected: int) -> None:
    assert planned(hostname(asked)).upstream == SocketAddress("10.0.0.2", expected)


def test_hostname_that_leads_nowhere() -> None:
    assert status(hostname(82)) == 503
    assert status(hostname(9999)) == 503
    assert status(hostname(80, "unknown.example")) == 503


@pytest.mark.parametrize("port", [15001, 15006, 15008])
def test_the_proxys_own_ports_are_refused(port: int) -> None:
    assert status(ip("10.0.0.2", port)) == 503
    tunnelled = replace(LOCAL, application_tunnel=ApplicationTunnel("NONE", port))
    assert status(ip("10.0.0.2", 80), tunnelled) == 503
    mapped = replace(LOCAL, services={str(WEB_KEY): {80: port}})
    assert status(hostname(80), mapped) == 503


def test_plain_application_tunnel_overrides_the_port_and_takes_any_address() -> None:
    local = replace(LOCAL, application_tunnel=ApplicationTunnel("NONE", 16000))
    plan = planned(ip("10.96.0.77", 80), local)
    assert plan.upstream == SocketAddress("10.0.0.2", 16000)
    assert plan.context.destination_port == 16000
    assert (plan.sends_proxy_header, plan.spoofed_source) == (False, "10.0.0.1")


def test_proxy_application_tunnel_dials_localhost_from_localhost() -> None:
    local = replace(LOCAL, application_tunnel=ApplicationTunnel("PROXY", 15088))
    plan = planned(ip("10.96.0.77", 80), local)
    assert plan.upstream == SocketAddress("127.0.0.1", 15088)
    # Policy still judges the pod's address and the real port.
    assert plan.context == ConnectionContext(PEER, "10.0.0.1", "10.0.0.2", 15088)
    assert (plan.sends_proxy_header, plan.spoofed_source) == (True, None)


GATEWAY_KEY = NamespacedHostname("shop", "waypoint.shop.svc.cluster.local")
GATEWAY_SERVICE = Service(
    "waypoint", "shop", GATEWAY_KEY.hostname, ports={15008: ServicePort(15008, 15008)}
)
AS_WAYPOINT = replace(LOCAL, services={str(GATEWAY_KEY): {15008: 15008}})


@pytest.mark.parametrize(
    "gateway",
    [
        GatewayAddress(GATEWAY_KEY, 15008),
        GatewayAddress(NetworkAddress("", "10.0.0.2"), 15008),
    ],
)
def test_a_waypoint_may_be_asked_for_what_it_serves(gateway: GatewayAddress) -> None:
    bound = replace(WEB, addresses=(NetworkAddress("", "10.96.0.5"),), waypoint=gateway)
    other = replace(CURL, uid="x", addresses=("10.0.0.5",), waypoint=gateway)
    filled = store(AS_WAYPOINT, GATEWAY_SERVICE, bound, other)
    assert planned(ip("10.96.0.5", 80), AS_WAYPOINT, filled).upstream.ip == "10.0.0.2"
    assert planned(ip("10.0.0.5", 80), AS_WAYPOINT, filled).upstream.ip == "10.0.0.2"
    assert status(ip("10.0.0.6", 80), AS_WAYPOINT, filled) == 400


def test_a_weighted_waypoint_counts() -> None:
    weighted = (WeightedWaypoint(GatewayAddress(GATEWAY_KEY, 15008), 1),)
    bound = replace(WEB, addresses=(NetworkAddress("", "10.96.0.5"),), weighted_waypoints=weighted)
    filled = store(AS_WAYPOINT, GATEWAY_SERVICE, bound)
    assert planned(ip("10.96.0.5", 80), AS_WAYPOINT, filled).upstream.port == 80


def test_another_workloads_waypoint_is_not_this_one() -> None:
    other = GatewayAddress(NamespacedHostname("shop", "other.shop.svc.cluster.local"), 15008)
    bound = replace(WEB, addresses=(NetworkAddress("", "10.96.0.5"),), waypoint=other)
    assert status(ip("10.96.0.5", 80), LOCAL, store(bound)) == 400


def test_source_workload_must_agree_with_the_proven_identity() -> None:
    impostor = replace(CONNECTION, peer=SpiffeId("cluster.local", "shop", "mallory"))
    plan = plan_inbound(impostor, ip("10.0.0.2"), LOCAL, store())
    assert isinstance(plan, InboundPlan)
    assert plan.source_workload is None
    assert plan.context.source_identity == impostor.peer


def test_self_calls_are_not_spoofed() -> None:
    own = replace(CONNECTION, source=SocketAddress("10.0.0.2", 40001))
    plan = plan_inbound(own, ip("10.0.0.2"), LOCAL, store())
    assert isinstance(plan, InboundPlan)
    assert plan.spoofed_source is None


def test_forwarded_host_picks_the_service_for_labels() -> None:
    second_key = NamespacedHostname("shop", "second.example")
    second = Service("second", "shop", "second.example", ports={80: ServicePort(80, 8080)})
    local = replace(LOCAL, services={str(WEB_KEY): {80: 8080}, str(second_key): {80: 8080}})
    filled = store(second, local)
    plan = plan_inbound(CONNECTION, ip("10.0.0.2"), local, filled, "Second.example")
    assert isinstance(plan, InboundPlan)
    assert plan.service == second
    assert planned(ip("10.0.0.2"), local, filled).service == WEB
    assert planned(ip("10.0.0.2", 9), local, filled).service is None


PLAIN = InboundConnection(None, SocketAddress("10.0.0.1", 40001), SocketAddress("10.0.0.2", 8080))


def test_plaintext_goes_to_its_original_destination() -> None:
    plan = plan_plaintext(PLAIN, LOCAL, store())
    assert plan == InboundPlan(
        upstream=SocketAddress("10.0.0.2", 8080),
        context=ConnectionContext(None, "10.0.0.1", "10.0.0.2", 8080),
        spoofed_source="10.0.0.1",
        source_workload=CURL,
        service=WEB,
    )


@pytest.mark.parametrize(
    "destination",
    [("10.0.0.2", 15001), ("10.0.0.2", 15006), ("10.0.0.2", 15008), ("127.0.0.1", 80)],
)
def test_plaintext_to_our_own_ports_is_refused(destination: tuple[str, int]) -> None:
    aimed = replace(PLAIN, destination=SocketAddress(*destination))
    assert isinstance(plan_plaintext(aimed, LOCAL, store()), Refusal)
