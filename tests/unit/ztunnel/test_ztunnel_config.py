"""Settings by upstream's names."""

from __future__ import annotations

import pytest

from mesh.errors import ConfigError
from mesh.runtime.config import load
from ztunnel.config import ZtunnelConfig


def test_defaults_are_upstreams() -> None:
    config = load(ZtunnelConfig, [], {})
    assert config.xds_address == "https://istiod.istio-system.svc:15012"
    assert config.inpod_uds == "/var/run/ztunnel/ztunnel.sock"
    assert (config.cluster_id, config.network, config.dns_capture) == ("Kubernetes", "", True)
    assert config.drain_seconds == 5.0


def test_environment() -> None:
    config = load(
        ZtunnelConfig,
        [],
        {
            "CLUSTER_ID": "second",
            "ISTIO_META_CLUSTER_ID": "first",
            "NODE_NAME": "n1",
            "SECRET_TTL": "24h",
            "ISTIO_META_DNS_CAPTURE": "false",
            "TERMINATION_GRACE_PERIOD_SECONDS": "30",
        },
    )
    assert (config.cluster_id, config.node_name) == ("first", "n1")
    assert config.secret_ttl_seconds == 86400.0
    assert config.dns_capture is False
    assert config.drain_seconds == 25.0


@pytest.mark.parametrize("address", ["localhost:1", "127.0.0.2:1", "[::1]:1", "unix:/run/a.sock"])
def test_the_admin_port_is_private(address: str) -> None:
    assert load(ZtunnelConfig, [], {"ADMIN_ADDR": address}).admin_address == address


@pytest.mark.parametrize(
    "address", ["0.0.0.0:15000", "[::]:15000", ":15000", "10.0.0.1:1", "host:1", "unix:", "x"]
)
def test_an_admin_port_for_everybody_is_refused(address: str) -> None:
    with pytest.raises(ConfigError, match=r"ADMIN_ADDR: .* is no port of loopback"):
        load(ZtunnelConfig, [], {"ADMIN_ADDR": address})
