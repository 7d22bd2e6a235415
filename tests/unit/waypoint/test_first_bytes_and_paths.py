"""waypoint.detect, .paths and .target: literals in, literals out."""

from __future__ import annotations

import ssl

import pytest

from mesh.errors import Refusal
from mesh.hbone.head import parse_authority
from mesh.model.store import Store
from mesh.model.workload import GatewayAddress, NamespacedHostname, NetworkAddress, Workload
from tests.support.waypoints import service
from waypoint.detect import Speech, server_name, sniff
from waypoint.paths import Mode, normalizer
from waypoint.target import Own, Target, plan_tunnel


@pytest.mark.parametrize(
    ("data", "speech"),
    [
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", Speech.HTTP2),
        (b"PRI * HT", Speech.NEED_DATA),
        (b"GET / H", Speech.HTTP1),
        (b"BREW /pot HTTP/1.1\r\n", Speech.HTTP1),
        (b"BREW /po", Speech.NEED_DATA),
        (b"EHLO me\r\n", Speech.OPAQUE),
        (b"\x16\x03\x01", Speech.TLS),
        (b"\x00\x01", Speech.OPAQUE),
    ],
)
def test_first_bytes(data: bytes, speech: Speech) -> None:
    assert sniff(data, is_http=False) is speech


def test_the_server_name_of_a_real_hello() -> None:
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    session = ssl.create_default_context().wrap_bio(incoming, outgoing, server_hostname="Web.shop")
    with pytest.raises(ssl.SSLWantReadError):
        session.do_handshake()
    hello = outgoing.read()
    assert server_name(hello) == "web.shop"
    assert server_name(hello[:50]) is None


@pytest.mark.parametrize(
    ("path", "none", "base", "merge", "decode"),
    [
        ("/app/../admin", "/app/../admin", "/admin", "/admin", "/admin"),
        ("/app/%2E./admin", "/app/%2E./admin", "/admin", "/admin", "/admin"),
        ("/app//", "/app//", "/app//", "/app/", "/app/"),
        ("/app/%2f", "/app/%2f", "/app/%2f", "/app/%2f", "/app/"),
        ("/app\\admin", "/app\\admin", "/app/admin", "/app/admin", "/app/admin"),
        ("/xyz%30..//abc", "/xyz%30..//abc", "/xyz0..//abc", "/xyz0../abc", "/xyz0../abc"),
        ("/a/%252e", "/a/%252e", "/a/%252e", "/a/%252e", "/a/%252e"),
        ("/plain/path", "/plain/path", "/plain/path", "/plain/path", "/plain/path"),
    ],
)
def test_path_normalization(path: str, none: str, base: str, merge: str, decode: str) -> None:
    modes: tuple[Mode, ...] = ("NONE", "BASE", "MERGE_SLASHES", "DECODE_AND_MERGE_SLASHES")
    for mode, wanted in zip(modes, (none, base, merge, decode), strict=True):
        assert normalizer(mode)(path.encode()) == wanted.encode(), mode
    assert normalizer("BASE")(b"/a%00") is None


def test_only_those_who_use_this_waypoint_are_served() -> None:
    us = NamespacedHostname("shop", "waypoint.shop.svc.cluster.local")
    own = Own(us, "", "10.0.0.9", lambda service: service.startswith("shop/granted"))
    other = GatewayAddress(NamespacedHostname("shop", "other.shop.svc.cluster.local"), 15008)
    pod = Workload("u", "pod", "shop", ("10.0.0.1",),
                   waypoint=GatewayAddress(NetworkAddress("", "10.0.0.9"), 15008))  # fmt: skip
    store = Store()
    store.apply_addresses(
        [service("web", 1), service("free", 2, waypoint=None),
         service("theirs", 3, waypoint=other), service("granted", 4, waypoint=None), pod],
        (),
    )  # fmt: skip
    for authority, status in (
        ("10.96.0.1:80", 0), ("web.shop.svc.cluster.local:80", 0), ("10.0.0.1:8080", 0),
        ("10.96.0.4:80", 0), ("10.96.0.1:81", 404), ("10.96.0.2:80", 404),
        ("10.96.0.3:80", 404), ("10.0.0.2:80", 404),
    ):  # fmt: skip
        plan = plan_tunnel(parse_authority(authority), "shop", own, store)
        assert isinstance(plan, Refusal) == bool(status), authority
        assert isinstance(plan, Target) or plan.http_status == status
