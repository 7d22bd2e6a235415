"""Policy evaluation: the truth tables, and the traps of empty and unreadable values."""

from __future__ import annotations

import pytest

from mesh.authz import CompiledPolicy, Compiler, ConnectionContext, Judge, Permit, evaluate
from mesh.errors import Refusal
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

CURL = SpiffeId("cluster.local", "shop", "curl")
CONTEXT = ConnectionContext(CURL, "10.0.0.7", "10.0.1.9", 8080)
ANONYMOUS = ConnectionContext(None, "10.0.0.7", "10.0.1.9", 8080)
PRESENT = StringMatch(StringKind.PRESENCE)


def exact(value: str) -> StringMatch:
    return StringMatch(StringKind.EXACT, value)


def policy(
    *rules: Rule, action: Action = Action.ALLOW, name: str = "p", dry_run: bool = False
) -> Authorization:
    return Authorization(name, "shop", PolicyScope.NAMESPACE, action, rules, dry_run)


def one(match: Match, action: Action = Action.ALLOW) -> Authorization:
    return policy(Rule((Clause((match,)),)), action=action)


def matches(match: Match, context: ConnectionContext = CONTEXT) -> bool:
    """Whether a match alone is true: an ALLOW of it permits and a DENY of it refuses."""
    permitted = isinstance(evaluate([one(match)], context), Permit)
    denied = isinstance(evaluate([one(match, Action.DENY)], context), Refusal)
    assert permitted == denied
    return permitted


@pytest.mark.parametrize(
    ("match", "expected"),
    [
        (Match(), False),
        (Match(principals=(exact(CURL.principal),)), True),
        (Match(principals=(exact(str(CURL)),)), True),
        (Match(principals=(exact("cluster.local/ns/shop/sa/other"),)), False),
        (Match(principals=(StringMatch(StringKind.PREFIX, "cluster.local/ns/shop/"),)), True),
        (Match(principals=(StringMatch(StringKind.SUFFIX, "/sa/curl"),)), True),
        (Match(principals=(StringMatch(StringKind.SUFFIX, "/sa/url"),)), False),
        (Match(principals=(PRESENT,)), True),
        (Match(principals=(exact("x"), exact(CURL.principal))), True),
        (Match(not_principals=(PRESENT,)), False),
        (Match(not_principals=(exact("x"),)), True),
        (Match(not_principals=(exact("x"), exact(CURL.principal))), False),
        (Match(namespaces=(exact("shop"),)), True),
        (Match(namespaces=(exact("bank"),)), False),
        (Match(namespaces=(StringMatch(StringKind.PREFIX, "sh"),)), True),
        (Match(not_namespaces=(exact("shop"),)), False),
        (Match(not_namespaces=(exact("bank"),)), True),
        (Match(service_accounts=(ServiceAccountMatch("shop", "curl"),)), True),
        (Match(service_accounts=(ServiceAccountMatch("bank", "curl"),)), False),
        (Match(not_service_accounts=(ServiceAccountMatch("shop", "curl"),)), False),
        (Match(source_ips=("10.0.0.0/24",)), True),
        (Match(source_ips=("10.0.0.7/32",)), True),
        (Match(source_ips=("10.0.0.7",)), True),
        (Match(source_ips=("10.0.0.8/32",)), False),
        (Match(source_ips=("0.0.0.0/0",)), True),
        (Match(source_ips=("::/0",)), False),
        (Match(not_source_ips=("10.0.0.0/24",)), False),
        (Match(destination_ips=("10.0.1.0/24",)), True),
        (Match(not_destination_ips=("10.0.1.9/32",)), False),
        (Match(destination_ports=(8080,)), True),
        (Match(destination_ports=(80, 8080)), True),
        (Match(destination_ports=(80,)), False),
        (Match(not_destination_ports=(8080,)), False),
        (Match(not_destination_ports=(80,)), True),
        # Fields are AND'ed.
        (Match(destination_ports=(8080,), namespaces=(exact("bank"),)), False),
        (Match(destination_ports=(8080,), namespaces=(exact("shop"),)), True),
    ],
)
def test_one_match(match: Match, expected: bool) -> None:
    assert matches(match) is expected


