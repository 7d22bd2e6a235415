"""Routes as they are read: defaults filled in, and what cannot mean anything refused by name."""

from __future__ import annotations

import pytest

from mesh.cluster.api import ref_of
from mesh.cluster.fields import Reader
from mesh.cluster.gateways import parse_gateway, parse_reference_grant
from mesh.cluster.inventory import PARSERS
from mesh.cluster.route_filters import read_duration, read_filters
from mesh.errors import ConfigError
from mesh.model.route import (
    Cors,
    HeaderChange,
    MethodMatch,
    NamedMatch,
    PathChange,
    PathMatch,
    Redirect,
    Retry,
    Rewrite,
    RouteMatch,
)
from tests.support.gateways import gateway, obj, route


def read(**rule):
    return parsed(route(rules=[rule])).rules[0]


def parsed(raw):
    return PARSERS[ref_of(raw).kind](raw)


def filters(*entries, is_grpc=False):
    return read_filters(Reader(list(entries), ("filters",)), "shop", is_grpc=is_grpc)


def test_what_an_api_server_would_default_is_defaulted():
    found = parsed(route(rules=[{"backendRefs": [{"name": "web", "port": 80}]}]))
    (rule,) = found.rules
    assert rule.matches == (RouteMatch(PathMatch("PathPrefix", "/")),)
    assert (rule.backends[0].service, rule.backends[0].weight) == ("shop/web", 1)
    plain = obj("HTTPRoute", "r", "shop", "gateway.networking.k8s.io/v1", spec={})
    assert len(parsed(plain).rules) == 1
    grpc = parsed(obj("GRPCRoute", "r", "shop", "gateway.networking.k8s.io/v1", spec={}))
    assert grpc.rules[0].matches == (RouteMatch(grpc=MethodMatch()),)


def test_a_parent_is_a_gateway_unless_it_says_core():
    refs = [{"name": "a"}, {"group": "core", "kind": "Service", "name": "b", "port": 80}]
    first, second = parsed(route(parents=refs)).parents
    assert (first.group, first.kind) == ("gateway.networking.k8s.io", "Gateway")
    assert (second.group, second.kind, second.port, second.namespace) == ("", "Service", 80, "shop")


def test_matches():
    match = {
        "path": {"type": "Exact", "value": "/a"},
        "method": "GET",
        "headers": [{"name": "X-A", "value": "1"}, {"name": "x-a", "value": "2"}],
        "queryParams": [{"name": "Q", "value": ".*", "type": "RegularExpression"}],
    }
    (found,) = read(matches=[match]).matches
    assert found == RouteMatch(
        PathMatch("Exact", "/a"),
        (NamedMatch("x-a", "1"),),
        (NamedMatch("Q", ".*", "RegularExpression"),),
        "GET",
    )


@pytest.mark.parametrize("path", ["a", "/a//b", "/a/../b", "/a/.", "/%2f", "/a#b", "/é", "/a b"])
def test_paths_that_are_none(path):
    with pytest.raises(ConfigError) as caught:
        read(matches=[{"path": {"value": path}}])
    assert caught.value.field == "spec.rules[0].matches[0].path.value"


def test_timeouts_and_retries():
    found = read(
        timeouts={"request": "1m30s", "backendRequest": "500ms"},
        retry={"attempts": 3, "codes": [500, 503], "backoff": "100ms"},
    )
    assert (found.request_timeout, found.backend_timeout) == (90.0, 0.5)
    assert found.retry == Retry(3, (500, 503), 0.1)
    off = read(timeouts={"request": "0s", "backendRequest": "5s"})
    assert (off.request_timeout, off.backend_timeout) == (None, 5.0)


@pytest.mark.parametrize("text", ["", "1", "1d", "-1s", "1s1s1s1s1s", "123456s"])
def test_durations_that_are_none(text):
    with pytest.raises(ConfigError):
        read_duration(Reader(text, ("x",)))


@pytest.mark.parametrize(
    "wrong",
    [
        {"unknown": 1},
        {"matches": [{"host": "x"}]},
        {"matches": [{"method": "BREW"}]},
        {"matches": [{"path": {"type": "Glob", "value": "/"}}]},
        {"matches": [{"path": {"type": "RegularExpression", "value": "("}}]},
        {"backendRefs": [{"name": "web"}]},
        {"backendRefs": [{"name": "web", "port": 80, "weight": -1}]},
        {"backendRefs": [{"name": "web", "port": 80}] * 17},
        {"timeouts": {"request": "1s", "backendRequest": "2s"}},
        {"retry": {"codes": [200]}},
        {"filters": [{"type": "RequestMirror"}]},
        {"filters": [{"type": "Magic", "magic": {}}]},
        {"sessionPersistence": {"cookie": {"lifetimeType": "Permanent"}}},
        {
            "filters": [{"type": "RequestRedirect", "requestRedirect": {}}],
            "backendRefs": [{"name": "web", "port": 80}],
        },
    ],
)
def test_rules_that_are_refused(wrong):
    with pytest.raises(ConfigError) as caught:
        read(**wrong)
    assert caught.value.field.startswith("spec.rules[0]")


