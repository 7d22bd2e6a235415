"""The routes of Gateway API's mesh conformance tests as YAML, by the tests' names upstream, and the
bench that they run on. Written from the specification; the requests are in `mesh_http`, those that
concern several Services here.
"""

from __future__ import annotations

from typing import Any

import yaml

from tests.conformance.mesh_http import CONSUMER, NAMESPACE, TESTS, Case

_EDITS = {
    "/set": "{set: [{name: X-Header-Set, value: set-overwrites-values}]}",
    "/add": "{add: [{name: X-Header-Add, value: add-appends-values}]}",
    "/remove": "{remove: [X-Header-Remove]}",
}


def _match(path: str, kind: str = "PathPrefix") -> str:
    return f"matches: [{{path: {{type: {kind}, value: {path}}}}}]"


def _to(name: str, port: int = 80, weight: int = 1, filters: str = "") -> str:
    more = f", filters: [{filters}]" if filters else ""
    return f"{{name: {name}, port: {port}, weight: {weight}{more}}}"


def _rules(*rules: str) -> str:
    return "[" + ", ".join(f"{{{each}}}" for each in rules) + "]"


def _route(rules: str, parent: str = "port: 80", service: str = "echo", name: str = "test",
           home: str = NAMESPACE, kind: str = "HTTPRoute") -> dict[str, Any]:  # fmt: skip
    where = f", namespace: {NAMESPACE}" if home != NAMESPACE else ""
    more = f", {parent}" if parent else ""
    found: dict[str, Any] = yaml.safe_load(f"""
apiVersion: gateway.networking.k8s.io/v1
kind: {kind}
metadata: {{name: {name}, namespace: {home}, generation: 7}}
spec:
  parentRefs: [{{group: "", kind: Service, name: {service}{where}{more}}}]
  rules: {rules}
""")
    return found


def _edits(template: str) -> str:
    return _rules(*(f"{_match(path)}, " + template.replace("EDIT", edit)
                    for path, edit in _EDITS.items()))  # fmt: skip


def _redirect(path: str, fields: str) -> str:
    return f"{_match(path)}, filters: [{{type: RequestRedirect, requestRedirect: {{{fields}}}}}]"


def _rewrite(path: str, change: str, more: str = "") -> str:
    return (f"{_match(path)}, filters: [{more}{{type: URLRewrite, urlRewrite: "
            f"{{path: {{{change}}}}}}}], "
            f"backendRefs: [{_to('echo-v1')}]")  # fmt: skip


def _query(value: str, more: str = "") -> str:
    return f"{{queryParams: [{{name: animal, value: {value}}}]{more}}}"


def _stamp(value: str) -> str:
    return ("filters: [{type: ResponseHeaderModifier, responseHeaderModifier: "
            f"{{set: [{{name: X-Header-Set, value: {value}}}]}}}}]")  # fmt: skip


_V1, _V2 = f"backendRefs: [{_to('echo-v1')}]", f"backendRefs: [{_to('echo-v2')}]"
_EDIT = "{type: RequestHeaderModifier, requestHeaderModifier: EDIT}"
_EDITED = _EDIT.replace("EDIT", (
    "{set: [{name: X-Header-Set, value: set-overwrites-values}], add: ["
    "{name: X-Header-Add, value: val-1}, {name: X-Header-Add-Append, value: val-2}], "
    "remove: [X-Header-Remove]}"
)) + ", "  # fmt: skip
_MIRRORED = "{type: RequestMirror, requestMirror: {backendRef: {name: echo-v2, port: 7070}}}"
_HOST, _MOVED = "hostname: example.org", "statusCode: 301"
_TO_PREFIX = "path: {type: ReplacePrefixMatch, replacePrefixMatch: /replacement-prefix}"
_TO_FULL = "path: {type: ReplaceFullPath, replaceFullPath: /full-path-replacement}"
_FRONTEND = [_route(_rules(f"{_stamp('set')}, {_V2}"), "", "echo-v2")]

