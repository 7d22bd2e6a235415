"""AuthorizationPolicy evaluation: may this peer talk to this workload?

The semantics are Istio's (`istio.security`): any DENY that matches refuses; without an
ALLOW policy everything else is permitted; with one, some ALLOW must match. Rules are OR'ed,
clauses AND'ed, matches OR'ed, fields of a match AND'ed, values of a field OR'ed. A policy
without rules never matches, a rule without clauses and a clause without matches always do,
a match without fields never does.

A value that cannot be read (a network that is no CIDR) is taken to say whatever refuses:
it never helps an ALLOW to match and never keeps a DENY from matching.

A `Judge` is compiled once for a set of policies and asked once per connection. Pure.
"""

from __future__ import annotations

import functools
import ipaddress
import itertools
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from mesh.errors import Refusal
from mesh.identity import SpiffeId
from mesh.model.authorization import (
    Action,
    Authorization,
    Clause,
    Match,
    ServiceAccountMatch,
    StringKind,
    StringMatch,
)

_NAMED_IN_REASON = 3


@dataclass(frozen=True, slots=True)
class ConnectionContext:
    """What is judged. Addresses are canonical text; the identity is proven, or None."""

    source_identity: SpiffeId | None
    source_ip: str
    destination_ip: str
    destination_port: int


@dataclass(frozen=True, slots=True)
class Permit:
    """A decision to let through; `policy` and `rule` name the ALLOW that said so, if any did."""

    policy: str = ""
    rule: int | None = None


class _Facts:
    """A context with everything parsed once."""

    __slots__ = ("destination", "namespace", "port", "principal", "service_account", "source")

    def __init__(self, context: ConnectionContext) -> None:
        identity = context.source_identity
        self.principal = identity.principal if identity else None
        self.namespace = identity.namespace if identity else ""
        self.service_account = (identity.namespace, identity.service_account) if identity else None
        self.source = _number(context.source_ip)
        self.destination = _number(context.destination_ip)
        self.port = context.destination_port


@functools.lru_cache(maxsize=4096)
def _number(ip: str) -> tuple[int, int]:
    """(IP version, address). The same few callers come again and again."""
    address = ipaddress.ip_address(ip)
    return address.version, int(address)


_Test: TypeAlias = Callable[[_Facts], bool]


def _never(_: _Facts) -> bool:
    return False


def _always(_: _Facts) -> bool:
    return True


# -- values: each compiler gives "is any of these true of the facts", and takes what an
# -- unreadable value counts as


def _string_test(match: StringMatch) -> Callable[[str], bool]:
    value = match.value
    match match.kind:
        case StringKind.EXACT:
            return lambda text: text == value
        case StringKind.PREFIX:
            return lambda text: text.startswith(value)
        case StringKind.SUFFIX:
            return lambda text: text.endswith(value)
        case StringKind.PRESENCE:
            return lambda text: text != ""


def _any_string(values: Sequence[StringMatch]) -> Callable[[str], bool]:
    exact = frozenset(each.value for each in values if each.kind is StringKind.EXACT)
    others = [_string_test(each) for each in values if each.kind is not StringKind.EXACT]
    if not others:
        return exact.__contains__
    return lambda text: text in exact or any(test(text) for test in others)


def _any_principal(values: Sequence[StringMatch], _: bool) -> _Test:
    # Policies write principals without the scheme; some authors write it all the same.
    cut = [StringMatch(each.kind, each.value.removeprefix("spiffe://")) for each in values]
    test = _any_string(cut)
    return lambda facts: facts.principal is not None and test(facts.principal)


def _any_namespace(values: Sequence[StringMatch], _: bool) -> _Test:
    test = _any_string(values)
    return lambda facts: test(facts.namespace)


def _any_service_account(values: Sequence[ServiceAccountMatch], _: bool) -> _Test:
    accounts = frozenset((each.namespace, each.service_account) for each in values)
    return lambda facts: facts.service_account in accounts


def _any_port(values: Sequence[int], _: bool) -> _Test:
    ports = frozenset(values)
    return lambda facts: facts.port in ports


def _networks(values: Sequence[str]) -> tuple[list[tuple[int, int, int]], bool]:
    """((IP version, shift, network number >> shift), ...) and whether all could be read."""
    networks: list[tuple[int, int, int]] = []
    is_readable = True
    for value in values:
        try:
            network = ipaddress.ip_network(value, strict=False)
        except ValueError:
            is_readable = False
            continue
        shift = network.max_prefixlen - network.prefixlen
        networks.append((network.version, shift, int(network.network_address) >> shift))
    return networks, is_readable


