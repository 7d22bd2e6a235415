"""AuthorizationPolicy with targetRefs -> what the waypoint judges; and what stands for a policy
that cannot be read. Pure.

Strings keep their syntax: the waypoint compiles them. What only this side knows is settled
here: the namespace of a service account named without one, whether the policy is for show, and
what cannot be carried out at all. That, and a policy that was never readable, is handed on with
its `problem`, and the waypoint denies what the policy was for.
"""

from __future__ import annotations

from dataclasses import replace

from istiod_lite.policies import DRY_RUN
from mesh.cluster.api import Object, Ref
from mesh.cluster.fields import Reader
from mesh.cluster.policies import AuthorizationPolicy, Condition, Operation, Source, TargetRef
from mesh.cluster.routes import RouteView
from mesh.errors import ConfigError
from mesh.model import l7_policy as model

POLICY_KINDS = (
    "AuthorizationPolicy",
    "RequestAuthentication",
    "RateLimitPolicy",
    "RedactionPolicy",
)
Policy = (
    model.L7Authorization
    | model.RequestAuthentication
    | model.RateLimitPolicy
    | model.RedactionPolicy
)


def translate(
    policy: AuthorizationPolicy,
    source: str = "",
    provider: model.ExternalAuthorizer | None = None,
) -> model.L7Authorization:
    """The waypoint's policy; `source` is where it is written, `provider` whom a CUSTOM one asks."""
    return model.L7Authorization(
        namespace=policy.namespace,
        name=policy.name,
        action=_action(policy.action),
        rules=tuple(
            model.L7Rule(
                tuple(_source(each, policy.namespace) for each in rule.sources),
                tuple(_operation(each) for each in rule.operations),
                tuple(_condition(each, policy.namespace) for each in rule.conditions),
            )
            for rule in policy.rules
        ),
        is_dry_run=policy.annotations.get(DRY_RUN, "").lower() == "true",
        provider=provider if policy.action == "CUSTOM" else None,
        source=source,
    )


def _action(action: str) -> model.L7Action:
    match action:
        case "ALLOW" | "DENY" | "AUDIT":
            return action
        case _:
            return "CUSTOM"


def _source(source: Source, namespace: str) -> model.L7Source:
    l7 = source.l7
    return model.L7Source(
        principals=source.principals,
        not_principals=source.not_principals,
        request_principals=l7.get("requestPrincipals", ()),
        not_request_principals=l7.get("notRequestPrincipals", ()),
        namespaces=source.namespaces,
        not_namespaces=source.not_namespaces,
        service_accounts=_accounts(source.service_accounts, namespace),
        not_service_accounts=_accounts(source.not_service_accounts, namespace),
        ip_blocks=source.ip_blocks,
        not_ip_blocks=source.not_ip_blocks,
        remote_ip_blocks=l7.get("remoteIpBlocks", ()),
        not_remote_ip_blocks=l7.get("notRemoteIpBlocks", ()),
    )


def _accounts(texts: tuple[str, ...], namespace: str) -> tuple[str, ...]:
    return tuple(each if "/" in each else f"{namespace}/{each}" for each in texts)


def _operation(operation: Operation) -> model.L7Operation:
    l7 = operation.l7
    return model.L7Operation(
        hosts=l7.get("hosts", ()),
        not_hosts=l7.get("notHosts", ()),
        ports=tuple(str(each) for each in operation.ports),
        not_ports=tuple(str(each) for each in operation.not_ports),
        methods=l7.get("methods", ()),
        not_methods=l7.get("notMethods", ()),
        paths=l7.get("paths", ()),
        not_paths=l7.get("notPaths", ()),
    )


def _condition(condition: Condition, namespace: str) -> model.L7Condition:
    values, not_values = condition.values, condition.not_values
    if condition.key == "source.serviceAccount":
        values, not_values = _accounts(values, namespace), _accounts(not_values, namespace)
    return model.L7Condition(condition.key, values, not_values)


def closed(ref: Ref, problem: str, source: str = "") -> Policy:
    """What stands for a policy that was never readable: it denies what it is attached to."""
    said = f"{ref.kind} cannot be read: {problem}"
    match ref.kind:
        case "RateLimitPolicy":
            return model.RateLimitPolicy(ref.namespace, ref.name, source=source, problem=said)
        case "RedactionPolicy":
            return model.RedactionPolicy(ref.namespace, ref.name, source=source, problem=said)
        case _:
            # Without its tokens' rules nobody can be told apart: that is a denial too.
            return model.L7Authorization(
                ref.namespace, ref.name, "DENY", source=source, problem=said
            )


def targets_of_unreadable(ref: Ref, obj: Object) -> tuple[TargetRef, ...] | None:
    """What a policy that cannot be read is attached to, as far as that can be read.

    None if it is no waypoint's. If its targets cannot be read either, its whole namespace,
    as kind Namespace.
    """
    spec = obj.get("spec")
    if not isinstance(spec, dict):
        spec = {}
    entries = spec.get("targetRefs") or ([spec["targetRef"]] if spec.get("targetRef") else None)
    if not entries:
        return None if ref.kind in ("AuthorizationPolicy", "RequestAuthentication") else _ALL
    found = []
    for index, entry in enumerate(entries if isinstance(entries, list) else [None]):
        reader = Reader(entry, ("spec", "targetRefs", index))
        try:
            group = reader.get("group").text()
            kind, name = reader.get("kind").name(), reader.get("name").name()
        except ConfigError:
            return _ALL
        found.append(TargetRef("" if group == "core" else group, kind, name))
    return tuple(found)


_ALL = (TargetRef("", "Namespace", ""),)


def narrowed(policy: Policy, view: RouteView, sections: set[str]) -> Policy:
    """A policy as it concerns some rules of a route, or all of it."""
    name = f"{view.namespace}/{view.name}"
    unknown = sections - {each.name for each in view.rules} - {""}
    if unknown and isinstance(policy, model.RateLimitPolicy | model.RedactionPolicy):
        # A policy for a rule that there is not would be one that nobody enforces.
        return replace(policy, problem=f"{view.ref} has no rule named {min(unknown)}")
    rules = (name,) if "" in sections else tuple(f"{name}/{each}" for each in sorted(sections))
    match policy:
        case model.RateLimitPolicy():
            limits = (
                replace(each, condition=replace(each.condition, route_rules=rules))
                for each in policy.rules
            )
            return replace(policy, rules=tuple(limits))
        case model.RedactionPolicy():
            return replace(policy, condition=replace(policy.condition, route_rules=rules))
        case _:
            return policy
