"""What is remembered of outbound plans, and when it is forgotten."""

from __future__ import annotations

import random
from dataclasses import replace

from mesh.errors import Refusal
from mesh.model.service import Service, ServicePort
from mesh.model.store import Store
from mesh.model.workload import NamespacedHostname, NetworkAddress, TunnelProtocol, Workload
from mesh.sockets import SocketAddress
from ztunnel.plan import Carrier, plan_outbound
from ztunnel.routes import Route, Routes, TunnelRoute

HOST = "web.shop.svc.cluster.local"
KEY = NamespacedHostname("shop", HOST)
VIP = SocketAddress("10.96.0.1", 80)


def pod(name: str, ip: str, **fields: object) -> Workload:
    defaults: dict[str, object] = {
        "service_account": name,
        "tunnel_protocol": TunnelProtocol.HBONE,
        "services": {str(KEY): {80: 8080}} if name.startswith("web") else {},
    }
    return Workload(f"Kubernetes//Pod/shop/{name}", name, "shop", (ip,), **(defaults | fields))  # type: ignore[arg-type]


CURL, WEB1, WEB2 = pod("curl", "10.0.0.1"), pod("web1", "10.0.0.2"), pod("web2", "10.0.0.3")
WEB = Service(
    "web",
    "shop",
    HOST,
    (NetworkAddress("", VIP.ip),),
    ports={80: ServicePort(80, 8080)},
)


def routes(*known: Workload | Service) -> tuple[Routes, Store]:
    store = Store()
    store.apply_addresses([CURL, *known], [])
    return Routes(store, random.Random(1)), store


def tunnel(found: Route | Refusal) -> TunnelRoute:
    assert isinstance(found, TunnelRoute)
    return found


def test_a_route_says_what_the_plan_does() -> None:
    table, store = routes(WEB1)
    found = tunnel(table.find(CURL, "10.0.0.1", SocketAddress("10.0.0.2", 8080)))
    destination = SocketAddress("10.0.0.2", 8080)
    assert found.plan == plan_outbound(CURL, destination, store, random.Random(1))
    assert (found.next_hop, found.protocol) == ("10.0.0.2:15008", "HBONE")
    assert found.key.source == CURL.identity
    assert found.key.expected == found.plan.expected
    assert found.key.address == ("10.0.0.2", 15008)
    assert found.key.source_ip == "10.0.0.1"


def test_it_is_decided_once_until_the_store_changes() -> None:
    table, store = routes(WEB1, WEB)
    first = table.find(CURL, "10.0.0.1", VIP)
    assert table.find(CURL, "10.0.0.1", VIP) is first
    store.apply_addresses([replace(WEB1, service_account="other")], [])
    second = tunnel(table.find(CURL, "10.0.0.1", VIP))
    assert {each.service_account for each in second.key.expected} == {"other"}
    store.apply_addresses([], [WEB1.uid])
    assert isinstance(table.find(CURL, "10.0.0.1", VIP), Refusal)
    store.apply_addresses([WEB1], [])
    assert tunnel(table.find(CURL, "10.0.0.1", VIP)).plan.workload == WEB1


def test_another_identity_of_the_caller_takes_another_route() -> None:
    table, _ = routes(WEB1)
    destination = SocketAddress("10.0.0.2", 8080)
    table.find(CURL, "10.0.0.1", destination)
    renamed = replace(CURL, service_account="renamed")
    assert tunnel(table.find(renamed, "10.0.0.1", destination)).key.source == renamed.identity


def test_where_there_is_a_choice_it_is_made_each_time() -> None:
    table, _ = routes(WEB1, WEB2, WEB)
    found = [tunnel(table.find(CURL, "10.0.0.1", VIP)) for _ in range(200)]
    assert {each.key.address.ip for each in found} == {"10.0.0.2", "10.0.0.3"}
    # but of each there is one, with its head made ready
    assert len({id(each) for each in found}) == 2


def test_each_address_of_the_caller_has_its_own() -> None:
    table, _ = routes(WEB1)
    destination = SocketAddress("10.0.0.2", 8080)
    sources = {
        tunnel(table.find(CURL, ip, destination)).key.source_ip for ip in ("10.0.0.1", "fd00::1")
    }
    assert sources == {"10.0.0.1", "fd00::1"}


def test_passthrough_is_no_tunnel() -> None:
    table, _ = routes()
    found = table.find(CURL, "10.0.0.1", SocketAddress("1.2.3.4", 443))
    assert isinstance(found, Route)
    assert not isinstance(found, TunnelRoute)
    assert found.plan.carrier is Carrier.TCP
    assert found.next_hop == "1.2.3.4:443"


def test_elsewhere_avoids_who_was_not_reached() -> None:
    table, _ = routes(WEB1, WEB2, WEB)
    other = table.elsewhere(CURL, "10.0.0.1", VIP, {WEB1.uid})
    assert other is not None
    assert other.plan.workload == WEB2
    assert table.elsewhere(CURL, "10.0.0.1", VIP, {WEB1.uid, WEB2.uid}) is None
