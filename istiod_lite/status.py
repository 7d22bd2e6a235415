"""What is said back on Gateways, routes, Services and policies. Pure.

What a condition claims is what proxies have acknowledged, not what was written: a policy is
Accepted when every proxy that has to enforce it, and at least one, holds it as it is now; before
that it is Pending, and Invalid with the proxy's own words if one refused it. Types and reasons
are Istio's and Gateway API's.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import replace

from istiod_lite import bindings, guards, status_backends
from istiod_lite.conditions import (
    WAYPOINT_ACCEPTED,
    WAYPOINT_BOUND,
    WAYPOINT_REQUIRED,
    ZTUNNEL_ACCEPTED,
    Condition,
    Fragment,
    ListenerStatus,
    ParentStatus,
)
from istiod_lite.features import FEATURES
from istiod_lite.index import ClusterIndex
from istiod_lite.providers import provider_of
from istiod_lite.routes import Attachment
from istiod_lite.subscriptions import Share
from mesh.cluster.api import Ref
from mesh.cluster.entries import ServiceEntry
from mesh.cluster.gateways import WAYPOINT_CONTROLLER, Gateway, GatewayClass, XMesh
from mesh.cluster.l7_policies import RateLimitPolicy, RedactionPolicy, RequestAuthentication
from mesh.cluster.mesh_config import mesh_config_ref
from mesh.cluster.objects import Pod, Service
from mesh.cluster.policies import AuthorizationPolicy
from mesh.cluster.routes import ROUTES, ParentRef, RouteView
from mesh.xds.translate import AUTHORIZATION_TYPE, TRAFFIC_TYPE

#: How many proxies hold all of these resources: type, names, account (empty for any).
Shares = Callable[[str, Collection[str], str], Share]

UNKNOWN_PROVIDER = "UnknownProvider"
_ON_SERVICES = frozenset((WAYPOINT_BOUND, WAYPOINT_REQUIRED))
_L7 = (AuthorizationPolicy, RequestAuthentication, RateLimitPolicy, RedactionPolicy)


def statuses(index: ClusterIndex, shares: Shares) -> dict[Ref, Fragment]:
    """Our part of the status of every object that has one."""
    return dict(each_status(index, shares))


def each_status(index: ClusterIndex, shares: Shares) -> Iterator[tuple[Ref, Fragment]]:
    """The same one by one; the index may change between them."""
    inventory = index.inventory
    for gateway in list(inventory.all(Gateway)):
        if gateway.is_waypoint:
            yield gateway.ref, _gateway(index, gateway, shares)
    for entry in list(inventory.all(ServiceEntry)):
        bound, assigned = _bound(index, entry.ref), index.allocated.of(entry.ref)
        if bound or assigned or not _ON_SERVICES.isdisjoint(entry.conditions):
            yield entry.ref, Fragment(bound, assigned=assigned)
    for service in list(inventory.all(Service)):
        # What was said before we started, and no longer holds, is taken back too.
        conditions = _service(index, service)
        if conditions or not _ON_SERVICES.isdisjoint(service.conditions):
            yield service.ref, Fragment(conditions)
    for kind in ROUTES:
        for route in list(inventory.all(kind)):
            if parents := _route(index, route, shares):
                yield route.ref, Fragment(parents=parents)
    for each in _L7:
        for policy in list(inventory.all(each)):
            if conditions := _policy(index, policy.ref, policy, shares):
                yield policy.ref, Fragment(conditions)
    yield from status_backends.each_status(index, shares)
    classes = [(each.ref, each.controller) for each in inventory.all(GatewayClass)]
    meshes = [(each.ref, each.controller) for each in inventory.all(XMesh)]
    for ref, controller in (*classes, *meshes):
        if controller == WAYPOINT_CONTROLLER:
            yield ref, Fragment((Condition("Accepted", "True", "Accepted"),), features=FEATURES)
    for ref in list(index.traffic.unreadable()):
        yield ref, Fragment(_twice(ref, _unreadable(index, ref, WAYPOINT_ACCEPTED)))


def _unreadable(index: ClusterIndex, ref: Ref, kind: str) -> Condition:
    return Condition(kind, "False", "Invalid", index.errors(ref) or "cannot be read")


# -- Gateway ---------------------------------------------------------------------------------


def _gateway(index: ClusterIndex, gateway: Gateway, shares: Shares) -> Fragment:
    waypoint = index.traffic.waypoints.get(gateway.ref)
    error = index.errors(gateway.ref)
    if waypoint is None or waypoint.problem or error:
        said = error or (waypoint.problem if waypoint else "not seen yet")
        conditions = (
            Condition("Accepted", "False", "ListenersNotValid", said),
            Condition("Programmed", "False", "Invalid", said),
        )
        listeners = tuple(
            ListenerStatus(
                each.name, 0, (Condition("Accepted", "False", "UnsupportedProtocol", said),)
            )
            for each in gateway.listeners
        )
        return Fragment(conditions, listeners=listeners)
    name = f"{gateway.namespace}/{gateway.name}"
    users = index.traffic.users(gateway.ref)
    every = [key for ref in users for key in index.traffic.config_keys(ref)]
    keys = [key for key in every if key.startswith(f"{name}/")]
    share = shares(TRAFFIC_TYPE, [name, *keys], name)
    routes = {
        route
        for ref in users
        if ref in index.traffic.outcomes
        for route, attached in index.traffic.outcomes[ref].attachments.items()
        if any(each.is_accepted for each in attached)
    }
    listeners = (
        ListenerStatus(
            gateway.listeners[0].name,
            len(routes),
            (
                Condition("Accepted", "True", "Accepted"),
                Condition("Programmed", "True", "Programmed")
                if waypoint.is_ready
                else Condition("Programmed", "False", "Pending"),
                Condition("ResolvedRefs", "True", "ResolvedRefs"),
            ),
        ),
    )
    accepted = Condition("Accepted", "True", "Accepted")
    service = index.inventory.get(Service, gateway.namespace, gateway.name)
    if not waypoint.is_ready or service is None:
        message = "no pod of the waypoint is ready" if service else "the waypoint has no Service"
        programmed = Condition("Programmed", "False", "AddressNotAssigned", message)
        return Fragment((accepted, programmed), listeners=listeners)
    hostname = index.mesh.hostname(gateway.namespace, gateway.name)
    ips = (("IPAddress", ip) for ip in service.cluster_ips[:1])
    message = _applied(share, "waypoint proxies")
    if share.refusal:
        programmed = Condition("Programmed", "False", "Invalid", f"refused: {share.refusal}")
    elif not share.is_whole:
        programmed = Condition("Programmed", "False", "Pending", message)
    else:
        programmed = Condition("Programmed", "True", "Programmed", message)
    return Fragment(
        (accepted, programmed), listeners=listeners, addresses=(("Hostname", hostname), *ips)
    )


def _applied(share: Share, whom: str) -> str:
    return f"applied on {share.held} of {share.total} {whom}"


# -- Service ---------------------------------------------------------------------------------


def _service(index: ClusterIndex, service: Service) -> tuple[Condition, ...]:
    required = _required(index, service)
    found = _bound(index, service.ref)
    return (*found, required) if required else found


def _bound(index: ClusterIndex, ref: Ref) -> tuple[Condition, ...]:
    """Whether a Service or ServiceEntry goes through the waypoint that it names."""
    binding = index.traffic.bindings.get(ref)
    if binding is None:
        return ()
    if binding.is_bound and binding.gateway is not None:
        message = f"goes through waypoint {binding.gateway.namespace}/{binding.gateway.name}"
        return (Condition(WAYPOINT_BOUND, "True", "WaypointAccepted", message),)
    return (Condition(WAYPOINT_BOUND, "False", binding.reason, binding.message),)


def _required(index: ClusterIndex, service: Service) -> Condition | None:
    """Whether L7 policy can be passed by, where there is some."""
    if service.ref in index.traffic.guards:
        pods = [
            pod
            for pod in index.inventory.within(Pod, service.namespace)
            if service.selects(pod.labels) and not pod.is_terminal
        ]
        outside = sorted(pod.name for pod in pods if not pod.is_captured)
        if outside:
            message = f"not in the mesh, so nobody refuses for them: {', '.join(outside[:5])}"
            return Condition(WAYPOINT_REQUIRED, "False", "PodsNotCaptured", message)
        message = f"{len(pods)} pods take this service's traffic from its waypoint alone"
        return Condition(WAYPOINT_REQUIRED, "True", "Enforced", message)
    if service.ref in index.traffic.with_policy and guards.is_opted_out(service):
        message = f"annotation {guards.OPT_OUT}: L7 policy can be passed by"
        return Condition(WAYPOINT_REQUIRED, "False", "OptedOut", message)
    return None


# -- routes ----------------------------------------------------------------------------------


def _route(index: ClusterIndex, route: RouteView, shares: Shares) -> tuple[ParentStatus, ...]:
    found = []
    error = index.errors(route.ref)
    for parent in route.parents:
        if (parent.group, parent.kind) != ("", "Service"):
            continue
        service = Ref("Service", parent.namespace, parent.name)
        outcome = index.traffic.outcomes.get(service)
        attached = next(
            (each for each in outcome.attachments.get(route.ref, ()) if each.parent == parent)
            if outcome
            else iter(()),
            None,
        )
        found.append(ParentStatus(parent, _at(index, parent, service, attached, error, shares)))
    return tuple(found)


def _at(
    index: ClusterIndex,
    parent: ParentRef,
    service: Ref,
    attached: Attachment | None,
    error: str,
    shares: Shares,
) -> tuple[Condition, ...]:
    if attached is None:
        message = f"there is no Service {parent.namespace}/{parent.name}"
        return (Condition("Accepted", "False", "NoMatchingParent", message),)
    if error:
        message = f"the state before stays in force: {error}"
        accepted = Condition("Accepted", "False", "UnsupportedValue", message)
    elif attached.is_accepted:
        accepted = Condition("Accepted", "True", "Accepted", _reach(index, service, shares))
    else:
        accepted = Condition("Accepted", "False", attached.reason, attached.message)
    is_resolved = attached.refs_reason == "ResolvedRefs"
    refs = Condition(
        "ResolvedRefs", "True" if is_resolved else "False", attached.refs_reason,
        attached.refs_message,
    )  # fmt: skip
    binding = index.traffic.bindings.get(service, bindings.Binding())
    if binding.gateway is None:
        message = f"Service {parent.namespace}/{parent.name} goes through no waypoint: no effect"
        waypoints = Condition("ResolvedWaypoints", "False", "MissingUseWaypointLabel", message)
    elif not binding.is_bound:
        waypoints = Condition("ResolvedWaypoints", "False", binding.reason, binding.message)
    else:
        waypoints = Condition("ResolvedWaypoints", "True", "ResolvedWaypoints")
    return accepted, refs, waypoints


def _reach(index: ClusterIndex, service: Ref, shares: Shares) -> str:
    key = index.traffic.config_key(service)
    if not key:
        return ""
    return _applied(shares(TRAFFIC_TYPE, [key], _account(key)), "waypoint proxies")


def _account(key: str) -> str:
    return "/".join(key.split("/")[:2])


# -- policies --------------------------------------------------------------------------------


def _policy(index: ClusterIndex, ref: Ref, policy: object, shares: Shares) -> tuple[Condition, ...]:
    refs = getattr(policy, "target_refs", ())
    if not refs:
        if isinstance(policy, AuthorizationPolicy):
            return (_at_ztunnel(index, ref, shares),)
        message = "without targetRefs no waypoint reads it, and node proxies see no tokens"
        return (Condition(WAYPOINT_ACCEPTED, "False", "AncestorNotBound", message),)
    if error := index.errors(ref):
        message = f"the state before stays in force: {error}"
        return _twice(ref, Condition(WAYPOINT_ACCEPTED, "False", "Invalid", message))
    return _twice(ref, _at_waypoints(index, ref, len(refs), shares))


def _twice(ref: Ref, condition: Condition) -> tuple[Condition, ...]:
    """Policies of our own say it under Gateway API's name for it, too."""
    is_ours = ref.kind in ("RateLimitPolicy", "RedactionPolicy")
    return (condition, replace(condition, type="Accepted")) if is_ours else (condition,)


