"""Upstreams: the workload, port and identities behind a service or a waypoint reference.

The half of routing that both directions share; `ztunnel.plan` decides with it. Pure.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection
from dataclasses import dataclass

from mesh.errors import ConfigError, Refusal
from mesh.identity import SpiffeId
from mesh.model.balancing import Random, choose_endpoint
from mesh.model.service import Service
from mesh.model.store import Store
from mesh.model.workload import GatewayAddress, NamespacedHostname, NetworkAddress, Workload


@dataclass(frozen=True, slots=True)
class Upstream:
    """A workload that was decided on, before we know how to carry to it."""

    workload: Workload
    port: int
    service: Service | None


def is_waypoint(workload: Workload, gateway: GatewayAddress, store: Store) -> bool:
    """Whether `workload` is (an endpoint of) the waypoint that `gateway` names."""
    match gateway.destination:
        case NamespacedHostname() as key:
            if store.service_by_key(key) is not None:
                return store.is_endpoint(key, workload.uid)
            return bool(workload.hostname) and workload.hostname == key.hostname
        case NetworkAddress() as address:
            if workload.network == address.network and address.address in workload.addresses:
                return True
            service = store.service_by_vip(address, workload.namespace)
            return service is not None and store.is_endpoint(service.key, workload.uid)


def service_waypoint(service: Service, rng: Random) -> GatewayAddress | None:
    """The waypoint to use for a service this time; None when it has none."""
    weighted = [each for each in service.weighted_waypoints if each.weight]
    if weighted:
        cumulated = list(itertools.accumulate(each.weight for each in weighted))
        (index,) = rng.choices(range(len(weighted)), cum_weights=cumulated)
        return weighted[index].destination
    return service.waypoint


def resolve_endpoint(
    service: Service,
    port: int,
    source: Workload,
    store: Store,
    rng: Random,
    avoid: Collection[str] = (),
) -> Upstream | Refusal:
    """An endpoint of `service` for this connection, or why there is none. Workloads (uids) in
    `avoid` only if there is no other.
    """
    choice = choose_endpoint(service, store.endpoints(service.key), port, source, rng, avoid)
    if choice.candidate is None:
        return Refusal(
            "CONNECT",
            choice.reason,
            hint=f"ambit services -n {service.namespace} -o wide: has it the port, and endpoints?",
        )
    return Upstream(choice.candidate.workload, choice.candidate.port, service)


def resolve_gateway(
    gateway: GatewayAddress,
    source: Workload,
    store: Store,
    rng: Random,
    avoid: Collection[str] = (),
) -> Upstream | Refusal:
    """The waypoint workload to use, and its port. A waypoint that is named but cannot be found
    refuses: going round it would go round its policy. `avoid` as in `resolve_endpoint`.
    """
    where = gateway.destination
    port = gateway.hbone_mtls_port
    service: Service | None
    workload: Workload | None
    match where:
        case NamespacedHostname():
            service = store.service_by_key(where)
            workload = store.workload_by_hostname(where.hostname) if service is None else None
        case NetworkAddress():
            if where.network != source.network:
                return _unreachable_network(f"waypoint {where}", where.network)
            service = store.service_by_vip(where, source.namespace)
            workload = store.workload_by_address(where) if service is None else None
    if service is not None:
        return resolve_endpoint(service, port, source, store, rng, avoid)
    if workload is not None:
        return Upstream(workload, port, None)
    return Refusal(
        "CONNECT",
        f"waypoint {where} is unknown",
        hint="ambit waypoint status: does the Gateway exist, and is it programmed?",
    )


def expected_identities(upstream: Upstream) -> frozenset[SpiffeId] | Refusal:
    """The identities the next hop may present: its own, or what its service's SANs say."""
    try:
        expected = {upstream.workload.identity}
    except ConfigError as exc:
        return Refusal("IDENTITY_ERROR", f"workload {upstream.workload.uid}: {exc}")
    for name in upstream.service.subject_alt_names if upstream.service else ():
        try:
            expected.add(SpiffeId.parse(name))
        except ConfigError:
            continue  # a DNS name or foreign scheme: not an identity, so it widens nothing
    return frozenset(expected)


def refuse_other_network(source: Workload, workload: Workload) -> Refusal | None:
    """A refusal when the workload is on another network than the source."""
    if workload.network == source.network:
        return None
    return _unreachable_network(f"workload {workload.uid}", workload.network)


def _unreachable_network(what: str, network: str) -> Refusal:
    return Refusal(
        "CONNECT",
        f"{what} is on network {network!r}: other networks are not supported",
        hint="only destinations on this node's own network can be reached",
    )


def refuse_without_address(workload: Workload) -> Refusal:
    """The refusal for a workload that cannot be dialled at all."""
    return Refusal("CONNECT", f"workload {workload.uid} has no usable address")
