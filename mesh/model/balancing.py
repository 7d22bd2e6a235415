"""Endpoint choice: which workload behind a service, which of its addresses, which port.

Health first, then locality (STRICT: every preferred scope agrees; FAILOVER: the closest
group that is not empty), then chance weighted by capacity. No outlier detection: this is the
tunnel's layer. Pure; the random numbers come in.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Protocol

from mesh.model.service import HealthPolicy, IpFamilies, LoadBalancing, Mode, Scope, Service
from mesh.model.store import Endpoint
from mesh.model.workload import Workload, WorkloadStatus


class Random(Protocol):
    """The part of `random.Random` that a choice needs."""

    def choices(self, population: Sequence[int], *, cum_weights: Sequence[int]) -> list[int]:
        """One choice by cumulated weights, as a list of one."""
        ...


@dataclass(frozen=True, slots=True)
class Candidate:
    """An endpoint that could serve, and the port it would be asked on."""

    workload: Workload
    port: int


@dataclass(frozen=True, slots=True)
class Choice:
    """What came of choosing: the winner, or None and why nobody could win."""

    candidate: Candidate | None
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Candidates:
    """Those who may win, at least one of them with capacity; or none, and why."""

    candidates: tuple[Candidate, ...]
    reason: str = ""


def target_port(service: Service, endpoint: Endpoint, service_port: int) -> int | None:
    """The port an endpoint serves `service_port` on, or None when it does not.

    The endpoint's own mapping first, then the service's, then the port itself if the
    workload terminates the tunnel in an application tunnel that names a port.
    """
    own = endpoint.ports.get(service_port)
    if own:
        return own
    described = service.ports.get(service_port)
    if described is not None and described.target_port:
        return described.target_port
    tunnel = endpoint.workload.application_tunnel
    return service_port if tunnel is not None and tunnel.port else None


def locality_rank(preference: Sequence[Scope], source: Workload, workload: Workload) -> int:
    """How close a workload is: the count of leading scopes that agree.

    A leading NETWORK is preferred, not required: disagreement does not end the count, and
    agreement outweighs all the other scopes together.
    """
    rank = 0
    for index, scope in enumerate(preference):
        if _agrees(scope, source, workload):
            rank += len(preference) if index == 0 and scope is Scope.NETWORK else 1
        elif index or scope is not Scope.NETWORK:
            break
    return rank


@dataclass(frozen=True, slots=True)
class _Group:
    """Who may be chosen; cumulated weights, empty when nobody has any; why nobody is here.
    It keeps what it was made of, so that their ids stay theirs.
    """

    candidates: Sequence[Candidate]
    cumulated: Sequence[int]
    reason: str
    service: Service
    endpoints: Sequence[Endpoint]


def choose_endpoint(
    service: Service,
    endpoints: Sequence[Endpoint],
    service_port: int,
    source: Workload,
    rng: Random,
    avoid: Collection[str] = (),
) -> Choice:
    """Choose an endpoint of `service` for `source`. Only endpoints on the source's network
    are candidates; without one, the reason says whether others exist. Workloads (uids) in
    `avoid` win only where nobody else can.

    Logarithmic in the number of endpoints, as long as `service` and `endpoints` are the same
    objects: the Store makes new ones when something changes.
    """
    group = _group(service, endpoints, service_port, source)
    if avoid:
        # Those left may be farther away than any of the group.
        others = [each for each in endpoints if each.workload.uid not in avoid]
        farther = _make_group(service, others, service_port, source)
        group = farther if farther.cumulated else group
    if not group.cumulated:
        return Choice(None, group.reason)
    if len(group.candidates) == 1:
        return Choice(group.candidates[0])
    (chosen,) = rng.choices(range(len(group.candidates)), cum_weights=group.cumulated)
    return Choice(group.candidates[chosen])


def find_candidates(
    service: Service, endpoints: Sequence[Endpoint], service_port: int, source: Workload
) -> Candidates:
    """The endpoints among which chance, weighted by capacity, may decide; or why there is none."""
    group = _group(service, endpoints, service_port, source)
    return Candidates(tuple(group.candidates) if group.cumulated else (), group.reason)


_known_groups: dict[tuple[object, ...], _Group] = {}
_MAX_KNOWN_CANDIDATES = 50_000
_known_candidates = 0


def _group(
    service: Service, endpoints: Sequence[Endpoint], service_port: int, source: Workload
) -> _Group:
    global _known_candidates
    place = source.locality
    key = (
        id(service),
        id(endpoints),
        service_port,
        source.network,
        source.cluster_id,
        source.node,
        place.region,
        place.zone,
        place.subzone,
    )
    known = _known_groups.get(key)
    if known is None:
        if _known_candidates > _MAX_KNOWN_CANDIDATES:
            _known_groups.clear()
            _known_candidates = 0
        known = _known_groups[key] = _make_group(service, endpoints, service_port, source)
        _known_candidates += len(endpoints) + 1
    return known


def _make_group(
    service: Service, endpoints: Sequence[Endpoint], service_port: int, source: Workload
) -> _Group:
    listed = service_port in service.ports
    policy = service.load_balancing
    candidates: list[Candidate] = []
    unready = remote = 0
    for endpoint in endpoints:
        workload = endpoint.workload
        tunnel = workload.application_tunnel
        if not listed and (tunnel is None or not tunnel.port):
            continue
        if not _is_healthy(workload, policy):
            unready += 1
            continue
        if workload.network != source.network:
            remote += 1
            continue
        if not workload.addresses and not workload.hostname:
            continue
        port = target_port(service, endpoint, service_port)
        if port is not None:
            candidates.append(Candidate(workload, port))
    group = _closest(candidates, policy, source)
    cumulated = list(itertools.accumulate(each.workload.capacity for each in group))
    reason = ""
    if not cumulated or not cumulated[-1]:
        cumulated = []
        reason = _why_nobody(service, endpoints, service_port, len(candidates), unready, remote)
    return _Group(group, cumulated, reason, service, endpoints)


def choose_address(workload: Workload, requested: str, families: IpFamilies) -> str | None:
    """The workload's address to use: the requested one if it owns it, else one that the
    service's families allow, of the request's family where possible. None when it has none.
    """
    if requested in workload.addresses:
        return requested
    allowed = [each for each in workload.addresses if _allows(families, each)]
    wants_v6 = ":" in requested
    for address in allowed:
        if (":" in address) == wants_v6:
            return address
    return allowed[0] if allowed else None


def _allows(families: IpFamilies, address: str) -> bool:
    match families:
        case IpFamilies.IPV4_ONLY:
            return ":" not in address
        case IpFamilies.IPV6_ONLY:
            return ":" in address
        case IpFamilies.AUTOMATIC | IpFamilies.DUAL:
            return True


def _is_healthy(workload: Workload, policy: LoadBalancing) -> bool:
    return (
        workload.status is WorkloadStatus.HEALTHY or policy.health_policy is HealthPolicy.ALLOW_ALL
    )


def _agrees(scope: Scope, source: Workload, workload: Workload) -> bool:
    match scope:
        case Scope.REGION:
            return source.locality.region == workload.locality.region
        case Scope.ZONE:
            return source.locality.zone == workload.locality.zone
        case Scope.SUBZONE:
            return source.locality.subzone == workload.locality.subzone
        case Scope.NODE:
            return source.node == workload.node
        case Scope.CLUSTER:
            return source.cluster_id == workload.cluster_id
        case Scope.NETWORK:
            return source.network == workload.network


def _closest(
    candidates: list[Candidate], policy: LoadBalancing, source: Workload
) -> list[Candidate]:
    preference = policy.routing_preference
    if not preference or not candidates:
        return candidates
    match policy.mode:
        case Mode.UNSPECIFIED | Mode.PASSTHROUGH:
            return candidates
        case Mode.STRICT:
            return [
                each
                for each in candidates
                if all(_agrees(scope, source, each.workload) for scope in preference)
            ]
        case Mode.FAILOVER:
            # An endpoint that never receives traffic must not hold its group's place.
            ranked = [
                (locality_rank(preference, source, each.workload), each)
                for each in candidates
                if each.workload.capacity
            ]
            best = max((rank for rank, _ in ranked), default=0)
            return [each for rank, each in ranked if rank == best]


def _why_nobody(
    service: Service,
    endpoints: Sequence[Endpoint],
    service_port: int,
    usable: int,
    unready: int,
    remote: int,
) -> str:
    name = f"{service.hostname}:{service_port}"
    count = len(endpoints)
    if service_port not in service.ports:
        return f"service {service.namespace}/{service.hostname} has no port {service_port}"
    if usable:
        return f"no endpoint of {name} is allowed by locality and capacity ({usable} healthy)"
    if remote:
        return f"{name} has endpoints only on other networks ({remote}), which cannot be reached"
    return f"no healthy endpoint for {name} ({count} endpoints, {unready} unready)"
