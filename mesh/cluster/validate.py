"""Checks over a whole set of objects: what each by itself is well-formed but does not fit. Pure.

`check` reads raw objects and tells everything it finds, with file, line and column; an
ERROR is what a cluster would refuse or what cannot mean anything, a WARNING what is
allowed but hardly meant. Pods count as they are written: those of a Deployment's template
are checked as the pods it will make.
"""

from __future__ import annotations

import enum
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace

from mesh.cluster.api import Object, Ref, Source, ref_of
from mesh.cluster.fields import Reader
from mesh.cluster.inventory import Inventory
from mesh.cluster.objects import Namespace, Pod, Service, ServiceAccount, is_selected, parse_pod
from mesh.cluster.policies import AuthorizationPolicy, PeerAuthentication
from mesh.cluster.shapes import unknown_fields
from mesh.cluster.validate_authorizers import odd_authorizers
from mesh.cluster.validate_pods import odd_pods
from mesh.cluster.validate_policies import idle_rules, unseen_rules
from mesh.cluster.validate_traffic import odd_traffic
from mesh.errors import ConfigError

# What exists in every cluster without anybody writing it down.
_GIVEN_NAMESPACES = frozenset({"", "default", "kube-system", "kube-public", "kube-node-lease"})
TEMPLATES: Mapping[str, tuple[str, ...]] = {
    "Deployment": ("spec", "template"),
    "StatefulSet": ("spec", "template"),
    "DaemonSet": ("spec", "template"),
    "ReplicaSet": ("spec", "template"),
    "Job": ("spec", "template"),
    "CronJob": ("spec", "jobTemplate", "spec", "template"),
}

_COMPARE = "compare it with the labels of the pods, or of their template"


