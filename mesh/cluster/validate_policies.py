"""Checks of what AuthorizationPolicies say: rules that nothing can match, and rules that need a
waypoint where there is none. Pure.

Part of `mesh.cluster.validate`. A remark is an object, a field, a message and a hint.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from mesh.cluster.api import Ref
from mesh.cluster.policies import AuthorizationPolicy, Operation, Source

_Remark = tuple[Ref, str, str, str]


def idle_rules(policy: AuthorizationPolicy) -> Iterator[_Remark]:
    """Rules of a policy that do not do what they look like."""
    for index, rule in enumerate(policy.rules):
        field = f"spec.rules[{index}]"
        for number, source in enumerate(rule.sources):
            yield from _never(policy, f"{field}.from[{number}].source", _pairs_of_source(source))
        for number, operation in enumerate(rule.operations):
            place = f"{field}.to[{number}].operation"
            yield from _never(policy, place, _pairs_of_operation(operation))
        for number, condition in enumerate(rule.conditions):
            pair = ("values", condition.values, condition.not_values)
            yield from _never(policy, f"{field}.when[{number}]", [pair])


def unseen_rules(policy: AuthorizationPolicy) -> Iterator[_Remark]:
    """Rules that ask for HTTP where nobody sees it. The controller tells of those it translates."""
    for index, rule in enumerate(policy.rules):
        field = f"spec.rules[{index}]"
        if rule.needs_http and not policy.target_refs and policy.action in ("ALLOW", "DENY"):
            what = (
                "is left out"
                if policy.action == "ALLOW"
                else "denies more than it says, or nothing"
            )
            message = f"node proxies see no HTTP, so the rule {what}"
            yield policy.ref, field, message, "attach it to a Service with a waypoint: targetRefs"


_Pair = tuple[str, Sequence[object], Sequence[object]]


def _never(policy: AuthorizationPolicy, place: str, pairs: list[_Pair]) -> Iterator[_Remark]:
    for name, wanted, refused in pairs:
        if wanted and set(wanted) <= set(refused):
            message = "never matches: all that it asks for is excluded beside it"
            yield policy.ref, f"{place}.{name}", message, ""


def _pairs_of_source(source: Source) -> list[_Pair]:
    return [
        ("principals", source.principals, source.not_principals),
        ("namespaces", source.namespaces, source.not_namespaces),
        ("serviceAccounts", source.service_accounts, source.not_service_accounts),
        ("ipBlocks", source.ip_blocks, source.not_ip_blocks),
        *_pairs_of_l7(source.l7),
    ]


def _pairs_of_operation(operation: Operation) -> list[_Pair]:
    return [("ports", operation.ports, operation.not_ports), *_pairs_of_l7(operation.l7)]


def _pairs_of_l7(fields: Mapping[str, tuple[str, ...]]) -> list[_Pair]:
    return [
        (name, values, fields.get(f"not{name[0].upper()}{name[1:]}", ()))
        for name, values in fields.items()
    ]
