"""Checks of waypoints, routes and what is attached to them: what each says does not fit. Pure.

Part of `mesh.cluster.validate`. References to what is not there, rules that no request can
reach, routes and policies without effect, and ports that the mesh keeps for itself in every pod.
A remark is an object, a field, a message and a hint.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TypeAlias

from mesh.cluster.api import Ref
from mesh.cluster.entries import ServiceEntry
from mesh.cluster.gateways import (
    GATEWAY_GROUP,
    USE_WAYPOINT,
    Gateway,
    GrantSource,
    GrantTarget,
    ReferenceGrant,
    is_waypoint_part,
    named_gateway,
)
from mesh.cluster.inventory import Inventory
from mesh.cluster.l7_policies import RateLimitPolicy, RedactionPolicy, RequestAuthentication
from mesh.cluster.objects import Metadata, Namespace, Pod, Service
from mesh.cluster.policies import AuthorizationPolicy, TargetRef
from mesh.cluster.routes import ROUTE_KINDS, ROUTES, ParentRef, RouteView
from mesh.cluster.traffic_policies import DestinationRule
from mesh.model.route import Backend, RouteMatch, RouteRule

Remark: TypeAlias = tuple[Ref, str, str, str]
Pods: TypeAlias = Sequence[tuple[Ref, str, Pod]]

#: Ports of a captured pod that the mesh listens on, and for what.
MESH_PORTS = {
    15001: "traffic that leaves the pod",
    15006: "plain text that comes to the pod",
    15008: "tunnels that come to the pod",
    15053: "the pod's DNS queries",
}
_POLICIES = (AuthorizationPolicy, RequestAuthentication, RateLimitPolicy, RedactionPolicy)
#: What policies can be attached to.
_GROUPS = {
    "Service": "",
    "ServiceEntry": "networking.istio.io",
    "Gateway": GATEWAY_GROUP,
    "HTTPRoute": GATEWAY_GROUP,
    "GRPCRoute": GATEWAY_GROUP,
}
_CORRECT = "write the object, or correct the name"


def odd_traffic(inventory: Inventory, pods: Pods) -> Iterator[Remark]:
    """Everything that is odd, in the order of the checks."""
    yield from _taken_ports(pods)
    yield from _unknown_waypoints(inventory, pods)
    for kind in ROUTES:
        for route in inventory.all(kind):
            yield from _dangling_parents(inventory, route)
            yield from _dangling_backends(inventory, route)
            yield from _dead_rules(route)
    yield from _shadowed(inventory)
    yield from _idle_policies(inventory)
    yield from _idle_rules(inventory)


def _taken_ports(pods: Pods) -> Iterator[Remark]:
    for ref, prefix, pod in pods:
        if pod.host_network or is_waypoint_part(pod):
            continue
        for port in pod.ports:
            if port.number in MESH_PORTS and port.protocol == "TCP":
                message = (
                    f"port {port.number} is the mesh's own in every enrolled pod, for "
                    f"{MESH_PORTS[port.number]}"
                )
                hint = "choose another port, or keep the pod out of the mesh"
                yield ref, f"{prefix}spec.containers", message, hint


def _unknown_waypoints(inventory: Inventory, pods: Pods) -> Iterator[Remark]:
    views: list[tuple[Ref, str, Metadata]] = [
        *((each.ref, "", each) for each in inventory.all(Namespace)),
        *((each.ref, "", each) for each in inventory.all(Service)),
        *((each.ref, "", each) for each in inventory.all(ServiceEntry)),
        *((ref, prefix, pod) for ref, prefix, pod in pods),
    ]
    for ref, prefix, view in views:
        # A namespace's label means a Gateway in it.
        home = view.name if isinstance(view, Namespace) else ref.namespace
        named = named_gateway(view, None)
        if named is None:
            continue
        name = Ref("Gateway", named.namespace or home, named.name)
        gateway = inventory.get(Gateway, name.namespace, name.name)
        field = f'{prefix}metadata.labels["{USE_WAYPOINT}"]'
        if gateway is None:
            message = f"there is no waypoint {name.namespace}/{name.name}"
            yield ref, field, message, f"ambit waypoint generate -n {name.namespace}"
        elif not gateway.is_waypoint:
            message = f"{name} is of class {gateway.class_name}, and no waypoint"
            yield ref, field, message, ""


def _service_parents(route: RouteView) -> Iterator[tuple[int, ParentRef]]:
    for index, parent in enumerate(route.parents):
        if (parent.group, parent.kind) == ("", "Service"):
            yield index, parent


def _dangling_parents(inventory: Inventory, route: RouteView) -> Iterator[Remark]:
    for index, parent in _service_parents(route):
        field = f"spec.parentRefs[{index}]"
        service = inventory.get(Service, parent.namespace, parent.name)
        if service is None:
            message = f"there is no Service {parent.namespace}/{parent.name}"
            yield route.ref, f"{field}.name", message, _CORRECT
            continue
        if not _ports_of(service, parent):
            asked = parent.port or f'"{parent.section}"'
            message = f"Service {parent.namespace}/{parent.name} has no port {asked}"
            yield route.ref, field, message, ""
        namespace = inventory.get(Namespace, "", parent.namespace)
        if named_gateway(service, namespace) is None:
            message = (
                f"Service {parent.namespace}/{parent.name} goes through no waypoint: the route "
                "has no effect"
            )
            yield route.ref, field, message, f"label it, or its namespace, {USE_WAYPOINT}"


def _ports_of(service: Service, parent: ParentRef) -> set[int]:
    return {
        port.number
        for port in service.ports
        if port.protocol == "TCP"
        and parent.port in (0, port.number)
        and parent.section in ("", port.name)
    }


def _dangling_backends(inventory: Inventory, route: RouteView) -> Iterator[Remark]:
    homes = {route.namespace, *(parent.namespace for _, parent in _service_parents(route))}
    for field, backend in _backends(route):
        namespace, _, name = backend.service.partition("/")
        service = inventory.get(Service, namespace, name)
        if backend.problem:
            yield route.ref, field, backend.problem.partition(": ")[2], ""
        elif service is None:
            message = f"there is no Service {namespace}/{name}: its share is answered with errors"
            yield route.ref, f"{field}.name", message, _CORRECT
        elif not any(port.number == backend.port for port in service.ports):
            message = f"Service {namespace}/{name} has no port {backend.port}"
            yield route.ref, f"{field}.port", message, "it is the Service's port, not the pod's"
        elif namespace not in homes and not _is_granted(inventory, route, namespace, name):
            message = f"no ReferenceGrant in {namespace} lets this route refer to {name}"
            yield route.ref, f"{field}.namespace", message, ""


def _backends(route: RouteView) -> Iterator[tuple[str, Backend]]:
    for index, rule in enumerate(route.rules):
        for number, backend in enumerate(rule.backends):
            yield f"spec.rules[{index}].backendRefs[{number}]", backend
        for number, each in enumerate(rule.filters):
            if each.mirror is not None:
                place = f"spec.rules[{index}].filters[{number}].requestMirror.backendRef"
                yield place, each.mirror.backend


def _is_granted(inventory: Inventory, route: RouteView, namespace: str, name: str) -> bool:
    source = GrantSource(GATEWAY_GROUP, route.ref.kind, route.namespace)
    target = GrantTarget("", "Service", name)
    grants = inventory.within(ReferenceGrant, namespace)
    return any(each.admits(source, target) for each in grants)


def _dead_rules(route: RouteView) -> Iterator[Remark]:
    for index, rule in enumerate(route.rules):
        field = f"spec.rules[{index}].backendRefs"
        if any(each.redirect for each in rule.filters):
            continue
        if not rule.backends:
            yield route.ref, field, "without backends every request is answered 500", ""
        elif all(each.weight == 0 for each in rule.backends):
            yield route.ref, field, "every weight is 0: every request is answered 500", ""


_Entry: TypeAlias = tuple[RouteView, int, RouteMatch]


def _shadowed(inventory: Inventory) -> Iterator[Remark]:
    """Rules that an equal match goes before, and routes of a kind that another goes before.

    Of two different matches the more specific goes first, so only an equal one hides another.
    """
    told: set[tuple[Ref, int]] = set()
    for service in inventory.all(Service):
        routes = [
            (route, ports)
            for kind in ROUTES
            for route in inventory.all(kind)
            if (ports := _bound_ports(route, service))
        ]
        routes.sort(key=lambda each: (each[0].created, f"{each[0].namespace}/{each[0].name}"))
        for group in {_group(route, service) for route, _ in routes}:
            mine = [each for each in routes if _group(each[0], service) == group]
            for port in sorted({port for _, ports in mine for port in ports}):
                here = [route for route, ports in mine if port in ports]
                yield from _at_port(here, service, port, told)


def _bound_ports(route: RouteView, service: Service) -> set[int]:
    found: set[int] = set()
    for _, parent in _service_parents(route):
        if (parent.namespace, parent.name) == (service.namespace, service.name):
            found |= _ports_of(service, parent)
    return found


def _group(route: RouteView, service: Service) -> str:
    return "" if route.namespace == service.namespace else route.namespace


def _at_port(
    routes: Iterable[RouteView], service: Service, port: int, told: set[tuple[Ref, int]]
) -> Iterator[Remark]:
    listed = list(routes)
    first = min(ROUTE_KINDS.index(each.kind) for each in listed)
    where = f"port {port} of Service {service.namespace}/{service.name}"
    seen: dict[object, tuple[RouteView, int]] = {}
    for route in listed:
        if ROUTE_KINDS.index(route.kind) != first:
            if (route.ref, -1) not in told:
                told.add((route.ref, -1))
                message = f"{where} has a {ROUTE_KINDS[first]}, which goes before a {route.kind}"
                yield route.ref, "spec.parentRefs", message, "keep one kind of route to a port"
            continue
        if route.kind in ("TCPRoute", "TLSRoute"):
            continue
        for index, rule in enumerate(route.rules):
            earlier = [seen.get(key) for key in _keys(rule)]
            for key in _keys(rule):
                seen.setdefault(key, (route, index))
            hiding = [each for each in earlier if each is not None]
            if len(hiding) == len(earlier) and (route.ref, index) not in told:
                told.add((route.ref, index))
                other, number = hiding[0]
                by = f"rule {number}" if other is route else f"rule {number} of {other.ref}"
                message = f"never reached: {by} matches the same and goes first"
                yield route.ref, f"spec.rules[{index}].matches", message, ""


def _keys(rule: RouteRule) -> list[object]:
    return [
        (
            each.path.kind,
            each.path.value.rstrip("/") if each.path.kind == "PathPrefix" else each.path.value,
            frozenset(each.headers),
            frozenset(each.query_params),
            each.method,
            each.grpc,
        )
        for each in rule.matches
    ]


def _idle_policies(inventory: Inventory) -> Iterator[Remark]:
    for kind in _POLICIES:
        for policy in inventory.all(kind):
            refs: tuple[TargetRef, ...] = policy.target_refs  # type: ignore[attr-defined]
            if not refs and isinstance(policy, RequestAuthentication):
                message = "without targetRefs no waypoint reads it: tokens are not checked"
                yield policy.ref, "spec.targetRefs", message, "name a Service or a Gateway"
            for index, target in enumerate(refs):
                yield from _idle_target(inventory, policy, f"spec.targetRefs[{index}]", target)


def _idle_target(
    inventory: Inventory, policy: Metadata, field: str, target: TargetRef
) -> Iterator[Remark]:
    home = policy.namespace
    if target.namespace not in ("", home):
        message = "a policy is for objects of its own namespace"
        yield policy.ref, f"{field}.namespace", message, ""
        return
    if target.kind == "GatewayClass":
        return
    if _GROUPS.get(target.kind) != target.group:
        named = f"{target.group}/{target.kind}" if target.group else target.kind
        yield policy.ref, f"{field}.kind", f"a policy cannot be attached to {named}", ""
        return
    view = inventory.view(Ref(target.kind, home, target.name))
    match view:
        case None:
            message = f"there is no {target.kind} {home}/{target.name}: nothing is enforced"
            yield policy.ref, f"{field}.name", message, _CORRECT
        case Service():
            if named_gateway(view, inventory.get(Namespace, "", home)) is None:
                message = (
                    f"Service {home}/{target.name} goes through no waypoint that could enforce "
                    "this: nobody gets through to its enrolled pods"
                )
                hint = f"label it, or its namespace, {USE_WAYPOINT}"
                yield policy.ref, field, message, hint
        case ServiceEntry():
            if named_gateway(view, inventory.get(Namespace, "", home)) is None:
                message = f"{view.ref} goes through no waypoint that could enforce this"
                hint = f"label it, or its namespace, {USE_WAYPOINT}"
                yield policy.ref, field, message, hint
            elif view.resolution == "NONE":
                message = f"{view.ref} has resolution NONE: its waypoint answers with errors"
                yield policy.ref, field, message, "list endpoints, or resolve by DNS"
        case RouteView():
            names = {rule.name for rule in view.rules}
            if target.section and target.section not in names:
                message = f"{view.ref} has no rule named {target.section}: requests are denied"
                yield policy.ref, f"{field}.sectionName", message, ""


def _idle_rules(inventory: Inventory) -> Iterator[Remark]:
    for rule in inventory.all(DestinationRule):
        for field in rule.ignored:
            yield rule.ref, field, "it has no effect here", ""
        name, _, rest = rule.host.partition(".")
        namespace = rest.partition(".")[0] or rule.namespace
        is_ours = "*" not in rule.host and (rest.count(".") == 0 or rest.split(".")[1] == "svc")
        if is_ours and inventory.get(Service, namespace, name) is None:
            yield rule.ref, "spec.host", f"there is no Service {namespace}/{name}", _CORRECT