MANIFESTS: dict[str, list[dict[str, Any]]] = {
    "MeshBasic": [],
    "MeshHTTPRouteSimpleSameNamespace": [_route(_rules(f"backendRefs: [{_to('echo-v1', 8080)}]"))],
    "MeshTrafficSplit": [
        _route(_rules(f"{_match('/v1', 'Exact')}, {_V1}", f"{_match('/v2', 'Exact')}, {_V2}"), "")
    ],
    "MeshHTTPRouteMatching": [
        _route(_rules(
            "matches: [{path: {value: /}}, {headers: [{name: version, value: one}]}], " + _V1,
            "matches: [{path: {value: /v2}}, {headers: [{name: version, value: two}]}], " + _V2,
        ))
    ],
    "MeshHTTPRouteQueryParamMatching": [
        _route(_rules(
            f"matches: [{_query('whale')}], {_V1}",
            f"matches: [{_query('dolphin')}], {_V2}",
            f"matches: [{_query('whale', ', path: {value: /path1}')}], {_V1}",
            f"matches: [{_query('whale', ', headers: [{name: version, value: one}]')}], {_V2}",
            "matches: [" + _query("shark", ", path: {value: /path3}") + ", "
            + _query("kraken", ", path: {value: /path4}, headers: [{name: version, value: three}]")
            + f"], {_V1}",
            f"{_match('/path5')}, {_V1}",
            f"matches: [{_query('hydra')}], {_V2}",
        ))
    ],
    "MeshHTTPRouteRequestHeaderModifier": [_route(_edits(f"filters: [{_EDIT}], {_V1}"))],
    "MeshHTTPRouteBackendRequestHeaderModifier": [
        _route(_edits(f"backendRefs: [{_to('echo-v1', filters=_EDIT)}]"))
    ],
    "MeshHTTPRouteRewritePath": [
        _route(_rules(
            _rewrite("/prefix/one", "type: ReplacePrefixMatch, replacePrefixMatch: /one"),
            _rewrite("/strip-prefix", "type: ReplacePrefixMatch, replacePrefixMatch: /"),
            _rewrite("/full/one", "type: ReplaceFullPath, replaceFullPath: /one"),
            _rewrite("/full/edited", "type: ReplaceFullPath, replaceFullPath: /test", _EDITED),
            _rewrite("/prefix/edited",
                     "type: ReplacePrefixMatch, replacePrefixMatch: /prefix", _EDITED),
        ))
    ],
    "MeshHTTPRouteRedirectHostAndStatus": [
        _route(_rules(_redirect("/hostname-redirect", _HOST),
                      _redirect("/host-and-status", f"{_HOST}, {_MOVED}")))
    ],
    "MeshHTTPRouteRedirectPath": [
        _route(_rules(
            _redirect("/original-prefix", _TO_PREFIX),
            _redirect("/full", _TO_FULL),
            _redirect("/path-and-host", f"{_HOST}, {_TO_PREFIX}"),
            _redirect("/full-path-and-status", _MOVED + ", path: {type: ReplaceFullPath, "
                      "replaceFullPath: /replacement-full}"),
        ))
    ],
    "MeshHTTPRouteRedirectPort": [
        _route(_rules(_redirect("/port", "port: 8083"),
                      _redirect("/port-and-host", f"port: 8083, {_HOST}")))
    ],
    "MeshHTTPRouteSchemeRedirect": [
        _route(_rules(_redirect("/scheme", "scheme: https"),
                      _redirect("/scheme-and-host", f"scheme: https, {_HOST}")))
    ],
    **{
        f"MeshHTTPRoute{status}Redirect": [
            _route(_rules(_redirect(path, f"statusCode: {status}")))
        ]
        for status, path in ((303, "/redirect"), (307, "/temporary"), (308, "/permanent"))
    },
    "MeshHTTPRouteNamedRule": [
        _route(_rules(f"name: named-rule, {_match('/named')}, {_V1}",
                      f"{_match('/unnamed')}, {_V2}"))
    ],
    "MeshPorts": [
        _route(_rules(f"{_stamp('v1')}, {_V1}"), service="echo-v1", name="mesh-ports-v1"),
        _route(_rules(f"{_stamp('v2')}, {_V2}"), "", "echo-v2", name="mesh-ports-v2"),
    ],
    "MeshFrontend": _FRONTEND,
    "MeshFrontendHostname": _FRONTEND,
    "MeshConsumerRoute": [
        _route(_rules(f"{_stamp('set')}, backendRefs: [{{name: echo-v1, namespace: {NAMESPACE}, "
                      "port: 80}]"), "", "echo-v1", home=CONSUMER)
    ],
    "MeshHTTPRouteWeight": [
        _route(_rules(f"backendRefs: [{_to('echo-v1', weight=70)}, {_to('echo-v2', weight=30)}]"))
    ],
    "MeshGRPCRouteWeight": [
        _route(_rules(f"backendRefs: [{_to('echo-v1', 7070, 70)}, {_to('echo-v2', 7070, 30)}, "
                      f"{_to('echo-v3', 7070, 0)}]"), "port: 7070", kind="GRPCRoute")
    ],
    "MeshGRPCRouteRequestMirror": [
        _route(_rules(*(
            f"matches: [{{headers: [{{name: {name}, value: 'true'}}]}}], "
            f"filters: [{filters}{_MIRRORED}], backendRefs: [{_to('echo-v1', 7070)}]"
            for name, filters in (("x-mirror-only", ""), ("x-mirror-and-modify", _EDITED))
        )), "port: 7070", kind="GRPCRoute")
    ],
    "MeshGRPCRouteRequestHeaderModifier": [
        _route(_rules(*(
            f"matches: [{{headers: [{{name: x-test-case, value: {path[1:]}}}]}}], filters: ["
            f"{_EDIT.replace('EDIT', edit)}], backendRefs: [{_to('echo-v1', 7070)}]"
            for path, edit in _EDITS.items()
        )), "port: 7070", kind="GRPCRoute")
    ],
}  # fmt: skip


