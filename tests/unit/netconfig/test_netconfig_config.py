"""The node agent's settings, by Istio's names."""

from __future__ import annotations

from pathlib import Path

import pytest

from mesh.errors import ConfigError
from mesh.runtime.config import load
from netconfig.config import NetconfigConfig
from netconfig.ruleset import Capture

REQUIRED = {"NODE_NAME": "node1", "CLUSTER_DIR": "/run/lab/cluster"}


def test_the_node_is_required() -> None:
    with pytest.raises(ConfigError, match="NODE_NAME"):
        load(NetconfigConfig, [], {"CLUSTER_DIR": "/run/lab/cluster"})


def test_without_a_directory_it_is_kubernetes() -> None:
    config = load(NetconfigConfig, [], {"NODE_NAME": "node1", "KUBECONFIG": "/k"})
    assert config.cluster().is_kubernetes
    assert config.cluster().kubeconfig == Path("/k")
    with pytest.raises(ConfigError, match=r"(?i)cluster_dir"):
        load(NetconfigConfig, [], {"NODE_NAME": "node1", "CLUSTER_SOURCE": "directory"})


def test_istios_names_and_defaults() -> None:
    config = load(NetconfigConfig, [], REQUIRED)
    assert config.ztunnel_uds_address == Path("/var/run/ztunnel/ztunnel.sock")
    assert config.plugin_socket == Path("/var/run/istio-cni/pluginevent.sock")
    selection = config.selection()
    assert selection.excluded_namespaces == {"kube-system"}
    assert selection.capture == Capture(
        exempt=("169.254.7.127", "fd16:9254:7127:1337:ffff:ffff:ffff:ffff")
    )


def test_what_the_environment_says_reaches_the_rules() -> None:
    environment = {
        **REQUIRED,
        "AMBIENT_DNS_CAPTURE": "false",
        "AMBIENT_IPV6": "false",
        "HOST_PROBE": "10.244.1.1,fd00:10:244:1::1",
        "HOST_PROBE_SNAT_IP": "",
        "HOST_PROBE_SNAT_IPV6": "",
        "EXCLUDE_NAMESPACES": "a,b",
        "SYSTEM_NAMESPACE": "mesh",
    }
    selection = load(NetconfigConfig, [], environment).selection()
    assert selection.capture == Capture(
        dns=False, ipv6=False, exempt=("10.244.1.1", "fd00:10:244:1::1")
    )
    assert selection.excluded_namespaces == {"a", "b"}
    assert selection.system_namespace == "mesh"


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("HOST_PROBE", "node1", "no address or network"),
        ("HOST_PROBE", "0.0.0.0/0", "nothing captured"),
        ("HOST_PROBE_SNAT_IPV6", "::/0", "nothing captured"),
        ("HEALTH_PORT", "70000", "no port"),
        ("DRIFT_SECONDS", "0", "more than zero"),
        ("AMBIENT_IPV6", "perhaps", "not a boolean"),
    ],
)
def test_an_impossible_value_is_refused_by_its_variable(
    name: str, value: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=f"{name}.*{message}"):
        load(NetconfigConfig, [], {**REQUIRED, name: value})
