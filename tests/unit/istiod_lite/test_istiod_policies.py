"""YAML in, verdict out: what a policy that users write means at the tunnel."""

from __future__ import annotations

import pytest

from istiod_lite.policies import closed, translate
from mesh.authz import ConnectionContext, Permit, evaluate
from mesh.cluster.api import ref_of
from mesh.cluster.documents import read_documents
from mesh.cluster.policies import parse_authorization_policy
from mesh.cluster.validate import Severity
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

HEAD = """\
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: p, namespace: shop%s}
spec:
"""


def parsed(spec: str, more: str = ""):
    text = HEAD % more + "".join(f"  {line}\n" for line in spec.splitlines())
    (document,) = read_documents(text.encode(), "p.yaml")
    return parse_authorization_policy(document.object)


def rules_of(spec: str) -> tuple[Rule, ...]:
    found = translate(parsed(spec), "istio-system").authorization
    assert found is not None
    return found.rules


def verdict(
    spec: str,
    *,
    identity: str | None = "spiffe://cluster.local/ns/a/sa/web",
    source: str = "10.0.0.1",
    destination: str = "10.0.0.2",
    port: int = 80,
) -> bool:
    found = translate(parsed(spec), "istio-system").authorization
    assert found is not None
    context = ConnectionContext(
        SpiffeId.parse(identity) if identity else None, source, destination, port
    )
    return isinstance(evaluate([found], context), Permit)


# -- scope ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "namespace", "scope"),
    [
        ("rules: []", "shop", PolicyScope.NAMESPACE),
        ("rules: []", "istio-system", PolicyScope.GLOBAL),
        ("selector: {matchLabels: {a: b}}", "shop", PolicyScope.WORKLOAD_SELECTOR),
        ("selector: {matchLabels: {a: b}}", "istio-system", PolicyScope.WORKLOAD_SELECTOR),
        ("selector: {}", "shop", PolicyScope.WORKLOAD_SELECTOR),
    ],
)
def test_scope(spec, namespace, scope):
    text = (HEAD % "").replace("shop", namespace) + f"  {spec}\n"
    (document,) = read_documents(text.encode(), "p.yaml")
    found = translate(parse_authorization_policy(document.object), "istio-system").authorization
    assert found is not None
    assert (found.scope, found.key) == (scope, f"{namespace}/p")


def test_a_waypoints_policy_is_not_ours():
    found = translate(parsed("targetRefs: [{group: '', kind: Service, name: web}]"), "istio-system")
    assert (found.authorization, found.findings) == (None, ())


@pytest.mark.parametrize("action", ["CUSTOM", "AUDIT"])
def test_unsupported_actions_are_told(action):
    found = translate(parsed(f"action: {action}\nrules: [{{}}]"), "istio-system")
    assert found.authorization is None
    (finding,) = found.findings
    assert (finding.field, finding.severity) == ("spec.action", Severity.WARNING)
    assert action in finding.message


def test_dry_run():
    found = translate(
        parsed("rules: [{}]", ', annotations: {istio.io/dry-run: "true"}'), "istio-system"
    )
    assert found.authorization is not None
    assert found.authorization.dry_run


# -- shape ---------------------------------------------------------------------------


def test_one_clause_for_from_one_for_to_one_for_each_when():
    assert rules_of(
        """\
rules:
- from:
  - source: {namespaces: [a], notPrincipals: ["*"]}
  - source: {serviceAccounts: [web, b/db]}
  to:
  - operation: {ports: ["80", "81"], notPorts: ["82"]}
  when:
  - {key: source.ip, values: [10.0.0.1], notValues: [10.1.0.0/16]}
  - {key: destination.port, values: ["80"]}
"""
    ) == (
        Rule(
            (
                Clause((Match(destination_ports=(80, 81), not_destination_ports=(82,)),)),
                Clause(
                    (
                        Match(
                            namespaces=(StringMatch(StringKind.EXACT, "a"),),
                            not_principals=(StringMatch(StringKind.PRESENCE),),
                        ),
                        Match(
                            service_accounts=(
                                ServiceAccountMatch("shop", "web"),
                                ServiceAccountMatch("b", "db"),
                            )
                        ),
                    )
                ),
                Clause((Match(source_ips=("10.0.0.1/32",), not_source_ips=("10.1.0.0/16",)),)),
                Clause((Match(destination_ports=(80,)),)),
            )
        ),
    )


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("a", StringMatch(StringKind.EXACT, "a")),
        ("*", StringMatch(StringKind.PRESENCE)),
        ("*x", StringMatch(StringKind.SUFFIX, "x")),
        ("x*", StringMatch(StringKind.PREFIX, "x")),
        ("x*y", StringMatch(StringKind.EXACT, "x*y")),
    ],
)
def test_wildcards(text, match):
    (rule,) = rules_of(f'rules: [{{from: [{{source: {{namespaces: ["{text}"]}}}}]}}]')
    assert rule.clauses[0].matches[0].namespaces == (match,)


