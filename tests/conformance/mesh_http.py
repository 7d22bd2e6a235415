"""Gateway API's mesh conformance cases as data, named as upstream names them. The expectations are
written from the specification: (request) -> backend's name, or a status; with what the backend must
see. Run against the plan here and meant for the whole mesh as well.
"""

from __future__ import annotations

from dataclasses import dataclass

from mesh.model.route import (
    Backend,
    HeaderChange,
    NamedMatch,
    PathChange,
    PathMatch,
    Redirect,
    Rewrite,
    Route,
    RouteFilter,
    RouteMatch,
    RouteRule,
)

NAMESPACE = "gateway-conformance-mesh"
CONSUMER = "gateway-conformance-mesh-consumer"


@dataclass(frozen=True)
class Case:
    """One request and what must come of it. `sees` are headers at the backend; None: absent."""

    target: str
    backend: str = ""
    status: int = 200
    headers: tuple[tuple[str, str], ...] = ()
    namespace: str = NAMESPACE
    port: int = 80
    service: str = "echo"
    host: str = "echo"
    location: str = ""
    path: str = ""
    sees: tuple[tuple[str, str | None], ...] = ()
    response: tuple[tuple[str, str | None], ...] = ()


@dataclass(frozen=True)
class Test:
    """A conformance test."""

    __test__ = False

    name: str
    routes: tuple[Route, ...]
    cases: tuple[Case, ...]


def to(name: str, weight: int = 1, filters: tuple[RouteFilter, ...] = ()) -> Backend:
    return Backend(f"{NAMESPACE}/{name}", 8080, weight, filters)


def prefix(value: str, **more: object) -> RouteMatch:
    return RouteMatch(PathMatch("PathPrefix", value), **more)  # type: ignore[arg-type]


def exact(value: str) -> RouteMatch:
    return RouteMatch(PathMatch("Exact", value))


def query(value: str, path: str = "/", header: str = "") -> RouteMatch:
    headers = (NamedMatch("version", header),) if header else ()
    return RouteMatch(PathMatch("PathPrefix", path), headers, (NamedMatch("animal", value),))


def rule(*matches: RouteMatch, to: Backend | None = None, filters: tuple[RouteFilter, ...] = (),
         name: str = "") -> RouteRule:  # fmt: skip
    return RouteRule(name, matches or (RouteMatch(),), filters, (to,) if to else ())


def route(*rules: RouteRule, **more: object) -> Route:
    return Route("HTTPRoute", NAMESPACE, "test", rules, **more)  # type: ignore[arg-type]


def changes(
    put: dict[str, str] | None = None,
    add: dict[str, str] | None = None,
    remove: tuple[str, ...] = (),
) -> HeaderChange:
    return HeaderChange(tuple((put or {}).items()), tuple((add or {}).items()), remove)


V1, V2 = to("echo-v1"), to("echo-v2")
_SET = {"X-Header-Set": "set-overwrites-values"}
_ADD = {"X-Header-Add": "add-appends-values"}
_EDITS = (
    ("/set", changes(put=_SET)),
    ("/add", changes(add=_ADD)),
    ("/remove", changes(remove=("X-Header-Remove",))),
)
_EDIT_CASES = (
    Case("/set", "echo-v1", headers=(("some-other-header", "val"),),
         sees=(("x-header-set", "set-overwrites-values"), ("some-other-header", "val"))),
    Case("/set", "echo-v1", headers=(("x-header-set", "some-other-value"),),
         sees=(("x-header-set", "set-overwrites-values"),)),
    Case("/add", "echo-v1", sees=(("x-header-add", "add-appends-values"),)),
    Case("/add", "echo-v1", headers=(("x-header-add", "some-other-value"),),
         sees=(("x-header-add", "some-other-value,add-appends-values"),)),
    Case("/remove", "echo-v1", headers=(("x-header-remove", "val"),),
         sees=(("x-header-remove", None),)),
)  # fmt: skip


_EDITED = RouteFilter(request_headers=changes(
    put=_SET, add={"X-Header-Add": "val-1", "X-Header-Add-Append": "val-2"},
    remove=("X-Header-Remove",),
))  # fmt: skip
_BEFORE = (("x-header-remove", "x"), ("x-header-add-append", "val-1"), ("x-header-set", "y"))
_AFTER = (
    ("x-header-set", "set-overwrites-values"), ("x-header-add", "val-1"),
    ("x-header-add-append", "val-1,val-2"), ("x-header-remove", None),
)  # fmt: skip


