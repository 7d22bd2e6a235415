"""AuthorizationPolicy at L7: truth tables, readings of HTTP, failing closed."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from mesh.errors import ConfigError
from mesh.identity import SpiffeId
from mesh.model.l7_policy import (
    ExternalAuthorizer,
    L7Authorization,
    L7Condition,
    L7Operation,
    L7Rule,
    L7Source,
)
from waypoint.filters.authorize import Authorize, Authorizer
from waypoint.filters.chain import Headers, Request, Respond
from waypoint.filters.strings import any_of, path_any_of

WEB = SpiffeId("cluster.local", "shop", "web")
BOT = SpiffeId("cluster.local", "crawl", "bot")


def request(**fields: Any) -> Request:
    given = {
        "method": b"GET",
        "scheme": b"http",
        "authority": b"reviews:9080",
        "path": b"/reviews/1",
        "source": WEB,
        "source_ip": "10.244.1.5",
        "remote_ip": "203.0.113.9",
        "destination_ip": "10.96.0.20",
        "destination_port": 9080,
    }
    return Request(**{**given, **fields})


def policy(*rules: L7Rule, action: str = "ALLOW", name: str = "p", **fields: Any) -> Any:
    return L7Authorization("shop", name, action, tuple(rules), **fields)  # type: ignore[arg-type]


def to(**fields: Any) -> L7Rule:
    return L7Rule(operations=(L7Operation(**fields),))


def source(**fields: Any) -> L7Rule:
    return L7Rule(sources=(L7Source(**fields),))


def when(key: str, *values: str, unless: tuple[str, ...] = ()) -> L7Rule:
    return L7Rule(conditions=(L7Condition(key, values, unless),))


ANYTHING = L7Rule()


@pytest.mark.parametrize(
    ("policies", "is_allowed", "policy_key"),
    [
        ((), True, ""),
        ((policy(),), False, "shop/p"),  # `{}`: an ALLOW that matches nothing
        ((policy(ANYTHING),), True, "shop/p"),  # `rules: [{}]`
        ((policy(ANYTHING, action="DENY"),), False, "shop/p"),
        ((policy(action="DENY"),), True, ""),
        ((policy(ANYTHING, name="a"), policy(ANYTHING, action="DENY", name="d")), False, "shop/d"),
        ((policy(name="a"), policy(ANYTHING, name="b")), True, "shop/b"),
        ((policy(ANYTHING, action="AUDIT"),), True, ""),
        ((policy(ANYTHING, action="DENY", is_dry_run=True),), True, ""),
        ((policy(is_dry_run=True),), True, ""),  # not an ALLOW that must match
        ((policy(ANYTHING, problem="no such target"),), False, "shop/p"),
        ((policy(ANYTHING, action="DENY", problem="?"),), False, "shop/p"),
    ],
)
def test_order_of_actions(policies: Any, is_allowed: bool, policy_key: str) -> None:
    decision = Authorizer(policies).judge(request())
    assert (decision.is_allowed, decision.policy) == (is_allowed, policy_key)


@pytest.mark.parametrize(
    ("rule", "fields", "matches"),
    [
        (source(principals=("cluster.local/ns/shop/sa/web",)), {}, True),
        (source(principals=("cluster.local/ns/shop/*",)), {}, True),
        (source(principals=("*/sa/web",)), {}, True),
        (source(principals=("*",)), {}, True),
        (source(principals=("*",)), {"source": None}, False),
        (source(not_principals=("*",)), {"source": None}, True),
        (source(not_principals=("cluster.local/ns/shop/sa/web",)), {}, False),
        (source(not_principals=("cluster.local/ns/shop/sa/web",)), {"source": BOT}, True),
        (source(namespaces=("shop", "crawl")), {"source": BOT}, True),
        (source(namespaces=("shop",), not_principals=("*/sa/web",)), {}, False),
        (source(service_accounts=("web",)), {}, True),
        (source(service_accounts=("web",)), {"source": SpiffeId("td", "other", "web")}, False),
        (source(service_accounts=("crawl/bot",)), {"source": BOT}, True),
        (source(ip_blocks=("10.244.0.0/16",)), {}, True),
        (source(ip_blocks=("10.244.0.0/16",)), {"source_ip": "::ffff:10.244.7.7"}, True),
        (source(not_ip_blocks=("10.244.0.0/16",)), {}, False),
        (source(remote_ip_blocks=("203.0.113.0/24",)), {}, True),
        (source(request_principals=("*",)), {}, False),
        (source(request_principals=("issuer/*",)), {"principal": "issuer/me"}, True),
        (to(methods=("GET", "HEAD")), {}, True),
        (to(methods=("get",)), {}, False),
        (to(not_methods=("GET",)), {}, False),
        (to(paths=("/reviews/*",)), {}, True),
        (to(paths=("/reviews/{*}",)), {}, True),
        (to(paths=("/reviews/{*}",)), {"path": b"/reviews/1/2"}, False),
        (to(paths=("/{**}",)), {"path": b"/a/b/c"}, True),
        (to(not_paths=("/health",)), {"path": b"/health"}, False),
        (to(ports=("9080",)), {}, True),
        (to(ports=("80",)), {}, False),
        (to(hosts=("Reviews:9080",)), {}, True),
        (to(hosts=("reviews",)), {}, False),  # ALLOW insists on the whole authority
        (when("request.headers[X-Team]", "red"), {"headers": Headers([(b"x-team", b"red")])}, True),
        (when("request.headers[X-Team]", "*"), {}, False),
        (when("request.headers[X-Team]", unless=("red",)), {}, True),
        (when("source.namespace", "shop"), {}, True),
        (when("source.trustDomain", "cluster.local"), {}, True),
        (when("source.serviceAccount", "web"), {}, True),
        (when("source.ip", "10.244.1.5"), {}, True),
        (when("destination.ip", "10.96.0.0/16"), {}, True),
        (when("destination.port", "9080"), {}, True),
        (when("request.auth.claims[groups]", "ops"), {"claims": {"groups": ["dev", "ops"]}}, True),
        (when("request.auth.claims[a][b]", "c"), {"claims": {"a": {"b": "c"}}}, True),
        (when("request.auth.claims[a][b]", "c"), {"claims": {"a": "c"}}, False),
        (when("request.auth.claims[a]", "c"), {"claims": None}, False),
        (when("request.auth.audiences", "shop"), {"claims": {"aud": "shop"}}, True),
        (when("connection.sni", "x"), {}, False),
    ],
)
def test_an_allow_rule(rule: L7Rule, fields: dict[str, Any], matches: bool) -> None:
    assert Authorizer((policy(rule),)).judge(request(**fields)).is_allowed is matches


@pytest.mark.parametrize(
    ("rule", "fields"),
    [
        (to(hosts=("reviews",)), {"authority": b"REVIEWS:9080"}),
        (to(hosts=("reviews",)), {"authority": b"reviews."}),
        (to(not_hosts=("ratings",)), {"authority": b"ratings:9080"}),
        (
            when("request.headers[x-role]", "guest"),
            {"headers": Headers([(b"x-role", b"admin"), (b"x-role", b"guest")])},
        ),
        (
            when("request.headers[x-role]", unless=("admin",)),
            {"headers": Headers([(b"x-role", b"admin"), (b"x-role", b"guest")])},
        ),
        (when("connection.sni", "x"), {}),
        (when("no.such.key", "x"), {}),
        (L7Rule(conditions=(L7Condition("source.ip"),)), {}),
        (source(), {}),
        (to(paths=("/{**}/x/{*}",)), {}),
        (source(ip_blocks=("10.0.0.0/99",)), {}),
        (to(ports=("http",)), {}),
    ],
)
def test_a_deny_takes_every_reading_and_what_it_cannot_judge(
    rule: L7Rule, fields: dict[str, Any]
) -> None:
    assert not Authorizer((policy(rule, action="DENY"),)).judge(request(**fields)).is_allowed


def test_a_denial_says_what_denied() -> None:
    denying = policy(to(methods=("PUT",)), to(methods=("GET",)), action="DENY", name="no-reads")
    answer = Authorize((denying,), explains_denials=True).on_request(request())
    assert isinstance(answer, Respond)
    assert (answer.status, answer.body, answer.flag) == (403, b"RBAC: access denied", "DENY")
    assert (answer.policy, answer.rule, answer.grpc_status) == ("shop/no-reads", "1", 7)
    assert answer.headers == ((b"x-ambit-denied-by", b"shop/no-reads 1"),)
    quiet = Authorize((denying,)).on_request(request())
    assert isinstance(quiet, Respond)
    assert quiet.headers == ()


def test_an_allow_and_what_only_looks_are_noted() -> None:
    asked = request()
    looking = policy(ANYTHING, action="DENY", name="soon", is_dry_run=True)
    assert Authorize((policy(ANYTHING, name="all"), looking)).on_request(asked) is None
    assert asked.notes == {
        "authorization.policy": ("shop/all", "0"),
        "authorization.noted": ("dry-run DENY shop/soon",),
    }


def test_an_external_authorizer_that_nobody_asks_denies() -> None:
    provider = ExternalAuthorizer("opa", "grpc", "shop/opa", 9191)
    custom = policy(to(paths=("/admin*",)), action="CUSTOM", provider=provider)
    judge = Authorizer((custom,)).judge
    assert judge(request()).is_allowed
    assert not judge(request(path=b"/admin/x")).is_allowed


@pytest.mark.parametrize(
    ("template", "path", "matches"),
    [
        ("/foo/{*}", "/foo/bar", True),
        ("/foo/{*}", "/foo/bar/baz", False),
        ("/foo/{*}", "/foo/", False),
        ("/foo/{**}/", "/foo/bar/", True),
        ("/foo/{**}/", "/foo/bar/baz.txt", False),
        ("/foo/{**}/", "/foo//", True),
        ("/foo/{**}/", "/foo/bar", False),
        ("/foo/{*}/bar/{**}", "/foo/x/bar/", True),
        ("/foo/{*}/bar/{**}", "/foo/x/bar/y/z", True),
        ("/a.c/{*}", "/abc/x", False),
    ],
)
def test_path_templates(template: str, path: str, matches: bool) -> None:
    assert path_any_of((template,))(path.encode()) is matches


@pytest.mark.parametrize(
    "template", ["/*/baz/{*}", "/{**}/foo/{*}", "/foo/{*}.txt", "/{a}", "/x{", "{*}", "/{**}/{**}"]
)
def test_what_is_no_template(template: str) -> None:
    with pytest.raises(ConfigError):
        path_any_of((template,))


def _naive(pattern: str, value: str) -> bool:
    if pattern == "*":
        return value != ""
    if pattern.endswith("*"):
        return value.startswith(pattern[:-1])
    return value.endswith(pattern[1:]) if pattern.startswith("*") else value == pattern


WORDS = st.text("ab/*", min_size=1, max_size=5)


@given(st.lists(WORDS, max_size=4), st.text("ab/", max_size=5))
@example(["", "*"], "")
def test_strings_are_what_the_api_says(patterns: list[str], value: str) -> None:
    expected = any(_naive(pattern, value) for pattern in patterns)
    assert bool(any_of(patterns)(value.encode())) is expected


@pytest.mark.parametrize(
    "path",
    [
        b"/admin", b"/admin;x=1", b"/admin;x/", b"/admin/;x", b"//admin", b"/%61dmin", b"/admin%2f",
        b"/admin%2fx", b"/x//admin", b"/admin//x", b"/%2fadmin", b"/admin%3bx",
    ],
)  # fmt: skip
def test_a_path_that_an_endpoint_may_take_for_a_denied_one_is_denied(path: bytes) -> None:
    denied = policy(to(paths=("/admin", "/admin/*", "/x/admin")), action="DENY")
    allowed = policy(to(paths=("/*",), not_paths=("/admin", "/admin/*", "/x/admin")))
    assert not Authorizer([denied]).judge(request(path=path)).is_allowed
    assert not Authorizer([allowed]).judge(request(path=path)).is_allowed


@pytest.mark.parametrize("path", [b"/public;/x", b"//public/x", b"/%70ublic/x", b"/public%2fx"])
def test_only_the_path_as_it_is_sent_opens_a_door(path: bytes) -> None:
    judge = Authorizer([policy(to(paths=("/public/*",)))]).judge
    assert not judge(request(path=path)).is_allowed
    assert judge(request(path=b"/public/x;y%2f")).is_allowed


@pytest.mark.parametrize(
    ("sent", "is_denied"),
    [
        ([b"admin"], True),
        ([b"user", b"admin"], True),
        ([b"user,admin"], True),
        ([b"user , admin\t,x", b"y"], True),
        ([b"user"], False),
        ([b"administrator"], False),
        ([], False),
    ],
)
def test_no_member_of_a_field_hides_from_a_denial(sent: list[bytes], is_denied: bool) -> None:
    fields = Headers([(b"x-role", value) for value in sent])
    denied = policy(when("request.headers[X-Role]", "admin"), action="DENY")
    assert Authorizer([denied]).judge(request(headers=fields)).is_allowed is not is_denied
    unless = policy(when("request.headers[x-role]", "*", unless=("admin",)))
    allowed = Authorizer([unless]).judge(request(headers=fields)).is_allowed
    assert allowed is (bool(sent) and not is_denied)


@pytest.mark.parametrize(
    ("key", "value", "sent"),
    [
        ("host", "admin.shop", {"authority": b"Admin.shop.:8080"}),
        (":authority", "admin.shop", {"authority": b"admin.shop:80"}),
        (":method", "DELETE", {"method": b"DELETE"}),
        (":path", "/a?b=c", {"path": b"/a", "query": b"b=c"}),
        ("upgrade", "websocket", {"upgrade": b"foo, WebSocket"}),
        ("Upgrade", "*", {"upgrade": b"foo"}),
    ],
)
def test_what_is_no_field_any_more_can_be_denied_by_its_name(
    key: str, value: str, sent: dict[str, bytes]
) -> None:
    judge = Authorizer([policy(when(f"request.headers[{key}]", value), action="DENY")]).judge
    assert not judge(request(**sent)).is_allowed
    assert judge(request()).is_allowed


@pytest.mark.parametrize("key", ["connection", "TE", "Transfer-Encoding"])
def test_a_field_between_neighbours_cannot_be_judged_and_denies(key: str) -> None:
    for action in ("ALLOW", "DENY"):
        judge = Authorizer([policy(when(f"request.headers[{key}]", "x"), action=action)]).judge
        assert "no policy sees it" in judge(request()).reason
