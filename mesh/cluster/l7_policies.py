"""Typed views of the policies that waypoints alone enforce, strictly read into the model. Pure.

RequestAuthentication is Istio's (`security.istio.io/v1`); RateLimitPolicy and RedactionPolicy
are ours (`ambit.dev/v1alpha1`), attached by `targetRefs`. As in `mesh.cluster.policies`, what
is not known here is refused; what an API server would default is defaulted.

A view carries the model's policy, with the name in it and nothing resolved.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any, Literal, cast, get_args

from mesh.cluster.api import Object
from mesh.cluster.descriptor_sets import check_descriptors
from mesh.cluster.fields import Reader, shown
from mesh.cluster.objects import Metadata, read_metadata
from mesh.cluster.policies import TargetRef, read_selector, read_target_refs
from mesh.cluster.route_filters import read_duration, read_expression
from mesh.errors import ConfigError
from mesh.model import l7_policy as model
from mesh.model.json_path import parse_json_path

GROUP = "ambit.dev"
MAX_RULES = 64
MAX_ENTRIES = 256
MAX_BODY_BYTES = 64 << 20
_KEYS = ("Identity", "Namespace", "SourceIP", "Header", "Path", "Method", "Claim", "Host")
NAMED_KEYS = ("Header", "Claim")
_HEADER = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]{1,256}")
_PROTO_FIELD = re.compile(r"(?:[A-Za-z_]\w{0,127}\.){1,32}[A-Za-z_]\w{0,127}")
_FILE = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,252})")
_SERVICE = re.compile(r"(?:[a-z0-9-]+/)?[a-z0-9-]+(?:\.[a-z0-9-]+)+:[0-9]{1,5}")
_ADDRESS = re.compile(r"(?:rediss?://)?[A-Za-z0-9.:@_\[\]-]+(?:/[0-9]{0,3})?")


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestAuthentication(Metadata):
    """Which tokens count. One with a selector, or without targets, no waypoint reads."""

    policy: model.RequestAuthentication
    target_refs: tuple[TargetRef, ...] = ()
    has_selector: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class RateLimitPolicy(Metadata):
    """How many requests may come."""

    policy: model.RateLimitPolicy
    target_refs: tuple[TargetRef, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class RedactionPolicy(Metadata):
    """What is taken out of requests and responses."""

    policy: model.RedactionPolicy
    target_refs: tuple[TargetRef, ...] = ()


def parse_request_authentication(obj: Object) -> RequestAuthentication:
    """Read a RequestAuthentication. Raises ConfigError naming the field."""
    common = read_metadata(obj)
    top = Reader(obj).only("apiVersion", "kind", "metadata", "spec", "status")
    spec = top.get("spec").only("selector", "targetRef", "targetRefs", "jwtRules")
    selector = read_selector(spec.get("selector"))
    refs = read_target_refs(spec)
    if refs and selector is not None:
        spec.get("targetRefs").fail("beside a selector: a policy has one or the other")
    rules = tuple(_jwt_rule(each) for each in _bounded(spec.get("jwtRules")))
    ref = common["ref"]
    return RequestAuthentication(
        **common,
        policy=model.RequestAuthentication(ref.namespace, ref.name, rules),
        target_refs=refs,
        has_selector=selector is not None,
    )


def _jwt_rule(rule: Reader) -> model.JwtRule:
    rule.only(
        "issuer", "audiences", "jwksUri", "jwks_uri", "jwks", "fromHeaders", "fromParams",
        "fromCookies", "forwardOriginalToken", "outputPayloadToHeader", "outputClaimToHeaders",
        "timeout", "spaceDelimitedClaims",
    )  # fmt: skip
    uri = rule.get("jwksUri").text() or rule.get("jwks_uri").text()
    if uri and rule.get("jwks").text():
        rule.get("jwks").fail("beside jwksUri: keys come from one place")
    if uri and not uri.startswith(("http://", "https://")):
        rule.get("jwksUri").fail(f"not an address of HTTP: {shown(uri)}")
    issuer = rule.get("issuer").text()
    if not issuer and not uri:
        rule.get("issuer").fail("missing")
    places = [
        *(_place(each, "header") for each in rule.get("fromHeaders").items()),
        *(model.TokenPlace("param", each.name()) for each in rule.get("fromParams").items()),
        *(model.TokenPlace("cookie", each.name()) for each in rule.get("fromCookies").items()),
    ]
    claims = []
    for each in rule.get("outputClaimToHeaders").items():
        each.only("header", "claim")
        claims.append((_header(each.get("header")), each.get("claim").name()))
    timeout = read_duration(rule.get("timeout"))
    output = rule.get("outputPayloadToHeader")
    return model.JwtRule(
        issuer=issuer,
        audiences=rule.get("audiences").texts(),
        jwks=rule.get("jwks").text(),
        jwks_uri=uri,
        places=tuple(places),
        forwards_token=rule.get("forwardOriginalToken").boolean(),
        payload_header=_header(output) if output.text() else "",
        claim_headers=tuple(claims),
        space_delimited_claims=rule.get("spaceDelimitedClaims").texts(),
        timeout_seconds=timeout or model.JwtRule("").timeout_seconds,
    )


def _place(place: Reader, kind: Literal["header"]) -> model.TokenPlace:
    place.only("name", "prefix")
    return model.TokenPlace(kind, _header(place.get("name")), place.get("prefix").text())


def _header(name: Reader) -> str:
    if not _HEADER.fullmatch(name.name()):
        name.fail(f"not the name of a header: {shown(name.value)}")
    return name.text()


def _bounded(items: Reader, limit: int = MAX_RULES) -> list[Reader]:
    found = list(items.items())
    if len(found) > limit:
        items.fail(f"{len(found)} entries, allowed are {limit}")
    return found


def _condition(when: Reader) -> model.RequestCondition:
    when.only("methods", "paths", "hosts", "headers", "principals", "notPrincipals", "namespaces")
    headers = []
    for each in _bounded(when.get("headers")):
        each.only("name", "value")
        headers.append((_header(each.get("name")).lower(), each.get("value").text("*")))
    for key in ("methods", "paths", "hosts", "principals", "notPrincipals", "namespaces"):
        if when.get(key).value == []:
            when.get(key).fail("an empty list: leave it out to match any")
    return model.RequestCondition(
        methods=when.get("methods").texts(),
        paths=when.get("paths").texts(),
        hosts=when.get("hosts").texts(),
        headers=tuple(headers),
        principals=when.get("principals").texts(),
        not_principals=when.get("notPrincipals").texts(),
        namespaces=when.get("namespaces").texts(),
    )


def _names_once(rules: Reader, names: list[str]) -> None:
    for name in names:
        if names.count(name) > 1:
            rules.fail(f"two rules are called {shown(name)}")


def parse_rate_limit_policy(obj: Object) -> RateLimitPolicy:
    """Read a RateLimitPolicy. Raises ConfigError naming the field."""
    common = read_metadata(obj)
    top = Reader(obj).only("apiVersion", "kind", "metadata", "spec", "status")
    spec = top.get("spec").only("targetRefs", "rules", "shared", "headers")
    shared = _shared(spec.get("shared"))
    listed = _bounded(spec.get("rules"))
    rules = [_limit(each, index, shared) for index, each in enumerate(listed)]
    if not rules:
        spec.get("rules").fail("missing: without rules nothing is limited")
    _names_once(spec.get("rules"), [each.name for each in rules])
    ref = common["ref"]
    return RateLimitPolicy(
        **common,
        policy=model.RateLimitPolicy(
            ref.namespace,
            ref.name,
            rules=tuple(rules),
            shared=shared,
            sends_headers=spec.get("headers").boolean(default=True),
        ),
        target_refs=_required_targets(spec),
    )


def _required_targets(spec: Reader) -> tuple[TargetRef, ...]:
    refs = read_target_refs(spec)
    if not refs:
        spec.get("targetRefs").fail("missing: name what the policy is for")
    return refs


def _limit(rule: Reader, index: int, shared: model.SharedLimiter) -> model.RateLimitRule:
    rule.only("name", "limit", "when", "key", "overrides", "cost", "costHeader", "shadow",
              "descriptor")  # fmt: skip
    is_asked = shared.kind == "RateLimitService"
    limit = rule.get("limit").only("requests", "window", "burst")
    requests, window = 0, 0.0
    if limit.exists or not is_asked:
        requests = _amount(limit.get("requests"), 0)
        window = _window(limit.get("window"), is_asked=is_asked)
    elif shared.on_failure == "LocalShare":
        limit.fail("missing: without one, onFailure LocalShare has nothing to share")
    if is_asked and limit.get("burst").exists:
        limit.get("burst").fail("cannot be told to a rate-limit service")
    keys = tuple(_key(each, is_asked=is_asked) for each in _bounded(rule.get("key")))
    descriptor = _descriptor(rule.get("descriptor"), is_asked=is_asked)
    if descriptor == () and not keys:
        rule.get("descriptor").fail("nothing to ask a rate-limit service for, without a key")
    overrides = []
    for each in _bounded(rule.get("overrides"), MAX_ENTRIES):
        if not window:
            each.fail("the limit is the rate-limit service's, so it cannot be overridden here")
        each.only("key", "requests")
        values = tuple(value.text() for value in each.get("key").items())
        if len(values) != len(keys):
            each.get("key").fail(f"{len(values)} values for a key of {len(keys)} parts")
        overrides.append(model.RateLimitOverride(values, _amount(each.get("requests"), 0)))
    header = rule.get("costHeader")
    return model.RateLimitRule(
        name=rule.get("name").text() or str(index),
        requests=requests,
        window_seconds=window,
        burst=_amount(limit.get("burst"), 0, 0),
        condition=_condition(rule.get("when")),
        keys=keys,
        overrides=tuple(overrides),
        cost=_amount(rule.get("cost"), 0, 1),
        cost_header=_header(header).lower() if header.text() else "",
        is_shadow=rule.get("shadow").boolean(),
        descriptor=descriptor,
    )


def _window(written: Reader, *, is_asked: bool) -> float:
    window = read_duration(written)
    if window is None or window <= 0:
        written.fail("missing" if window is None else "no time at all")
    if is_asked and window not in model.UNIT_SECONDS:
        written.fail("not 1s, 1m, 1h or 24h, by which a rate-limit service counts")
    return window or 1.0


def _descriptor(entries: Reader, *, is_asked: bool) -> tuple[tuple[str, str], ...] | None:
    if not entries.exists:
        return None
    if not is_asked:
        entries.fail("only a rate-limit service is asked with one")
    found = []
    for each in _bounded(entries):
        each.only("key", "value")
        found.append((each.get("key").name(), each.get("value").text()))
    return tuple(found)


def _amount(number: Reader, least: int, default: int | None = None) -> int:
    if not number.exists and default is None:
        number.fail("missing")
    found = number.integer(default or 0)
    if not least <= found <= 1_000_000_000:
        number.fail(f"not from {least} to a thousand million")
    return found


def _key(key: Reader, *, is_asked: bool) -> model.RateLimitKey:
    key.only("type", "name", "descriptorKey")
    called = key.get("descriptorKey")
    if called.exists and not is_asked:
        called.fail("only a rate-limit service is told one")
    kind = key.get("type").choice(_KEYS)
    if kind in NAMED_KEYS:
        named = key.get("name")
        name = _header(named).lower() if kind == "Header" else named.name()
    else:
        name = ""
        if key.get("name").exists:
            key.get("name").fail(f"{kind} has no name")
    return model.RateLimitKey(cast("Any", kind or key.get("type").name()), name, called.text())


def _shared(shared: Reader) -> model.SharedLimiter:
    shared.only("type", "address", "domain", "timeout", "onFailure", "replicas")
    kind = shared.get("type").choice(("Local", "Redis", "RateLimitService"), "Local")
    address = shared.get("address").text()
    if (kind != "Local") != bool(address):
        shared.get("address").fail("missing" if kind != "Local" else "nothing is shared")
    is_asked = kind == "RateLimitService"
    if address and not (_SERVICE if is_asked else _ADDRESS).fullmatch(address):
        wanted = "name.namespace:port of a Service" if is_asked else "an address"
        shared.get("address").fail(f"not {wanted}: {shown(address)}")
    default = model.SharedLimiter()
    failure = shared.get("onFailure").choice(("Allow", "Deny", "LocalShare"), default.on_failure)
    timeout = read_duration(shared.get("timeout"))
    return model.SharedLimiter(
        kind=cast("Any", kind),
        address=address,
        domain=shared.get("domain").text(default.domain),
        timeout_seconds=timeout or default.timeout_seconds,
        on_failure=cast("Any", failure),
        replicas=_amount(shared.get("replicas"), 1, default.replicas),
    )


def parse_redaction_policy(obj: Object) -> RedactionPolicy:
    """Read a RedactionPolicy. Raises ConfigError naming the field."""
    common = read_metadata(obj)
    top = Reader(obj).only("apiVersion", "kind", "metadata", "spec", "status")
    spec = top.get("spec").only(
        "targetRefs", "direction", "when", "rules", "onUninspectable", "maxBodyBytes", "dryRun",
        "keyFile", "audit", "descriptors", "descriptorFile",
    )  # fmt: skip
    rules = [_redaction(each, index) for index, each in enumerate(_bounded(spec.get("rules")))]
    if not rules:
        spec.get("rules").fail("missing: without rules nothing is redacted")
    _names_once(spec.get("rules"), [each.name for each in rules])
    ref = common["ref"]
    default = model.RedactionPolicy("", "")
    policy = model.RedactionPolicy(
        ref.namespace,
        ref.name,
        direction=cast(
            "Any", spec.get("direction").choice(("Request", "Response", "Both"), "Both")
        ),
        condition=_condition(spec.get("when")),
        rules=tuple(rules),
        on_uninspectable=cast(
            "Any", spec.get("onUninspectable").choice(("Pass", "Block"), "Block")
        ),
        max_body_bytes=_amount(spec.get("maxBodyBytes"), 0, default.max_body_bytes),
        is_dry_run=spec.get("dryRun").boolean(),
        key_file=_file(spec.get("keyFile")),
        descriptors=spec.get("descriptors").text(),
        descriptor_file=_file(spec.get("descriptorFile")),
        audits=spec.get("audit").boolean(default=True),
    )
    if policy.max_body_bytes > MAX_BODY_BYTES:
        spec.get("maxBodyBytes").fail(f"more than {MAX_BODY_BYTES}")
    keyed = [each.name for each in rules if each.action.kind in ("hash", "tokenize")]
    if keyed and not policy.key_file:
        spec.get("keyFile").fail(f"missing: rule {keyed[0]} needs a key")
    check_descriptors(spec)
    return RedactionPolicy(**common, policy=policy, target_refs=_required_targets(spec))


def _file(name: Reader) -> str:
    """A plain name: the waypoint looks in one directory."""
    if name.text() and not _FILE.fullmatch(name.text()):
        name.fail(
            f"not a plain name of a file: {shown(name.value)}",
            hint="such as shop.key, in the Secret that is mounted into the waypoint",
        )
    return name.text()


def _redaction(rule: Reader, index: int) -> model.RedactionRule:
    rule.only(
        "name", "detector", "pattern", "validator", "headers", "cookies", "queryParams",
        "jsonPaths", "formFields", "grpcFields", "action",
    )  # fmt: skip
    kinds = get_args(model.DetectorKind)
    detector = rule.get("detector").choice(kinds, "")
    pattern = rule.get("pattern").text()
    if (detector == "custom") != bool(pattern):
        rule.get("pattern").fail("missing" if detector else "goes with detector custom")
    if pattern:
        read_expression(rule.get("pattern"), pattern)
    for each in rule.get("jsonPaths").items():
        _path(each)
    for each in rule.get("grpcFields").items():
        if each.name().startswith("$"):
            _path(each)
        elif not _PROTO_FIELD.fullmatch(each.text()):
            each.fail(
                f"not a field: {shown(each.value)}",
                hint="such as shop.v1.User.email, or a path: $.user.email",
            )
    found = model.RedactionRule(
        name=rule.get("name").text() or str(index),
        detector=cast("Any", detector or None),
        pattern=pattern,
        validator=cast("Any", rule.get("validator").choice(("luhn", "mod97"), "")),
        headers=tuple(_header(each).lower() for each in rule.get("headers").items()),
        cookies=rule.get("cookies").texts(),
        query_params=rule.get("queryParams").texts(),
        json_paths=rule.get("jsonPaths").texts(),
        form_fields=rule.get("formFields").texts(),
        grpc_fields=rule.get("grpcFields").texts(),
        action=_action(rule.get("action")),
    )
    nowhere = replace(found, name="", action=model.RedactionAction())
    if nowhere == model.RedactionRule(""):
        rule.fail("names neither a detector nor a place: it finds nothing")
    return found


def _path(each: Reader) -> None:
    try:
        parse_json_path(each.name())
    except ConfigError as error:
        each.fail(str(error.args[0]), hint=error.hint)


def _action(action: Reader) -> model.RedactionAction:
    action.only("type", "keepLast", "mask")
    kind = action.get("type").choice(("mask", "drop", "hash", "tokenize", "block"), "mask")
    mask = action.get("mask").text("*")
    if not 1 <= len(mask) <= 64:
        action.get("mask").fail("not from 1 to 64 characters")
    keep = _amount(action.get("keepLast"), 0, 0)
    if kind != "mask" and (action.get("keepLast").exists or action.get("mask").exists):
        action.get("type").fail(f"{kind} keeps nothing and has no mask")
    return model.RedactionAction(cast("Any", kind), keep, mask)
