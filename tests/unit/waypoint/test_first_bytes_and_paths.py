"""waypoint.detect, .paths and .target: literals in, literals out."""

from __future__ import annotations

import ssl

import pytest
from hypothesis import given
from hypothesis import strategies as st

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
        ("/a/%252f", "/a/%252f", "/a/%252f", "/a/%252f", "/a/%252f"),
        ("/a;x=1/b", "/a;x=1/b", "/a;x=1/b", "/a;x=1/b", "/a;x=1/b"),
        ("/a/..b/.c/d..", "/a/..b/.c/d..", "/a/..b/.c/d..", "/a/..b/.c/d..", "/a/..b/.c/d.."),
        ("/a/%c3%a4%20%3b", *["/a/%c3%a4%20%3b"] * 4),
        ("/..", "/..", "/", "/", "/"),
        ("/../../a", "/../../a", "/a", "/a", "/a"),
        ("/a/./b/.", "/a/./b/.", "/a/b/", "/a/b/", "/a/b/"),
        ("*", "*", "*", "*", "*"),
        ("/plain/path", "/plain/path", "/plain/path", "/plain/path", "/plain/path"),
    ],
)
def test_path_normalization(path: str, none: str, base: str, merge: str, decode: str) -> None:
    modes: tuple[Mode, ...] = ("NONE", "BASE", "MERGE_SLASHES", "DECODE_AND_MERGE_SLASHES")
    for mode, wanted in zip(modes, (none, base, merge, decode), strict=True):
        assert normalizer(mode)(path.encode()) == wanted.encode(), mode
    assert normalizer("BASE")(b"/a%00") is None


@pytest.mark.parametrize(
    "path",
    [
        "/a/..;/b", "/a/..;x=1/b", "/a/.;/b", "/a/..;", "/a/%2e%2e;/b", "/a/..%2fb", "/a/..%2F",
        "/a%2f../b", "/a%2f..", "/a/..%5cb", "/a%5c..%5cb", "/a/%252e%252e/b", "/a/%25252e./b",
        "/a/..%252fb", "/a/%c0%ae%c0%ae/b", "/a/..%c0%afb", "/a/%e0%80%ae./b", "/a/..%c1%9cb",
        "/a/.%3b/b", "/%25252525252525252e", "/a%", "/a%zz", "/a%2", "/a%2%66", "/a%u002e",
        "/a%00", "/a/%2e%00",
    ],
)  # fmt: skip
def test_paths_that_endpoints_may_read_otherwise_are_refused(path: str) -> None:
    modes: tuple[Mode, ...] = ("BASE", "MERGE_SLASHES")
    assert [normalizer(mode)(path.encode()) for mode in modes] == [None, None]
    # Where slashes are decoded this path is either plain, or refused as well.
    decoded = normalizer("DECODE_AND_MERGE_SLASHES")(path.encode())
    assert decoded is None or not {b"..", b"."} & set(decoded.split(b"/"))


@given(
    st.lists(st.sampled_from(["/", ".", "..", "%2e", "%2f", "%5c", "\\", ";", "a", "%25", "//"]))
)
def test_a_normal_path_is_its_own_normal_form(parts: list[str]) -> None:
    path = ("/" + "".join(parts)).encode()
    modes: tuple[Mode, ...] = ("BASE", "MERGE_SLASHES", "DECODE_AND_MERGE_SLASHES")
    for mode in modes:
        once = normalizer(mode)(path)
        if once is not None:
            assert normalizer(mode)(once) == once
            assert not {b"..", b"."} & set(once.split(b"/"))


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