# -- truth tables --------------------------------------------------------------------

OTHER = "spiffe://cluster.local/ns/b/sa/web"
WEB = "spiffe://cluster.local/ns/a/sa/web"


@pytest.mark.parametrize(
    ("spec", "context", "permitted"),
    [
        ("rules: []", {}, False),
        ("rules: [{}]", {}, True),
        ("rules: [{}]", {"identity": None}, True),
        ("action: DENY\nrules: []", {}, True),
        ("action: DENY\nrules: [{}]", {}, False),
        ("rules: [{from: [{source: {namespaces: [a]}}]}]", {}, True),
        ("rules: [{from: [{source: {namespaces: [a]}}]}]", {"identity": OTHER}, False),
        ("rules: [{from: [{source: {namespaces: [a]}}]}]", {"identity": None}, False),
        ('rules: [{from: [{source: {principals: ["*"]}}]}]', {}, True),
        ('rules: [{from: [{source: {principals: ["*"]}}]}]', {"identity": None}, False),
        ('rules: [{from: [{source: {principals: ["cluster.local/ns/a/*"]}}]}]', {}, True),
        ('rules: [{from: [{source: {principals: ["*/sa/web"]}}]}]', {"identity": OTHER}, True),
        ("rules: [{from: [{source: {principals: [cluster.local/ns/a/sa/web]}}]}]", {}, True),
        ("rules: [{from: [{source: {serviceAccounts: [a/web]}}]}]", {}, True),
        ("rules: [{from: [{source: {serviceAccounts: [web]}}]}]", {}, False),
        ("action: DENY\nrules: [{from: [{source: {notNamespaces: [a]}}]}]", {}, True),
        (
            "action: DENY\nrules: [{from: [{source: {notNamespaces: [a]}}]}]",
            {"identity": OTHER},
            False,
        ),
        (
            "action: DENY\nrules: [{from: [{source: {notPrincipals: ['*']}}]}]",
            {"identity": None},
            False,
        ),
        ("rules: [{from: [{source: {ipBlocks: [10.0.0.0/24]}}]}]", {}, True),
        ("rules: [{from: [{source: {ipBlocks: [10.0.0.0/24]}}]}]", {"source": "10.0.1.1"}, False),
        ("rules: [{from: [{source: {ipBlocks: ['fd00::/64']}}]}]", {"source": "fd00::9"}, True),
        ("rules: [{from: [{source: {notIpBlocks: [10.0.0.1]}}]}]", {}, False),
        ("rules: [{to: [{operation: {ports: ['80']}}]}]", {}, True),
        ("rules: [{to: [{operation: {ports: ['80']}}]}]", {"port": 81}, False),
        ("rules: [{to: [{operation: {notPorts: ['80']}}]}]", {"port": 81}, True),
        ("rules: [{when: [{key: destination.ip, values: [10.0.0.2]}]}]", {}, True),
        ("rules: [{when: [{key: destination.ip, notValues: [10.0.0.2]}]}]", {}, False),
        ("rules: [{when: [{key: source.namespace, values: [b, a]}]}]", {}, True),
        ("rules: [{when: [{key: source.principal, notValues: ['*']}]}]", {}, False),
        ("rules: [{when: [{key: source.serviceAccount, values: [a/web]}]}]", {}, True),
        # from and to must both hold; of several entries one is enough.
        (
            "rules: [{from: [{source: {namespaces: [a]}}], to: [{operation: {ports: ['81']}}]}]",
            {},
            False,
        ),
        (
            "rules: [{to: [{operation: {ports: ['81']}}, {operation: {ports: ['80']}}]}]",
            {},
            True,
        ),
        # Rules are alternatives.
        (
            "rules: [{to: [{operation: {ports: ['81']}}]}, {from: [{source: {namespaces: [a]}}]}]",
            {},
            True,
        ),
    ],
)
def test_truth(spec, context, permitted):
    assert verdict(spec, **context) is permitted


# -- HTTP at the tunnel --------------------------------------------------------------


