"""MeshConfig: the text under the key `mesh` of ConfigMap `istio`, as far as it is carried out.

Of it the `extensionProviders` are read that are external authorizers (`envoyExtAuthzHttp`,
`envoyExtAuthzGrpc`), strictly: what exists and has no effect here is listed in `ignored`, any other
field of theirs is refused. Other providers and other settings are other programs'.

The text is YAML inside of YAML: an error carries its line and column within the text, and
`mesh.cluster.api.located` adds them to where the text stands. Pure.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from mesh.cluster.api import Object, Ref
from mesh.cluster.documents import read_text
from mesh.cluster.fields import Reader, format_path, shown, split_path
from mesh.cluster.objects import Metadata, read_metadata
from mesh.cluster.traffic_policies import read_istio_duration
from mesh.errors import ConfigError
from mesh.model.l7_policy import ExternalAuthorizer

NAME: Final = "istio"
KEY: Final = "mesh"
#: The most of a request's body that an authorizer may be sent, in bytes.
MAX_BODY: Final = 1 << 20
_TIMEOUT_SECONDS: Final = 600.0
_HOST = re.compile(r"(?:[a-z0-9][a-z0-9-]{0,62}/)?[A-Za-z0-9](?:[A-Za-z0-9.-]{0,251}[A-Za-z0-9])?")
_FIELD_NAME = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]{1,256}")
_VALUE = re.compile(r"[\x20-\x7e]{0,4096}")
_PREFIX = re.compile(r"/[A-Za-z0-9._~!$&'()*+,;=:@%/-]{0,1024}")
_COMMON = (
    "service", "port", "timeout", "failOpen", "statusOnError", "clearRouteCache",
    "includeRequestBodyInCheck",
)  # fmt: skip
_HTTP = (
    *_COMMON, "pathPrefix", "includeHeadersInCheck", "includeRequestHeadersInCheck",
    "includeAdditionalHeadersInCheck", "headersToUpstreamOnAllow", "headersToDownstreamOnDeny",
    "headersToDownstreamOnAllow",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class ConfigMap(Metadata):
    """The authorizers by name; the `service` of each is as it is written, a host name or
    `namespace/hostname`. Empty for any other ConfigMap.
    """

    providers: Mapping[str, ExternalAuthorizer] = field(default_factory=dict)
    ignored: tuple[str, ...] = ()


def mesh_config_ref(root_namespace: str) -> Ref:
    """The object that the MeshConfig of a mesh is in."""
    return Ref("ConfigMap", root_namespace, NAME)


def parse_config_map(obj: Object) -> ConfigMap:
    """Read a ConfigMap; only one named `istio` is looked into. Raises ConfigError."""
    common = read_metadata(obj)
    if common["ref"].name != NAME:
        return ConfigMap(**common)
    written = Reader(obj).at("data", KEY)
    text = written.text()
    if not text:
        return ConfigMap(**common)
    try:
        value, marks = read_text(text)
    except ConfigError as exc:
        message = f"{exc.message} (line {exc.line} of the text)"
        raise ConfigError(
            message, line=exc.line, column=exc.column, field=format_path(written.path)
        ) from exc
    ignored: list[str] = []
    try:
        providers = _providers(Reader(value, written.path).get("extensionProviders"), ignored)
    except ConfigError as exc:
        place = marks.find(split_path(exc.field)[len(written.path) :]) if marks else None
        raise ConfigError(
            exc.message,
            line=place.line if place else 0,
            column=place.column if place else 0,
            field=exc.field,
            hint=exc.hint,
        ) from exc
    return ConfigMap(**common, providers=providers, ignored=tuple(ignored))


def _providers(listed: Reader, ignored: list[str]) -> Mapping[str, ExternalAuthorizer]:
    found: dict[str, ExternalAuthorizer] = {}
    names: set[str] = set()
    for each in listed.items():
        name = each.get("name").name()
        if name in names:
            each.get("name").fail(f"another provider is called {shown(name)}")
        names.add(name)
        http, grpc = each.get("envoyExtAuthzHttp"), each.get("envoyExtAuthzGrpc")
        if http.exists and grpc.exists:
            grpc.fail("beside envoyExtAuthzHttp: a provider is one or the other")
        if http.exists:
            found[name] = _http(name, http, ignored)
        elif grpc.exists:
            found[name] = _common(name, grpc.only(*_COMMON), ignored)
    return found


def _common(name: str, provider: Reader, ignored: list[str]) -> ExternalAuthorizer:
    service = provider.get("service")
    if not _HOST.fullmatch(service.name()):
        service.fail(f"not a host name: {shown(service.value)}", hint="or namespace/host name")
    if provider.get("clearRouteCache").boolean():
        ignored.append(format_path(provider.get("clearRouteCache").path))
    timeout = read_istio_duration(provider.get("timeout"))
    if timeout is not None and timeout <= 0:
        provider.get("timeout").fail("must be more than nothing")
    body = provider.get("includeRequestBodyInCheck")
    body.only("maxRequestBytes", "allowPartialMessage", "packAsBytes")
    most = body.get("maxRequestBytes").integer()
    if body.exists and not 0 < most <= MAX_BODY:
        body.get("maxRequestBytes").fail(f"must be 1 to {MAX_BODY}")
    return ExternalAuthorizer(
        name=name,
        protocol="grpc",
        service=service.name(),
        port=provider.get("port").port(),
        timeout_seconds=_TIMEOUT_SECONDS if timeout is None else timeout,
        is_fail_open=provider.get("failOpen").boolean(),
        status_on_error=_status(provider.get("statusOnError")),
        max_body_bytes=most,
        allows_partial_body=body.get("allowPartialMessage").boolean(),
        packs_body_as_bytes=body.get("packAsBytes").boolean(),
    )


def _http(name: str, provider: Reader, ignored: list[str]) -> ExternalAuthorizer:
    common = _common(name, provider.only(*_HTTP), ignored)
    prefix = provider.get("pathPrefix")
    if prefix.text() and not _PREFIX.fullmatch(prefix.text()):
        prefix.fail(f"not the beginning of a path: {shown(prefix.value)}")
    asked = provider.get("includeRequestHeadersInCheck")
    if not asked.exists:
        asked = provider.get("includeHeadersInCheck")
    return ExternalAuthorizer(
        name=name,
        protocol="http",
        service=common.service,
        port=common.port,
        timeout_seconds=common.timeout_seconds,
        is_fail_open=common.is_fail_open,
        status_on_error=common.status_on_error,
        path_prefix=prefix.text().rstrip("/"),
        request_headers=_names(asked),
        additional_headers=_additional(provider.get("includeAdditionalHeadersInCheck")),
        upstream_headers_on_allow=_names(provider.get("headersToUpstreamOnAllow")),
        downstream_headers_on_deny=_names(provider.get("headersToDownstreamOnDeny")),
        downstream_headers_on_allow=_names(provider.get("headersToDownstreamOnAllow")),
        max_body_bytes=common.max_body_bytes,
        allows_partial_body=common.allows_partial_body,
        packs_body_as_bytes=common.packs_body_as_bytes,
    )


def _status(status: Reader) -> int:
    """Istio writes it as text."""
    if not status.exists:
        return 403
    value = status.value
    number = int(value) if isinstance(value, str) and re.fullmatch("[0-9]{3}", value) else value
    if isinstance(number, bool) or not isinstance(number, int) or not 400 <= number <= 599:
        status.fail(f"not a status of an error: {shown(value)}", hint="400 to 599")
    return number


def _names(listed: Reader) -> tuple[str, ...]:
    """Names of fields, in the syntax of policies: `x-a`, `x-*`, `*-id`, `*`."""
    for each in listed.items():
        if not _FIELD_NAME.fullmatch(each.name()) or "*" in each.name()[1:-1]:
            each.fail(f"not a name of a header: {shown(each.value)}")
    return tuple(each.lower() for each in listed.texts())


def _additional(headers: Reader) -> tuple[tuple[str, str], ...]:
    found = []
    for key, each in headers.entries():
        if not _FIELD_NAME.fullmatch(key) or "*" in key:
            each.fail(f"not a name of a header: {shown(key)}")
        if not _VALUE.fullmatch(each.text()):
            each.fail("not a value of a header")
        if "%" in each.text():
            each.fail("command operators are not understood here", hint="write a plain value")
        found.append((key.lower(), each.text().strip()))
    return tuple(found)