def _stamped(service: str, backend: str, value: str | None, **more: Any) -> Case:
    return Case("/", backend, service=service, response=(("x-header-set", value),), **more)


CASES: dict[str, tuple[Case, ...]] = {
    **{test.name: test.cases for test in TESTS},
    "MeshPorts": (
        _stamped("echo-v1", "echo-v1", "v1"),
        _stamped("echo-v1", "echo-v1", None, port=8080),
        _stamped("echo-v2", "echo-v2", "v2"),
        _stamped("echo-v2", "echo-v2", "v2", port=8080),
    ),
    "MeshFrontend": (_stamped("echo-v2", "echo-v2", "set"), _stamped("echo-v1", "echo-v1", None)),
    # The cluster IP decides, whatever the Host header says: MeshClusterIPMatching.
    "MeshFrontendHostname": (
        _stamped("echo-v2", "echo-v2", "set", host="echo-v1"),
        _stamped("echo-v1", "echo-v1", None, host="echo-v2"),
    ),
    "MeshConsumerRoute": (
        _stamped("echo-v1", "echo-v1", "set", namespace=CONSUMER),
        _stamped("echo-v1", "echo-v1", None),
    ),
}


def _service(name: str, number: int, selector: dict[str, str]) -> dict[str, Any]:
    ports = {"http": (80, 8080), "http-alt": (8080, 8080), "https": (443, 8443),
             "tcp": (9090, 9090), "grpc": (7070, 7070)}  # fmt: skip
    spoken = {"http": "http", "http-alt": "http", "grpc": "grpc"}
    listed = [
        {"name": port, "port": pair[0], "targetPort": pair[1], "appProtocol": spoken.get(port)}
        for port, pair in ports.items()
    ]
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": name, "namespace": NAMESPACE},
        "spec": {"clusterIP": f"10.96.1.{number}", "selector": selector, "ports": listed},
    }


ADDRESSES = {"echo": "10.96.1.1", "echo-v1": "10.96.1.2", "echo-v2": "10.96.1.3"}
SERVICES = [
    _service("echo", 1, {"app": "echo"}),
    _service("echo-v1", 2, {"app": "echo", "version": "v1"}),
    _service("echo-v2", 3, {"app": "echo", "version": "v2"}),
]
