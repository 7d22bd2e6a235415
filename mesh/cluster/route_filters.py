"""Filters and backendRefs of routes, read strictly into the model's values. Pure.

One of the kinds that may stand once stands once; rewrite and redirect exclude each other; a
header is under one action of a modifier. See `mesh.cluster.routes` for what is left open.
"""

from __future__ import annotations

import re
from collections import Counter
from typing import Literal, cast

import re2

from mesh.cluster.fields import Reader, shown
from mesh.model.route import (
    Backend,
    Cors,
    HeaderChange,
    Mirror,
    PathChange,
    Redirect,
    Rewrite,
    RouteFilter,
)

MAX_FILTERS = 16
MAX_WEIGHT = 1_000_000
MAX_EXPRESSION = 1024
_REPEATABLE = ("RequestMirror", "ExtensionRef")
_MEMBERS = {
    "RequestHeaderModifier": "requestHeaderModifier",
    "ResponseHeaderModifier": "responseHeaderModifier",
    "RequestMirror": "requestMirror",
    "ExtensionRef": "extensionRef",
    "RequestRedirect": "requestRedirect",
    "URLRewrite": "urlRewrite",
    "CORS": "cors",
}
_GRPC = ("RequestHeaderModifier", "ResponseHeaderModifier", "RequestMirror", "ExtensionRef")
_STATUSES = (301, 302, 303, 307, 308)
_DURATION = re.compile(r"([0-9]{1,5}(h|ms|m|s)){1,4}")
_DURATION_PART = re.compile(r"([0-9]{1,5})(h|ms|m|s)")
_SECONDS = {"h": 3600.0, "m": 60.0, "s": 1.0, "ms": 0.001}
_TOKEN = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]{1,256}")
_ORIGIN = re.compile(r"\*|https?://[A-Za-z0-9*.\[\]:-]+")


def read_duration(duration: Reader) -> float | None:
    """A duration of Gateway API (GEP-2257) in seconds, None if absent. Raises ConfigError."""
    if not duration.exists:
        return None
    text = duration.name()
    if not _DURATION.fullmatch(text):
        duration.fail(f"not a duration: {shown(text)}", hint="such as 10s, 1m30s, 500ms")
    return sum(int(number) * _SECONDS[unit] for number, unit in _DURATION_PART.findall(text))


def read_expression(where: Reader, text: str) -> None:
    """Refuse what is no regular expression of RE2. Raises ConfigError."""
    if len(text) > MAX_EXPRESSION:
        where.fail(f"longer than {MAX_EXPRESSION} characters")
    options = re2.Options()
    options.log_errors = False
    try:
        re2.compile(text, options)
    except re2.error:
        where.fail(f"not a regular expression of RE2: {shown(text)}")


def read_backend(ref: Reader, namespace: str, filters: tuple[RouteFilter, ...] = ()) -> Backend:
    """A backendRef of a route in `namespace`; `service` is `namespace/name`. Raises ConfigError."""
    ref.only("group", "kind", "namespace", "name", "port", "weight", "filters")
    group, kind = ref.get("group").text(), ref.get("kind").text("Service")
    weight = ref.get("weight").integer(1)
    if not 0 <= weight <= MAX_WEIGHT:
        ref.get("weight").fail(f"not from 0 to {MAX_WEIGHT}")
    home = ref.get("namespace").text() or namespace
    service = f"{home}/{ref.get('name').name()}"
    if group not in ("", "core") or kind != "Service":
        named = f"{group}/{kind}" if group else kind
        return Backend(service, 0, weight, filters, f"InvalidKind: {named} is no Service")
    return Backend(service, ref.get("port").port(), weight, filters)


def read_filters(filters: Reader, namespace: str, *, is_grpc: bool) -> tuple[RouteFilter, ...]:
    """The filters of a rule or a backendRef, in their order. Raises ConfigError."""
    found, kinds = [], []
    for each in filters.items():
        kind = each.get("type").choice(_GRPC if is_grpc else tuple(_MEMBERS))
        member = _MEMBERS.get(kind)
        if member is None:
            each.get("type").fail("missing")
        each.only("type", member)
        body = each.get(member)
        if not body.exists:
            body.fail("missing")
        found.append(_filter(kind, body, namespace))
        kinds.append(kind)
    if len(found) > MAX_FILTERS:
        filters.fail(f"{len(found)} filters, allowed are {MAX_FILTERS}")
    for kind, count in Counter(kinds).items():
        if count > 1 and kind not in _REPEATABLE:
            filters.fail(f"{kind} more than once")
    if {"URLRewrite", "RequestRedirect"} <= set(kinds):
        filters.fail("URLRewrite beside RequestRedirect")
    return tuple(found)


