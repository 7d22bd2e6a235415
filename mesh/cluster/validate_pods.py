"""Checks of what several objects want of the same pods, where they cannot all have it. Pure.

Part of `mesh.cluster.validate`: NetworkPolicies that cut enrolled pods off from the mesh, and
Services that bring the same pods behind different waypoints.
A remark is an object, a field, a message and a hint.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

from mesh.cluster.api import Ref
from mesh.cluster.gateways import USE_WAYPOINT, named_gateway
from mesh.cluster.inventory import Inventory
from mesh.cluster.network_policies import HBONE_PORT, NetworkPolicy, blocking
from mesh.cluster.objects import Namespace, Pod, Service
from mesh.cluster.validate_traffic import Pods, Remark

_MODE = "istio.io/dataplane-mode"
_AMBIENT = "ambient"


def odd_pods(inventory: Inventory, pods: Pods) -> Iterator[Remark]:
    """Everything that is odd, in the order of the checks."""
    yield from _cut_off(inventory, pods)
    yield from _two_waypoints(inventory, pods)


def is_enrolled(pod: Pod, namespace: Namespace | None) -> bool:
    """Whether labels take a pod into the mesh: its own, else its namespace's."""
    if pod.host_network:
        return False
    inherited = namespace.labels.get(_MODE, "") if namespace is not None else ""
    return pod.labels.get(_MODE, inherited) == _AMBIENT


def _cut_off(inventory: Inventory, pods: Pods) -> Iterator[Remark]:
    enrolled = [
        (ref, pod)
        for ref, _, pod in pods
        if is_enrolled(pod, inventory.get(Namespace, "", ref.namespace))
    ]
    for policy, direction, ref in blocking(inventory.all(NetworkPolicy), enrolled):
        what = "that come to" if direction == "Ingress" else "that leave"
        message = f"TCP port {HBONE_PORT} is not among its ports: the mesh's tunnels {what} {ref}"
        hint = f"add `ports: [{{port: {HBONE_PORT}}}]` to a rule; AuthorizationPolicy tells callers"
        path = f"spec.{direction.lower()}"
        yield policy.ref, path, f"{message} are dropped", f"{hint} apart"


def _two_waypoints(inventory: Inventory, pods: Pods) -> Iterator[Remark]:
    """A pod can only be told whose waypoint its callers come from, for each of its ports."""
    by_namespace: dict[str, list[tuple[Ref, Pod]]] = {}
    for ref, _, pod in pods:
        by_namespace.setdefault(ref.namespace, []).append((ref, pod))
    told: set[tuple[Ref, Ref]] = set()
    for namespace, listed in by_namespace.items():
        home = inventory.get(Namespace, "", namespace)
        behind = [
            (service, (named.namespace or namespace, named.name))
            for service in inventory.within(Service, namespace)
            if service.selector and (named := named_gateway(service, home)) is not None
        ]
        if len({waypoint for _, waypoint in behind}) < 2:
            continue
        for ref, pod in listed:
            mine = [each for each in behind if each[0].selects(pod.labels)]
            for (first, one), (second, other) in pairwise(mine):
                if one == other or (second.ref, first.ref) in told:
                    continue
                if not _targets(first) & _targets(second):
                    continue
                told.add((second.ref, first.ref))
                message = (
                    f"{ref} is behind two waypoints for the same port: {'/'.join(other)} here, "
                    f"{'/'.join(one)} by {first.ref}; where either has layer 7 policy, callers "
                    "of the other are refused"
                )
                field = f'metadata.labels["{USE_WAYPOINT}"]'
                yield second.ref, field, message, "let Services that share pods use one waypoint"


def _targets(service: Service) -> set[int | str]:
    return {port.target for port in service.ports if port.protocol == "TCP"}
