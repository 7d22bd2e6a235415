"""A real Envoy beside us: configurations for both ends of HBONE, start and stop."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import trio

LOOPBACK = "127.0.0.1"
_TYPE = "type.googleapis.com/envoy.extensions"


def free_port() -> int:
    """A port that was free a moment ago."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


def common_tls(directory: Path, name: str) -> dict[str, Any]:
    """A CommonTlsContext: mutual TLS 1.3 by the files of `name`, with the mesh's identities."""
    return {
        "alpn_protocols": ["h2"],
        # The default maximum for clients is TLS 1.2.
        "tls_params": {
            "tls_minimum_protocol_version": "TLSv1_3",
            "tls_maximum_protocol_version": "TLSv1_3",
        },
        "tls_certificates": [
            {
                "certificate_chain": {"filename": f"{directory}/{name}.pem"},
                "private_key": {"filename": f"{directory}/{name}.key"},
            }
        ],
        "validation_context": {
            "trusted_ca": {"filename": f"{directory}/ca.pem"},
            "match_typed_subject_alt_names": [
                {"san_type": "URI", "matcher": {"prefix": "spiffe://cluster.local/"}}
            ],
        },
    }


def _tls(directory: Path, name: str) -> str:
    """The same as JSON, which is YAML, whatever the indentation around it."""
    return json.dumps(common_tls(directory, name))


def _address(port: int, host: str = LOOPBACK) -> str:
    return f"{{socket_address: {{address: {host}, port_value: {port}}}}}"


def _endpoint(name: str, port: int, host: str = LOOPBACK) -> str:
    return (
        f"{{cluster_name: {name}, endpoints: "
        f"[{{lb_endpoints: [{{endpoint: {{address: {_address(port, host)}}}}}]}}]}}"
    )


_ACCESS_LOG = json.dumps(
    [
        {
            "name": "stdout",
            "typed_config": {
                "@type": f"{_TYPE}.access_loggers.stream.v3.StdoutAccessLog",
                "log_format": {
                    "json_format": {
                        "time": "%START_TIME%",
                        "id": "%STREAM_ID%",
                        "src.addr": "%DOWNSTREAM_REMOTE_ADDRESS%",
                        "dst.addr": "%UPSTREAM_HOST%",
                        "dst.hbone_addr": "%REQ(:AUTHORITY)%",
                        "src.identity": "%DOWNSTREAM_PEER_URI_SAN%",
                        "bytes_sent": "%BYTES_SENT%",
                        "bytes_recv": "%BYTES_RECEIVED%",
                        "duration": "%DURATION%",
                        "response_flags": "%RESPONSE_FLAGS%",
                        "error": "%UPSTREAM_TRANSPORT_FAILURE_REASON%",
                    }
                },
            },
        }
    ]
)


def _rbac(identity: str) -> str:
    """The filter that lets `identity` in."""
    client = {"authenticated": {"principal_name": {"exact": identity}}}
    rules = {"clients": {"permissions": [{"any": True}], "principals": [client]}}
    return json.dumps(
        {
            "name": "envoy.filters.http.rbac",
            "typed_config": {
                "@type": f"{_TYPE}.filters.http.rbac.v3.RBAC",
                "rules": {"action": "ALLOW", "policies": rules},
            },
        }
    )


def tunnelling_client(
    directory: Path,
    name: str,
    listen: int,
    peer: int,
    authority: str,
    peer_host: str = LOOPBACK,
    *,
    listen_host: str = LOOPBACK,
    logs: bool = False,
    mark: int = 0,
) -> str:
    """TCP on `listen` goes through CONNECT `authority` to HBONE on `peer`.

    `logs` turns the access log on (stdout), `mark` is set on the sockets to the peer.
    """
    marked = {"level": 1, "name": 36, "int_value": mark, "state": "STATE_PREBIND"}
    options = json.dumps({"socket_options": [marked]} if mark else {})
    return f"""
static_resources:
  listeners:
  - name: in
    address: {_address(listen, listen_host)}
    filter_chains:
    - filters:
      - name: envoy.filters.network.tcp_proxy
        typed_config:
          "@type": {_TYPE}.filters.network.tcp_proxy.v3.TcpProxy
          stat_prefix: tunnel
          access_log: {_ACCESS_LOG if logs else "[]"}
          cluster: peer
          tunneling_config:
            hostname: "{authority}"
            headers_to_add:
            - header: {{key: baggage, value: "k8s.namespace.name=shop,k8s.pod.name=envoy"}}
  clusters:
  - name: peer
    type: STATIC
    connect_timeout: 5s
    upstream_bind_config: {options}
    typed_extension_protocol_options:
      envoy.extensions.upstreams.http.v3.HttpProtocolOptions:
        "@type": {_TYPE}.upstreams.http.v3.HttpProtocolOptions
        explicit_http_config: {{http2_protocol_options: {{}}}}
    load_assignment: {_endpoint("peer", peer, peer_host)}
    transport_socket:
      name: envoy.transport_sockets.tls
      typed_config:
        "@type": {_TYPE}.transport_sockets.tls.v3.UpstreamTlsContext
        common_tls_context: {_tls(directory, name)}
"""


