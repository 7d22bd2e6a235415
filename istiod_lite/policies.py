"""AuthorizationPolicy -> what the tunnel judges (`model.Authorization`). Pure.

The split is Istio's. A policy with targetRefs is a waypoint's and not ours; without them it
is the tunnel's: for the whole mesh (root namespace), a namespace, or the pods it selects.
A rule of the API becomes one rule: its `from` one clause, its `to` one, each `when` one.

The tunnel sees no HTTP, and fails closed. In an ALLOW, a rule that asks for HTTP is dropped
and the policy stays: what only that rule would have allowed is denied. In a DENY the HTTP
fields are dropped and the rest denies, so more is denied than is written. (In Istio an
entry with HTTP fields alone matches nothing there, and the DENY is silently skipped.) Both
are told as findings, because they are rarely what was meant.

A policy that cannot be read at all, and of which nothing older is known, is `closed`: it
denies everything in its scope until it is repaired.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from mesh.cluster.api import Object, Ref
from mesh.cluster.fields import Reader
from mesh.cluster.policies import (
    L4_CONDITIONS,
    AuthorizationPolicy,
    Condition,
    Operation,
    Rule,
    Source,
    parse_network,
    read_selector,
)
from mesh.cluster.validate import Finding, Severity
from mesh.errors import ConfigError
from mesh.model import authorization as model

DRY_RUN = "istio.io/dry-run"
_EMPTY = model.Match()


@dataclass(frozen=True, slots=True)
class Translated:
    """A policy for the tunnel, or none, and what should be said about it."""

    authorization: model.Authorization | None
    findings: tuple[Finding, ...] = ()


def translate(policy: AuthorizationPolicy, root_namespace: str) -> Translated:
    """The tunnel's part of a policy; none if it is not the tunnel's."""
    if policy.target_refs:
        return Translated(None)
    if policy.action not in ("ALLOW", "DENY"):
        return Translated(None, (_unsupported(policy),))
    action = model.Action[policy.action]
    findings: list[Finding] = []
    rules = []
    for index, rule in enumerate(policy.rules):
        translation = _Translation(policy, action, f"spec.rules[{index}]", findings)
        clauses = translation.clauses(rule)
        if clauses is not None:
            rules.append(model.Rule(tuple(clauses)))
    return Translated(
        model.Authorization(
            name=policy.name,
            namespace=policy.namespace,
            scope=scope_of(policy.namespace, policy.selector, root_namespace),
            action=action,
            rules=tuple(rules),
            dry_run=policy.annotations.get(DRY_RUN, "").lower() == "true",
        ),
        tuple(findings),
    )


def scope_of(
    namespace: str, selector: Mapping[str, str] | None, root_namespace: str
) -> model.PolicyScope:
    """Whom a policy concerns. A selector without labels still is a selector."""
    if selector is not None:
        return model.PolicyScope.WORKLOAD_SELECTOR
    if namespace == root_namespace:
        return model.PolicyScope.GLOBAL
    return model.PolicyScope.NAMESPACE


def closed(
    ref: Ref, obj: Object, root_namespace: str
) -> tuple[model.Authorization, Mapping[str, str] | None] | None:
    """What stands for a policy that cannot be read: it denies, as wide as it was to apply.

    Also its selector. None if it is clearly a waypoint's, or would never have denied.
    """
    spec = obj.get("spec")
    if not isinstance(spec, dict):
        spec = {}
    if spec.get("targetRef") or spec.get("targetRefs"):
        return None
    written = spec.get("action", "ALLOW")
    if written in ("AUDIT", "CUSTOM"):
        return None
    try:
        selector = read_selector(Reader(spec.get("selector"), ("spec", "selector")))
    except ConfigError:
        selector = None  # whom it selects is unreadable too: then all that it could select
    # An ALLOW that never matches leaves what other policies allow; a DENY must not.
    is_allow = written in ("ALLOW", None)
    authorization = model.Authorization(
        name=ref.name,
        namespace=ref.namespace,
        scope=scope_of(ref.namespace, selector, root_namespace),
        action=model.Action.ALLOW if is_allow else model.Action.DENY,
        rules=() if is_allow else (model.Rule(),),
    )
    return authorization, selector


def _unsupported(policy: AuthorizationPolicy) -> Finding:
    consequence = (
        "nothing is decided by it" if policy.action == "CUSTOM" else "nothing is recorded for it"
    )
    return Finding(
        Severity.WARNING,
        f"the tunnel does not support {policy.action}: {consequence}",
        policy.ref,
        "spec.action",
        hint="attach the policy to a waypoint with targetRefs",
    )


class _Translation:
    """One rule on its way; collects findings."""

    def __init__(
        self,
        policy: AuthorizationPolicy,
        action: model.Action,
        path: str,
        findings: list[Finding],
    ) -> None:
        self._policy = policy
        self._action = action
        self._path = path
        self._findings = findings

    def clauses(self, rule: Rule) -> list[model.Clause] | None:
        """The clauses, all of which must match; None if the rule must not allow anything."""
        beyond = [*_beyond_l4(rule)]
        if beyond and self._action is model.Action.ALLOW:
            field, names = beyond[0]
            self._tell(
                Severity.WARNING,
                field,
                f"{names} cannot be seen by the tunnel: this rule allows nothing",
            )
            return None
        found = []
        if rule.operations:
            matches = [_operation(each) for each in rule.operations]
            found.append(_clause(matches, [bool(each.l7) for each in rule.operations]))
        if rule.sources:
            matches = [_source(each, self._policy.namespace) for each in rule.sources]
            found.append(_clause(matches, [bool(each.l7) for each in rule.sources]))
        for each in rule.conditions:
            match = _condition(each, self._policy.namespace)
            found.append(_clause([match], [each.key not in L4_CONDITIONS]))
        for field, names in beyond:
            message = f"{names} cannot be seen by the tunnel: more is denied than is written"
            self._tell(Severity.WARNING, field, message)
        return found

    def _tell(self, severity: Severity, part: str, message: str) -> None:
        self._findings.append(
            Finding(
                severity,
                message,
                self._policy.ref,
                f"{self._path}.{part}",
                hint="attach the policy to a waypoint with targetRefs",
            )
        )


def _clause(matches: list[model.Match], unseen: list[bool]) -> model.Clause:
    """A DENY rule's clause. An entry that asks only for what the tunnel cannot see may be what
    it would have denied: then the clause asks nothing, and the rest of the rule decides. (An
    empty Match would never match, and the rule would be silently skipped.)
    """
    if any(flag and match == _EMPTY for match, flag in zip(matches, unseen, strict=True)):
        return model.Clause()
    return model.Clause(tuple(matches))


def _beyond_l4(rule: Rule) -> Iterable[tuple[str, str]]:
    """Parts of a rule that only an HTTP proxy can judge: path and names."""
    for index, source in enumerate(rule.sources):
        if source.l7:
            yield f"from[{index}].source", ", ".join(source.l7)
    for index, operation in enumerate(rule.operations):
        if operation.l7:
            yield f"to[{index}].operation", ", ".join(operation.l7)
    for index, condition in enumerate(rule.conditions):
        if condition.key not in L4_CONDITIONS:
            yield f"when[{index}].key", condition.key


def _operation(operation: Operation) -> model.Match:
    return model.Match(destination_ports=operation.ports, not_destination_ports=operation.not_ports)


def _source(source: Source, namespace: str) -> model.Match:
    return model.Match(
        principals=_strings(source.principals),
        not_principals=_strings(source.not_principals),
        namespaces=_strings(source.namespaces),
        not_namespaces=_strings(source.not_namespaces),
        source_ips=source.ip_blocks,
        not_source_ips=source.not_ip_blocks,
        service_accounts=_accounts(source.service_accounts, namespace),
        not_service_accounts=_accounts(source.not_service_accounts, namespace),
    )


def _condition(condition: Condition, namespace: str) -> model.Match:
    yes, no = condition.values, condition.not_values
    match condition.key:
        case "source.ip":
            return model.Match(source_ips=_networks(yes), not_source_ips=_networks(no))
        case "source.namespace":
            return model.Match(namespaces=_strings(yes), not_namespaces=_strings(no))
        case "source.principal":
            return model.Match(principals=_strings(yes), not_principals=_strings(no))
        case "source.serviceAccount":
            return model.Match(
                service_accounts=_accounts(yes, namespace),
                not_service_accounts=_accounts(no, namespace),
            )
        case "destination.ip":
            return model.Match(destination_ips=_networks(yes), not_destination_ips=_networks(no))
        case "destination.port":
            return model.Match(
                destination_ports=tuple(int(each) for each in yes),
                not_destination_ports=tuple(int(each) for each in no),
            )
        case _:
            return _EMPTY


def _strings(texts: Iterable[str]) -> tuple[model.StringMatch, ...]:
    return tuple(_string(each) for each in texts)


def _string(text: str) -> model.StringMatch:
    if text == "*":
        return model.StringMatch(model.StringKind.PRESENCE)
    if text.startswith("*"):
        return model.StringMatch(model.StringKind.SUFFIX, text[1:])
    if text.endswith("*"):
        return model.StringMatch(model.StringKind.PREFIX, text[:-1])
    return model.StringMatch(model.StringKind.EXACT, text)


def _accounts(texts: Iterable[str], namespace: str) -> tuple[model.ServiceAccountMatch, ...]:
    found = []
    for each in texts:
        home, slash, name = each.rpartition("/")
        found.append(model.ServiceAccountMatch(home if slash else namespace, name))
    return tuple(found)


def _networks(texts: Iterable[str]) -> tuple[str, ...]:
    return tuple(parse_network(each) for each in texts)
