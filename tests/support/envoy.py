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

import trio

LOOPBACK = "127.0.0.1"
_TYPE = "type.googleapis.com/envoy.extensions"


def free_port() -> int:
    """A port that was free a moment ago."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


def _tls(directory: Path, name: str) -> str:
    """A CommonTlsContext; JSON is YAML, whatever the indentation around it."""
    return json.dumps(
        {
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
    )


def _address(port: int, host: str = LOOPBACK) -> str:
    return f"{{socket_address: {{address: {host}, port_value: {port}}}}}"


def _endpoint(name: str, port: int, host: str = LOOPBACK) -> str:
    return (
        f"{{cluster_name: {name}, endpoints: "
        f"[{{lb_endpoints: [{{endpoint: {{address: {_address(port, host)}}}}}]}}]}}"
    )


def tunnelling_client(
    directory: Path, name: str, listen: int, peer: int, authority: str, peer_host: str = LOOPBACK
) -> str:
    """TCP on `listen` goes through CONNECT `authority` to HBONE on `peer`."""
    return f"""
static_resources:
  listeners:
  - name: in
    address: {_address(listen)}
    filter_chains:
    - filters:
      - name: envoy.filters.network.tcp_proxy
        typed_config:
          "@type": {_TYPE}.filters.network.tcp_proxy.v3.TcpProxy
          stat_prefix: tunnel
          cluster: peer
          tunneling_config:
            hostname: "{authority}"
            headers_to_add:
            - header: {{key: baggage, value: "k8s.namespace.name=shop,k8s.pod.name=envoy"}}
  clusters:
  - name: peer
    type: STATIC
    connect_timeout: 5s
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
    directory: Path, name: str, listen: int, destination: int, listen_host: str = LOOPBACK
) -> str:
    """HBONE on `listen`; every CONNECT leads to TCP `destination`."""
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
