"""MeshConfig's external authorizers: what is read, what is refused, and where it says so."""

from __future__ import annotations

import pytest

from mesh.cluster.api import Object
from mesh.cluster.documents import read_documents
from mesh.cluster.inventory import Inventory
from mesh.cluster.mesh_config import MAX_BODY, parse_config_map
from mesh.cluster.validate import check
from mesh.errors import ConfigError

HTTP = """
accessLogFile: /dev/stdout
extensionProviders:
- name: opa
  envoyExtAuthzHttp:
    service: opa.auth.svc.cluster.local
    port: 8000
    timeout: 0.5s
    pathPrefix: /check/
    failOpen: true
    statusOnError: "503"
    includeRequestHeadersInCheck: [X-Tenant, x-b-*]
    includeAdditionalHeadersInCheck: {X-Mesh: ambit}
    includeRequestBodyInCheck: {maxRequestBytes: 4096, allowPartialMessage: true}
    headersToUpstreamOnAllow: [x-user]
    headersToDownstreamOnDeny: [x-why]
    headersToDownstreamOnAllow: [set-cookie]
    clearRouteCache: true
- name: traces
  zipkin: {service: z, port: 9411, anything: goes}
- name: grpc
  envoyExtAuthzGrpc: {service: auth/grpc.example, port: 9000}
"""


def config_map(text: object, name: str = "istio") -> Object:
    metadata = {"name": name, "namespace": "istio-system"}
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": {"mesh": text}}


def test_authorizers_are_read_and_other_providers_are_not_ours() -> None:
    found = parse_config_map(config_map(HTTP))
    assert list(found.providers) == ["opa", "grpc"]
    opa = found.providers["opa"]
    assert (opa.protocol, opa.service, opa.port) == ("http", "opa.auth.svc.cluster.local", 8000)
    assert (opa.timeout_seconds, opa.is_fail_open, opa.status_on_error) == (0.5, True, 503)
    assert (opa.path_prefix, opa.request_headers) == ("/check", ("x-tenant", "x-b-*"))
    assert opa.additional_headers == (("x-mesh", "ambit"),)
    assert (opa.max_body_bytes, opa.allows_partial_body) == (4096, True)
    assert opa.upstream_headers_on_allow == ("x-user",)
    assert opa.downstream_headers_on_deny == ("x-why",)
    assert opa.downstream_headers_on_allow == ("set-cookie",)
    assert found.ignored == ("data.mesh.extensionProviders[0].envoyExtAuthzHttp.clearRouteCache",)
    grpc = found.providers["grpc"]
    assert (grpc.protocol, grpc.service, grpc.timeout_seconds) == ("grpc", "auth/grpc.example", 600)
    assert type(grpc.timeout_seconds) is float
    assert (grpc.is_fail_open, grpc.status_on_error, grpc.max_body_bytes) == (False, 403, 0)


def test_only_the_mesh_config_is_looked_into() -> None:
    assert parse_config_map(config_map("{", name="other")).providers == {}
    assert parse_config_map(config_map(None)).providers == {}
    assert parse_config_map(config_map("rootNamespace: x")).providers == {}


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ("service: a b, port: 1", "not a host name"),
        ("service: a", "envoyExtAuthzHttp.port: not a port"),
        ("port: 1", "service: missing"),
        ("service: a, port: 1, failOpn: true", "failOpn: unknown field"),
        ("service: a, port: 1, timeout: 0s", "more than nothing"),
        ("service: a, port: 1, timeout: soon", "not a duration"),
        ("service: a, port: 1, statusOnError: '200'", "not a status of an error"),
        ("service: a, port: 1, statusOnError: true", "not a status of an error"),
        ("service: a, port: 1, pathPrefix: check", "not the beginning of a path"),
        ("service: a, port: 1, pathPrefix: '/a?b'", "not the beginning of a path"),
        ("service: a, port: 1, includeRequestBodyInCheck: {}", f"must be 1 to {MAX_BODY}"),
        ("service: a, port: 1, headersToUpstreamOnAllow: ['a b']", "not a name of a header"),
        ("service: a, port: 1, headersToUpstreamOnAllow: ['a*b']", "not a name of a header"),
        ("service: a, port: 1, includeAdditionalHeadersInCheck: {x: '%REQ(y)%'}", "operators"),
        ('service: a, port: 1, includeAdditionalHeadersInCheck: {x: "a\\r\\nb: c"}', "not a value"),
    ],
)
def test_what_cannot_be_meant_is_refused(fields: str, said: str) -> None:
    text = f"extensionProviders:\n- name: a\n  envoyExtAuthzHttp: {{{fields}}}\n"
    with pytest.raises(ConfigError) as caught:
        parse_config_map(config_map(text))
    assert said in str(caught.value)
    assert caught.value.field.startswith("data.mesh.extensionProviders[0]")


def test_names_are_told_apart() -> None:
    one = "- name: a\n  envoyExtAuthzGrpc: {service: s, port: 1}\n"
    with pytest.raises(ConfigError, match="another provider is called"):
        parse_config_map(config_map("extensionProviders:\n" + one + one))
    with pytest.raises(ConfigError, match="text, not a mapping"):
        parse_config_map(config_map({"extensionProviders": []}))


FILE = """
apiVersion: v1
kind: ConfigMap
metadata: {name: istio, namespace: istio-system}
data:
  other: x
  mesh: |
    # the authorizers

    extensionProviders:
    - name: opa
      envoyExtAuthzHttp:
        service: opa.auth.svc.cluster.local
        port: %s
"""


@pytest.mark.parametrize(
    ("port", "place"), [("http", "m.yaml:14:15"), ("[", "m.yaml:15:5"), ("{a: 1", "m.yaml:15:5")]
)
def test_a_mistake_is_told_at_its_line_in_the_file(port: str, place: str) -> None:
    (document,) = read_documents((FILE % port).encode(), "m.yaml")
    with pytest.raises(ConfigError) as caught:
        Inventory().put(document.ref, document.object, document.source)
    assert str(caught.value).startswith(place + ": data.mesh")
    found = check([(document.object, document.source)])
    assert next(str(each) for each in found if "data.mesh" in str(each)).startswith(place)


def test_what_is_written_in_one_line_is_told_where_it_begins() -> None:
    text = FILE.partition("  mesh:")[0] + '  mesh: "extensionProviders: 1"\n'
    (document,) = read_documents(text.encode(), "m.yaml")
    with pytest.raises(ConfigError) as caught:
        Inventory().put(document.ref, document.object, document.source)
    assert str(caught.value).startswith("m.yaml:7:9: data.mesh.extensionProviders: expected a list")


def test_providers_and_policies_are_checked_against_each_other() -> None:
    policy = """
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: p, namespace: istio-system}
spec: {action: CUSTOM, provider: {name: oppa}, rules: [{}]}
"""
    both = read_documents((FILE % 80 + "---" + policy).encode(), "m.yaml")
    told = [str(each) for each in check((each.object, each.source) for each in both)]
    assert any("m.yaml:19:" in each and 'no external authorizer "oppa"' in each for each in told)
    assert any('"opa" is at a Service auth/opa that there is not' in each for each in told)
