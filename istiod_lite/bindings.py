"""Which waypoint a service or a pod goes through, and why not, if not. Pure.

`istio.io/use-waypoint` of the object goes before that of its namespace; `none` opts out. The
Gateway named must be of the waypoint class, serve this kind of traffic (`istio.io/waypoint-for`),
admit the namespace (`allowedRoutes` of its listener) and be ready, or have been.

A waypoint that is not ready is not referred to, as in Istio, and traffic goes without it; but
where L7 policy would be skipped that way, it is (see `address_for`), and so nothing gets through.
A waypoint's own Service and pods never go through a waypoint.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from istiod_lite.workloads import Mesh
from mesh.cluster.api import Ref
from mesh.cluster.entries import ServiceEntry
from mesh.cluster.gateways import (
    HBONE_PORT,
    WAYPOINT_FOR,
    Gateway,
    GatewayClass,
    Listener,
    named_gateway,
)
from mesh.cluster.objects import Namespace, Pod, Service
from mesh.identity import SpiffeId
from mesh.model.workload import GatewayAddress, NamespacedHostname

PROTOCOL = "HBONE"
TRAFFIC = ("service", "workload", "all", "none")
_NAME = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?")


@dataclass(frozen=True, slots=True)
class Waypoint:
    """A Gateway of the waypoint class as bindings need it. `problem`: why none is made of it."""

    ref: Ref
    traffic: str = "service"
    listener: Listener | None = None
    is_ready: bool = False
    problem: str = ""


@dataclass(frozen=True, slots=True)
class Binding:
    """What came of `use-waypoint`: the Gateway named, if any, and why it is not used.

    `reason` is one of the condition WaypointBound; empty means bound.
    """

    gateway: Ref | None = None
    reason: str = ""
    message: str = ""

    @property
    def is_bound(self) -> bool:
        """Whether traffic goes through the waypoint that is named."""
        return self.gateway is not None and not self.reason

    @property
    def is_served(self) -> bool:
        """Whether the waypoint may serve this, though it may not be up yet."""
        return self.gateway is not None and self.reason in ("", "WaypointIsNotReady")


def waypoint_of(
    gateway: Gateway, gateway_class: GatewayClass | None, *, has_ready_pod: bool
) -> Waypoint:
    """What a Gateway of the waypoint class comes to."""
    listener = next((each for each in gateway.listeners if each.protocol == PROTOCOL), None)
    traffic = gateway.labels.get(WAYPOINT_FOR)
    if traffic is None and gateway_class is not None:
        traffic = gateway_class.labels.get(WAYPOINT_FOR)
    problem = ""
    if listener is None:
        problem = f"no listener speaks {PROTOCOL}"
    elif len(gateway.listeners) > 1 or listener.port != HBONE_PORT:
        problem = f"a waypoint has one listener, on port {HBONE_PORT}"
    elif traffic is not None and traffic not in TRAFFIC:
        problem = f"{WAYPOINT_FOR} is none of {', '.join(TRAFFIC)}"
    is_ready = not problem and (has_ready_pod or bool(gateway.addresses))
    return Waypoint(gateway.ref, traffic or "service", listener, is_ready, problem)


def bind(
    view: Service | ServiceEntry | Pod,
    namespace: Namespace | None,
    waypoints: Mapping[Ref, Waypoint],
) -> Binding:
    """The binding of a service, of the hosts of a ServiceEntry, or of a pod."""
    ref = named_gateway(view, namespace)
    if ref is None:
        return Binding()
    if not _NAME.fullmatch(ref.namespace) or not _NAME.fullmatch(ref.name):
        return Binding(None, "WaypointIsNotReady", f"no waypoint can be called {_name(ref)!r}")
    waypoint = waypoints.get(ref)
    if waypoint is None:
        return Binding(ref, "WaypointIsNotReady", f"there is no waypoint {_name(ref)}")
    wanted = "workload" if isinstance(view, Pod) else "service"
    if waypoint.traffic not in (wanted, "all"):
        return Binding(
            ref,
            "UnsupportedTrafficType",
            f"waypoint {_name(ref)} is for {waypoint.traffic} traffic, not for {wanted}s",
        )
    if not _admits(waypoint, view.namespace, namespace):
        return Binding(
            ref,
            "AttachmentDenied",
            f"waypoint {_name(ref)} does not admit namespace {view.namespace} (allowedRoutes)",
        )
    if waypoint.problem:
        return Binding(ref, "WaypointIsNotReady", f"waypoint {_name(ref)}: {waypoint.problem}")
    if not waypoint.is_ready:
        return Binding(ref, "WaypointIsNotReady", f"no pod of waypoint {_name(ref)} is ready")
    return Binding(ref)


def _admits(waypoint: Waypoint, name: str, namespace: Namespace | None) -> bool:
    listener = waypoint.listener
    if listener is None or listener.namespaces == "Same":
        return name == waypoint.ref.namespace
    if listener.namespaces == "Selector":
        labels = {"kubernetes.io/metadata.name": name, **(namespace.labels if namespace else {})}
        return all(each.admits(labels) for each in listener.selector)
    return listener.namespaces == "All"


def address_for(mesh: Mesh, binding: Binding, *, has_policy: bool) -> GatewayAddress | None:
    """The `waypoint` that node proxies are told.

    One that is missing or not ready is told all the same where there is L7 policy: a proxy
    that cannot reach it refuses, and does not pass the policy by.
    """
    if binding.gateway is None or not (binding.is_bound or (has_policy and binding.is_served)):
        return None
    ref = binding.gateway
    hostname = mesh.hostname(ref.namespace, ref.name)
    return GatewayAddress(NamespacedHostname(ref.namespace, hostname), HBONE_PORT)


def identity_of(mesh: Mesh, gateway: Ref) -> SpiffeId:
    """Who a waypoint is: its service account has the Gateway's name."""
    return SpiffeId(mesh.trust_domain, gateway.namespace, gateway.name)


def _name(ref: Ref) -> str:
    return f"{ref.namespace}/{ref.name}"