def _contains(networks: list[tuple[int, int, int]], address: tuple[int, int]) -> bool:
    version, number = address
    return any(
        version == each_version and number >> shift == prefix
        for each_version, shift, prefix in networks
    )


def _any_source(values: Sequence[str], unreadable: bool) -> _Test:
    networks, is_readable = _networks(values)
    if not is_readable and unreadable:
        return _always
    return lambda facts: _contains(networks, facts.source)


def _any_destination(values: Sequence[str], unreadable: bool) -> _Test:
    networks, is_readable = _networks(values)
    if not is_readable and unreadable:
        return _always
    return lambda facts: _contains(networks, facts.destination)


# -- structure


def _not(test: _Test) -> _Test:
    return lambda facts: not test(facts)


def _all(tests: Sequence[_Test]) -> _Test:
    if len(tests) == 1:
        return tests[0]
    return lambda facts: all(test(facts) for test in tests)


def _any(tests: Sequence[_Test]) -> _Test:
    if len(tests) == 1:
        return tests[0]
    return lambda facts: any(test(facts) for test in tests)


def _compile_match(match: Match, action: Action) -> _Test:
    # Unreadable: true in a DENY's field and in an ALLOW's `not_` field, false in the others.
    positive = action is Action.DENY
    negative = action is Action.ALLOW
    tests: list[_Test] = []
    # In the order of what is cheapest to ask.
    if match.destination_ports:
        tests.append(_any_port(match.destination_ports, positive))
    if match.not_destination_ports:
        tests.append(_not(_any_port(match.not_destination_ports, negative)))
    if match.principals:
        tests.append(_any_principal(match.principals, positive))
    if match.not_principals:
        tests.append(_not(_any_principal(match.not_principals, negative)))
    if match.namespaces:
        tests.append(_any_namespace(match.namespaces, positive))
    if match.not_namespaces:
        tests.append(_not(_any_namespace(match.not_namespaces, negative)))
    if match.service_accounts:
        tests.append(_any_service_account(match.service_accounts, positive))
    if match.not_service_accounts:
        tests.append(_not(_any_service_account(match.not_service_accounts, negative)))
    if match.source_ips:
        tests.append(_any_source(match.source_ips, positive))
    if match.not_source_ips:
        tests.append(_not(_any_source(match.not_source_ips, negative)))
    if match.destination_ips:
        tests.append(_any_destination(match.destination_ips, positive))
    if match.not_destination_ips:
        tests.append(_not(_any_destination(match.not_destination_ips, negative)))
    return _all(tests) if tests else _never


def _compile_clause(clause: Clause, action: Action) -> _Test:
    return _any([_compile_match(match, action) for match in clause.matches])


# -- anchors: what the facts must say for a rule to match at all, so that it is not asked in vain

_Anchor: TypeAlias = tuple[str, frozenset[object]]


def _exact(values: Sequence[StringMatch]) -> frozenset[object] | None:
    if any(each.kind is not StringKind.EXACT for each in values):
        return None
    return frozenset(each.value.removeprefix("spiffe://") for each in values)


def _anchors_of_match(match: Match) -> dict[str, frozenset[object]]:
    found: dict[str, frozenset[object]] = {}
    if match.principals and (principals := _exact(match.principals)) is not None:
        found["principal"] = principals
    if match.service_accounts:
        found["service_account"] = frozenset(
            (each.namespace, each.service_account) for each in match.service_accounts
        )
    if match.namespaces and all(each.kind is StringKind.EXACT for each in match.namespaces):
        found["namespace"] = frozenset(each.value for each in match.namespaces)
    if match.destination_ports:
        found["port"] = frozenset(match.destination_ports)
    return found


def _find_anchor(clauses: Sequence[Clause]) -> _Anchor | None:
    """The first kind of fact of which one clause names every value that it can take."""
    for kind in _ANCHOR_KINDS:
        for clause in clauses:
            each = [_anchors_of_match(match).get(kind) for match in clause.matches]
            named = [values for values in each if values is not None]
            if len(named) == len(each):
                return kind, frozenset().union(*named)
    return None


_ANCHOR_KINDS = ("principal", "service_account", "namespace", "port")


class CompiledPolicy:
    """One policy as tests: of each rule the anchor, if it has one, and whether it matches."""

    __slots__ = ("action", "dry_run", "key", "rules")

    def __init__(self, policy: Authorization) -> None:
        self.key = policy.key
        self.action = policy.action
        self.dry_run = policy.dry_run
        self.rules: list[tuple[_Anchor | None, _Test]] = []
        for rule in policy.rules:
            # A clause without matches is true, so it need not be asked.
            clauses = [each for each in rule.clauses if each.matches]
            tests = [_compile_clause(each, policy.action) for each in clauses]
            self.rules.append((_find_anchor(clauses), _all(tests) if tests else _always))


