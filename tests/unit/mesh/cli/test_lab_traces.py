"""What `ambit lab up` tells the node proxies about traces."""

from __future__ import annotations

import pytest

from mesh.cli.lab import collector_outside, trace_variables
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


@pytest.mark.parametrize("endpoint", ["localhost:4318", "ftp://localhost", "http://[::", "x"])
def test_what_is_no_url(endpoint: str) -> None:
    with pytest.raises(ConfigError):
        collector_outside({"OTEL_EXPORTER_OTLP_ENDPOINT": endpoint})