def terminating_server(
    directory: Path,
    name: str,
    listen: int,
    destination: int,
    listen_host: str = LOOPBACK,
    *,
    logs: bool = False,
    admits: str = "",
) -> str:
    """HBONE on `listen`; every CONNECT leads to TCP `destination`.

    `logs` turns the access log on (stdout); `admits` is the only identity that RBAC lets in.
    """
    rbac = f"- {_rbac(admits)}" if admits else ""
    return f"""
static_resources:
  listeners:
  - name: hbone
    address: {_address(listen, listen_host)}
    filter_chains:
    - transport_socket:
        name: envoy.transport_sockets.tls
        typed_config:
          "@type": {_TYPE}.transport_sockets.tls.v3.DownstreamTlsContext
          require_client_certificate: true
          common_tls_context: {_tls(directory, name)}
      filters:
      - name: envoy.filters.network.http_connection_manager
        typed_config:
          "@type": {_TYPE}.filters.network.http_connection_manager.v3.HttpConnectionManager
          stat_prefix: hbone
          access_log: {_ACCESS_LOG if logs else "[]"}
          codec_type: HTTP2
          http2_protocol_options: {{allow_connect: true}}
          upgrade_configs: [{{upgrade_type: CONNECT}}]
          route_config:
            virtual_hosts:
            - name: all
              domains: ["*"]
              routes:
              - match: {{connect_matcher: {{}}}}
                route:
                  cluster: destination
                  timeout: 0s
                  upgrade_configs: [{{upgrade_type: CONNECT, connect_config: {{}}}}]
          http_filters:
          {rbac}
          - name: envoy.filters.http.router
            typed_config: {{"@type": {_TYPE}.filters.http.router.v3.Router}}
  clusters:
  - name: destination
    type: STATIC
    connect_timeout: 5s
    load_assignment: {_endpoint("destination", destination)}
"""


@contextlib.asynccontextmanager
async def running_envoy(directory: Path, config: str, port: int) -> AsyncIterator[None]:
    """Envoy with `config` until the block ends; ready when `port` accepts."""
    path = directory / f"envoy-{port}.yaml"
    path.write_text(config)
    binary = os.path.join(os.path.dirname(sys.executable), "envoy")
    log_path = directory / f"envoy-{port}.log"
    with log_path.open("wb") as log:
        process = await trio.lowlevel.open_process(
            [binary, "-c", str(path), "--concurrency", "1", "--use-dynamic-base-id", "-l", "warn"],
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    try:
        with trio.fail_after(20):
            while True:
                if process.poll() is not None:
                    raise RuntimeError(f"envoy ended: {log_path.read_text()[-2000:]}")
                try:
                    socket.create_connection(("127.0.0.1", port), 1).close()
                    break
                except OSError:
                    await trio.sleep(0.05)
        yield
    finally:
        process.kill()
        with trio.CancelScope(shield=True):
            await process.wait()


def asking_config(
    listen: int,
    name: str,
    http_filter: dict[str, Any],
    asked: tuple[str, int],
    web: tuple[str, int],
    route: dict[str, Any] | None = None,
) -> str:
    """Envoy with the HTTP filter `name`, which asks cluster `asked` (gRPC), before `web`."""
    kind = "type.googleapis.com/envoy.extensions"

    def cluster(called: str, at: tuple[str, int]) -> dict[str, Any]:
        address = {"socket_address": {"address": at[0], "port_value": at[1]}}
        endpoints = [{"lb_endpoints": [{"endpoint": {"address": address}}]}]
        version = "http2_protocol_options" if called == "asked" else "http_protocol_options"
        return {
            "name": called,
            "load_assignment": {"cluster_name": called, "endpoints": endpoints},
            "typed_extension_protocol_options": {
                "envoy.extensions.upstreams.http.v3.HttpProtocolOptions": {
                    "@type": f"{kind}.upstreams.http.v3.HttpProtocolOptions",
                    "explicit_http_config": {version: {}},
                }
            },
        }

    routes = [{"match": {"prefix": "/"}, "route": {"cluster": "web", **(route or {})}}]
    manager = {
        "@type": f"{kind}.filters.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": "in",
        "route_config": {"virtual_hosts": [{"name": "all", "domains": ["*"], "routes": routes}]},
        "http_filters": [
            {"name": f"envoy.filters.http.{name}", "typed_config": http_filter},
            {
                "name": "envoy.filters.http.router",
                "typed_config": {"@type": f"{kind}.filters.http.router.v3.Router"},
            },
        ],
    }
    chain = {
        "filters": [
            {"name": "envoy.filters.network.http_connection_manager", "typed_config": manager}
        ]
    }
    listener = {
        "name": "in",
        "address": {"socket_address": {"address": "127.0.0.1", "port_value": listen}},
        "filter_chains": [chain],
    }
    clusters = [cluster("asked", asked), cluster("web", web)]
    return json.dumps({"static_resources": {"listeners": [listener], "clusters": clusters}})
