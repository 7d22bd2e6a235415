"""What a policy is attached to by its targetRefs, and what it comes to at a waypoint. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from istiod_lite import l7_policies
from istiod_lite.l7_policies import Policy
from mesh.cluster.api import Ref
from mesh.cluster.gateways import GATEWAY_GROUP, WAYPOINT_CLASS, Gateway
from mesh.cluster.l7_policies import RateLimitPolicy, RedactionPolicy, RequestAuthentication
from mesh.cluster.objects import Metadata
from mesh.cluster.policies import AuthorizationPolicy, TargetRef
from mesh.model import l7_policy as model
from mesh.model.l7_policy import ExternalAuthorizer
from mesh.model.route import Route

SHOWS_IDENTITY = "ambient.istio.io/xfcc-include-client-identity"
EXPLAINS = "ambit.dev/explain-denials"

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


def translated(
    view: Metadata | None,
    ref: Ref,
    source: str,
    problem: str,
    asked: ExternalAuthorizer | None = None,
) -> Policy:
    """A policy for waypoints; one that was never readable, because of `problem`, denies. A CUSTOM
    one asks `asked`.
    """
    match view:
        case AuthorizationPolicy():
            return l7_policies.translate(view, source, asked)
        case RequestAuthentication() | RateLimitPolicy() | RedactionPolicy():
            return replace(view.policy, source=source)
        case _:
            return l7_policies.closed(ref, problem, source)


def config_of(
    gateway: Gateway, service: str, policies: Iterable[Policy], routes: tuple[Route, ...]
) -> model.TrafficConfig:
    """What the waypoint of `gateway` does for `service` (`namespace/hostname`), or for all."""
    listed = list(policies)
    annotations = gateway.annotations
    return model.TrafficConfig(
        gateway=f"{gateway.namespace}/{gateway.name}",
        service=service,
        routes=routes,
        authorizations=tuple(p for p in listed if isinstance(p, model.L7Authorization)),
        authentications=tuple(p for p in listed if isinstance(p, model.RequestAuthentication)),
        rate_limits=tuple(p for p in listed if isinstance(p, model.RateLimitPolicy)),
        redactions=tuple(p for p in listed if isinstance(p, model.RedactionPolicy)),
        shows_client_identity=annotations.get(SHOWS_IDENTITY, "").lower() == "true",
        explains_denials=annotations.get(EXPLAINS, "").lower() == "true",
    )
