"""Routes on a Service -> the model's routes, with backends looked up; and what to say of each
parentRef. Pure.

Of several kinds on one port only the first applies (GRPC, HTTP, TLS, TCP); producer routes (of
the Service's namespace) and the consumer routes of each other namespace never mix. A backend
that cannot be used keeps its share, which is answered with an error.

A backend in the route's own namespace, or in that of the Service it is bound to, needs no
grant: whoever may call the parent may be sent there. For any other namespace a ReferenceGrant
must be in it, because the waypoint would reach what its callers perhaps may not.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from istiod_lite.workloads import Mesh, is_published, tcp_ports
from mesh.cluster.api import Ref
from mesh.cluster.gateways import GATEWAY_GROUP, GrantSource, GrantTarget, ReferenceGrant
from mesh.cluster.inventory import Inventory
from mesh.cluster.objects import Service, ServicePort
from mesh.cluster.routes import ROUTE_KINDS, ParentRef, RouteView
from mesh.model.route import Backend, Route, RouteFilter, RouteRule


@dataclass(frozen=True, slots=True)
class Attachment:
    """What came of one parentRef. The reasons are those of Accepted and ResolvedRefs."""

    parent: ParentRef
    reason: str = "Accepted"
    message: str = ""
    refs_reason: str = "ResolvedRefs"
    refs_message: str = ""

    @property
    def is_accepted(self) -> bool:
        """Whether the route is in force there."""
        return self.reason == "Accepted"


@dataclass(frozen=True, slots=True)
class Outcome:
    """The routes of one Service in force, and what came of every parentRef to it."""

    routes: tuple[Route, ...] = ()
    attachments: dict[Ref, tuple[Attachment, ...]] = field(default_factory=dict)


@dataclass(slots=True)
class _Candidate:
    view: RouteView
    attachments: list[Attachment]
    ports: set[int]
    is_consumer: bool


def parent_services(view: RouteView) -> list[Ref]:
    """The Services that a route names as parents."""
    return [
        Ref("Service", each.namespace, each.name)
        for each in view.parents
        if each.group == "" and each.kind == "Service"
    ]


def backends_of(view: RouteView) -> list[Backend]:
    """Every backend that a route mentions, mirrors included."""
    found: list[Backend] = []
    for rule in view.rules:
        found += rule.backends
        filters = [*rule.filters, *(f for each in rule.backends for f in each.filters)]
        found += [each.mirror.backend for each in filters if each.mirror is not None]
    return found


def routes_of(
    mesh: Mesh, service: Service, views: Iterable[RouteView], inventory: Inventory
) -> Outcome:
    """What is in force on `service` of the routes that name it as a parent."""
    ports = tcp_ports(service)
    candidates = [_candidate(view, service, ports) for view in views]
    candidates.sort(key=lambda each: (each.view.created, str(each.view.ref)))
    _settle_kinds(candidates)
    everything = {port.number for port in ports}
    found = []
    attachments = {}
    for each in candidates:
        resolution = _Resolution(mesh, each.view, service, inventory)
        rules = tuple(resolution.rule(rule) for rule in each.view.rules)
        if each.ports:
            found.append(_route(each, rules, everything, inventory))
        reason, _, message = resolution.problem.partition(": ")
        attachments[each.view.ref] = tuple(
            replace(entry, refs_reason=reason or "ResolvedRefs", refs_message=message)
            for entry in each.attachments
        )
    return Outcome(tuple(found), attachments)


def _candidate(view: RouteView, service: Service, ports: list[ServicePort]) -> _Candidate:
    is_consumer = view.namespace != service.namespace
    found = _Candidate(view, [], set(), is_consumer)
    for parent in view.parents:
        if (parent.group, parent.kind) != ("", "Service"):
            continue
        if (parent.namespace, parent.name) != (service.namespace, service.name):
            continue
        matching = {
            port.number
            for port in ports
            if parent.port in (0, port.number) and parent.section in ("", port.name)
        }
        if matching:
            found.attachments.append(Attachment(parent))
            found.ports |= matching
        else:
            asked = f"port {parent.port}" if parent.port else f'port "{parent.section}"'
            message = f"Service {service.namespace}/{service.name} has no {asked}"
            found.attachments.append(Attachment(parent, "NoMatchingParent", message))
    return found


def _settle_kinds(candidates: list[_Candidate]) -> None:
    """Leave each port to one kind, within producers and each namespace of consumers."""
    taken: dict[tuple[str, int], int] = {}
    for each in candidates:
        rank = ROUTE_KINDS.index(each.view.kind)
        for port in each.ports:
            key = (_group(each), port)
            taken[key] = min(rank, taken.get(key, rank))
    for each in candidates:
        rank = ROUTE_KINDS.index(each.view.kind)
        if not each.ports:
            continue
        each.ports = {port for port in each.ports if taken[_group(each), port] == rank}
        if not each.ports:
            message = "another kind of route, which goes first, has all of its ports"
            each.attachments = [
                replace(entry, reason="Conflicted", message=message) if entry.is_accepted else entry
                for entry in each.attachments
            ]


def _group(candidate: _Candidate) -> str:
    return candidate.view.namespace if candidate.is_consumer else ""


def _route(
    candidate: _Candidate, rules: tuple[RouteRule, ...], everything: set[int], inventory: Inventory
) -> Route:
    view = candidate.view
    return Route(
        kind=view.kind,
        namespace=view.namespace,
        name=view.name,
        rules=rules,
        ports=() if candidate.ports == everything else tuple(sorted(candidate.ports)),
        # For HTTP the Host header does not choose among routes of a mesh; for TLS the SNI does.
        hostnames=view.hostnames if view.kind == "TLSRoute" else (),
        created=view.created,
        source=str(inventory.source(view.ref) or ""),
        is_consumer=candidate.is_consumer,
    )


class _Resolution:
    """One route's backends on their way; keeps the first problem."""

    def __init__(self, mesh: Mesh, view: RouteView, service: Service, inventory: Inventory) -> None:
        self._mesh = mesh
        self._view = view
        self._homes = (view.namespace, service.namespace)
        self._inventory = inventory
        self.problem = ""

    def rule(self, rule: RouteRule) -> RouteRule:
        return replace(
            rule,
            filters=self._filters(rule.filters),
            backends=tuple(
                replace(self._backend(each), filters=self._filters(each.filters))
                for each in rule.backends
            ),
        )

    def _filters(self, filters: tuple[RouteFilter, ...]) -> tuple[RouteFilter, ...]:
        return tuple(
            replace(each, mirror=replace(each.mirror, backend=self._backend(each.mirror.backend)))
            if each.mirror is not None
            else each
            for each in filters
        )

    def _backend(self, backend: Backend) -> Backend:
        namespace, _, name = backend.service.partition("/")
        problem = backend.problem or self._judge(namespace, name, backend.port)
        if problem and not self.problem:
            self.problem = problem
        return replace(backend, service=self._mesh.service_key(namespace, name), problem=problem)

    def _judge(self, namespace: str, name: str, port: int) -> str:
        if namespace not in self._homes and not self._is_granted(namespace, name):
            return f"RefNotPermitted: no ReferenceGrant in {namespace} lets {self._view.ref} refer"
        service = self._inventory.get(Service, namespace, name)
        if service is None or not is_published(service):
            return f"BackendNotFound: there is no Service {namespace}/{name}"
        if not any(each.number == port for each in tcp_ports(service)):
            return f"BackendNotFound: Service {namespace}/{name} has no port {port}"
        return ""

    def _is_granted(self, namespace: str, name: str) -> bool:
        source = GrantSource(GATEWAY_GROUP, self._view.ref.kind, self._view.namespace)
        target = GrantTarget("", "Service", name)
        grants = self._inventory.within(ReferenceGrant, namespace)
        return any(each.admits(source, target) for each in grants)