def _at_ztunnel(index: ClusterIndex, ref: Ref, shares: Shares) -> Condition:
    key = f"{ref.namespace}/{ref.name}"
    if error := index.errors(ref):
        return Condition(ZTUNNEL_ACCEPTED, "False", "Invalid", error)
    odd = "; ".join(f"{each.field}: {each.message}" for each in index.problems(ref))
    if key not in index.policies:
        return Condition(ZTUNNEL_ACCEPTED, "False", "UnsupportedValue", odd)
    share = shares(AUTHORIZATION_TYPE, [key], "")
    if share.refusal:
        return Condition(ZTUNNEL_ACCEPTED, "False", "Invalid", f"refused: {share.refusal}")
    message = _applied(share, "proxies")
    if odd:
        return Condition(ZTUNNEL_ACCEPTED, "False", "UnsupportedValue", f"{odd}; {message}")
    if not share.is_whole:
        return Condition(ZTUNNEL_ACCEPTED, "Unknown", "Pending", message)
    return Condition(ZTUNNEL_ACCEPTED, "True", "Accepted", message)


def _at_waypoints(index: ClusterIndex, ref: Ref, asked: int, shares: Shares) -> Condition:
    problems: list[tuple[str, str]] = []
    targets = index.traffic.targets(ref)
    problems += _provider_problem(index, ref)
    if len(targets) < asked:
        problems.append(("TargetNotFound", "it cannot be attached to all that it names"))
    keys: list[str] = []
    for target in targets:
        found, problem = _keys(index, target)
        keys += found
        problems += problem
    held = total = 0
    for gateway in sorted({_account(key) for key in keys}):
        names = [key for key in keys if _account(key) == gateway]
        share = shares(TRAFFIC_TYPE, names, gateway)
        if share.refusal:
            return Condition(WAYPOINT_ACCEPTED, "False", "Invalid", f"refused: {share.refusal}")
        held, total = held + share.held, total + share.total
    message = _applied(Share(held, total), "waypoint proxies")
    told = "; ".join(text for _, text in problems)
    if problems and (not keys or problems[0][0] == UNKNOWN_PROVIDER):
        return Condition(WAYPOINT_ACCEPTED, "False", problems[0][0], told)
    if not 0 < total == held:
        text = f"{told}; {message}" if told else message
        return Condition(WAYPOINT_ACCEPTED, "Unknown", "Pending", text)
    if problems:
        return Condition(WAYPOINT_ACCEPTED, "True", "PartiallyInvalid", f"{told}; {message}")
    return Condition(WAYPOINT_ACCEPTED, "True", "Accepted", message)


