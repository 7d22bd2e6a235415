"""What holds for calls to a Service: its DestinationRule, and its XBackendTrafficPolicy. Pure.

A DestinationRule counts where Istio's waypoints take it from: the Service's own namespace, then the
root namespace; the most specific host first, of equal ones the oldest. The Gateway API's policy has
to be in the Service's namespace, is one (the oldest), and goes before a DestinationRule in what it
says.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

from istiod_lite.workloads import Mesh
from mesh.cluster.api import Ref
from mesh.cluster.inventory import Inventory
from mesh.cluster.objects import Service
from mesh.cluster.traffic_policies import DestinationRule, XBackendTrafficPolicy
from mesh.model.route import DEFAULT_BACKEND, BackendSettings, Route

KINDS = ("DestinationRule", "XBackendTrafficPolicy")


def host_of(mesh: Mesh, rule: DestinationRule) -> str:
    """The host as a full name; `*` may stand at its beginning."""
    host = rule.host.lower()
    if host.startswith("*"):
        return host
    labels = host.count(".") + 1
    if labels == 1:
        return mesh.hostname(rule.namespace, host)
    name, _, namespace = host.partition(".")
    if labels == 2:
        return mesh.hostname(namespace, name)
    if host.endswith(".svc"):
        return mesh.hostname(namespace.removesuffix(".svc"), name)
    return host


def concerns(mesh: Mesh, rule: DestinationRule, service: Service) -> bool:
    """Whether a rule is for a Service, and from a namespace that may say so."""
    if rule.namespace not in (service.namespace, mesh.root_namespace):
        return False
    host, hostname = host_of(mesh, rule), mesh.hostname(service.namespace, service.name)
    return hostname.endswith(host[1:]) if host.startswith("*") else host == hostname


def rule_of(mesh: Mesh, service: Service, inventory: Inventory) -> DestinationRule | None:
    """The DestinationRule in force on a Service."""
    namespaces = dict.fromkeys((service.namespace, mesh.root_namespace))
    found = [
        rule
        for namespace in namespaces
        for rule in inventory.within(DestinationRule, namespace)
        if rule.settings is not None and concerns(mesh, rule, service)
    ]
    return min(found, key=lambda each: _rank(mesh, service, each), default=None)


def _rank(mesh: Mesh, service: Service, rule: DestinationRule) -> tuple[object, ...]:
    host = host_of(mesh, rule)
    is_far = rule.namespace != service.namespace
    return (is_far, host.startswith("*"), -len(host), rule.created, rule.name)


def policy_of(service: Service, inventory: Inventory) -> XBackendTrafficPolicy | None:
    """The XBackendTrafficPolicy in force on a Service: the oldest."""
    found = [
        each
        for each in inventory.within(XBackendTrafficPolicy, service.namespace)
        if service.ref in targets_of(each)
    ]
    return min(found, key=lambda each: (each.created, each.name), default=None)


def targets_of(policy: XBackendTrafficPolicy) -> Iterator[Ref]:
    """The Services that it names; others it cannot be attached to."""
    for each in policy.target_refs:
        if (each.group, each.kind) == ("", "Service") and each.namespace in ("", policy.namespace):
            yield Ref("Service", policy.namespace, each.name)


def settings_of(mesh: Mesh, service: Service, inventory: Inventory) -> BackendSettings:
    """What holds for calls to a Service."""
    rule, policy = rule_of(mesh, service, inventory), policy_of(service, inventory)
    settings = rule.settings if rule is not None and rule.settings is not None else DEFAULT_BACKEND
    if policy is None:
        return settings
    ports = tuple((number, _with(each, policy)) for number, each in settings.ports)
    return replace(_with(settings, policy), ports=ports)


def _with(settings: BackendSettings, policy: XBackendTrafficPolicy) -> BackendSettings:
    limits, budget = settings.limits, policy.budget
    if budget is not None:
        limits = replace(
            limits,
            retry_budget_percent=budget.retry_budget_percent,
            retry_budget_minimum=budget.retry_budget_minimum,
            retry_interval_seconds=budget.retry_interval_seconds,
            retry_minimum_seconds=budget.retry_minimum_seconds,
            max_retries=0,
        )
    return replace(settings, limits=limits, session=policy.session or settings.session)


def of_routes(
    mesh: Mesh, routes: Iterable[Route], inventory: Inventory
) -> tuple[tuple[str, BackendSettings], ...]:
    """What holds for the backends of routes, mirrors included, where it is not the default."""
    keys: set[str] = set()
    for route in routes:
        for rule in route.rules:
            filters = [*rule.filters, *(f for each in rule.backends for f in each.filters)]
            backends = [
                *rule.backends,
                *(f.mirror.backend for f in filters if f.mirror is not None),
            ]
            keys.update(each.service for each in backends if not each.problem)
    found = []
    for key in sorted(keys):
        namespace, _, hostname = key.partition("/")
        service = inventory.get(Service, namespace, hostname.partition(".")[0])
        if service is None:
            continue
        settings = settings_of(mesh, service, inventory)
        if settings != DEFAULT_BACKEND:
            found.append((key, settings))
    return tuple(found)


def touched(
    mesh: Mesh, inventory: Inventory, *views: DestinationRule | XBackendTrafficPolicy | None
) -> list[Ref]:
    """The Services whose settings may have changed with such an object."""
    found: list[Ref] = []
    for view in views:
        match view:
            case XBackendTrafficPolicy():
                found += targets_of(view)
            case DestinationRule():
                found += [each.ref for each in inventory.all(Service) if concerns(mesh, view, each)]
    return list(dict.fromkeys(found))
