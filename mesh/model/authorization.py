"""Authorization policies as the tunnel judges them: field for field `istio.security`.

Rules are OR'ed, clauses AND'ed, matches OR'ed; the set fields of one match are AND'ed
and the values of one field OR'ed. `mesh.authz` evaluates; this module only holds.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass


class PolicyScope(enum.Enum):
    """Which workloads a policy concerns."""

    GLOBAL = 0
    NAMESPACE = 1
    WORKLOAD_SELECTOR = 2


class Action(enum.Enum):
    """What a match means."""

    ALLOW = 0
    DENY = 1


class StringKind(enum.Enum):
    """How a string is compared; PRESENCE means "not empty"."""

    EXACT = "Exact"
    PREFIX = "Prefix"
    SUFFIX = "Suffix"
    PRESENCE = "Presence"


@dataclass(frozen=True, slots=True)
class StringMatch:
    """One string comparison."""

    kind: StringKind
    value: str = ""


@dataclass(frozen=True, slots=True)
class ServiceAccountMatch:
    """A service account by namespace and name; the trust domain is not compared."""

    namespace: str
    service_account: str


@dataclass(frozen=True, slots=True)
class Match:
    """One match; every tuple is "any of these". No field set at all never matches.

    Addresses are networks in CIDR text.
    """

    namespaces: tuple[StringMatch, ...] = ()
    not_namespaces: tuple[StringMatch, ...] = ()
    principals: tuple[StringMatch, ...] = ()
    not_principals: tuple[StringMatch, ...] = ()
    source_ips: tuple[str, ...] = ()
    not_source_ips: tuple[str, ...] = ()
    destination_ips: tuple[str, ...] = ()
    not_destination_ips: tuple[str, ...] = ()
    destination_ports: tuple[int, ...] = ()
    not_destination_ports: tuple[int, ...] = ()
    service_accounts: tuple[ServiceAccountMatch, ...] = ()
    not_service_accounts: tuple[ServiceAccountMatch, ...] = ()


@dataclass(frozen=True, slots=True)
class Clause:
    """Matches, OR'ed; none at all is true."""

    matches: tuple[Match, ...] = ()


@dataclass(frozen=True, slots=True)
class Rule:
    """Clauses, AND'ed; none at all is true."""

    clauses: tuple[Clause, ...] = ()


@dataclass(frozen=True, slots=True)
class Authorization:
    """One policy. No rules never matches, so ALLOW without rules denies everything."""

    name: str
    namespace: str
    scope: PolicyScope
    action: Action
    rules: tuple[Rule, ...] = ()
    dry_run: bool = False

    @property
    def key(self) -> str:
        """`namespace/name`, the xDS resource name."""
        return f"{self.namespace}/{self.name}"
