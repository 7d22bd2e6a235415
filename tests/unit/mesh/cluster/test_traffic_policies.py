"""DestinationRule and XBackendTrafficPolicy, read strictly."""

from __future__ import annotations

from typing import Any

import pytest

from mesh.cluster.traffic_policies import parse_backend_traffic_policy, parse_destination_rule
from mesh.errors import ConfigError
from mesh.model.route import (
    ConnectionLimits,
    LoadBalancing,
    OutlierDetection,
    SessionPersistence,
)


def _rule(policy: Any, **spec: Any) -> Any:
    return parse_destination_rule(
        {
            "apiVersion": "networking.istio.io/v1",
            "kind": "DestinationRule",
            "metadata": {"name": "r", "namespace": "shop"},
            "spec": {"host": "web", "trafficPolicy": policy, **spec},
        }
    )


def _policy(**spec: Any) -> Any:
    return parse_backend_traffic_policy(
        {
            "apiVersion": "gateway.networking.x-k8s.io/v1alpha1",
            "kind": "XBackendTrafficPolicy",
            "metadata": {"name": "p", "namespace": "shop"},
            "spec": {"targetRefs": [{"group": "", "kind": "Service", "name": "web"}], **spec},
        }
    )


def test_everything_that_is_carried_out() -> None:
    found = _rule(
        {
            "loadBalancer": {"simple": "ROUND_ROBIN"},
            "connectionPool": {
                "tcp": {"maxConnections": 3, "connectTimeout": "1.5s"},
                "http": {
                    "http1MaxPendingRequests": 4, "http2MaxRequests": 5, "maxRetries": 6,
                    "maxRequestsPerConnection": 7, "idleTimeout": "1h30m",
                },
            },
            "outlierDetection": {
                "consecutiveGatewayErrors": 2, "consecutive5xxErrors": 0,
                "baseEjectionTime": "500ms", "maxEjectionPercent": 100, "minHealthPercent": 20,
            },
            "portLevelSettings": [
                {"port": {"number": 9090}, "loadBalancer": {"simple": "RANDOM"}}
            ],
        }
    )  # fmt: skip
    settings = found.settings
    assert found.ignored == ()
    assert settings.balancing.kind == "ROUND_ROBIN"
    assert settings.limits == ConnectionLimits(
        max_connections=3, max_requests=5, max_pending=4, max_retries=6,
        max_requests_per_connection=7, connect_seconds=1.5, idle_seconds=5400.0,
    )  # fmt: skip
    assert settings.outlier == OutlierDetection(2, 0.5, 100, 0, 20)
    # A port's settings replace the others: nothing is inherited.
    assert settings.of(9090).balancing.kind == "RANDOM"
    assert settings.of(9090).limits == ConnectionLimits()
    assert settings.of(80) is settings


def test_empty_outlier_detection_is_istios_default() -> None:
    assert _rule({"outlierDetection": {}}).settings.outlier == OutlierDetection(0, 30.0, 10, 5, 0)
    assert _rule({}).settings.outlier == OutlierDetection()


@pytest.mark.parametrize(
    ("hashed", "expected"),
    [
        ({"httpHeaderName": "x-user"}, LoadBalancing("CONSISTENT_HASH", "header:x-user")),
        ({"useSourceIp": True}, LoadBalancing("CONSISTENT_HASH", "source-ip")),
        (
            {"httpQueryParameterName": "q", "ringHash": {"minimumRingSize": 2048}},
            LoadBalancing("CONSISTENT_HASH", "query:q", ring_size=2048),
        ),
        (
            {"httpCookie": {"name": "u", "ttl": "0s", "path": "/a"}},
            LoadBalancing("CONSISTENT_HASH", "cookie:u", "/a", 0.0),
        ),
        ({"httpCookie": {"name": "u"}}, LoadBalancing("CONSISTENT_HASH", "cookie:u")),
    ],
)
def test_hashes(hashed: Any, expected: LoadBalancing) -> None:
    assert _rule({"loadBalancer": {"consistentHash": hashed}}).settings.balancing == expected


def test_what_has_no_effect_is_told() -> None:
    found = _rule(
        {
            "loadBalancer": {"simple": "PASSTHROUGH", "localityLbSetting": {}},
            "tls": {"mode": "SIMPLE"},
            "connectionPool": {"tcp": {"tcpKeepalive": {}}},
        },
        subsets=[{"name": "v1"}],
    )
    assert found.ignored == (
        "spec.subsets",
        "spec.trafficPolicy.tls",
        "spec.trafficPolicy.connectionPool.tcp.tcpKeepalive",
        "spec.trafficPolicy.loadBalancer.localityLbSetting",
        "spec.trafficPolicy.loadBalancer.simple",
    )
    assert _rule({"tls": {"mode": "ISTIO_MUTUAL"}}).ignored == ()
    assert _rule(None).settings is None


@pytest.mark.parametrize(
    ("policy", "field"),
    [
        ({"loadBalancr": {}}, "spec.trafficPolicy.loadBalancr"),
        ({"loadBalancer": {"simple": "BEST"}}, "spec.trafficPolicy.loadBalancer.simple"),
        (
            {"loadBalancer": {"consistentHash": {}}},
            "spec.trafficPolicy.loadBalancer.consistentHash",
        ),
        (
            {"loadBalancer": {"simple": "RANDOM", "consistentHash": {"useSourceIp": True}}},
            "spec.trafficPolicy.loadBalancer.consistentHash",
        ),
        (
            {"connectionPool": {"tcp": {"connectTimeout": "soon"}}},
            "spec.trafficPolicy.connectionPool.tcp.connectTimeout",
        ),
        (
            {"connectionPool": {"http": {"maxRetries": -1}}},
            "spec.trafficPolicy.connectionPool.http.maxRetries",
        ),
        (
            {"outlierDetection": {"maxEjectionPercent": 101}},
            "spec.trafficPolicy.outlierDetection.maxEjectionPercent",
        ),
        ({"retryBudget": {"percent": "x"}}, "spec.trafficPolicy.retryBudget.percent"),
        ({"portLevelSettings": [{}]}, "spec.trafficPolicy.portLevelSettings[0].port.number"),
    ],
)
def test_mistakes_are_named(policy: Any, field: str) -> None:
    with pytest.raises(ConfigError) as caught:
        _rule(policy)
    assert caught.value.field == field


def test_retry_budgets() -> None:
    limits = _rule({"retryBudget": {"percent": 12.5, "minRetryConcurrency": 1},
                    "connectionPool": {"http": {"maxRetries": 9}}}).settings.limits  # fmt: skip
    assert (limits.retry_budget_percent, limits.retry_budget_minimum) == (12.5, 1)
    assert limits.max_retries == 0
    found = _policy(retryConstraint={"budget": {"percent": 30, "interval": "20s"},
                                     "minRetryRate": {"count": 5}},
                    sessionPersistence={"sessionName": "s"})  # fmt: skip
    assert found.budget == ConnectionLimits(
        retry_budget_percent=30.0, retry_budget_minimum=5,
        retry_interval_seconds=20.0, retry_minimum_seconds=1.0,
    )  # fmt: skip
    assert found.session == SessionPersistence(name="s")
    assert _policy().budget is None


@pytest.mark.parametrize("spec", [{"targetRefs": []}, {"retryConstraint": {"x": 1}},
                                  {"retryConstraint": {"budget": {"interval": "2h"}}}])  # fmt: skip
def test_mistakes_in_policies(spec: Any) -> None:
    with pytest.raises(ConfigError):
        _policy(**spec)
