"""An index asks whatever could match, in order: a grid of rules with a grid of requests."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest

from mesh.identity import SpiffeId
from mesh.model.l7_policy import L7Action, L7Authorization, L7Operation, L7Rule, L7Source
from waypoint.filters.authorize import Authorizer
from waypoint.filters.chain import Request
from waypoint.filters.rule_index import FEW, Filed, RuleIndex, find_anchors

SOURCES = [
    *(L7Source(principals=(each,)) for each in ("c/ns/a/sa/b", "c/ns/a*", "*/sa/c", "*")),
    *(L7Source(namespaces=(each,)) for each in ("a", "a*", "*b", "")),
    *(L7Source(service_accounts=(each,)) for each in ("b", "ab/c")),
    L7Source(not_namespaces=("a",)),
    L7Source(principals=("*/sa/c",), namespaces=("ab",)),
]
OPERATIONS = [
    *(L7Operation(hosts=(each,)) for each in ("web", "WEB:80", "Web*", "*b:80", "other", "*")),
    *(L7Operation(paths=(each,)) for each in ("/a", "/a/*", "/a*", "*/c", "/a/{*}/c", "/{**}")),
    *(L7Operation(paths=(each,)) for each in ("/b;x", "/b", "*")),
    L7Operation(methods=("GET",)),
    L7Operation(not_paths=("/a/b",)),
    L7Operation(hosts=("web",), paths=("*/c", "/b")),
]
RULES = [
    *(L7Rule(sources=(each,)) for each in SOURCES),
    *(L7Rule(operations=(each,)) for each in OPERATIONS),
    *(L7Rule((SOURCES[0],), (each,)) for each in OPERATIONS),
    *(L7Rule(tuple(SOURCES[:2]), pair) for pair in itertools.combinations(OPERATIONS, 2)),
    L7Rule(),
]
NEVER = L7Rule(operations=(L7Operation(hosts=("never",)),))
REQUESTS = [
    Request(method=b"GET", scheme=b"http", authority=host, path=path, source=source)
    for host in (b"web", b"Web:80", b"other.", b"b:80", b"")
    for path in (b"/a", b"/a/b/c", b"//a", b"/%61", b"/b;x", b"/b", b"*")
    for source in (
        None,
        *(SpiffeId("c", space, name) for space in ("a", "ab") for name in ("b", "c")),
    )
]


def authorizer(action: L7Action, *rules: L7Rule) -> Authorizer:
    return Authorizer([L7Authorization("a", "p", action, rules)])


@pytest.mark.parametrize("action", ["ALLOW", "DENY"])
def test_no_rule_that_matches_is_left_out(action: L7Action) -> None:
    for rule in RULES:
        alone, among = authorizer(action, rule), authorizer(action, *[NEVER] * FEW, rule)
        for request in REQUESTS:
            said = alone.judge(request)
            if said.rule:
                said = replace(said, rule=str(FEW))
            assert among.judge(request) == said, (rule, request)


def test_the_first_that_matches_is_named_whatever_it_is_filed_under() -> None:
    request = replace(REQUESTS[0], path=b"/a", source=SpiffeId("c", "a", "b"))
    matching = [
        L7Rule(operations=(L7Operation(paths=("/a",)),)),
        L7Rule(sources=(SOURCES[0],)),
        L7Rule(operations=(L7Operation(paths=("/*",)),)),
        L7Rule(operations=(L7Operation(methods=("GET",)),)),
    ]
    for order in itertools.permutations(matching):
        found = authorizer("DENY", *[NEVER] * FEW, *order).judge(request)
        assert found.rule == str(FEW)


def test_rules_about_others_are_not_asked() -> None:
    asked = []

    def told(number: int) -> Filed:
        rule = L7Rule((SOURCES[0],), (L7Operation(paths=(f"/item/{number}/*",)),))

        def test(_: Request) -> bool:
            asked.append(number)
            return number == 77

        return Filed("a/p", str(number), find_anchors(rule, "a"), test)

    index = RuleIndex([told(number) for number in range(1000)])
    caller = SpiffeId("c", "a", "b")
    assert index.first(replace(REQUESTS[0], path=b"/item/77/x", source=caller)) == ("a/p", "77")
    # Filed by path, as all name the same caller.
    assert asked == [77]