class Severity(enum.Enum):
    """How bad a finding is."""

    ERROR = "error"
    WARNING = "warning"


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing worth telling. `field` is a path within the object `ref`."""

    severity: Severity
    message: str
    ref: Ref | None = None
    field: str = ""
    source: Source | None = None
    hint: str = ""

    def __str__(self) -> str:
        where = str(self.source.at(self.field)) if self.source else ""
        named = f"{self.ref}" if self.ref else ""
        return ": ".join(part for part in (where, named, self.field, self.message) if part)


@dataclass(slots=True)
class _Set:
    """What the checks look at: the inventory, and pods that templates will make."""

    inventory: Inventory
    root_namespace: str
    is_translated: bool = True
    refs: list[Ref] = field(default_factory=list)
    pods: list[tuple[Ref, str, Pod]] = field(default_factory=list)


def finding_of(error: ConfigError, ref: Ref | None = None) -> Finding:
    """An error that was raised, as a finding."""
    source = Source(error.file, error.line, error.column) if error.file else None
    return Finding(Severity.ERROR, error.message, ref, error.field, source, error.hint)


def check(
    objects: Iterable[tuple[Object, Source | None]],
    root_namespace: str = "istio-system",
    *,
    is_translated: bool = True,
) -> list[Finding]:
    """Everything that is wrong or odd about these objects, in the order of the checks.

    Policies of `root_namespace` are for the whole mesh. Where no controller translates the objects
    as well (not `is_translated`), what it would say of them is said here.
    """
    findings: list[Finding] = []
    checked = _Set(Inventory(), root_namespace, is_translated)
    places: dict[Ref, Source | None] = {}
    for obj, source in objects:
        try:
            ref = ref_of(obj)
        except ConfigError as exc:
            findings.append(Finding(Severity.ERROR, exc.message, None, exc.field, source, exc.hint))
            continue
        if ref in places:
            findings.append(
                Finding(
                    Severity.ERROR,
                    f"already defined at {places[ref] or 'another place'}",
                    ref,
                    "metadata.name",
                    source,
                )
            )
            continue
        places[ref] = source
        checked.refs.append(ref)
        findings.extend(_misspelt(ref, obj, source))
        try:
            view = checked.inventory.put(ref, obj, source)
            if isinstance(view, Pod):
                checked.pods.append((ref, "", view))
            elif ref.kind in TEMPLATES:
                checked.pods.append(_templated(ref, obj))
        except ConfigError as exc:
            found = finding_of(exc, ref)
            if source is None or found.source in (None, source.at(exc.field)):
                found = replace(found, source=source)
            findings.append(found)
    findings.extend(_relate(checked, places))
    return findings


def _misspelt(ref: Ref, obj: Object, source: Source | None) -> Iterator[Finding]:
    for path, meant in unknown_fields(ref.kind, obj):
        hint = f"did you mean {meant}?" if meant else ""
        message = "unknown field: it is ignored"
        yield Finding(Severity.WARNING, message, ref, path, source, hint)


def _templated(ref: Ref, obj: Object) -> tuple[Ref, str, Pod]:
    path = TEMPLATES[ref.kind]
    template = Reader(obj).at(*path)
    prefix = ".".join(path) + "."
    if not template.exists:
        template.fail("missing")
    metadata = dict(template.get("metadata").value or {})
    pod: Object = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {**metadata, "name": ref.name, "namespace": ref.namespace},
        "spec": template.get("spec").value,
    }
    try:
        return ref, prefix, parse_pod(pod)
    except ConfigError as exc:
        raise ConfigError(exc.message, field=prefix + exc.field, hint=exc.hint) from exc


def _relate(checked: _Set, places: Mapping[Ref, Source | None]) -> Iterator[Finding]:
    inventory = checked.inventory
    for each in (
        _missing_namespaces(checked),
        _dangling_accounts(checked),
        _shared_ports(checked),
        _odd_services(checked),
        _odd_policies(checked),
        odd_traffic(inventory, checked.pods),
        odd_authorizers(inventory, checked.root_namespace),
        odd_pods(inventory, checked.pods),
    ):
        for ref, path, message, hint in each:
            source = places.get(ref) or inventory.source(ref)
            yield Finding(Severity.WARNING, message, ref, path, source, hint)


_Remark = tuple[Ref, str, str, str]


def _missing_namespaces(checked: _Set) -> Iterator[_Remark]:
    known = {each.name for each in checked.inventory.all(Namespace)} | _GIVEN_NAMESPACES
    for ref in checked.refs:
        if ref.namespace not in known:
            hint = "write a Namespace object, or correct the name"
            yield ref, "metadata.namespace", f'no namespace "{ref.namespace}" is defined', hint


def _dangling_accounts(checked: _Set) -> Iterator[_Remark]:
    for ref, prefix, pod in checked.pods:
        name = pod.service_account
        if name == "default" or checked.inventory.get(ServiceAccount, ref.namespace, name):
            continue
        yield (
            ref,
            f"{prefix}spec.serviceAccountName",
            f'no service account "{name}" is defined in namespace "{ref.namespace}"',
            "write a ServiceAccount object, or correct the name",
        )


def _shared_ports(checked: _Set) -> Iterator[_Remark]:
    for ref, prefix, pod in checked.pods:
        times = Counter((each.number, each.protocol) for each in pod.ports)
        for (number, protocol), count in times.items():
            if count > 1:
                message = (
                    f"port {number}/{protocol} is declared twice: the containers of a pod share "
                    "its address, so only one of them can listen there"
                )
                yield ref, f"{prefix}spec.containers", message, "give each a port of its own"


def _odd_services(checked: _Set) -> Iterator[_Remark]:
    pods: dict[str, list[Pod]] = {}
    for ref, _, pod in checked.pods:
        pods.setdefault(ref.namespace, []).append(pod)
    for service in checked.inventory.all(Service):
        if not service.selector or service.type == "ExternalName":
            continue
        home = pods.get(service.namespace, ())
        selected = [pod for pod in home if service.selects(pod.labels)]
        if not selected:
            pairs = ", ".join(f"{key}={value}" for key, value in service.selector.items())
            message = f"selects nothing: no pod in {service.namespace!r} has {pairs}"
            yield service.ref, "spec.selector", message, _COMPARE
            continue
        for index, port in enumerate(service.ports):
            if isinstance(port.target, int):
                continue
            lacking = [
                pod.name
                for pod in selected
                if not any(
                    (each.name, each.protocol) == (port.target, port.protocol) for each in pod.ports
                )
            ]
            if lacking:
                message = (
                    f'no container port named "{port.target}" ({port.protocol}) in '
                    f"{', '.join(lacking[:3])}{', …' if len(lacking) > 3 else ''}"
                )
                yield service.ref, f"spec.ports[{index}].targetPort", message, ""


def _odd_policies(checked: _Set) -> Iterator[_Remark]:
    for policy in checked.inventory.all(AuthorizationPolicy):
        if not policy.rules and policy.action == "ALLOW":
            message = (
                "ALLOW without rules never matches: it denies everything that no other "
                "policy allows"
            )
            hint = "write `rules: [{}]` to allow everything"
            yield policy.ref, "spec.rules", message, hint
        elif not policy.rules:
            message = f"{policy.action} without rules never matches: it does nothing"
            yield policy.ref, "spec.rules", message, ""
        yield from idle_rules(policy)
        if not checked.is_translated:
            yield from unseen_rules(policy)
        if policy.selector and not policy.target_refs:
            everywhere = policy.namespace == checked.root_namespace
            yield from _idle_selector(checked, policy.ref, policy.selector, everywhere)
    for peer in checked.inventory.all(PeerAuthentication):
        if not peer.selector:
            continue
        if peer.namespace == checked.root_namespace:
            message = "a selector in the root namespace has no effect"
            yield peer.ref, "spec.selector", message, ""
        else:
            yield from _idle_selector(checked, peer.ref, peer.selector, everywhere=False)


def _idle_selector(
    checked: _Set, ref: Ref, selector: Mapping[str, str], everywhere: bool
) -> Iterator[_Remark]:
    if any(
        (everywhere or home.namespace == ref.namespace) and is_selected(selector, pod.labels)
        for home, _, pod in checked.pods
    ):
        return
    pairs = ", ".join(f"{key}={value}" for key, value in selector.items())
    where = "anywhere" if everywhere else f"in {ref.namespace!r}"
    message = f"selects nothing: no pod {where} has {pairs}"
    yield ref, "spec.selector.matchLabels", message, _COMPARE