@pytest.mark.parametrize(
    "rule",
    [
        "{to: [{operation: {methods: [GET]}}]}",
        "{to: [{operation: {ports: ['80'], paths: [/x]}}]}",
        "{to: [{operation: {ports: ['80']}}, {operation: {hosts: [x]}}]}",
        "{from: [{source: {requestPrincipals: ['*']}}]}",
        "{from: [{source: {remoteIpBlocks: [10.0.0.1]}}]}",
        "{when: [{key: 'request.headers[x]', values: [y]}]}",
        "{when: [{key: remote.ip, values: [10.0.0.1]}]}",
    ],
)
def test_an_allow_rule_with_http_allows_nothing_and_the_policy_stays(rule):
    found = translate(parsed(f"rules: [{rule}]"), "istio-system")
    assert found.authorization is not None
    assert found.authorization.rules == ()
    assert not verdict(f"rules: [{rule}]")
    (finding,) = found.findings
    assert finding.field.startswith("spec.rules[0].")
    assert "allows nothing" in finding.message
    # Another rule is not harmed.
    assert verdict(f"rules: [{rule}, {{from: [{{source: {{namespaces: [a]}}}}]}}]")


@pytest.mark.parametrize(
    ("rule", "port80", "port81", "field"),
    [
        # What is left denies, and so more than is written.
        (
            "{to: [{operation: {ports: ['80'], methods: [GET]}}]}",
            False,
            True,
            "spec.rules[0].to[0].operation",
        ),
        # Nothing is left of the entry: it may be anything, so the rest of the rule decides.
        ("{to: [{operation: {methods: [GET]}}]}", False, False, "spec.rules[0].to[0].operation"),
        (
            "{from: [{source: {namespaces: [a]}}], to: [{operation: {methods: [GET]}}]}",
            False,
            False,
            "spec.rules[0].to[0].operation",
        ),
        (
            "{from: [{source: {namespaces: [b]}}], to: [{operation: {methods: [GET]}}]}",
            True,
            True,
            "spec.rules[0].to[0].operation",
        ),
        (
            "{when: [{key: 'request.headers[x]', values: [y]}]}",
            False,
            False,
            "spec.rules[0].when[0].key",
        ),
        (
            "{to: [{operation: {ports: ['80']}}, {operation: {methods: [GET]}}]}",
            False,
            False,
            "spec.rules[0].to[1].operation",
        ),
    ],
)
def test_a_deny_rule_with_http_denies_more_never_less(rule, port80, port81, field):
    spec = f"action: DENY\nrules: [{rule}]"
    assert (verdict(spec, port=80), verdict(spec, port=81)) == (port80, port81)
    (finding,) = translate(parsed(spec), "istio-system").findings
    assert (finding.severity, finding.field) == (Severity.WARNING, field)
    assert "more is denied than is written" in finding.message


# -- what cannot be read -------------------------------------------------------------


def unreadable(spec: dict, namespace: str = "shop"):
    obj = {
        "apiVersion": "security.istio.io/v1",
        "kind": "AuthorizationPolicy",
        "metadata": {"name": "p", "namespace": namespace},
        "spec": spec,
    }
    return closed(ref_of(obj), obj, "istio-system")


@pytest.mark.parametrize(
    ("spec", "scope", "action", "rules", "selector"),
    [
        ({"rules": "x"}, PolicyScope.NAMESPACE, Action.ALLOW, (), None),
        ({"action": "DENY", "rules": "x"}, PolicyScope.NAMESPACE, Action.DENY, (Rule(),), None),
        ({"action": "Alow"}, PolicyScope.NAMESPACE, Action.DENY, (Rule(),), None),
        ({"action": 5}, PolicyScope.NAMESPACE, Action.DENY, (Rule(),), None),
        (
            {"selector": {"matchLabels": {"a": "b"}}, "rules": "x"},
            PolicyScope.WORKLOAD_SELECTOR,
            Action.ALLOW,
            (),
            {"a": "b"},
        ),
        ({"selector": {"matchLabels": {"a": 1}}}, PolicyScope.NAMESPACE, Action.ALLOW, (), None),
        ({"selector": "x"}, PolicyScope.NAMESPACE, Action.ALLOW, (), None),
    ],
)
def test_closed(spec, scope, action, rules, selector):
    assert unreadable(spec) == (Authorization("p", "shop", scope, action, rules), selector)


def test_closed_in_the_root_namespace_is_for_all():
    found = unreadable({"rules": "x"}, "istio-system")
    assert found is not None
    assert found[0].scope is PolicyScope.GLOBAL


@pytest.mark.parametrize(
    "spec", [{"targetRefs": [{}]}, {"targetRef": {}, "targetRefs": "x"}, {"action": "AUDIT"}]
)
def test_what_would_not_have_denied_here_does_not(spec):
    assert unreadable(spec) is None
