"""L7 AuthorizationPolicy (security.istio.io/v1), compiled when it changes.

Order: CUSTOM, DENY, ALLOW; AUDIT and dry-run only note. Without an ALLOW policy everything that is
not denied passes; with one, only what some ALLOW rule matches. What cannot be understood or
judged here denies: it is never as if it were not written.

Where HTTP leaves two readings of a request (a port in the authority, a field sent twice, parameters
in a path: `waypoint.filters.readings`), DENY takes either and ALLOW insists on the whole, so that a
second spelling never opens a door.

`judge` is the decision as a value, which is what explains it too; `Authorize` answers by it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from mesh.errors import ConfigError
from mesh.model.l7_policy import L7Authorization, L7Condition, L7Operation, L7Rule, L7Source
from waypoint.filters.addresses import in_any_block
from waypoint.filters.authorize_connection import for_connections
from waypoint.filters.chain import PassingFilter, Request, Respond, Verdict
from waypoint.filters.readings import field_readings, host_readings, path_readings
from waypoint.filters.rule_index import Filed, RuleIndex, Test, find_anchors
from waypoint.filters.strings import any_of, path_any_of

GRPC_PERMISSION_DENIED: Final = 7
_HEADER = re.compile(r"request\.headers\[([^\[\]]+)\]")
_CLAIMS = re.compile(r"request\.auth\.claims((?:\[[^\[\]]+\])+)")
_BODY = b"RBAC: access denied"
_ALLOWED: Final = "an ALLOW rule matches"
# Taken out of the fields of a request before anybody sees them.
UNSEEN: Final = frozenset(
    {b"connection", b"keep-alive", b"proxy-connection", b"te", b"transfer-encoding"}
)
_FOLDED: Final = frozenset({b"host", b":authority", b"upgrade"})
_NOT_AMONG_FIELDS: Final[Mapping[bytes, Callable[[Request], Sequence[bytes]]]] = {
    b"host": lambda request: host_readings(request.authority),
    b":authority": lambda request: host_readings(request.authority),
    b":method": lambda request: [request.method],
    b":path": lambda request: [
        request.path + b"?" + request.query if request.query else request.path
    ],
    b":scheme": lambda request: [request.scheme],
    b"upgrade": lambda request: [request.upgrade.lower()] if request.upgrade else [],
}


@dataclass(frozen=True, slots=True)
class Decision:
    """Whether a request may pass, and what said so: `policy` is `namespace/name`, `rule` its index;
    both are empty when no policy did. `noted` are policies that only look (AUDIT, dry-run).
    """

    is_allowed: bool
    policy: str = ""
    rule: str = ""
    reason: str = ""
    noted: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Compiled:
    """One policy as tests. `problem`: it was not understood, and denies."""

    key: str
    rules: tuple[Filed, ...]
    problem: str

    def match(self, request: Request) -> str | None:
        """The index of the first rule that matches."""
        for each in self.rules:
            if each.test(request):
                return each.rule
        return None


def is_asked(policy: L7Authorization) -> bool:
    """Whether `waypoint.filters.ext_authz` asks for this policy, so that nothing is left here."""
    provider = policy.provider
    return (
        policy.action == "CUSTOM"
        and provider is not None
        and not policy.is_dry_run
        and not policy.problem
    )


class Authorizer:
    """The policies of one service, in one object. Pure."""

    def __init__(self, policies: Iterable[L7Authorization]) -> None:
        self._asked: list[Compiled] = []
        self._denying: list[Compiled] = []
        self._allowing: list[Compiled] = []
        self._noting: list[tuple[str, Compiled]] = []
        for policy in policies:
            made = compile_policy(policy)
            if policy.is_dry_run or policy.action == "AUDIT":
                word = "AUDIT" if policy.action == "AUDIT" else f"dry-run {policy.action}"
                self._noting.append((word, made))
            elif policy.action == "ALLOW":
                self._allowing.append(made)
            else:
                (self._denying if policy.action == "DENY" else self._asked).append(made)
        deciding = (*self._asked, *self._denying, *self._allowing)
        self._broken = next((each for each in deciding if each.problem), None)
        # By rule: at most as many as there are.
        self._allowed: dict[tuple[str, str], Decision] = {}
        self._denies = RuleIndex(rule for each in self._denying for rule in each.rules)
        self._allows = RuleIndex(rule for each in self._allowing for rule in each.rules)

    def judge(self, request: Request) -> Decision:
        """Decide."""
        noted = self._note(request) if self._noting else ()
        if self._broken is not None:
            return Decision(False, self._broken.key, "", self._broken.problem, noted)
        for each in self._asked:
            if (rule := each.match(request)) is not None:
                said = "its external authorizer is not asked by this waypoint"
                return Decision(False, each.key, rule, said, noted)
        if (found := self._denies.first(request)) is not None:
            return Decision(False, *found, "a DENY rule matches", noted)
        if not self._allowing:
            return Decision(True, noted=noted)
        if (found := self._allows.first(request)) is not None:
            if noted:
                return Decision(True, *found, _ALLOWED, noted)
            decision = self._allowed.get(found)
            if decision is None:
                decision = self._allowed[found] = Decision(True, *found, _ALLOWED)
            return decision
        names = ", ".join(each.key for each in self._allowing[:5])
        said = f"no rule of an ALLOW policy matches ({names})"
        return Decision(False, self._allowing[0].key, "", said, noted)

    def _note(self, request: Request) -> tuple[str, ...]:
        """The policies that only look, and would have said something."""
        return tuple(
            f"{word} {each.key}"
            for word, each in self._noting
            if each.problem or each.match(request) is not None
        )


class Authorize(PassingFilter):
    """Answers 403 (gRPC: PERMISSION_DENIED) where `Authorizer` denies."""

    name = "AuthorizationPolicy"

    def __init__(
        self, policies: Iterable[L7Authorization], *, explains_denials: bool = False
    ) -> None:
        policies = tuple(policies)
        self._authorizer = Authorizer(each for each in policies if not is_asked(each))
        self.connections = Authorizer(for_connections(policies))
        """Judges what is no HTTP, by what is known of it."""
        self._explains = explains_denials

    def on_request(self, request: Request) -> Verdict:
        """Deny, or go on with the deciding policy noted."""
        decision = self._authorizer.judge(request)
        if decision.noted:
            request.notes["authorization.noted"] = decision.noted
        if decision.is_allowed:
            if decision.policy:
                request.notes["authorization.policy"] = (decision.policy, decision.rule)
            return None
        told = f"{decision.policy} {decision.rule}".strip().encode()
        return Respond(
            403,
            _BODY,
            ((b"x-ambit-denied-by", told),) if self._explains else (),
            flag="DENY",
            policy=decision.policy,
            rule=decision.rule,
            reason=decision.reason,
            grpc_status=GRPC_PERMISSION_DENIED,
        )


# -- from policies to functions --------------------------------------------------------------


def compile_policy(policy: L7Authorization) -> Compiled:
    """The tests of one policy."""
    key = f"{policy.namespace}/{policy.name}"
    if policy.problem:
        return Compiled(key, (), policy.problem)
    is_deny = policy.action != "ALLOW"
    try:
        rules = tuple(
            Filed(
                key,
                str(index),
                find_anchors(rule, policy.namespace),
                _rule(rule, policy.namespace, is_deny=is_deny),
            )
            for index, rule in enumerate(policy.rules)
        )
    except ConfigError as error:
        return Compiled(key, (), f"it cannot be understood: {error}")
    return Compiled(key, rules, "")


def _rule(rule: L7Rule, namespace: str, *, is_deny: bool) -> Test:
    parts: list[Test] = []
    if rule.sources:
        parts.append(_either([_source(each, namespace) for each in rule.sources]))
    if rule.operations:
        parts.append(_either([_operation(each, is_deny=is_deny) for each in rule.operations]))
    parts += [_condition(each, namespace, is_deny=is_deny) for each in rule.conditions]
    return _every(parts)


def _every(tests: Sequence[Test]) -> Test:
    # Written out: a generator costs more than most tests.
    match list(tests):
        case [test]:
            return test
        case [first, second]:
            return lambda request: first(request) and second(request)
        case [first, second, third]:
            return lambda request: first(request) and second(request) and third(request)
    return lambda request: all(test(request) for test in tests)


def _either(tests: Sequence[Test]) -> Test:
    if len(tests) == 1:
        return tests[0]
    return lambda request: any(test(request) for test in tests)


def _not(test: Test) -> Test:
    return lambda request: not test(request)


def _with_not(
    make: Callable[[tuple[str, ...]], Test], wanted: tuple[str, ...], unwanted: tuple[str, ...]
) -> list[Test]:
    found = [make(wanted)] if wanted else []
    return [*found, _not(make(unwanted))] if unwanted else found


def _source(source: L7Source, namespace: str) -> Test:
    def accounts(values: tuple[str, ...]) -> Test:
        return _service_account(values, namespace)

    tests: list[Test] = []
    for make, wanted, unwanted in (
        (_principal, source.principals, source.not_principals),
        (_request_principal, source.request_principals, source.not_request_principals),
        (_namespace, source.namespaces, source.not_namespaces),
        (accounts, source.service_accounts, source.not_service_accounts),
        (_source_ip, source.ip_blocks, source.not_ip_blocks),
        (_remote_ip, source.remote_ip_blocks, source.not_remote_ip_blocks),
    ):
        tests += _with_not(make, wanted, unwanted)
    if not tests:
        raise ConfigError("an empty source", field="from")
    return _every(tests)


def _operation(operation: L7Operation, *, is_deny: bool) -> Test:
    tests: list[Test] = []
    if operation.hosts:
        tests.append(_host(operation.hosts, is_loose=is_deny))
    if operation.not_hosts:
        tests.append(_not(_host(operation.not_hosts, is_loose=not is_deny)))
    tests += _with_not(_port, operation.ports, operation.not_ports)
    tests += _with_not(_method, operation.methods, operation.not_methods)
    if operation.paths:
        tests.append(_path(operation.paths, is_loose=is_deny))
    if operation.not_paths:
        tests.append(_not(_path(operation.not_paths, is_loose=not is_deny)))
    if not tests:
        raise ConfigError("an empty operation", field="to")
    return _every(tests)


def _principal(values: tuple[str, ...]) -> Test:
    matches = any_of(values)

    def test(request: Request) -> bool:
        source = request.source
        return source is not None and matches(source.principal.encode())

    return test


def _namespace(values: tuple[str, ...]) -> Test:
    matches = any_of(values)
    return lambda request: request.source is not None and matches(request.source.namespace.encode())


def _trust_domain(values: tuple[str, ...]) -> Test:
    matches = any_of(values)

    def test(request: Request) -> bool:
        source = request.source
        return source is not None and matches(source.trust_domain.encode())

    return test


def _service_account(values: tuple[str, ...], namespace: str) -> Test:
    wanted = {value if "/" in value else f"{namespace}/{value}" for value in values}

    def test(request: Request) -> bool:
        source = request.source
        return source is not None and f"{source.namespace}/{source.service_account}" in wanted

    return test


def _request_principal(values: tuple[str, ...]) -> Test:
    matches = any_of(values)
    return lambda request: matches(request.principal.encode())


def _source_ip(values: tuple[str, ...]) -> Test:
    matches = in_any_block(values)
    return lambda request: matches(request.source_ip)


def _remote_ip(values: tuple[str, ...]) -> Test:
    matches = in_any_block(values)
    return lambda request: matches(request.remote_ip)


def _destination_ip(values: tuple[str, ...]) -> Test:
    matches = in_any_block(values)
    return lambda request: matches(request.destination_ip)


def _port(values: tuple[str, ...]) -> Test:
    try:
        wanted = frozenset(int(value) for value in values)
    except ValueError as exc:
        raise ConfigError(str(exc), field="ports") from exc
    return lambda request: request.destination_port in wanted


def _method(values: tuple[str, ...]) -> Test:
    matches = any_of(values)
    return lambda request: matches(request.method)


def _path(values: tuple[str, ...], *, is_loose: bool) -> Test:
    matches = path_any_of(values)
    if not is_loose:
        return lambda request: matches(request.path)
    return lambda request: any(map(matches, path_readings(request.path)))


def _host(values: tuple[str, ...], *, is_loose: bool) -> Test:
    matches = any_of(values, folds_case=True)
    if not is_loose:
        return lambda request: matches(request.authority.lower())
    return lambda request: any(map(matches, host_readings(request.authority)))


def _header(name: str, *, is_loose: bool) -> Callable[[tuple[str, ...]], Test]:
    key = name.lower().encode()
    if key in UNSEEN:
        raise ConfigError(f"{name} is between two neighbours, no policy sees it", field="when.key")
    apart = _NOT_AMONG_FIELDS.get(key)

    def make(values: tuple[str, ...]) -> Test:
        matches = any_of(values, folds_case=key in _FOLDED)

        def test(request: Request) -> bool:
            sent = request.headers.get_all(key) if apart is None else apart(request)
            if not sent:
                return False
            if is_loose:
                return any(map(matches, field_readings(sent)))
            if apart is not None:
                return matches(sent[0])
            return matches(sent[0] if len(sent) == 1 else b",".join(sent))

        return test

    return make


def _claim(names: Sequence[str]) -> Callable[[tuple[str, ...]], Test]:
    def make(values: tuple[str, ...]) -> Test:
        matches = any_of(values)

        def test(request: Request) -> bool:
            found: Any = request.claims
            for name in names:
                found = found.get(name) if isinstance(found, dict) else None
            items = found if isinstance(found, list) else [found]
            return any(matches(text.encode()) for text in map(_claim_text, items) if text)

        return test

    return make


def _claim_text(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return str(value) if isinstance(value, str | int) else ""


_KEYS: Final[dict[str, Callable[[tuple[str, ...]], Test]]] = {
    "source.ip": _source_ip,
    "source.namespace": _namespace,
    "source.principal": _principal,
    "source.trustDomain": _trust_domain,
    "remote.ip": _remote_ip,
    "destination.ip": _destination_ip,
    "destination.port": _port,
    "request.auth.principal": _request_principal,
    "request.auth.audiences": _claim(["aud"]),
    "request.auth.presenter": _claim(["azp"]),
}


def _condition(condition: L7Condition, namespace: str, *, is_deny: bool) -> Test:
    key = condition.key
    if header := _HEADER.fullmatch(key):
        # In a DENY each reading of a field counts, in its `notValues` only the whole does.
        wanted = _header(header[1], is_loose=is_deny)
        unwanted = _header(header[1], is_loose=not is_deny)
        tests = [wanted(condition.values)] if condition.values else []
        tests += [_not(unwanted(condition.not_values))] if condition.not_values else []
    else:
        make = _KEYS.get(key)
        if claims := _CLAIMS.fullmatch(key):
            make = _claim(claims[1][1:-1].split("]["))
        elif key == "source.serviceAccount":
            make = lambda values: _service_account(values, namespace)  # noqa: E731
        if make is None:
            if key == "connection.sni" or key.startswith("experimental."):
                # Not seen here: an ALLOW rule cannot hold, a DENY rule must not be loosened by it.
                return lambda request: is_deny
            raise ConfigError(f"unknown condition {key!r}", field="when.key")
        tests = _with_not(make, condition.values, condition.not_values)
    if not tests:
        raise ConfigError(f"condition {key!r} has neither values nor notValues", field="when")
    return _every(tests)