@pytest.mark.parametrize(
    ("match", "expected"),
    [
        (Match(principals=(PRESENT,)), False),
        (Match(principals=(StringMatch(StringKind.PREFIX, ""),)), False),
        (Match(not_principals=(PRESENT,)), True),
        (Match(not_principals=(exact("x"),)), True),
        (Match(namespaces=(PRESENT,)), False),
        (Match(namespaces=(exact("shop"),)), False),
        (Match(namespaces=(exact(""),)), True),
        (Match(not_namespaces=(exact("shop"),)), True),
        (Match(service_accounts=(ServiceAccountMatch("", ""),)), False),
        (Match(not_service_accounts=(ServiceAccountMatch("shop", "curl"),)), True),
        (Match(source_ips=("10.0.0.7/32",)), True),
    ],
)
def test_a_peer_without_identity(match: Match, expected: bool) -> None:
    assert matches(match, ANONYMOUS) is expected


@pytest.mark.parametrize("action", list(Action))
@pytest.mark.parametrize(
    "match",
    [
        Match(source_ips=("nonsense",)),
        Match(destination_ips=("10.0.0.0/33",)),
        Match(not_source_ips=("",)),
        Match(not_destination_ips=("1.2.3",)),
        Match(source_ips=("nonsense", "192.168.0.0/16")),
        Match(not_source_ips=("nonsense", "192.168.0.0/16")),
    ],
)
def test_unreadable_values_refuse_whatever_the_action(action: Action, match: Match) -> None:
    assert isinstance(evaluate([one(match, action)], CONTEXT), Refusal)


def test_an_unreadable_value_does_not_spoil_its_readable_neighbours() -> None:
    allow = one(Match(source_ips=("nonsense", "10.0.0.0/24")))
    assert isinstance(evaluate([allow], CONTEXT), Permit)
    # The other fields of a DENY still narrow it.
    deny = one(Match(source_ips=("nonsense",), destination_ports=(80,)), Action.DENY)
    assert isinstance(evaluate([deny], CONTEXT), Permit)


TRUE = Match(destination_ports=(8080,))
FALSE = Match(destination_ports=(1,))


@pytest.mark.parametrize(
    ("rules", "expected"),
    [
        ((), False),
        ((Rule(),), True),
        ((Rule((Clause(),)),), True),
        ((Rule((Clause((Match(),)),)),), False),
        ((Rule((Clause((Match(), TRUE)),)),), True),
        ((Rule((Clause((TRUE,)), Clause((FALSE,)))),), False),
        ((Rule((Clause((TRUE,)), Clause())),), True),
        ((Rule((Clause((FALSE, TRUE)), Clause((TRUE, FALSE)))),), True),
        ((Rule((Clause((FALSE,)),)), Rule((Clause((TRUE,)),))), True),
        ((Rule((Clause((FALSE,)),)), Rule((Clause((FALSE,)),))), False),
    ],
)
def test_empty_values_and_nesting(rules: tuple[Rule, ...], expected: bool) -> None:
    assert isinstance(evaluate([policy(*rules)], CONTEXT), Permit) is expected
    denied = evaluate([policy(*rules, action=Action.DENY)], CONTEXT)
    assert isinstance(denied, Refusal) is expected


ALLOW_YES = policy(Rule(), name="allow-yes")
ALLOW_NO = policy(name="allow-no")
DENY_YES = policy(Rule(), action=Action.DENY, name="deny-yes")
DENY_NO = policy(action=Action.DENY, name="deny-no")


@pytest.mark.parametrize(
    ("policies", "decider"),
    [
        ([], ""),
        ([DENY_NO], ""),
        ([ALLOW_YES], "shop/allow-yes"),
        ([ALLOW_NO, ALLOW_YES], "shop/allow-yes"),
        ([DENY_NO, ALLOW_YES], "shop/allow-yes"),
    ],
)
def test_permitted(policies: list[Authorization], decider: str) -> None:
    permit = evaluate(policies, CONTEXT)
    assert isinstance(permit, Permit)
    assert permit.policy == decider