def _filter(kind: str, body: Reader, namespace: str) -> RouteFilter:
    match kind:
        case "RequestHeaderModifier":
            return RouteFilter(request_headers=_headers(body))
        case "ResponseHeaderModifier":
            return RouteFilter(response_headers=_headers(body))
        case "RequestMirror":
            return RouteFilter(mirror=_mirror(body, namespace))
        case "RequestRedirect":
            return RouteFilter(redirect=_redirect(body))
        case "URLRewrite":
            body.only("hostname", "path")
            return RouteFilter(rewrite=Rewrite(_host(body), _path_change(body.get("path"))))
        case "CORS":
            return RouteFilter(cors=_cors(body))
        case _:
            body.only("group", "kind", "name")
            parts = (body.get("group").text(), body.get("kind").name(), namespace)
            return RouteFilter(extension="/".join((*parts, body.get("name").name())))


def _headers(body: Reader) -> HeaderChange:
    body.only("set", "add", "remove")
    names: dict[str, str] = {}

    def pairs(action: str) -> tuple[tuple[str, str], ...]:
        chosen: dict[str, tuple[str, str]] = {}
        for each in body.get(action).items():
            each.only("name", "value")
            name, value = _token(each.get("name")), each.get("value").text()
            if any((ord(char) < 32 and char != "\t") or ord(char) == 127 for char in value):
                each.get("value").fail("holds control characters")
            _once(names, name, action, each)
            # Of two entries of one name the first counts.
            chosen.setdefault(name.lower(), (name, value))
        return tuple(chosen.values())

    set_, add = pairs("set"), pairs("add")
    remove = []
    for each in body.get("remove").items():
        _once(names, _token(each), "remove", each)
        remove.append(each.text())
    return HeaderChange(set_, add, tuple(remove))


def _once(names: dict[str, str], name: str, action: str, where: Reader) -> None:
    if names.setdefault(name.lower(), action) != action:
        where.fail(f"header {shown(name)} is under {names[name.lower()]} too")


def _token(name: Reader) -> str:
    if not _TOKEN.fullmatch(name.name()):
        name.fail(f"not the name of a header: {shown(name.value)}")
    return name.text()


def _mirror(body: Reader, namespace: str) -> Mirror:
    body.only("backendRef", "percent", "fraction")
    backend = read_backend(body.get("backendRef"), namespace)
    percent, fraction = body.get("percent"), body.get("fraction")
    if percent.exists and fraction.exists:
        percent.fail("beside fraction: say one")
    numerator, denominator = percent.integer(100), 100
    if fraction.exists:
        fraction.only("numerator", "denominator")
        numerator = fraction.get("numerator").integer(-1)
        denominator = fraction.get("denominator").integer(100)
    if denominator < 1 or not 0 <= numerator <= denominator:
        body.fail("not a share from none to all")
    return Mirror(backend, numerator, denominator)


def _redirect(body: Reader) -> Redirect:
    body.only("scheme", "hostname", "path", "port", "statusCode")
    status = body.get("statusCode").integer(302)
    if status not in _STATUSES:
        body.get("statusCode").fail(f"none of {', '.join(map(str, _STATUSES))}")
    return Redirect(
        scheme=body.get("scheme").choice(("http", "https"), ""),
        hostname=_host(body),
        path=_path_change(body.get("path")),
        port=body.get("port").port() if body.get("port").exists else None,
        status=status,
    )


def _host(body: Reader) -> str:
    hostname = body.get("hostname")
    text = hostname.text()
    if text and not re.fullmatch(r"[a-z0-9](?:[a-z0-9.-]{0,251}[a-z0-9])?", text):
        hostname.fail(f"not a hostname: {shown(text)}")
    return text


def _path_change(path: Reader) -> PathChange | None:
    if not path.exists:
        return None
    path.only("type", "replaceFullPath", "replacePrefixMatch")
    kind = path.get("type").choice(("ReplaceFullPath", "ReplacePrefixMatch"))
    member = "replaceFullPath" if kind == "ReplaceFullPath" else "replacePrefixMatch"
    path.only("type", member)
    value = path.get(member).text()
    if any(ord(char) <= 32 or ord(char) > 126 for char in value) or len(value) > 1024:
        path.get(member).fail(f"not a path: {shown(value)}")
    return PathChange(cast('Literal["ReplaceFullPath", "ReplacePrefixMatch"]', kind), value)


def _cors(body: Reader) -> Cors:
    body.only(
        "allowOrigins", "allowCredentials", "allowMethods", "allowHeaders", "exposeHeaders",
        "maxAge",
    )  # fmt: skip
    origins = body.get("allowOrigins")
    for each in origins.items():
        if not _ORIGIN.fullmatch(each.name()):
            each.fail(f"not an origin: {shown(each.value)}", hint="scheme://host[:port], or *")
    lists = {key: body.get(key).texts() for key in ("allowMethods", "allowHeaders")}
    lists |= {key: body.get(key).texts() for key in ("allowOrigins", "exposeHeaders")}
    for key, values in lists.items():
        if "*" in values and len(values) > 1:
            body.get(key).fail("* stands alone")
    age = body.get("maxAge").integer(5)
    if age < 1:
        body.get("maxAge").fail("less than a second")
    return Cors(
        allow_origins=lists["allowOrigins"],
        allow_credentials=body.get("allowCredentials").boolean(),
        allow_methods=lists["allowMethods"],
        allow_headers=lists["allowHeaders"],
        expose_headers=lists["exposeHeaders"],
        max_age_seconds=age,
    )
