"""Policies are read strictly: every misspelling has its place."""

from __future__ import annotations

import pytest

from mesh.cluster.documents import read_documents
from mesh.cluster.inventory import Inventory
from mesh.cluster.policies import (
    Condition,
    Operation,
    Rule,
    Source,
    TargetRef,
    parse_authorization_policy,
    parse_peer_authentication,
)
from mesh.errors import ConfigError


def policy(**spec: object) -> dict:
    return {
        "apiVersion": "security.istio.io/v1",
        "kind": "AuthorizationPolicy",
        "metadata": {"name": "a", "namespace": "shop"},
        "spec": spec,
    }


def peer(**spec: object) -> dict:
    return {**policy(**spec), "kind": "PeerAuthentication"}


def test_a_whole_policy():
    found = parse_authorization_policy(
        policy(
            action="DENY",
            selector={"matchLabels": {"app": "web"}},
            rules=[
                {
                    "from": [
                        {
                            "source": {
                                "principals": ["cluster.local/ns/a/sa/b"],
                                "notNamespaces": ["x*"],
                                "ipBlocks": ["10.0.0.1", "10.1.2.3/16", "FD00::1/64"],
                                "requestPrincipals": ["*"],
                            }
                        },
                        {"source": {"serviceAccounts": ["b", "a/b"]}},
                    ],
                    "to": [{"operation": {"ports": ["80", "443"], "methods": ["GET"]}}],
                    "when": [{"key": "source.ip", "notValues": ["10.0.0.0/8"]}],
                },
                {},
            ],
        )
    )
    assert found.action == "DENY"
    assert found.selector == {"app": "web"}
    assert found.rules == (
        Rule(
            (
                Source(
                    principals=("cluster.local/ns/a/sa/b",),
                    not_namespaces=("x*",),
                    ip_blocks=("10.0.0.1/32", "10.1.0.0/16", "fd00::/64"),
                    l7={"requestPrincipals": ("*",)},
                ),
                Source(service_accounts=("b", "a/b")),
            ),
            (Operation(ports=(80, 443), l7={"methods": ("GET",)}),),
            (Condition("source.ip", (), ("10.0.0.0/8",)),),
        ),
        Rule(),
    )


def test_an_empty_policy_allows_nothing():
    found = parse_authorization_policy(policy())
    assert (found.action, found.selector, found.rules) == ("ALLOW", None, ())
    raw = policy()
    del raw["spec"]
    assert parse_authorization_policy(raw).rules == ()


def test_target_refs():
    ref = {"group": "", "kind": "Service", "name": "web"}
    for spec in ({"targetRefs": [ref]}, {"targetRef": ref}):
        assert parse_authorization_policy(policy(**spec)).target_refs == (
            TargetRef("", "Service", "web"),
        )


def _operation(**fields: object) -> dict:
    return policy(rules=[{}, {"to": [{"operation": fields}]}])


def _source(**fields: object) -> dict:
    return policy(rules=[{"from": [{"source": fields}]}])


def _when(**fields: object) -> dict:
    return policy(rules=[{"when": [fields]}])


