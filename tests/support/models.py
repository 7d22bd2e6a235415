"""Hypothesis strategies for the model: workloads, services and policies, all fields."""

from __future__ import annotations

import ipaddress
import string
from typing import TypeVar

from hypothesis import strategies as st

from mesh.model.authorization import (
    Action,
    Authorization,
    Clause,
    Match,
    PolicyScope,
    Rule,
    ServiceAccountMatch,
    StringKind,
    StringMatch,
)
from mesh.model.service import (
    AppProtocol,
    HealthPolicy,
    IpFamilies,
    LoadBalancing,
    Mode,
    Scope,
    Service,
    ServicePort,
    Visibility,
    WeightedWaypoint,
)
from mesh.model.workload import (
    ApplicationTunnel,
    CidrAddress,
    GatewayAddress,
    Locality,
    NamespacedHostname,
    NetworkAddress,
    NetworkMode,
    TunnelProtocol,
    Workload,
    WorkloadStatus,
    WorkloadType,
)

_T = TypeVar("_T")

names = st.text(string.ascii_lowercase + string.digits + "-", min_size=1, max_size=12)
texts = st.text(st.characters(exclude_categories=("Cs",)), max_size=12)
ports = st.integers(0, 65535)
numbers = st.integers(0, 2**32 - 1)
addresses = st.one_of(
    st.integers(0, 2**32 - 1).map(lambda value: str(ipaddress.IPv4Address(value))),
    st.integers(2**120, 2**128 - 1).map(lambda value: str(ipaddress.IPv6Address(value))),
)


def _prefix(address: str, length: int) -> str:
    ip = ipaddress.ip_address(address)
    return str(ipaddress.ip_network(f"{ip}/{length % (ip.max_prefixlen + 1)}", strict=False))


prefixes = st.builds(_prefix, addresses, st.integers(0, 128))
network_addresses = st.builds(NetworkAddress, texts, addresses)
hostnames = st.builds(NamespacedHostname, names, names)
gateways = st.builds(GatewayAddress, st.one_of(hostnames, network_addresses), ports)
service_keys = hostnames.map(str)
localities = st.builds(Locality, texts, texts, texts)


def _tuples(values: st.SearchStrategy[_T]) -> st.SearchStrategy[tuple[_T, ...]]:
    return st.lists(values, max_size=3).map(tuple)


workloads = st.builds(
    Workload,
    uid=names.map(lambda name: f"Kubernetes//Pod/demo/{name}"),
    name=texts,
    namespace=texts,
    addresses=_tuples(addresses),
    network=texts,
    tunnel_protocol=st.sampled_from(TunnelProtocol),
    trust_domain=names,
    service_account=names,
    waypoint=st.none() | gateways,
    network_gateway=st.none() | gateways,
    node=texts,
    canonical_name=texts,
    canonical_revision=texts,
    workload_type=st.sampled_from(WorkloadType),
    workload_name=texts,
    native_tunnel=st.booleans(),
    authorization_policies=_tuples(texts),
    status=st.sampled_from(WorkloadStatus),
    cluster_id=names,
    hostname=texts,
    services=st.dictionaries(service_keys, st.dictionaries(ports, ports, max_size=3), max_size=3),
    application_tunnel=st.none()
    | st.builds(ApplicationTunnel, st.sampled_from(["NONE", "PROXY"]), ports),
    locality=localities,
    network_mode=st.sampled_from(NetworkMode),
    capacity=numbers,
)
services = st.builds(
    Service,
    name=texts,
    namespace=names,
    hostname=names,
    addresses=_tuples(network_addresses),
    cidr_addresses=_tuples(st.builds(CidrAddress, texts, prefixes)),
    ports=st.lists(
        st.builds(ServicePort, ports, ports, st.sampled_from(AppProtocol)), max_size=3
    ).map(lambda found: {port.service_port: port for port in found}),
    subject_alt_names=_tuples(texts),
    waypoint=st.none() | gateways,
    weighted_waypoints=_tuples(st.builds(WeightedWaypoint, gateways, numbers)),
    load_balancing=st.builds(
        LoadBalancing,
        _tuples(st.sampled_from(Scope)),
        st.sampled_from(Mode),
        st.sampled_from(HealthPolicy),
    ),
    ip_families=st.sampled_from(IpFamilies),
    canonical=st.booleans(),
    ingress_use_waypoint=st.booleans(),
    visibility=st.sampled_from(Visibility),
)
string_matches = st.one_of(
    st.builds(
        StringMatch,
        st.sampled_from([StringKind.EXACT, StringKind.PREFIX, StringKind.SUFFIX]),
        texts,
    ),
    st.just(StringMatch(StringKind.PRESENCE)),
)
accounts = _tuples(st.builds(ServiceAccountMatch, texts, texts))
matches = st.builds(
    Match,
    namespaces=_tuples(string_matches),
    not_namespaces=_tuples(string_matches),
    principals=_tuples(string_matches),
    not_principals=_tuples(string_matches),
    source_ips=_tuples(prefixes),
    not_source_ips=_tuples(prefixes),
    destination_ips=_tuples(prefixes),
    not_destination_ips=_tuples(prefixes),
    destination_ports=_tuples(ports),
    not_destination_ports=_tuples(ports),
    service_accounts=accounts,
    not_service_accounts=accounts,
)
authorizations = st.builds(
    Authorization,
    name=names,
    namespace=names,
    scope=st.sampled_from(PolicyScope),
    action=st.sampled_from(Action),
    rules=_tuples(st.builds(Rule, _tuples(st.builds(Clause, _tuples(matches))))),
    dry_run=st.booleans(),
)
