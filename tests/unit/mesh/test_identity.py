"""SPIFFE ids: what is read, what is refused."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh.errors import ConfigError
from mesh.identity import SpiffeId

SEGMENT = st.from_regex(r"[A-Za-z0-9_-]{1,40}", fullmatch=True)
DOMAIN = st.from_regex(r"[a-z0-9-]{1,20}(\.[a-z0-9-]{1,20}){0,2}", fullmatch=True)


def test_parses_what_istio_writes() -> None:
    parsed = SpiffeId.parse("spiffe://cluster.local/ns/shop/sa/web")
    assert parsed == SpiffeId("cluster.local", "shop", "web")
    assert parsed.principal == "cluster.local/ns/shop/sa/web"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "spiffe://",
        "spiffe://td",
        "spiffe://td/ns/a",
        "spiffe://td/ns/a/sa/b/c",
        "spiffe://td/ns/a/sa/",
        "spiffe://td/ns//sa/b",
        "spiffe://td/sa/a/ns/b",
        "spiffe://TD/ns/a/sa/b",
        "SPIFFE://td/ns/a/sa/b",
        "https://td/ns/a/sa/b",
        "spiffe://td/ns/a/sa/b\x00",
        "spiffe://td/ns/a/sa/b\n",
        "spiffe://td/ns/../sa/b",
        "spiffe://td/ns/a%2fb/sa/c",
        "spiffe://td/ns/a/sa/b?x=1",
        "spiffe:///ns/a/sa/b",
        "spiffe://td:80/ns/a/sa/b",
        "spiffe://" + "a" * 256 + "/ns/a/sa/b",
    ],
)
def test_refuses_everything_else(text: str) -> None:
    with pytest.raises(ConfigError):
        SpiffeId.parse(text)


@given(DOMAIN, SEGMENT, SEGMENT)
def test_round_trip(domain: str, namespace: str, account: str) -> None:
    identity = SpiffeId(domain, namespace, account)
    assert SpiffeId.parse(str(identity)) == identity
