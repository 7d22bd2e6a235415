"""AuthorizationPolicy on connections without HTTP: a truth table, and failing closed."""

from __future__ import annotations

from typing import Any

import pytest

from mesh.identity import SpiffeId
from mesh.model.l7_policy import (
    JwtRule,
    L7Authorization,
    L7Condition,
    L7Operation,
    L7Rule,
    L7Source,
    RequestAuthentication,
)
from mesh.model.service import AppProtocol
from waypoint.filters import jwks
from waypoint.filters.authorize import Authorize
from waypoint.filters.chain import PassingFilter, Request
from waypoint.filters.jwt import Jwt
from waypoint.judge_connection import judge_connection

FACTS = Request(
    method=b"",
    scheme=b"",
    authority=b"",
    path=b"",
    source=SpiffeId("cluster.local", "shop", "web"),
    source_ip="10.0.0.5",
    remote_ip="10.0.0.5",
    destination_ip="10.96.0.1",
    destination_port=5432,
)
WEB, OTHER = "cluster.local/ns/shop/sa/web", "cluster.local/ns/shop/sa/other"


def rule(to: Any = None, source: Any = None, **when: tuple[str, ...]) -> L7Rule:
    conditions = tuple(L7Condition(key.replace("_", "."), values) for key, values in when.items())
    return L7Rule(
        (L7Source(**source),) if source else (), (L7Operation(**to),) if to else (), conditions
    )


def is_allowed(*rules: L7Rule, action: Any = "ALLOW", **fields: Any) -> bool:
    policy = L7Authorization("shop", "p", action, rules, **fields)
    return judge_connection([Authorize([policy])], FACTS, AppProtocol.TCP) is None


@pytest.mark.parametrize(
    ("known", "matches"),
    [
        (rule(source={"principals": (WEB,)}), True),
        (rule(source={"principals": (OTHER,)}), False),
        (rule(source={"not_principals": (OTHER,)}), True),
        (rule(source={"namespaces": ("shop",)}), True),
        (rule(source={"service_accounts": ("shop/web",)}), True),
        (rule(source={"ip_blocks": ("10.0.0.0/8",)}), True),
        (rule(source={"not_ip_blocks": ("10.0.0.0/8",)}), False),
        (rule({"ports": ("5432",)}), True),
        (rule({"not_ports": ("5432",)}), False),
        (rule(destination_port=("5432",)), True),
        (rule(source_namespace=("other",)), False),
        (L7Rule(), True),
    ],
)
def test_what_is_known_of_a_connection_is_judged(known: L7Rule, matches: bool) -> None:
    assert is_allowed(known) is matches
    assert is_allowed(known, action="DENY") is not matches
    assert is_allowed(known, action="CUSTOM") is not matches
    assert is_allowed(known, action="DENY", is_dry_run=True)


@pytest.mark.parametrize(
    "unknown",
    [
        rule({"paths": ("/*",)}),
        rule({"not_paths": ("/admin",)}),
        rule({"methods": ("GET",)}),
        rule({"hosts": ("*",), "ports": ("5432",)}),
        rule({"not_methods": ("POST",)}, {"principals": (WEB,)}),
        rule(source={"request_principals": ("*",)}),
        rule(source={"not_request_principals": ("*",), "principals": (WEB,)}),
        L7Rule(conditions=(L7Condition("request.headers[x]", ("y",)),)),
        L7Rule(conditions=(L7Condition("request.auth.claims[a]", (), ("y",)),)),
        L7Rule(conditions=(L7Condition("connection.sni", ("a",)),)),
        L7Rule(conditions=(L7Condition("whatever", ("a",)),)),
    ],
)
def test_what_only_a_request_could_answer_opens_nothing_and_closes_all(unknown: L7Rule) -> None:
    assert not is_allowed(unknown)
    assert not is_allowed(unknown, action="DENY")


def test_alternatives_that_can_be_judged_are() -> None:
    both = L7Rule(operations=(L7Operation(paths=("/*",)), L7Operation(ports=("5432",))))
    assert is_allowed(both)
    other = L7Rule(operations=(L7Operation(ports=("1",)), L7Operation(ports=("2",))))
    assert is_allowed(other, action="DENY")
    apart = rule({"methods": ("GET",), "ports": ("80",)})
    assert is_allowed(apart, action="DENY")  # another port altogether
    elsewhere = rule({"methods": ("GET",)}, {"principals": (OTHER,)})
    assert is_allowed(elsewhere, action="DENY")


def test_what_was_not_understood_denies() -> None:
    assert not is_allowed(problem="no such action")
    assert not is_allowed(rule(source={"ip_blocks": ("nonsense",)}), action="DENY")
    assert not is_allowed()  # ALLOW nothing


def test_tokens_and_other_policies() -> None:
    tokens = Jwt(
        [RequestAuthentication("shop", "t", (JwtRule("i", jwks="{}"),))],
        jwks.sources(jwks.fetch),
        lambda: 0.0,
    )
    assert judge_connection([tokens], FACTS, AppProtocol.TCP) is None
    refusal = judge_connection([tokens], FACTS, AppProtocol.UNKNOWN)
    assert refusal is not None
    assert (refusal.flag, refusal.reason) == (
        "DENY",
        "RequestAuthentication cannot judge a connection that is not HTTP",
    )

    class Redacts(PassingFilter):
        name = "RedactionPolicy"

    assert judge_connection([Redacts()], FACTS, AppProtocol.TCP) is not None
