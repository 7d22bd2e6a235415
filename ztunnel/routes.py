"""Where the outbound connections of one pod go, remembered for as long as that is so. No I/O.

`ztunnel.plan` decides. What it decides for a workload and a destination is the same until the
Store or the workload changes, unless chance had a part in it; so it is asked once for a
destination, each time where there is a choice. With each plan comes what all connections
that follow it have in common.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from mesh.errors import Refusal
from mesh.hbone.head_template import HeadTemplate
from mesh.hbone.pool import PoolKey
from mesh.model.balancing import Random
from mesh.model.store import Store
from mesh.model.workload import Workload
from mesh.sockets import SocketAddress
from ztunnel.plan import Carrier, OutboundPlan, plan_elsewhere, plan_outbound
from ztunnel.record import baggage_of

MAX_REMEMBERED = 1024


@dataclass(frozen=True, slots=True)
class Route:
    """A plan for `destination`; that, and where to and how, as text."""

    destination: SocketAddress
    asked: str
    plan: OutboundPlan
    next_hop: str
    protocol: str


@dataclass(frozen=True, slots=True)
class TunnelRoute(Route):
    """One through a tunnel: the pool's key, and what the CONNECTs share."""

    key: PoolKey
    template: HeadTemplate


class _Dice:
    """A Random that notes whether it was asked."""

    def __init__(self, rng: Random) -> None:
        self._rng = rng
        self.were_thrown = False

    def choices(self, population: Sequence[int], *, cum_weights: Sequence[int]) -> list[int]:
        """As the other one."""
        self.were_thrown = True
        return self._rng.choices(population, cum_weights=cum_weights)


class Routes:
    """The routes of one pod. Ask for every connection; nothing outlives a change of `store`."""

    def __init__(self, store: Store, rng: Random) -> None:
        self._store = store
        self._rng = rng
        self._version = -1
        self._source: Workload | None = None
        self._decided: dict[tuple[SocketAddress, str], Route | Refusal] = {}
        self._routes: dict[tuple[object, ...], Route] = {}

    def find(self, source: Workload, source_ip: str, destination: SocketAddress) -> Route | Refusal:
        """The route of a connection that `source`, at its address `source_ip`, opened."""
        if self._version != self._store.version or source is not self._source:
            self._version, self._source = self._store.version, source
            self._decided.clear()
            self._routes.clear()
        known = self._decided.get((destination, source_ip))
        if known is not None:
            return known
        dice = _Dice(self._rng)
        plan = plan_outbound(source, destination, self._store, dice)
        found = (
            plan if isinstance(plan, Refusal) else self._route(source, source_ip, destination, plan)
        )
        if not dice.were_thrown:
            if len(self._decided) >= MAX_REMEMBERED:
                self._decided.clear()
            self._decided[destination, source_ip] = found
        return found

    def elsewhere(
        self,
        source: Workload,
        source_ip: str,
        destination: SocketAddress,
        unreached: Collection[str],
    ) -> TunnelRoute | None:
        """Another tunnel than to `unreached` (uids of workloads), None if there is none."""
        plan = plan_elsewhere(source, destination, self._store, self._rng, unreached)
        return None if plan is None else _through_tunnel(source, source_ip, destination, plan)

    def _route(
        self, source: Workload, source_ip: str, destination: SocketAddress, plan: OutboundPlan
    ) -> Route:
        # By the identity of what the plan names, which hashes faster; the route keeps the plan.
        ends = (source_ip, destination)
        key = (id(plan.workload), id(plan.service), plan.next_hop, plan.authority, *ends)
        known = self._routes.get(key)
        if known is None:
            if len(self._routes) >= MAX_REMEMBERED:
                self._routes.clear()
            known = self._routes[key] = _make_route(source, source_ip, destination, plan)
        return known


def _make_route(
    source: Workload, source_ip: str, destination: SocketAddress, plan: OutboundPlan
) -> Route:
    if plan.carrier is Carrier.TCP:
        hop = str(plan.next_hop)
        return Route(destination, str(destination), plan, hop, plan.carrier.value)
    return _through_tunnel(source, source_ip, destination, plan)


def _through_tunnel(
    source: Workload, source_ip: str, destination: SocketAddress, plan: OutboundPlan
) -> TunnelRoute:
    hop = plan.next_hop
    key = PoolKey(source.identity, plan.expected, SocketAddress(hop.host, hop.port), source_ip)
    host = plan.service.hostname if plan.service is not None else ""
    template = HeadTemplate(plan.authority, baggage_of(source), host)
    asked, carrier = str(destination), plan.carrier.value
    return TunnelRoute(destination, asked, plan, str(hop), carrier, key, template)
