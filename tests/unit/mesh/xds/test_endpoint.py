"""Addresses of the control plane."""

from __future__ import annotations

import pytest

from mesh.errors import ConfigError
from mesh.xds.endpoint import parse_address


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("https://istiod.istio-system.svc:15012", ("istiod.istio-system.svc", 15012)),
        ("istiod:1", ("istiod", 1)),
        ("https://[fd00::1]:2/", ("fd00::1", 2)),
        ("https://istiod", ("istiod", 15012)),
    ],
)
def test_parse_address(text: str, expected: tuple[str, int]) -> None:
    assert parse_address(text, "XDS_ADDRESS") == expected


@pytest.mark.parametrize(
    "text", ["http://istiod:15010", "", "https://", "https://h:port", "https://h/path", "unix:///x"]
)
def test_addresses_that_are_none(text: str) -> None:
    with pytest.raises(ConfigError, match="CA_ADDRESS"):
        parse_address(text, "CA_ADDRESS")