def _redirect(start: str, /, **fields: object) -> RouteRule:
    filters = (RouteFilter(redirect=Redirect(**fields)),)  # type: ignore[arg-type]
    return rule(prefix(start), filters=filters)


def _go(path: str, location: str, status: int = 302) -> Case:
    return Case(path, status=status, location=location)


def _prefix_path(value: str) -> PathChange:
    return PathChange("ReplacePrefixMatch", value)


def _full_path(value: str) -> PathChange:
    return PathChange("ReplaceFullPath", value)


TESTS = (
    Test("MeshBasic", (), (Case("/", "echo"),)),
    Test("MeshHTTPRouteSimpleSameNamespace", (route(rule(to=V1)),), (Case("/", "echo-v1"),)),
    Test(
        "MeshTrafficSplit",
        (route(rule(exact("/v1"), to=V1), rule(exact("/v2"), to=V2)),),
        (Case("/v1", "echo-v1"), Case("/v2", "echo-v2"), Case("/v3", status=404)),
    ),
    Test(
        "MeshHTTPRouteMatching",
        (
            route(
                rule(prefix("/"), RouteMatch(headers=(NamedMatch("version", "one"),)), to=V1),
                rule(prefix("/v2"), RouteMatch(headers=(NamedMatch("Version", "two"),)), to=V2),
            ),
        ),
        (
            Case("/", "echo-v1"),
            Case("/example", "echo-v1"),
            Case("/", "echo-v1", headers=(("version", "one"),)),
            Case("/v2", "echo-v2"),
            Case("/v2example", "echo-v1"),
            Case("/foo/v2/example", "echo-v1"),
            Case("/v2/", "echo-v2"),
            Case("/v2/example", "echo-v2"),
            Case("/", "echo-v2", headers=(("version", "two"),)),
        ),
    ),
    Test(
        "MeshHTTPRouteQueryParamMatching",
        (
            route(
                rule(query("whale"), to=V1),
                rule(query("dolphin"), to=V2),
                rule(query("whale", "/path1"), to=V1),
                rule(RouteMatch(headers=(NamedMatch("version", "one"),),
                                query_params=(NamedMatch("animal", "whale"),)), to=V2),
                rule(query("shark", "/path3"), query("kraken", "/path4", "three"), to=V1),
                rule(prefix("/path5"), to=V1),
                rule(query("hydra"), to=V2),
            ),
        ),
        (
            Case("/?animal=whale", "echo-v1"),
            Case("/?animal=whale&otherparam=irrelevant", "echo-v1"),
            Case("/?animal=dolphin", "echo-v2"),
            Case("/?animal=dolphin&color=yellow", "echo-v2"),
            Case("/?color=blue", status=404),
            Case("/?animal=dog", status=404),
            Case("/?animal=whaledolphin", status=404),
            Case("/", status=404),
            Case("/path1?animal=whale", "echo-v1"),
            Case("/?animal=whale", "echo-v2", headers=(("version", "one"),)),
            Case("/path3?animal=shark", "echo-v1"),
            Case("/path4?animal=kraken", "echo-v1", headers=(("version", "three"),)),
            Case("/?animal=shark", status=404),
            Case("/path4?animal=kraken", status=404),
            Case("/path5?animal=hydra", "echo-v1"),
            Case("/?animal=hydra", "echo-v2"),
        ),
    ),
    Test(
        "MeshHTTPRouteRequestHeaderModifier",
        (route(*(rule(prefix(path), to=V1, filters=(RouteFilter(request_headers=change),))
                 for path, change in _EDITS)),),
        _EDIT_CASES,
    ),
    Test(
        "MeshHTTPRouteBackendRequestHeaderModifier",
        (route(*(rule(prefix(path), to=to("echo-v1", 1, (RouteFilter(request_headers=change),)))
                 for path, change in _EDITS)),),
        _EDIT_CASES,
    ),
    Test(
        "MeshHTTPRouteRewritePath",
        (
            route(
                rule(prefix("/prefix/one"), to=V1,
                     filters=(RouteFilter(rewrite=Rewrite(path=_prefix_path("/one"))),)),
                rule(prefix("/strip-prefix"), to=V1,
                     filters=(RouteFilter(rewrite=Rewrite(path=_prefix_path("/"))),)),
                rule(prefix("/full/one"), to=V1,
                     filters=(RouteFilter(rewrite=Rewrite(path=_full_path("/one"))),)),
                rule(prefix("/full/edited"), to=V1,
                     filters=(_EDITED, RouteFilter(rewrite=Rewrite(path=_full_path("/test"))))),
                rule(prefix("/prefix/edited"), to=V1,
                     filters=(_EDITED, RouteFilter(rewrite=Rewrite(path=_prefix_path("/prefix"))))),
            ),
        ),
        (
            Case("/prefix/one/two", "echo-v1", path="/one/two"),
            Case("/strip-prefix/three", "echo-v1", path="/three"),
            Case("/strip-prefix", "echo-v1", path="/"),
            Case("/full/one/two", "echo-v1", path="/one"),
            Case("/full/edited/test", "echo-v1", path="/test", headers=_BEFORE, sees=_AFTER),
            Case("/prefix/edited/one", "echo-v1", path="/prefix/one", headers=_BEFORE,
                 sees=_AFTER),
        ),
    ),
    Test(
        "MeshHTTPRouteRedirectHostAndStatus",
        (route(_redirect("/hostname-redirect", hostname="example.org"),
               _redirect("/host-and-status", hostname="example.org", status=301)),),
        (_go("/hostname-redirect", "http://example.org/hostname-redirect"),
         _go("/host-and-status", "http://example.org/host-and-status", 301)),
    ),
    Test(
        "MeshHTTPRouteRedirectPath",
        (
            route(
                _redirect("/original-prefix", path=_prefix_path("/replacement-prefix")),
                _redirect("/full", path=_full_path("/full-path-replacement")),
                _redirect("/path-and-host", hostname="example.org",
                          path=_prefix_path("/replacement-prefix")),
                _redirect("/full-path-and-status", path=_full_path("/replacement-full"),
                          status=301),
            ),
        ),
        (
            _go("/original-prefix/lemon", "http://echo/replacement-prefix/lemon"),
            _go("/full/path/original", "http://echo/full-path-replacement"),
            _go("/path-and-host", "http://example.org/replacement-prefix"),
            _go("/full-path-and-status", "http://echo/replacement-full", 301),
        ),
    ),
    Test(
        "MeshHTTPRouteRedirectPort",
        (route(_redirect("/port", port=8083),
               _redirect("/port-and-host", hostname="example.org", port=8083)),),
        (_go("/port", "http://echo:8083/port"),
         _go("/port-and-host", "http://example.org:8083/port-and-host")),
    ),
    Test(
        "MeshHTTPRouteSchemeRedirect",
        (route(_redirect("/scheme", scheme="https"),
               _redirect("/scheme-and-host", hostname="example.org", scheme="https")),),
        (_go("/scheme", "https://echo/scheme"),
         _go("/scheme-and-host", "https://example.org/scheme-and-host")),
    ),
    Test("MeshHTTPRoute303Redirect", (route(_redirect("/redirect", status=303)),),
         (_go("/redirect", "http://echo/redirect", 303),)),
    Test("MeshHTTPRoute307Redirect", (route(_redirect("/temporary", status=307)),),
         (_go("/temporary", "http://echo/temporary", 307),)),
    Test("MeshHTTPRoute308Redirect", (route(_redirect("/permanent", status=308)),),
         (_go("/permanent", "http://echo/permanent", 308),)),
    Test(
        "MeshHTTPRouteNamedRule",
        (route(rule(prefix("/named"), to=V1, name="named-rule"),
               rule(prefix("/unnamed"), to=V2)),),
        (Case("/named", "echo-v1"), Case("/unnamed", "echo-v2")),
    ),
    Test(
        "MeshPorts",
        (route(rule(to=V1, filters=(RouteFilter(
            response_headers=changes(put={"X-Header-Set": "v1"})),)), ports=(80,)),),
        (Case("/", "echo-v1", response=(("x-header-set", "v1"),)),
         Case("/", "echo", port=8080, response=(("x-header-set", None),))),
    ),
    Test(
        "MeshConsumerRoute",
        (Route("HTTPRoute", CONSUMER, "test", (rule(to=V1, filters=(RouteFilter(
            response_headers=changes(put={"X-Header-Set": "set"})),)),), is_consumer=True),),
        (Case("/", "echo-v1", namespace=CONSUMER, response=(("x-header-set", "set"),)),
         Case("/", "echo", response=(("x-header-set", None),))),
    ),
)  # fmt: skip