_Entry: TypeAlias = tuple[int, str, int, _Test]


class _RuleSet:
    """The rules of many policies, in their order; only those are asked whose anchor agrees."""

    __slots__ = ("_anchored", "_general", "keys")

    def __init__(self, policies: Sequence[CompiledPolicy]) -> None:
        self.keys = [each.key for each in policies]
        self._general: list[_Entry] = []
        self._anchored: dict[str, dict[object, list[_Entry]]] = {}
        order = 0
        for policy in policies:
            for index, (anchor, test) in enumerate(policy.rules):
                entry = (order, policy.key, index, test)
                order += 1
                if anchor is None:
                    self._general.append(entry)
                    continue
                kind, values = anchor
                by_value = self._anchored.setdefault(kind, {})
                for value in values:
                    by_value.setdefault(value, []).append(entry)

    def find(self, facts: _Facts) -> tuple[str, int] | None:
        """Policy and rule of the first that matches, or None."""
        candidates = [self._general] if self._general else []
        for kind, by_value in self._anchored.items():
            entries = by_value.get(getattr(facts, kind))
            if entries:
                candidates.append(entries)
        if not candidates:
            return None
        if len(candidates) == 1:
            entries = candidates[0]
        else:
            entries = sorted(itertools.chain.from_iterable(candidates), key=_order)
        for _, policy, rule, test in entries:
            if test(facts):
                return policy, rule
        return None


_order = operator.itemgetter(0)


class Judge:
    """A set of policies, ready to be asked. Dry-run policies decide nothing, unless
    `enforce_dry_run` asks what they would decide. Asking takes as long as there are rules that
    concern the caller or the port by name, or none of both.
    """

    __slots__ = ("_allow", "_deny")

    def __init__(
        self, policies: Iterable[CompiledPolicy], *, enforce_dry_run: bool = False
    ) -> None:
        enforced = [each for each in policies if enforce_dry_run or not each.dry_run]
        self._deny = _RuleSet([each for each in enforced if each.action is Action.DENY])
        self._allow = _RuleSet([each for each in enforced if each.action is Action.ALLOW])

    def evaluate(self, context: ConnectionContext) -> Permit | Refusal:
        """Judge one connection. Raises ValueError if an address of the context is not one."""
        facts = _Facts(context)
        found = self._deny.find(facts)
        if found is not None:
            policy, rule = found
            return _refusal(f"denied by policy {policy}, rule {rule}", policy, rule)
        keys = self._allow.keys
        if not keys:
            return Permit()
        found = self._allow.find(facts)
        if found is not None:
            return Permit(*found)
        names = ", ".join(keys[:_NAMED_IN_REASON])
        if len(keys) > _NAMED_IN_REASON:
            names += f" and {len(keys) - _NAMED_IN_REASON} more"
        return _refusal(f"no ALLOW policy matched ({names})", keys[0], None)


def _refusal(reason: str, policy: str, rule: int | None) -> Refusal:
    return Refusal("DENY", reason, policy=policy, rule=rule, http_status=401)


class Compiler:
    """Compiles policies and keeps them by key, so what many workloads share is compiled once."""

    __slots__ = ("_compiled",)

    def __init__(self) -> None:
        self._compiled: dict[str, tuple[Authorization, CompiledPolicy]] = {}

    def judge(self, policies: Iterable[Authorization], *, enforce_dry_run: bool = False) -> Judge:
        """A Judge of these policies."""
        return Judge(map(self._compile, policies), enforce_dry_run=enforce_dry_run)

    def retain(self, keys: Mapping[str, object] | frozenset[str]) -> None:
        """Drop what was compiled of policies that are not among `keys`."""
        self._compiled = {key: each for key, each in self._compiled.items() if key in keys}

    def _compile(self, policy: Authorization) -> CompiledPolicy:
        kept = self._compiled.get(policy.key)
        if kept is None or kept[0] is not policy:
            kept = self._compiled[policy.key] = (policy, CompiledPolicy(policy))
        return kept[1]


def evaluate(policies: Sequence[Authorization], context: ConnectionContext) -> Permit | Refusal:
    """Judge one connection by policies that are not kept compiled."""
    return Judge(map(CompiledPolicy, policies)).evaluate(context)
