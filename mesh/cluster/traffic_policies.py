"""Typed views of what holds for calls to a Service, strictly read into the model. Pure.

DestinationRule is Istio's (`networking.istio.io/v1`), XBackendTrafficPolicy the Gateway API's
(experimental). What a waypoint carries out is in `settings`; fields that exist and have no effect
here are listed in `ignored`, for the object's status; any other field is refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

from mesh.cluster.api import Object
from mesh.cluster.fields import Reader, format_path, shown
from mesh.cluster.objects import Metadata, read_metadata
from mesh.cluster.policies import TargetRef, read_target_refs
from mesh.cluster.route_filters import read_duration
from mesh.cluster.routes import read_session
from mesh.model.route import (
    BackendSettings,
    ConnectionLimits,
    LoadBalancing,
    OutlierDetection,
    SessionPersistence,
)

_DURATION = re.compile(r"(?:[0-9]{1,9}(?:\.[0-9]{1,9})?(?:h|ms|us|ns|m|s))+")
_PART = re.compile(r"([0-9.]+)(h|ms|us|ns|m|s)")
_SECONDS = {"h": 3600.0, "m": 60.0, "s": 1.0, "ms": 1e-3, "us": 1e-6, "ns": 1e-9}
_MAX = 2**31 - 1
_Kind = Literal["LEAST_REQUEST", "RANDOM", "ROUND_ROBIN", "CONSISTENT_HASH"]
_SIMPLE: dict[str, _Kind] = {
    "UNSPECIFIED": "LEAST_REQUEST",
    "LEAST_CONN": "LEAST_REQUEST",
    "LEAST_REQUEST": "LEAST_REQUEST",
    "PASSTHROUGH": "LEAST_REQUEST",
    "RANDOM": "RANDOM",
    "ROUND_ROBIN": "ROUND_ROBIN",
}
_POLICY = (
    "loadBalancer", "connectionPool", "outlierDetection", "tls", "tunnel", "proxyProtocol",
    "retryBudget",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class DestinationRule(Metadata):
    """`host` is as written. `settings` is None without a trafficPolicy."""

    host: str
    settings: BackendSettings | None = None
    ignored: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class XBackendTrafficPolicy(Metadata):
    """A retry budget and a session for the Services in `target_refs`."""

    target_refs: tuple[TargetRef, ...] = ()
    budget: ConnectionLimits | None = None
    session: SessionPersistence | None = None


def parse_destination_rule(obj: Object) -> DestinationRule:
    """Read a DestinationRule. Raises ConfigError naming the field."""
    common = read_metadata(obj)
    top = Reader(obj).only("apiVersion", "kind", "metadata", "spec", "status")
    spec = top.get("spec").only("host", "trafficPolicy", "subsets", "exportTo", "workloadSelector")
    ignored: list[str] = []
    _ignore(spec, ("subsets", "exportTo", "workloadSelector"), ignored)
    policy = spec.get("trafficPolicy")
    settings = None
    if policy.exists:
        policy.only(*_POLICY, "portLevelSettings")
        ports = []
        for each in policy.get("portLevelSettings").items():
            each.only("port", *_POLICY)
            number = each.get("port").only("number").get("number").port()
            ports.append((number, _settings(each, ignored)))
        settings = replace(_settings(policy, ignored), ports=tuple(ports))
    return DestinationRule(
        **common,
        host=spec.get("host").name(),
        settings=settings,
        ignored=tuple(dict.fromkeys(ignored)),
    )


def _ignore(where: Reader, names: Iterable[str], ignored: list[str]) -> None:
    ignored += [format_path(where.get(name).path) for name in names if where.get(name).exists]


def _settings(policy: Reader, ignored: list[str]) -> BackendSettings:
    _ignore(policy, ("tunnel", "proxyProtocol"), ignored)
    tls = policy.get("tls")
    mode = tls.get("mode").text("DISABLE")
    if mode not in ("DISABLE", "ISTIO_MUTUAL"):
        # Its traffic would go out in plain text, which the author did not want.
        ignored.append(format_path(tls.path))
    outlier = policy.get("outlierDetection")
    return BackendSettings(
        outlier=_outlier(outlier, ignored) if outlier.exists else OutlierDetection(),
        limits=_limits(policy, ignored),
        balancing=_balancing(policy.get("loadBalancer"), ignored),
    )


def _outlier(outlier: Reader, ignored: list[str]) -> OutlierDetection:
    outlier.only(
        "consecutiveErrors", "splitExternalLocalOriginErrors", "consecutiveLocalOriginFailures",
        "consecutiveGatewayErrors", "consecutive5xxErrors", "interval", "baseEjectionTime",
        "maxEjectionPercent", "minHealthPercent",
    )  # fmt: skip
    names = ("splitExternalLocalOriginErrors", "consecutiveLocalOriginFailures", "interval")
    _ignore(outlier, names, ignored)
    old = outlier.get("consecutiveErrors")
    gateway = outlier.get("consecutiveGatewayErrors")
    base = read_istio_duration(outlier.get("baseEjectionTime"))
    return OutlierDetection(
        consecutive_errors=_count(gateway if gateway.exists else old),
        consecutive_5xx=_count(outlier.get("consecutive5xxErrors"), 5),
        base_ejection_seconds=30.0 if base is None else base,
        max_ejection_percent=_percent(outlier.get("maxEjectionPercent"), 10),
        min_health_percent=_percent(outlier.get("minHealthPercent"), 0),
    )


def _limits(policy: Reader, ignored: list[str]) -> ConnectionLimits:
    pool = policy.get("connectionPool").only("tcp", "http")
    tcp = pool.get("tcp").only(
        "maxConnections", "connectTimeout", "tcpKeepalive", "maxConnectionDuration", "idleTimeout"
    )
    http = pool.get("http").only(
        "http1MaxPendingRequests", "http2MaxRequests", "maxRequestsPerConnection", "maxRetries",
        "idleTimeout", "h2UpgradePolicy", "useClientProtocol", "maxConcurrentStreams",
    )  # fmt: skip
    _ignore(tcp, ("tcpKeepalive", "maxConnectionDuration", "idleTimeout"), ignored)
    _ignore(http, ("h2UpgradePolicy", "useClientProtocol", "maxConcurrentStreams"), ignored)
    default = ConnectionLimits()
    budget = policy.get("retryBudget").only("percent", "minRetryConcurrency", "budgetInterval")
    _ignore(budget, ("budgetInterval",), ignored)
    return ConnectionLimits(
        max_connections=_count(tcp.get("maxConnections")),
        max_requests=_count(http.get("http2MaxRequests")),
        max_pending=_count(http.get("http1MaxPendingRequests")),
        retry_budget_percent=_share(budget.get("percent"), default.retry_budget_percent),
        retry_budget_minimum=_count(
            budget.get("minRetryConcurrency"), default.retry_budget_minimum
        ),
        max_retries=0 if budget.exists else _count(http.get("maxRetries")),
        max_requests_per_connection=_count(http.get("maxRequestsPerConnection")),
        connect_seconds=read_istio_duration(tcp.get("connectTimeout")) or 0.0,
        idle_seconds=read_istio_duration(http.get("idleTimeout")) or 0.0,
    )


def _balancing(balancer: Reader, ignored: list[str]) -> LoadBalancing:
    balancer.only("simple", "consistentHash", "localityLbSetting", "warmup", "warmupDurationSecs")
    _ignore(balancer, ("localityLbSetting", "warmup", "warmupDurationSecs"), ignored)
    simple, hashed = balancer.get("simple"), balancer.get("consistentHash")
    if not hashed.exists:
        kind = simple.choice(_SIMPLE, "LEAST_REQUEST")
        if kind == "PASSTHROUGH":
            ignored.append(format_path(simple.path))
        return LoadBalancing(_SIMPLE[kind])
    if simple.exists:
        hashed.fail("beside simple: say one")
    return _hash(hashed, ignored)


def _hash(hashed: Reader, ignored: list[str]) -> LoadBalancing:
    keys = ("httpHeaderName", "httpCookie", "useSourceIp", "httpQueryParameterName")
    hashed.only(*keys, "ringHash", "maglev", "minimumRingSize")
    if sum(hashed.get(key).exists for key in keys) != 1:
        hashed.fail("not exactly one thing to hash on", hint=f"one of: {', '.join(keys)}")
    _ignore(hashed, ("maglev",), ignored)
    ring = hashed.get("ringHash").only("minimumRingSize").get("minimumRingSize")
    size = _count(ring if ring.exists else hashed.get("minimumRingSize"), 1024)
    cookie = hashed.get("httpCookie").only("name", "path", "ttl", "attributes")
    _ignore(cookie, ("attributes",), ignored)
    if cookie.exists:
        return LoadBalancing(
            "CONSISTENT_HASH",
            f"cookie:{cookie.get('name').name()}",
            cookie.get("path").text("/"),
            read_istio_duration(cookie.get("ttl")),
            min(size, 65536),
        )
    if hashed.get("httpHeaderName").exists:
        on = f"header:{hashed.get('httpHeaderName').name()}"
    elif hashed.get("httpQueryParameterName").exists:
        on = f"query:{hashed.get('httpQueryParameterName').name()}"
    else:
        if not hashed.get("useSourceIp").boolean():
            hashed.get("useSourceIp").fail("false: nothing to hash on")
        on = "source-ip"
    return LoadBalancing("CONSISTENT_HASH", on, ring_size=min(size, 65536))


def parse_backend_traffic_policy(obj: Object) -> XBackendTrafficPolicy:
    """Read an XBackendTrafficPolicy. Raises ConfigError naming the field."""
    common = read_metadata(obj)
    top = Reader(obj).only("apiVersion", "kind", "metadata", "spec", "status")
    spec = top.get("spec").only("targetRefs", "retryConstraint", "sessionPersistence")
    refs = read_target_refs(spec)
    if not refs:
        spec.get("targetRefs").fail("missing: name what the policy is for")
    constraint = spec.get("retryConstraint").only("budget", "minRetryRate")
    budget = constraint.get("budget").only("percent", "interval")
    rate = constraint.get("minRetryRate").only("count", "interval")
    limits = ConnectionLimits(
        retry_budget_percent=float(_percent(budget.get("percent"), 20)),
        retry_budget_minimum=_count(rate.get("count"), 10),
        retry_interval_seconds=_interval(budget.get("interval"), 10.0),
        retry_minimum_seconds=_interval(rate.get("interval"), 1.0),
    )
    return XBackendTrafficPolicy(
        **common,
        target_refs=refs,
        budget=limits if constraint.exists else None,
        session=read_session(spec.get("sessionPersistence")),
    )


def _interval(interval: Reader, default: float) -> float:
    found = read_duration(interval)
    if found is not None and not 1.0 <= found <= 3600.0:
        interval.fail("not from 1s to 1h")
    return default if found is None else found


def read_istio_duration(duration: Reader) -> float | None:
    """A duration as Istio writes it (1h, 1.5s, 100ms) in seconds, None if absent."""
    text = duration.text()
    if not text:
        return None
    if not _DURATION.fullmatch(text):
        duration.fail(f"not a duration: {shown(text)}", hint="such as 10s, 1.5s, 500ms")
    return float(sum(float(number) * _SECONDS[unit] for number, unit in _PART.findall(text)))


def _count(number: Reader, default: int = 0) -> int:
    found = number.integer(default)
    if not 0 <= found <= _MAX:
        number.fail(f"not from 0 to {_MAX}")
    return found


def _percent(number: Reader, default: int) -> int:
    found = number.integer(default)
    if not 0 <= found <= 100:
        number.fail("not from 0 to 100")
    return found


def _share(number: Reader, default: float) -> float:
    value = default if number.value is None else number.value
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value <= 100:
        number.fail("not a number from 0 to 100")
    return float(value)
