"""Envoy as a waypoint: HBONE in, HTTP filters, HBONE out, as configuration (JSON).

CONNECT ends at the first listener; the stream goes to an internal one with the HTTP filters, and
from there to a second one that tunnels it to the workload's node.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.support.envoy import common_tls

NODE, THEIRS = "127.0.0.2", "127.0.0.4"
USERS = ("alice", "bob")
PLENTY = 100_000_000

_E = "type.googleapis.com/envoy.extensions"
_HTTP_OPTIONS = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions"
_LIMITS = {"thresholds": [{f"max_{each}": 100_000 for each in
           ("connections", "requests", "pending_requests")}]}  # fmt: skip


def envoy_config(directory: Path, listen: int, peer: int, features: str, log: Path) -> str:
    """HBONE on THEIRS:`listen`, out to NODE:`peer`."""
    h2 = features == "h2"
    filters: list[dict[str, Any]] = []
    if features != "routing":
        filters = [_rbac(), _local_rate_limit()]
    http = _manager("http", _routes(), filters, [_file_log(log)] if features == "telemetry" else [])
    connect = {
        "match": {"connect_matcher": {}},
        "route": {
            "cluster": "http",
            "timeout": "0s",
            "upgrade_configs": [{"upgrade_type": "CONNECT", "connect_config": {}}],
        },
    }
    outer = _manager("hbone", [connect], [], [])
    outer["typed_config"]["codec_type"] = "HTTP2"
    outer["typed_config"]["upgrade_configs"] = [{"upgrade_type": "CONNECT"}]
    outer["typed_config"]["http2_protocol_options"]["allow_connect"] = True
    tunnel = {
        "name": "envoy.filters.network.tcp_proxy",
        "typed_config": {
            "@type": f"{_E}.filters.network.tcp_proxy.v3.TcpProxy",
            "stat_prefix": "tunnel",
            "cluster": "node",
            "tunneling_config": {"hostname": f"{NODE}:8080"},
        },
    }
    node = _cluster("node", {"socket_address": {"address": NODE, "port_value": peer}}, h2=True)
    node["transport_socket"] = _tls(directory, "waypoint", "Upstream")
    node["connect_timeout"] = "5s"
    listener = {
        "name": "hbone",
        "address": {"socket_address": {"address": THEIRS, "port_value": listen}},
        "filter_chains": [
            {"transport_socket": _tls(directory, "waypoint", "Downstream"), "filters": [outer]}
        ],
    }
    return json.dumps(
        {
            "bootstrap_extensions": [
                {
                    "name": "envoy.bootstrap.internal_listener",
                    "typed_config": {
                        "@type": f"{_E}.bootstrap.internal_listener.v3.InternalListener"
                    },
                }
            ],
            "static_resources": {
                "listeners": [listener, _behind("http", http), _behind("out", tunnel)],
                "clusters": [_internal("http", "http", h2=False), _internal("a", "out", h2=h2),
                             _internal("b", "out", h2=h2), node],
            },
        }
    )  # fmt: skip


def _behind(name: str, network_filter: dict[str, Any]) -> dict[str, Any]:
    """A listener that only other parts of this Envoy reach."""
    chain = {"filters": [network_filter]}
    return {"name": name, "internal_listener": {}, "filter_chains": [chain]}


def _manager(
    name: str, routes: list[Any], filters: list[dict[str, Any]], logs: list[Any]
) -> dict[str, Any]:
    router = {
        "name": "envoy.filters.http.router",
        "typed_config": {"@type": f"{_E}.filters.http.router.v3.Router"},
    }
    return {
        "name": "envoy.filters.network.http_connection_manager",
        "typed_config": {
            "@type": f"{_E}.filters.network.http_connection_manager.v3.HttpConnectionManager",
            "stat_prefix": name,
            "codec_type": "AUTO",
            "http2_protocol_options": {"max_concurrent_streams": 2000},
            "access_log": logs,
            "route_config": {
                "virtual_hosts": [{"name": "all", "domains": ["*"], "routes": routes}]
            },
            "http_filters": [*filters, router],
        },
    }


def _routes() -> list[Any]:
    versioned = {"prefix": "/a", "headers": [{"name": "x-ver", "string_match": {"exact": "v2"}}]}
    clusters = [{"name": "a", "weight": 90}, {"name": "b", "weight": 10}]
    return [
        {"match": versioned, "route": {"cluster": "b"}},
        {"match": {"prefix": "/w"}, "route": {"weighted_clusters": {"clusters": clusters}}},
        {"match": {"safe_regex": {"regex": "/re/[0-9]+/x"}}, "route": {"cluster": "b"}},
        {"match": {"prefix": "/"}, "route": {"cluster": "a"}},
    ]


def _rbac() -> dict[str, Any]:
    paths = [{"url_path": {"path": {"prefix": each}}} for each in ("/a", "/shop.Orders/")]
    methods = [_field(":method", each) for each in ("GET", "POST")]
    either = [{"or_rules": {"rules": each}} for each in (paths, methods)]
    users = {
        "permissions": [{"and_rules": {"rules": either}}],
        "principals": [_field("x-user", each) for each in USERS],
    }
    return {
        "name": "envoy.filters.http.rbac",
        "typed_config": {
            "@type": f"{_E}.filters.http.rbac.v3.RBAC",
            "rules": {"action": "ALLOW", "policies": {"users": users}},
        },
    }


def _field(name: str, value: str) -> dict[str, Any]:
    return {"header": {"name": name, "string_match": {"exact": value}}}


def _local_rate_limit() -> dict[str, Any]:
    always = {"default_value": {"numerator": 100, "denominator": "HUNDRED"}}
    bucket = {"max_tokens": PLENTY, "tokens_per_fill": PLENTY, "fill_interval": "1s"}
    return {
        "name": "envoy.filters.http.local_ratelimit",
        "typed_config": {
            "@type": f"{_E}.filters.http.local_ratelimit.v3.LocalRateLimit",
            "stat_prefix": "limit",
            "token_bucket": bucket,
            "filter_enabled": always,
            "filter_enforced": always,
        },
    }


def _file_log(path: Path) -> dict[str, Any]:
    names = {
        "time": "%START_TIME%", "id": "%REQ(X-REQUEST-ID)%", "trace": "%REQ(TRACEPARENT)%",
        "method": "%REQ(:METHOD)%", "authority": "%REQ(:AUTHORITY)%", "path": "%REQ(:PATH)%",
        "status": "%RESPONSE_CODE%", "bytes_recv": "%BYTES_RECEIVED%",
        "bytes_sent": "%BYTES_SENT%", "duration": "%DURATION%", "flags": "%RESPONSE_FLAGS%",
        "upstream": "%UPSTREAM_HOST%", "source": "%DOWNSTREAM_REMOTE_ADDRESS%",
    }  # fmt: skip
    return {
        "name": "envoy.access_loggers.file",
        "typed_config": {
            "@type": f"{_E}.access_loggers.file.v3.FileAccessLog",
            "path": str(path),
            "log_format": {"json_format": names},
        },
    }


def _cluster(name: str, address: dict[str, Any], *, h2: bool) -> dict[str, Any]:
    options = {"http2_protocol_options": {"max_concurrent_streams": 2000}}
    made: dict[str, Any] = {
        "name": name,
        "type": "STATIC",
        "circuit_breakers": _LIMITS,
        "load_assignment": {
            "cluster_name": name,
            "endpoints": [{"lb_endpoints": [{"endpoint": {"address": address}}]}],
        },
    }
    if h2:
        made["typed_extension_protocol_options"] = {
            _HTTP_OPTIONS: {
                "@type": f"{_E}.upstreams.http.v3.HttpProtocolOptions",
                "explicit_http_config": options,
            }
        }
    return made


def _internal(name: str, listener: str, *, h2: bool) -> dict[str, Any]:
    address = {"envoy_internal_address": {"server_listener_name": listener}}
    sockets = f"{_E}.transport_sockets"
    raw = {
        "name": "envoy.transport_sockets.raw_buffer",
        "typed_config": {"@type": f"{sockets}.raw_buffer.v3.RawBuffer"},
    }
    return {
        **_cluster(name, address, h2=h2),
        "transport_socket": {
            "name": "envoy.transport_sockets.internal_upstream",
            "typed_config": {
                "@type": f"{sockets}.internal_upstream.v3.InternalUpstreamTransport",
                "transport_socket": raw,
            },
        },
    }


def _tls(directory: Path, name: str, side: str) -> dict[str, Any]:
    config: dict[str, Any] = {
        "@type": f"{_E}.transport_sockets.tls.v3.{side}TlsContext",
        "common_tls_context": common_tls(directory, name),
    }
    if side == "Downstream":
        config["require_client_certificate"] = True
    return {"name": "envoy.transport_sockets.tls", "typed_config": config}
