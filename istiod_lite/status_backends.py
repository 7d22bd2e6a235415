"""What is said of DestinationRules and XBackendTrafficPolicies: whether they are in force, where,
and which of their fields have no effect here. Pure.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator

from istiod_lite import backends
from istiod_lite.conditions import WAYPOINT_ACCEPTED, AncestorStatus, Condition, Fragment
from istiod_lite.index import ClusterIndex
from istiod_lite.subscriptions import Share
from mesh.cluster.api import Ref
from mesh.cluster.objects import Service
from mesh.cluster.traffic_policies import DestinationRule, XBackendTrafficPolicy
from mesh.xds.translate import TRAFFIC_TYPE

Shares = Callable[[str, Collection[str], str], Share]
_LISTED = 5


def each_status(index: ClusterIndex, shares: Shares) -> Iterator[tuple[Ref, Fragment]]:
    """Our part of the status of each of them."""
    for rule in list(index.inventory.all(DestinationRule)):
        yield rule.ref, Fragment((_rule(index, rule, shares),))
    for policy in list(index.inventory.all(XBackendTrafficPolicy)):
        targets = backends.targets_of(policy)
        entries = (AncestorStatus(t, (_policy(index, policy, t, shares),)) for t in targets)
        yield policy.ref, Fragment(ancestors=tuple(entries))


def _rule(index: ClusterIndex, rule: DestinationRule, shares: Shares) -> Condition:
    kind = WAYPOINT_ACCEPTED
    if error := index.errors(rule.ref):
        return Condition(kind, "False", "Invalid", f"the state before stays in force: {error}")
    mesh, inventory = index.mesh, index.inventory
    services = [each for each in inventory.all(Service) if backends.concerns(mesh, rule, each)]
    if not services:
        where = f"{rule.namespace} or, for all, {mesh.root_namespace}"
        message = f"no Service is called {backends.host_of(mesh, rule)}: it has to be in {where}"
        return Condition(kind, "False", "TargetNotFound", message)
    won = [each for each in services if backends.rule_of(mesh, each, inventory) == rule]
    if rule.settings is not None and not won:
        return Condition(kind, "False", "Conflicted", "another rule goes first for its host")
    return _reached(index, kind, [each.ref for each in won], rule.ignored, shares)


def _policy(
    index: ClusterIndex, policy: XBackendTrafficPolicy, target: Ref, shares: Shares
) -> Condition:
    kind = "Accepted"
    if error := index.errors(policy.ref):
        return Condition(kind, "False", "Invalid", f"the state before stays in force: {error}")
    service = index.inventory.get(Service, target.namespace, target.name)
    if service is None:
        return Condition(kind, "False", "TargetNotFound", f"there is no {target}")
    if backends.policy_of(service, index.inventory) != policy:
        return Condition(kind, "False", "Conflicted", f"an older policy is on {target}")
    return _reached(index, kind, [target], (), shares)


def _reached(
    index: ClusterIndex,
    kind: str,
    services: list[Ref],
    ignored: tuple[str, ...],
    shares: Shares,
) -> Condition:
    """By whom it is carried out: the waypoints of the Services, and of routes that lead to them."""
    parents = [p for each in services for p in index.traffic.parents_by_backend(each)]
    keys = {key for each in (*services, *parents) if (key := index.traffic.config_key(each))}
    told = ""
    if ignored:
        more = f" and {len(ignored) - _LISTED} more" if len(ignored) > _LISTED else ""
        told = f"no effect here: {', '.join(ignored[:_LISTED])}{more}; "
    if not keys:
        text = (
            f"{told}no waypoint has it: its Service goes through none, and node proxies ignore it"
        )
        return Condition(kind, "False", "AncestorNotBound", text)
    held = total = 0
    for account in sorted({"/".join(key.split("/")[:2]) for key in keys}):
        names = [key for key in keys if key.startswith(f"{account}/")]
        share = shares(TRAFFIC_TYPE, names, account)
        if share.refusal:
            return Condition(kind, "False", "Invalid", f"refused: {share.refusal}")
        held, total = held + share.held, total + share.total
    message = f"{told}applied on {held} of {total} waypoint proxies"
    if not 0 < total == held:
        return Condition(kind, "Unknown", "Pending", message)
    return Condition(kind, "True", "PartiallyInvalid" if ignored else "Accepted", message)
