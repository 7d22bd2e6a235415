"""AuthorizationPolicies for connections that no HTTP is read from, as Istio means them. Pure.

Of a connection only its two ends are known. What a policy asks beyond that cannot be answered,
and the answer nobody has never opens a door: an ALLOW rule that needs it matches nothing; in a
DENY rule (CUSTOM and AUDIT likewise) it is as if it were not written, so that the rule closes
the more. A caller gains nothing by speaking so that HTTP is not recognised.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Final

from mesh.model.l7_policy import L7Authorization, L7Condition, L7Operation, L7Rule, L7Source

_KNOWN_KEYS: Final = frozenset(
    {"source.ip", "source.namespace", "source.principal", "source.trustDomain",
     "source.serviceAccount", "remote.ip", "destination.ip", "destination.port"}
)  # fmt: skip


def for_connections(policies: Iterable[L7Authorization]) -> list[L7Authorization]:
    """The same policies with nothing left in them that only a request could answer."""
    return [_translate(policy) for policy in policies]


def _translate(policy: L7Authorization) -> L7Authorization:
    if policy.problem:
        return policy
    change = _only_answerable if policy.action == "ALLOW" else _without_unanswerable
    rules = [made for rule in policy.rules if (made := change(rule)) is not None]
    return dataclasses.replace(policy, rules=tuple(rules))


def _known_source(source: L7Source) -> L7Source:
    return dataclasses.replace(source, request_principals=(), not_request_principals=())


def _known_operation(operation: L7Operation) -> L7Operation:
    return L7Operation(ports=operation.ports, not_ports=operation.not_ports)


def _is_known(condition: L7Condition) -> bool:
    return condition.key in _KNOWN_KEYS


def _only_answerable(rule: L7Rule) -> L7Rule | None:
    """For ALLOW: alternatives that need more are gone; None when no other is left."""
    sources = tuple(each for each in rule.sources if _known_source(each) == each)
    operations = tuple(each for each in rule.operations if _known_operation(each) == each)
    if (
        bool(sources) is not bool(rule.sources)
        or bool(operations) is not bool(rule.operations)
        or not all(map(_is_known, rule.conditions))
    ):
        return None
    return L7Rule(sources, operations, rule.conditions)


def _without_unanswerable(rule: L7Rule) -> L7Rule:
    """For DENY: an alternative with nothing left holds for everybody, and so do all of them."""
    sources = tuple(map(_known_source, rule.sources))
    operations = tuple(map(_known_operation, rule.operations))
    return L7Rule(
        () if L7Source() in sources else sources,
        () if L7Operation() in operations else operations,
        tuple(filter(_is_known, rule.conditions)),
    )