def _provider_problem(index: ClusterIndex, ref: Ref) -> list[tuple[str, str]]:
    """What is wrong with whom a CUSTOM policy asks."""
    view = index.inventory.view(ref)
    if not isinstance(view, AuthorizationPolicy):
        return []
    provider = provider_of(index.mesh, index.inventory, view)
    if provider is None:
        return []
    config = mesh_config_ref(index.mesh.root_namespace)
    error = index.errors(config)
    unread = f"{config} cannot be read, the state before stays in force: {error}" if error else ""
    if provider.problem:
        said = f"{provider.problem}: requests that its rules match are denied"
        return [(UNKNOWN_PROVIDER, "; ".join(each for each in (said, unread) if each))]
    return [("ProviderUnchanged", unread)] if unread else []


def _keys(index: ClusterIndex, target: Ref) -> tuple[list[str], list[tuple[str, str]]]:
    """The TrafficConfigs that a target's policy is in, and what is wrong with the target."""
    traffic = index.traffic
    match target.kind:
        case "Service" | "ServiceEntry":
            if index.inventory.view(target) is None:
                return [], [("TargetNotFound", f"there is no {target}")]
            if keys := traffic.config_keys(target):
                return [*keys], []
            return [], [("AncestorNotBound", f"{target} goes through no waypoint")]
        case "Gateway":
            if target not in traffic.waypoints:
                return [], [("TargetNotFound", f"there is no waypoint {target}")]
            return [f"{target.namespace}/{target.name}"], []
        case "GatewayClass":
            return [f"{each.namespace}/{each.name}" for each in traffic.waypoints], []
        case _:
            return _keys_of_route(index, target)


def _keys_of_route(index: ClusterIndex, target: Ref) -> tuple[list[str], list[tuple[str, str]]]:
    if index.inventory.view(target) is None:
        return [], [("TargetNotFound", f"there is no {target}")]
    keys = [key for ref in index.traffic.parents_of(target) if (key := _key(index, ref))]
    return keys, [] if keys else [("AncestorNotBound", f"{target} is on no waypoint")]


def _key(index: ClusterIndex, ref: Ref) -> str:
    return index.traffic.config_key(ref)


def changed(old: dict[Ref, Fragment], new: dict[Ref, Fragment]) -> Iterable[tuple[Ref, Fragment]]:
    """What has to be written; an object of which nothing is said any more gets an empty one."""
    for ref, fragment in new.items():
        if old.get(ref) != fragment:
            yield ref, fragment
    for ref in old.keys() - new.keys():
        gone = old[ref]
        yield (
            ref,
            Fragment(
                parents=() if gone.parents is not None else None,
                ancestors=() if gone.ancestors is not None else None,
            ),
        )
