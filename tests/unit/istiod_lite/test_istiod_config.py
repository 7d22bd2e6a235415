"""Settings of the controller."""

from __future__ import annotations

import pytest

from istiod_lite.config import IstiodConfig
from istiod_lite.debug import plain
from istiod_lite.workloads import Mesh
from mesh.errors import ConfigError
from mesh.model.authorization import (
    Action,
    Authorization,
    Clause,
    Match,
    PolicyScope,
    Rule,
    StringKind,
    StringMatch,
)
from mesh.model.service import LoadBalancing, Mode, Scope, Service, ServicePort
from mesh.model.workload import NetworkAddress, Workload
from mesh.runtime.config import load

GIVEN = {"CLUSTER_DIR": "/c", "CA_DIR": "/ca", "TOKEN_ISSUER_KEYS": "/keys"}


def config(**environment: str) -> IstiodConfig:
    return load(IstiodConfig, [], {**GIVEN, **environment})


def test_defaults():
    found = config()
    assert found.mesh() == Mesh()
    assert (found.xds_port, found.monitoring_port) == (15012, 15014)
    assert found.token_audiences == ("istio-ca",)
    # Nobody may ask for others' certificates unless it is said who.
    assert found.ca_trusted_node_accounts == ()
    assert found.serving_names()[:2] == (
        "istiod.istio-system.svc",
        "istiod.istio-system.svc.cluster.local",
    )


def test_all_of_it():
    found = config(
        CLUSTER_ID="c2",
        TRUST_DOMAIN="td",
        CLUSTER_DOMAIN="example.org",
        NETWORK="n",
        ROOT_NAMESPACE="root",
        ISTIOD_CUSTOM_HOST="a.b,10.0.0.1",
        CA_TRUSTED_NODE_ACCOUNTS="root/ztunnel,x/y",
        MONITORING_HOST="::",
    )
    assert found.mesh() == Mesh("c2", "td", "example.org", "n", "root")
    assert found.serving_names()[0] == "istiod.root.svc"
    assert {"a.b", "10.0.0.1"} <= set(found.serving_names())
    assert found.ca_trusted_node_accounts == ("root/ztunnel", "x/y")


def test_what_waypoints_are_told_of_traces():
    found = config(
        WAYPOINT_TRACES="OTEL_EXPORTER_OTLP_ENDPOINT=http%3A%2F%2Fc,OTEL_TRACES_SAMPLER=x"
    )
    assert found.waypoints().traces == (
        ("OTEL_EXPORTER_OTLP_ENDPOINT", "http://c"),
        ("OTEL_TRACES_SAMPLER", "x"),
    )


def test_on_kubernetes_only_the_keys_need_a_place():
    found = load(IstiodConfig, [], {"CA_DIR": "/ca", "CA_SECRET": "authority"})
    assert found.cluster().is_kubernetes
    assert found.cluster_dir is None
    assert found.token_issuer_keys is None


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"CLUSTER_SOURCE": "kubernetes"}, "cluster_dir"),
        ({"CLUSTER_SOURCE": "etcd"}, "CLUSTER_SOURCE"),
        ({"CA_SECRET": "authority"}, "ca_secret|CA_SECRET"),
        ({"LEASE_DURATION_SECONDS": "1"}, "LEASE_DURATION_SECONDS"),
    ],
)
def test_a_directory_is_not_kubernetes(wrong, named):
    with pytest.raises(ConfigError, match=f"(?i){named}"):
        load(IstiodConfig, [], GIVEN | wrong)


@pytest.mark.parametrize("missing", ["CA_DIR", "TOKEN_ISSUER_KEYS"])
def test_required(missing):
    with pytest.raises(ConfigError, match=f"(?i){missing}"):
        load(IstiodConfig, [], {key: value for key, value in GIVEN.items() if key != missing})


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("XDS_PORT", "0"),
        ("XDS_PORT", "65536"),
        ("MONITORING_PORT", "-1"),
        ("XDS_HOST", "localhost"),
        ("MONITORING_HOST", "x"),
        ("CLUSTER_ID", "a/b"),
        ("ROOT_NAMESPACE", ""),
        ("TRUST_DOMAIN", "UPPER"),
        ("CA_TRUSTED_NODE_ACCOUNTS", "a/b/c"),
        ("CA_TRUSTED_NODE_ACCOUNTS", "/b"),
        ("TOKEN_AUDIENCES", ""),
        ("TERMINATION_DRAIN_DURATION_SECONDS", "-1"),
        ("WAYPOINT_TRACES", "http://c"),
        ("WAYPOINT_TRACES", "PATH=/bin"),
        ("WAYPOINT_TRACES", "OTEL_EXPORTER_OTLP_HEADERS=key%3Dsecret"),
    ],
)
def test_refused(variable, value):
    with pytest.raises(ConfigError):
        config(**{variable: value})


def test_models_as_json():
    workload = Workload(
        uid="K//Pod/a/b",
        name="b",
        namespace="a",
        addresses=("10.0.0.1",),
        services={"a/h": {80: 1}},
    )
    shown = plain(workload)
    assert shown["addresses"] == ["10.0.0.1"]
    assert shown["tunnelProtocol"] == "NONE"
    assert shown["services"] == {"a/h": {"80": 1}}
    assert "hostname" not in shown
    assert "waypoint" not in shown
    service = Service(
        "s",
        "a",
        "h",
        addresses=(NetworkAddress("n", "10.0.0.2"),),
        ports={80: ServicePort(80)},
        load_balancing=LoadBalancing((Scope.NODE,), Mode.STRICT),
    )
    shown = plain(service)
    assert shown["addresses"] == ["n/10.0.0.2"]
    assert shown["ports"]["80"]["targetPort"] == 0
    assert shown["loadBalancing"]["routingPreference"] == ["NODE"]
    match = Match(principals=(StringMatch(StringKind.PRESENCE),))
    policy = Authorization("p", "a", PolicyScope.GLOBAL, Action.DENY, (Rule((Clause((match,)),)),))
    assert plain(policy)["rules"] == [
        {"clauses": [{"matches": [{"principals": [{"kind": "PRESENCE"}]}]}]}
    ]
