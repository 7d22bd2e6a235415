"""What a policy is attached to by its targetRefs, and what it comes to at a waypoint. Pure."""

from __future__ import annotations

from dataclasses import replace

from istiod_lite import l7_policies
from istiod_lite.l7_policies import Policy
from istiod_lite.providers import provider_of
from istiod_lite.workloads import Mesh
from mesh.cluster.api import Ref
from mesh.cluster.gateways import GATEWAY_GROUP, WAYPOINT_CLASS
from mesh.cluster.inventory import Inventory
from mesh.cluster.l7_policies import RateLimitPolicy, RedactionPolicy, RequestAuthentication
from mesh.cluster.policies import AuthorizationPolicy, TargetRef

#: Every waypoint.
CLASS = Ref("GatewayClass", "", WAYPOINT_CLASS)


def target_of(policy: Ref, target: TargetRef, root_namespace: str) -> Ref | None:
    """The object that a targetRef of `policy` means; None for what it cannot be attached to."""
    if target.namespace not in ("", policy.namespace):
        return None
    match target.group, target.kind:
        case "", "Service":
            return Ref("Service", policy.namespace, target.name)
        case "networking.istio.io", "ServiceEntry":
            return Ref("ServiceEntry", policy.namespace, target.name)
        case "", "Namespace":
            return Ref("Namespace", "", policy.namespace)
        case g, "Gateway" if g == GATEWAY_GROUP:
            return Ref("Gateway", policy.namespace, target.name)
        case g, "GatewayClass" if g == GATEWAY_GROUP:
            is_ours = target.name == WAYPOINT_CLASS and policy.namespace == root_namespace
            return CLASS if is_ours else None
        case g, ("HTTPRoute" | "GRPCRoute") if g == GATEWAY_GROUP:
            is_ours = policy.kind in ("RateLimitPolicy", "RedactionPolicy")
            return Ref(target.kind, policy.namespace, target.name) if is_ours else None
        case _:
            return None


def translated(mesh: Mesh, inventory: Inventory, ref: Ref, problem: str) -> Policy:
    """A policy for waypoints; one that was never readable, because of `problem`, denies."""
    source = str(inventory.source(ref) or "")
    match view := inventory.view(ref):
        case AuthorizationPolicy():
            return l7_policies.translate(view, source, provider_of(mesh, inventory, view))
        case RequestAuthentication() | RateLimitPolicy() | RedactionPolicy():
            return replace(view.policy, source=source)
        case _:
            return l7_policies.closed(ref, problem, source)
