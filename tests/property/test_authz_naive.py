"""The compiled judge decides as a naive reading of the rules does."""

from __future__ import annotations

import ipaddress

from hypothesis import given
from hypothesis import strategies as st

from mesh.authz import ConnectionContext, Permit, evaluate
from mesh.identity import SpiffeId
from mesh.model.authorization import (
    Action,
    Authorization,
    Clause,
    Match,
    PolicyScope,
    Rule,
    ServiceAccountMatch,
    StringKind,
    StringMatch,
)

NAMES = ["a", "b", "ab"]
PORTS = st.lists(st.sampled_from([80, 81]), max_size=2).map(tuple)
NETWORKS = st.lists(
    st.sampled_from(["10.0.0.1/32", "10.0.0.0/8", "11.0.0.0/8", "fd00::/16"]), max_size=2
).map(tuple)
TEXTS = st.sampled_from(
    ["", "a", "b", "ab", "cluster.local/ns/a/sa/b", "cluster.local/", "/sa/a", "/sa/b"]
)
STRINGS = st.lists(st.builds(StringMatch, st.sampled_from(StringKind), TEXTS), max_size=2).map(
    tuple
)
ACCOUNTS = st.lists(
    st.builds(ServiceAccountMatch, st.sampled_from(NAMES), st.sampled_from(NAMES)), max_size=2
).map(tuple)
MATCHES = st.builds(
    Match,
    namespaces=STRINGS,
    not_namespaces=STRINGS,
    principals=STRINGS,
    not_principals=STRINGS,
    source_ips=NETWORKS,
    not_source_ips=NETWORKS,
    destination_ips=NETWORKS,
    not_destination_ips=NETWORKS,
    destination_ports=PORTS,
    not_destination_ports=PORTS,
    service_accounts=ACCOUNTS,
    not_service_accounts=ACCOUNTS,
)
CLAUSES = st.builds(Clause, st.lists(MATCHES, max_size=2).map(tuple))
RULES = st.builds(Rule, st.lists(CLAUSES, max_size=2).map(tuple))
POLICIES = st.lists(
    st.builds(
        Authorization,
        st.sampled_from(["p", "q"]),
        st.just("shop"),
        st.just(PolicyScope.GLOBAL),
        st.sampled_from(Action),
        st.lists(RULES, max_size=2).map(tuple),
        st.booleans(),
    ),
    max_size=4,
)
CONTEXTS = st.builds(
    ConnectionContext,
    st.none() | st.builds(SpiffeId, st.just("cluster.local"), *[st.sampled_from(NAMES)] * 2),
    st.sampled_from(["10.0.0.1", "11.0.0.1", "fd00::1"]),
    st.sampled_from(["10.0.0.1", "fd00::2"]),
    st.sampled_from([80, 81, 82]),
)


def text_is(match: StringMatch, text: str) -> bool:
    match match.kind:
        case StringKind.EXACT:
            return text == match.value
        case StringKind.PREFIX:
            return text.startswith(match.value)
        case StringKind.SUFFIX:
            return text.endswith(match.value)
        case StringKind.PRESENCE:
            return bool(text)


def match_is(match: Match, context: ConnectionContext) -> bool:
    identity = context.source_identity
    namespace = identity.namespace if identity else ""

    def within(network: str, ip: str) -> bool:
        return ipaddress.ip_address(ip) in ipaddress.ip_network(network)

    tests = {
        "namespaces": lambda v: text_is(v, namespace),
        "principals": lambda v: identity is not None and text_is(v, identity.principal),
        "service_accounts": lambda v: (
            identity is not None
            and (v.namespace, v.service_account) == (identity.namespace, identity.service_account)
        ),
        "source_ips": lambda v: within(v, context.source_ip),
        "destination_ips": lambda v: within(v, context.destination_ip),
        "destination_ports": lambda v: v == context.destination_port,
    }
    if match == Match():
        return False
    for name, test in tests.items():
        values = getattr(match, name)
        if values and not any(test(value) for value in values):
            return False
        if any(test(value) for value in getattr(match, f"not_{name}")):
            return False
    return True


def policy_is(policy: Authorization, context: ConnectionContext) -> bool:
    return any(
        all(
            not clause.matches or any(match_is(match, context) for match in clause.matches)
            for clause in rule.clauses
        )
        for rule in policy.rules
    )


@given(POLICIES, CONTEXTS)
def test_as_a_naive_reading(policies: list[Authorization], context: ConnectionContext) -> None:
    enforced = [each for each in policies if not each.dry_run]
    denied = any(policy_is(p, context) for p in enforced if p.action is Action.DENY)
    allows = [each for each in enforced if each.action is Action.ALLOW]
    expected = not denied and (not allows or any(policy_is(p, context) for p in allows))
    assert isinstance(evaluate(policies, context), Permit) is expected
