"""The CNI plugin's JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mesh.errors import ConfigError
from netconfig.cni import AddRequest, parse_request

GOOD = {
    "Netns": "/var/run/netns/cni-1",
    "PodName": "web-0",
    "PodNamespace": "shop",
    "IPs": [
        {
            "Interface": 0,
            "Address": {"IP": "10.0.0.2", "Mask": "////AA=="},
            "Gateway": "10.0.0.1",
        },
        {"Interface": None, "Address": {"IP": "fd00::2", "Mask": "//8="}, "Gateway": "fd00::1"},
    ],
}


def body(**changes: Any) -> bytes:
    return json.dumps({**GOOD, **changes}).encode()


def test_a_request_as_istios_plugin_sends_it() -> None:
    assert parse_request(body()) == AddRequest(
        Path("/var/run/netns/cni-1"), "web-0", "shop", ("10.0.0.2", "fd00::2")
    )


def test_the_addresses_may_be_null() -> None:
    assert parse_request(body(IPs=None)).addresses == ()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "not JSON"),
        (b"[" * 100_000, "not JSON|larger"),
        (b"[]", "not a JSON object"),
        (b" " * 70_000, "larger than"),
        (body(Netns="netns"), "Netns: not an absolute path"),
        (body(Netns="/" + "x" * 5000), "Netns: not an absolute path"),
        (body(Netns="/a\0b"), "Netns: not an absolute path"),
        (body(Netns=7), "Netns"),
        (body(PodName=""), "PodName: a name of 0"),
        (body(PodNamespace="n" * 300), "PodNamespace: a name of 300"),
        (body(IPs={}), "IPs"),
        (body(IPs=[{"Address": {"IP": "ten"}}]), "IP"),
        (body(IPs=[{"Address": {"IP": "10.0.0.1"}}] * 33), "IPs: more than 32"),
    ],
)
def test_anything_else_is_refused_naming_the_field(data: bytes, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_request(data)
