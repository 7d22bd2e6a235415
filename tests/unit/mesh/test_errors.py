"""Messages name file, line, column and field, as far as they are known."""

from __future__ import annotations

import pytest

from mesh.errors import ConfigError, Denied, MeshError, RemoteProtocolError, Unavailable


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ConfigError("no"), "no"),
        (ConfigError("no", file="a.yaml"), "a.yaml: no"),
        (ConfigError("no", file="a.yaml", line=3), "a.yaml:3: no"),
        (
            ConfigError("no", file="a.yaml", line=3, column=7, field="spec.x"),
            "a.yaml:3:7: spec.x: no",
        ),
        (ConfigError("no", field="spec.x"), "spec.x: no"),
    ],
)
def test_where(error: ConfigError, message: str) -> None:
    assert str(error) == message


def test_each_branch_carries_its_flag() -> None:
    assert Denied("x", policy="a/b").flag == "DENY"
    assert Unavailable("x").retryable
    assert Unavailable("x", flag="NETWORK_POLICY").flag == "NETWORK_POLICY"
    assert RemoteProtocolError("x", http_status=503).http_status == 503
    assert issubclass(RemoteProtocolError, MeshError)