@pytest.mark.parametrize(
    ("policies", "decider", "rule"),
    [
        ([DENY_YES], "shop/deny-yes", 0),
        ([ALLOW_YES, DENY_YES], "shop/deny-yes", 0),
        ([ALLOW_NO], "shop/allow-no", None),
        ([DENY_NO, ALLOW_NO], "shop/allow-no", None),
    ],
)
def test_refused(policies: list[Authorization], decider: str, rule: int | None) -> None:
    refusal = evaluate(policies, CONTEXT)
    assert isinstance(refusal, Refusal)
    assert (refusal.flag, refusal.policy, refusal.rule, refusal.http_status) == (
        "DENY",
        decider,
        rule,
        401,
    )
    assert decider in refusal.reason


def test_the_rule_that_decided_is_named() -> None:
    second = policy(Rule((Clause((FALSE,)),)), Rule((Clause((TRUE,)),)), action=Action.DENY)
    refusal = evaluate([second], CONTEXT)
    assert isinstance(refusal, Refusal)
    assert refusal.rule == 1


def test_dry_run_decides_nothing() -> None:
    deny = policy(Rule(), action=Action.DENY, dry_run=True)
    allow_none = policy(dry_run=True, name="q")
    assert evaluate([deny, allow_none], CONTEXT) == Permit()
    would = Judge(map(CompiledPolicy, [deny, allow_none]), enforce_dry_run=True)
    assert isinstance(would.evaluate(CONTEXT), Refusal)


def test_strict_mtls_as_the_controller_compiles_it() -> None:
    strict = one(Match(not_principals=(PRESENT,)), Action.DENY)
    assert isinstance(evaluate([strict], ANONYMOUS), Refusal)
    assert isinstance(evaluate([strict], CONTEXT), Permit)


def test_strict_with_an_exempt_port() -> None:
    rule = Rule(
        (
            Clause((Match(not_principals=(PRESENT,)),)),
            Clause((Match(not_destination_ports=(8080,)),)),
        )
    )
    exempt = policy(rule, action=Action.DENY)
    assert isinstance(evaluate([exempt], ANONYMOUS), Permit)
    other_port = ConnectionContext(None, "10.0.0.7", "10.0.1.9", 9090)
    assert isinstance(evaluate([exempt], other_port), Refusal)


def test_a_compiler_follows_a_policy_that_changed() -> None:
    compiler = Compiler()
    assert isinstance(compiler.judge([policy(Rule())]).evaluate(CONTEXT), Permit)
    assert isinstance(compiler.judge([policy()]).evaluate(CONTEXT), Refusal)
    compiler.retain(frozenset())
    assert isinstance(compiler.judge([policy(Rule())]).evaluate(CONTEXT), Permit)


def test_many_allow_policies_are_not_all_named() -> None:
    refusal = evaluate([policy(name=f"p{i}") for i in range(5)], CONTEXT)
    assert isinstance(refusal, Refusal)
    assert "and 2 more" in refusal.reason


def _allow(name: str, **fields: object) -> Authorization:
    match = Match(**fields)  # type: ignore[arg-type]
    return Authorization(
        name=name,
        namespace="shop",
        scope=PolicyScope.NAMESPACE,
        action=Action.ALLOW,
        rules=(Rule((Clause((match,)),)),),
    )


def test_among_thousands_the_first_that_matches_is_named() -> None:
    principal = (StringMatch(StringKind.EXACT, "cluster.local/ns/shop/sa/me"),)
    others = [
        _allow(f"o{n}", principals=(StringMatch(StringKind.EXACT, f"cluster.local/ns/x/sa/{n}"),))
        for n in range(2000)
    ]
    context = ConnectionContext(SpiffeId("cluster.local", "shop", "me"), "10.0.0.1", "10.0.0.2", 80)
    by_port = _allow("port", destination_ports=(80,))
    by_name = _allow("name", principals=principal)
    by_prefix = _allow("prefix", namespaces=(StringMatch(StringKind.PREFIX, "sh"),))
    # However a rule is found, by what it names or by asking it, the order of policies decides.
    for first in (by_port, by_name, by_prefix):
        rest = [each for each in (by_port, by_name, by_prefix) if each is not first]
        verdict = evaluate([*others, first, *others, *rest], context)
        assert verdict == Permit(first.key, 0)
    assert isinstance(evaluate(others, context), Refusal)
    nobody = ConnectionContext(None, "10.0.0.1", "10.0.0.2", 81)
    assert isinstance(evaluate([*others, by_name, by_port], nobody), Refusal)
