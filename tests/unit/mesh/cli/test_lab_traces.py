"""What `ambit lab up` tells the node proxies about traces."""

from __future__ import annotations

import pytest

from mesh.cli.lab import collector_outside, trace_variables, waypoint_traces
from mesh.errors import ConfigError

ENVIRON = {
    "PATH": "/bin",
    "OTEL_EXPORTER_OTLP_ENDPOINT": "http://a:1",
    "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://b:2/x",
    "OTEL_TRACES_SAMPLER": "always_on",
}


def test_the_callers_variables_and_the_flag_before_them() -> None:
    assert trace_variables({"PATH": "/bin"}, None) == {}
    assert trace_variables(ENVIRON, None) == {k: v for k, v in ENVIRON.items() if k != "PATH"}
    assert trace_variables(ENVIRON, "http://c:3") == {
        "OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:3",
        "OTEL_TRACES_SAMPLER": "always_on",
    }


@pytest.mark.parametrize(
    ("endpoint", "outside"),
    [
        ("", None),
        ("http://localhost:4318", ("localhost", 4318)),
        ("https://127.0.0.1", ("127.0.0.1", 443)),
        ("http://[::1]:1/x", ("::1", 1)),
        ("http://collector.observability.svc.cluster.local:4318", None),
        ("http://10.96.0.7:4318", None),
    ],
)
def test_only_loopback_is_outside(endpoint: str, outside: tuple[str, int] | None) -> None:
    assert collector_outside({"OTEL_EXPORTER_OTLP_ENDPOINT": endpoint}) == outside


def test_waypoints_come_by_their_nodes_address_and_get_no_secret() -> None:
    told = {
        "OTEL_EXPORTER_OTLP_ENDPOINT": "http://localhost:4318/x",
        "OTEL_EXPORTER_OTLP_HEADERS": "key=secret",
        "OTEL_TRACES_SAMPLER": "always_on",
    }
    assert waypoint_traces(told, ("localhost", 4318)) == (
        "OTEL_EXPORTER_OTLP_ENDPOINT=http%3A%2F%2F%24%28HOST_IP%29%3A4318%2Fx"
        ",OTEL_TRACES_SAMPLER=always_on"
    )
    assert waypoint_traces({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:1"}, None) == (
        "OTEL_EXPORTER_OTLP_ENDPOINT=http%3A%2F%2Fc%3A1"
    )


@pytest.mark.parametrize("endpoint", ["localhost:4318", "ftp://localhost", "http://[::", "x"])
def test_what_is_no_url(endpoint: str) -> None:
    with pytest.raises(ConfigError):
        collector_outside({"OTEL_EXPORTER_OTLP_ENDPOINT": endpoint})