def test_each_filter():
    change = {"set": [{"name": "A", "value": "1"}], "remove": ["B"]}
    found = filters(
        {"type": "RequestHeaderModifier", "requestHeaderModifier": change},
        {"type": "ResponseHeaderModifier", "responseHeaderModifier": {"add": []}},
        {
            "type": "URLRewrite",
            "urlRewrite": {
                "hostname": "x.example",
                "path": {"type": "ReplacePrefixMatch", "replacePrefixMatch": "/n"},
            },
        },
        {"type": "CORS", "cors": {"allowOrigins": ["https://*.example"], "maxAge": 9}},
        {"type": "ExtensionRef", "extensionRef": {"group": "g", "kind": "K", "name": "n"}},
        {
            "type": "RequestMirror",
            "requestMirror": {"backendRef": {"name": "m", "port": 1}, "percent": 5},
        },
    )
    assert found[0].request_headers == HeaderChange(set=(("A", "1"),), remove=("B",))
    assert found[1].response_headers == HeaderChange()
    assert found[2].rewrite == Rewrite("x.example", PathChange("ReplacePrefixMatch", "/n"))
    assert found[3].cors == Cors(allow_origins=("https://*.example",), max_age_seconds=9)
    assert found[4].extension == "g/K/shop/n"
    assert found[5].mirror is not None
    assert (found[5].mirror.numerator, found[5].mirror.denominator) == (5, 100)
    redirect = {"hostname": "x.example", "statusCode": 301, "port": 8443, "scheme": "https"}
    (other,) = filters({"type": "RequestRedirect", "requestRedirect": redirect})
    assert other.redirect == Redirect("https", "x.example", None, 8443, 301)


HEADERS = "RequestHeaderModifier"


@pytest.mark.parametrize(
    "wrong",
    [
        [{"type": HEADERS, "requestHeaderModifier": {}}] * 2,
        [{"type": HEADERS, "requestHeaderModifier": {}, "cors": {}}],
        [
            {
                "type": HEADERS,
                "requestHeaderModifier": {"set": [{"name": "A", "value": ""}], "remove": ["a"]},
            }
        ],
        [{"type": HEADERS, "requestHeaderModifier": {"set": [{"name": "A:", "value": ""}]}}],
        [{"type": HEADERS, "requestHeaderModifier": {"set": [{"name": "A", "value": "x\r\ny"}]}}],
        [
            {"type": "URLRewrite", "urlRewrite": {}},
            {"type": "RequestRedirect", "requestRedirect": {}},
        ],
        [{"type": "RequestRedirect", "requestRedirect": {"statusCode": 200}}],
        [{"type": "CORS", "cors": {"allowOrigins": ["*", "https://a"]}}],
        [{"type": "CORS", "cors": {"allowOrigins": ["ftp://a"]}}],
        [
            {
                "type": "RequestMirror",
                "requestMirror": {
                    "backendRef": {"name": "m", "port": 1},
                    "fraction": {"numerator": 2, "denominator": 1},
                },
            }
        ],
    ],
)
def test_filters_that_are_refused(wrong):
    with pytest.raises(ConfigError):
        filters(*wrong)


def test_grpc_has_fewer_filters():
    with pytest.raises(ConfigError):
        filters({"type": "CORS", "cors": {}}, is_grpc=True)


def test_a_prefix_is_replaced_only_where_there_is_one():
    path = {"type": "ReplacePrefixMatch", "replacePrefixMatch": "/"}
    rewrite = [{"type": "URLRewrite", "urlRewrite": {"path": path}}]
    assert read(filters=rewrite).filters
    with pytest.raises(ConfigError):
        read(filters=rewrite, matches=[{"path": {"type": "Exact", "value": "/a"}}])


def test_grpc_matches():
    method = {"method": {"service": "s", "method": "m"}, "headers": [{"name": "A", "value": "b"}]}
    rule = {"matches": [method], "backendRefs": [{"name": "web", "port": 80}]}
    (found,) = parsed(route(kind="GRPCRoute", rules=[rule])).rules[0].matches
    assert found == RouteMatch(headers=(NamedMatch("a", "b"),), grpc=MethodMatch("s", "m"))


def test_streams_have_one_rule_and_tls_needs_names():
    assert parsed(route(kind="TCPRoute")).rules[0].backends[0].port == 80
    for raw in (
        route(kind="TCPRoute", rules=[{}, {}]),
        route(kind="TLSRoute"),
        route(kind="TLSRoute", hostnames=["10.0.0.1:8"]),
    ):
        with pytest.raises(ConfigError):
            parsed(raw)


def test_one_name_names_one_rule():
    with pytest.raises(ConfigError):
        parsed(route(rules=[{"name": "a"}, {"name": "a"}]))


def test_gateways_say_strictly_whom_they_admit():
    assert parse_gateway(gateway()).is_waypoint
    for wrong in ({"from": "Selector"}, {"from": "Some"}, {"froms": "All"}):
        with pytest.raises(ConfigError):
            parse_gateway(gateway(allowed=wrong))


def test_grants_say_strictly_what_they_grant():
    version = "gateway.networking.k8s.io/v1beta1"
    spec = {"from": [{"group": "g", "kind": "k"}], "to": []}
    grant = obj("ReferenceGrant", "g", "a", version, spec=spec)
    with pytest.raises(ConfigError):
        parse_reference_grant(grant)
