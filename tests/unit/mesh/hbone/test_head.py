"""CONNECT heads: authority, baggage, forwarded, traceparent, requests and responses."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh.errors import LocalProtocolError, RemoteProtocolError
from mesh.hbone.head import (
    Authority,
    Baggage,
    ConnectHead,
    ConnectResponse,
    Forwarded,
    Malformed,
    encode_baggage,
    encode_forwarded,
    encode_request,
    encode_response,
    parse_authority,
    parse_baggage,
    parse_forwarded,
    parse_request,
    parse_response,
    take_connection_id,
    traceparent,
)

TRACE = f"00-{'a' * 32}-{'b' * 16}-00"
CART = Baggage(
    cluster="Kubernetes",
    namespace="shop",
    workload_type="deployment",
    workload_name="cart",
    service_name="cart",
    service_version="v2",
    region="eu",
    zone="eu-1",
)
CART_TEXT = (
    "k8s.cluster.name=Kubernetes,k8s.namespace.name=shop,k8s.deployment.name=cart,"
    "service.name=cart,service.version=v2,cloud.region=eu,cloud.availability_zone=eu-1"
)


@pytest.mark.parametrize(
    ("text", "authority"),
    [
        ("10.0.0.1:80", Authority("10.0.0.1", 80, is_ip=True)),
        ("[fd00::1]:65535", Authority("fd00::1", 65535, is_ip=True)),
        ("[FD00:0::1]:8080", Authority("fd00::1", 8080, is_ip=True)),
        ("[::ffff:10.0.0.1]:80", Authority("10.0.0.1", 80, is_ip=True)),
        ("web.shop.svc.cluster.local:80", Authority("web.shop.svc.cluster.local", 80, is_ip=False)),
        ("Web.Shop:1", Authority("web.shop", 1, is_ip=False)),
        ("my_svc-1:80", Authority("my_svc-1", 80, is_ip=False)),
    ],
)
def test_authorities(text: str, authority: Authority) -> None:
    assert parse_authority(text) == authority


@pytest.mark.parametrize(
    "text",
    [
        "",
        ":80",
        "10.0.0.1",
        "10.0.0.1:",
        "10.0.0.1:0",
        "10.0.0.1:65536",
        "10.0.0.1:+80",
        "10.0.0.1: 80",
        "10.0.0.1:٨٠",
        "10.0.0.256:80",
        "1.2.3:80",
        "fd00::1:80",
        "[10.0.0.1]:80",
        "[fd00::1%eth0]:80",
        "[fd00::1:80",
        "[web]:80",
        "user@web:80",
        "web/path:80",
        "we b:80",
        "-web:80",
        "web..shop:80",
        "web.:80",
        "x" * 254 + ":80",
        "é:80",
    ],
)
def test_what_is_no_authority(text: str) -> None:
    with pytest.raises(RemoteProtocolError) as caught:
        parse_authority(text)
    assert caught.value.http_status == 400


@given(st.text(max_size=60))
def test_any_text_is_an_authority_or_a_protocol_error(text: str) -> None:
    try:
        authority = parse_authority(text)
    except RemoteProtocolError:
        return
    assert parse_authority(str(authority)) == authority


def test_baggage_in_order_and_back() -> None:
    assert encode_baggage(CART) == CART_TEXT
    assert parse_baggage([CART_TEXT]) == CART


def test_empty_members_are_omitted_and_lists_cannot_be_broken() -> None:
    assert encode_baggage(Baggage(namespace="shop", zone="a,b=c", region="e u")) == (
        "k8s.namespace.name=shop"
    )
    assert encode_baggage(Baggage()) == ""


@pytest.mark.parametrize("kind", ["deployment", "cronjob", "pod", "job"])
def test_workload_kinds(kind: str) -> None:
    baggage = Baggage(workload_type=kind, workload_name="x")
    assert encode_baggage(baggage) == f"k8s.{kind}.name=x"
    assert parse_baggage([f"k8s.{kind}.name=x"]) == baggage


def test_repeated_headers_merge_and_the_last_wins_untrimmed() -> None:
    parsed = parse_baggage(
        ["service.name=a,cloud.region=eu", "service.name= b%20,junk,=,k8s..name=x"]
    )
    assert parsed == Baggage(service_name=" b%20", region="eu")


def test_baggage_is_bounded() -> None:
    assert parse_baggage(["service.name=" + "x" * 513]) == Baggage()
    assert parse_baggage(["cloud.region=" + "x" * 8200, "service.name=a"]) == Baggage()


@given(st.lists(st.text(max_size=100), max_size=5))
def test_any_baggage_is_survived(headers: list[str]) -> None:
    parse_baggage(headers)


@pytest.mark.parametrize(
    ("forwarded", "text"),
    [
        (Forwarded("10.0.0.1:4711"), 'for="10.0.0.1:4711"'),
        (Forwarded("[fd00::1]:4711", "web.shop"), 'for="[fd00::1]:4711";host=web.shop'),
    ],
)
def test_forwarded(forwarded: Forwarded, text: str) -> None:
    assert encode_forwarded(forwarded) == text
    assert parse_forwarded(text) == forwarded


def test_forwarded_of_others() -> None:
    assert parse_forwarded("For=1.2.3.4; Host=Web ;proto=http, for=5.6.7.8") == Forwarded(
        "1.2.3.4", "web"
    )
    assert parse_forwarded('for="unfinished') is None
    assert parse_forwarded("") is None


def test_traceparents() -> None:
    assert traceparent(bytes(range(1, 25))) == (
        "00-0102030405060708090a0b0c0d0e0f10-1112131415161718-00"
    )
    with pytest.raises(LocalProtocolError):
        traceparent(b"short")


def test_a_request_and_back() -> None:
    head = ConnectHead(
        "10.0.0.1:80",
        baggage=CART,
        forwarded=Forwarded("10.9.9.9:4711", "web.shop"),
        traceparent=TRACE,
        extra=(("x-forwarded-network", "net1"), ("x-istio-source", "waypoint")),
    )
    pairs = encode_request(head)
    assert [name for name, _ in pairs[:3]] == [b":method", b":authority", b"baggage"]
    assert parse_request(pairs) == head
    assert head.header("x-forwarded-network") == "net1"
    assert head.header("missing") == ""


def test_the_authority_becomes_canonical_and_a_bad_trace_is_dropped() -> None:
    head = parse_request(
        [
            (b":method", b"CONNECT"),
            (b":authority", b"[FD00::0:1]:80"),
            (b"traceparent", b"00-" + b"0" * 32 + b"-" + b"1" * 16 + b"-00"),
        ]
    )
    assert head == ConnectHead("[fd00::1]:80")


@pytest.mark.parametrize(
    "pairs",
    [
        [],
        [(b":method", b"GET"), (b":authority", b"a:80"), (b":path", b"/")],
        [(b":method", b"CONNECT")],
        [(b":method", b"connect"), (b":authority", b"a:80")],
        [(b":method", b"CONNECT"), (b":authority", b"a:80"), (b":path", b"/")],
        [(b":method", b"CONNECT"), (b":authority", b"a:80"), (b":protocol", b"websocket")],
        [(b":method", b"CONNECT"), (b":authority", b"a:80"), (b":status", b"200")],
    ],
)
def test_what_is_no_request(pairs: list[tuple[bytes, bytes]]) -> None:
    with pytest.raises(Malformed) as caught:
        parse_request(pairs)
    assert caught.value.h2_code == 1


@pytest.mark.parametrize(
    "pairs",
    [
        [(b":method", b"GET"), (b":authority", b"a:80"), (b":path", b"/"), (b":scheme", b"http")],
        [(b":method", b"GET"), (b":path", b"/"), (b":scheme", b"http")],
        [(b":method", b"CONNECT"), (b":authority", b"")],
        [(b":method", b"CONNECT"), (b":authority", b"a")],
    ],
)
def test_what_is_no_connect(pairs: list[tuple[bytes, bytes]]) -> None:
    with pytest.raises(RemoteProtocolError) as caught:
        parse_request(pairs)
    assert not isinstance(caught.value, Malformed)
    assert caught.value.http_status == 400


def test_extra_headers_are_bounded() -> None:
    many = [(b"x-%d" % number, b"") for number in range(100)]
    head = parse_request([(b":method", b"CONNECT"), (b":authority", b"a:80"), *many])
    assert len(head.extra) == 32


@pytest.mark.parametrize(
    "response",
    [ConnectResponse(200, CART), ConnectResponse(503), ConnectResponse(200, None, (("x", "y"),))],
)
def test_responses(response: ConnectResponse) -> None:
    assert parse_response(encode_response(response)) == response


@pytest.mark.parametrize("status", [b"", b"20", b"2000", b"abc"])
def test_bad_statuses(status: bytes) -> None:
    with pytest.raises(RemoteProtocolError):
        parse_response([(b":status", status)])
    with pytest.raises(RemoteProtocolError):
        parse_response([(b":path", b"/"), (b":status", b"200")])


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        (["ambit.connection.id=ab12"], ("ab12", [])),
        (["a=b,ambit.connection.id=ab12"], ("ab12", ["a=b"])),
        (["a=b,ambit.connection.id=ab12,c=d", "e=f"], ("ab12", ["a=b,c=d", "e=f"])),
        (["ambit.connection.id=ab12,c=d"], ("ab12", ["c=d"])),
        (["xambit.connection.id=ab12"], ("", ["xambit.connection.id=ab12"])),
        (["ambit.connection.id=a b"], ("", [])),
        (["ambit.connection.id=" + "a" * 65], ("", [])),
        ([], ("", [])),
    ],
)
def test_taking_the_connection_id(headers: list[str], expected: tuple[str, list[str]]) -> None:
    assert take_connection_id(headers) == expected


def test_the_connection_id_travels_in_the_baggage() -> None:
    head = ConnectHead("10.0.0.1:80", baggage=CART, connection_id="ab12")
    pairs = encode_request(head)
    assert (b"baggage", f"{CART_TEXT},ambit.connection.id=ab12".encode()) in pairs
    assert parse_request(pairs) == head
    # Somebody who does not know the member sees the rest unchanged.
    assert parse_baggage([dict(pairs)[b"baggage"].decode()]) == CART
    alone = ConnectHead("10.0.0.1:80", connection_id="ab12")
    assert parse_request(encode_request(alone)).connection_id == "ab12"


@pytest.mark.parametrize("extra", [[], [(b"x-other", b"1")]])
def test_a_head_in_our_order_is_read_as_any_other(extra: list[tuple[bytes, bytes]]) -> None:
    pairs = [
        (b":method", b"CONNECT"),
        (b":authority", b"[FD00::1]:80"),
        (b"baggage", b"k8s.namespace.name=shop,ambit.connection.id=c1"),
        (b"forwarded", b'for="10.0.0.1:5";host=Web.Shop'),
        (b"traceparent", b"00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"),
    ]
    head = parse_request([*pairs, *extra])
    assert head.authority == "[fd00::1]:80"
    assert head.baggage == Baggage(namespace="shop")
    assert head.connection_id == "c1"
    assert head.forwarded == Forwarded("10.0.0.1:5", "web.shop")
    assert head.traceparent == pairs[-1][1].decode()
    with pytest.raises(RemoteProtocolError):
        parse_request([(b":method", b"GET"), *pairs[1:]])
    with pytest.raises(RemoteProtocolError):
        parse_request([pairs[0], (b":authority", b"nowhere"), *pairs[2:]])