@pytest.mark.parametrize(
    ("obj", "says"),
    [
        (_operation(ports=["http"]), 'spec.rules[1].to[0].operation.ports[0]: not a port: "http"'),
        (_operation(ports=["80", "0"]), "spec.rules[1].to[0].operation.ports[1]: not a port: 0"),
        (_operation(ports=["70000"]), "spec.rules[1].to[0].operation.ports[0]: not a port: 70000"),
        (_operation(ports=[True]), "spec.rules[1].to[0].operation.ports[0]: not a port: true"),
        (_operation(ports="80"), 'spec.rules[1].to[0].operation.ports: expected a list, not "80"'),
        (_operation(port=["80"]), "spec.rules[1].to[0].operation.port: unknown field"),
        (_operation(), "spec.rules[1].to[0].operation: empty"),
        (
            _operation(ports=[]),
            "spec.rules[1].to[0].operation: matches nothing: every list in it is empty",
        ),
        (_operation(paths=[""]), "spec.rules[1].to[0].operation.paths[0]: empty"),
        (_source(principal=["a"]), "spec.rules[0].from[0].source.principal: unknown field"),
        (
            _source(ipBlocks=["10.0.0.0/33"]),
            "spec.rules[0].from[0].source.ipBlocks[0]: not an address or a CIDR block",
        ),
        (
            _source(serviceAccounts=["a/b/c"]),
            'spec.rules[0].from[0].source.serviceAccounts[0]: not a service account: "a/b/c"',
        ),
        (
            _source(serviceAccounts=["*"]),
            'spec.rules[0].from[0].source.serviceAccounts[0]: not a service account: "*"',
        ),
        (
            _source(serviceAccounts=["b"], namespaces=["a"]),
            "spec.rules[0].from[0].source.serviceAccounts[0]: service accounts beside principals "
            "or namespaces: name one or the other",
        ),
        (policy(rules=[{"from": []}]), "spec.rules[0].from: an empty list"),
        (policy(rules=[{"to": []}]), "spec.rules[0].to: an empty list"),
        (policy(rules=[None]), "spec.rules[0]: empty: write {}"),
        (policy(rules=[{"form": []}]), "spec.rules[0].form: unknown field"),
        (
            policy(rules=[{"from": [{"namespaces": ["a"]}]}]),
            "spec.rules[0].from[0].namespaces: unk",
        ),
        (policy(rules={}), "spec.rules: expected a list, not a mapping"),
        (_when(key="source.ip", values=["x"]), "spec.rules[0].when[0].values[0]: not an address"),
        (
            _when(key="destination.port", values=["x"]),
            "spec.rules[0].when[0].values[0]: not a port",
        ),
        (_when(key="source.ip"), "spec.rules[0].when[0]: neither values nor notValues"),
        (_when(key="source.ipp", values=["x"]), "spec.rules[0].when[0].key: unknown attribute"),
        (_when(values=["x"]), "spec.rules[0].when[0].key: missing"),
        (policy(action="Allow"), 'spec.action: unknown value "Allow"'),
        (policy(selector={"app": "web"}), "spec.selector.app: unknown field"),
        (
            policy(selector={"matchLabels": {"app": "w*"}}),
            "spec.selector.matchLabels.app: wildcards are not for labels",
        ),
        (policy(provider={"name": "x"}), "spec.provider: only a CUSTOM policy has a provider"),
        (
            policy(selector={}, targetRefs=[{"kind": "Service", "name": "x"}]),
            "spec.targetRefs: beside a selector",
        ),
        (policy(rule=[]), "spec.rule: unknown field"),
        ({**policy(), "rules": []}, "rules: unknown field"),
    ],
)
def test_refused(obj, says):
    with pytest.raises(ConfigError) as caught:
        parse_authorization_policy(obj)
    assert str(caught.value).startswith(says)


def test_peer_authentication():
    found = parse_peer_authentication(
        peer(
            selector={"matchLabels": {"app": "web"}},
            mtls={"mode": "STRICT"},
            portLevelMtls={"8080": {"mode": "DISABLE"}, "9090": {}},
        )
    )
    assert found.selector == {"app": "web"}
    assert (found.mode, found.port_modes) == ("STRICT", {8080: "DISABLE", 9090: "UNSET"})
    assert parse_peer_authentication(peer()).mode == "UNSET"


@pytest.mark.parametrize(
    ("obj", "says"),
    [
        (peer(mtls={"mode": "strict"}), 'spec.mtls.mode: unknown value "strict"'),
        (peer(mtls="STRICT"), 'spec.mtls: expected a mapping, not "STRICT"'),
        (peer(mtsl={}), "spec.mtsl: unknown field"),
        (
            peer(portLevelMtls={"80": {"mode": "STRICT"}}),
            "spec.portLevelMtls: needs a selector with labels",
        ),
        (
            peer(selector={"matchLabels": {"a": "b"}}, portLevelMtls={"http": {}}),
            'spec.portLevelMtls.http: not a port: "http"',
        ),
        (
            peer(selector={"matchLabels": {"a": "b"}}, portLevelMtls={"0": {}}),
            'spec.portLevelMtls["0"]: not a port: 0',
        ),
    ],
)
def test_refused_peers(obj, says):
    with pytest.raises(ConfigError) as caught:
        parse_peer_authentication(obj)
    assert str(caught.value) == says


def test_the_place_in_a_file():
    text = """\
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: a, namespace: shop}
spec:
  rules:
  - {}
  - to:
    - operation:
        ports: ["http"]
"""
    (document,) = read_documents(text.encode(), "p.yaml")
    with pytest.raises(ConfigError) as caught:
        Inventory().put(document.ref, document.object, document.source)
    assert str(caught.value) == (
        'p.yaml:9:17: spec.rules[1].to[0].operation.ports[0]: not a port: "http"'
    )
