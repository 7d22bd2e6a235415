"""Callers that break rules, through the whole daemon, while an honest one goes on."""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Callable

import pytest
import trio

from mesh.http import h2_frames as h2
from mesh.http.hpack_table import Pair
from mesh.model.l7_policy import (
    L7Authorization,
    L7Operation,
    L7Rule,
    L7Source,
    TrafficConfig,
)
from mesh.model.service import AppProtocol
from tests.support.raw_http2 import GET, HELLO, RawPeer, get, head
from tests.support.waypoints import (
    Mesh,
    fetch,
    key,
    running_app,
    running_waypoint,
    service,
    settle,
    traffic,
)

pytestmark = pytest.mark.usefixtures("no_fd_leak")

POST = ((b":method", b"POST"), *GET[1:])
# Each would be another request, or another reading, to an endpoint of HTTP/1.1.
MALFORMED: dict[str, bytes] = {
    "CRLF in a value": get(1, (b"x", b"a\r\nhost: evil\r\n\r\nGET /admin HTTP/1.1")),
    "LF in a value": get(1, (b"x", b"a\nb")),
    "NUL in a value": get(1, (b"x", b"a\0b")),
    "CRLF in a name": get(1, (b"x: y\r\nz", b"a")),
    "a colon in a name": get(1, (b"x:y", b"a")),
    "an upper-case name": get(1, (b"X", b"a")),
    "CRLF in the path": get(1, path=b"/ HTTP/1.1\r\nx: y"),
    "a blank in the path": get(1, path=b"/a b"),
    "a fragment": get(1, path=b"/a#b"),
    "a path without slash": get(1, path=b"admin"),
    "an empty path": get(1, path=b""),
    "GET *": get(1, path=b"*"),
    "CRLF in the method": get(1, method=b"GET / HTTP/1.1\r\nx: y\r\n\r\nGET"),
    "a blank in the method": get(1, method=b"GET /admin"),
    "CRLF in the authority": get(1, authority=b"web\r\nx: y"),
    "a user in the authority": get(1, authority=b"me@web"),
    "two ports": get(1, authority=b"web:80:81"),
    "a path in the authority": get(1, authority=b"web/admin"),
    "no authority": head(1, [GET[0], GET[1], GET[3]]),
    "another host": get(1, (b"host", b"other")),
    "two other hosts": head(
        1, [GET[0], GET[1], GET[3], (b"host", b"a"), (b"host", b"b")]
    ),
    "a scheme that is none": get(1, scheme=b"gopher"),
    "no scheme": head(1, [GET[0], GET[2], GET[3]]),
    "no method": head(1, GET[1:]),
    "a pseudo-header twice": head(1, [*GET, (b":path", b"/admin")]),
    "a pseudo-header behind others": head(1, [*GET[:3], (b"x", b"y"), GET[3]]),
    "an unknown pseudo-header": head(1, [(b":other", b"x"), *GET]),
    "a status": head(1, [(b":status", b"200"), *GET]),
    "transfer-encoding": head(1, [*POST, (b"transfer-encoding", b"chunked")]),
    "connection": get(1, (b"connection", b"close")),
    "keep-alive": get(1, (b"keep-alive", b"1")),
    "proxy-connection": get(1, (b"proxy-connection", b"close")),
    "upgrade": get(1, (b"upgrade", b"websocket")),
    "te": get(1, (b"te", b"gzip")),
    "CONNECT": head(1, [(b":method", b"CONNECT"), (b":authority", b"web:80")]),
    "extended CONNECT": head(
        1, [(b":method", b"CONNECT"), *GET[1:], (b":protocol", b"connect-udp")]
    ),
    "a WebSocket with a length": head(
        1, [(b":method", b"CONNECT"), *GET[1:], (b":protocol", b"websocket"),
            (b"content-length", b"3")], h2.END_HEADERS
    ),
    "a WebSocket without path": head(
        1, [(b":method", b"CONNECT"), *GET[1:3], (b":protocol", b"websocket")]
    ),
    "a :protocol without CONNECT": head(1, [*GET, (b":protocol", b"websocket")]),
    "two lengths": head(1, [*POST, (b"content-length", b"1"), (b"content-length", b"2")]),
    "a signed length": head(1, [*POST, (b"content-length", b"+1")]),
    "less than the length": head(1, [*POST, (b"content-length", b"5")]),
    "more than the length": head(1, [*POST, (b"content-length", b"1")], h2.END_HEADERS)
    + h2.pack_frame(h2.DATA, h2.END_STREAM, 1, b"abc"),
    "a length in disguise": head(1, [*POST, (b"content_length", b"5")]),
    "too many fields": get(1, *[(b"x%d" % number, b"y") for number in range(200)]),
    "a pseudo-header in trailers": head(1, POST, h2.END_HEADERS) + head(1, [(b":path", b"/x")]),
    "a second head": head(1, POST, h2.END_HEADERS) + head(1, POST, h2.END_HEADERS),
}  # fmt: skip
# Nobody broke a rule: an answer is all there is.
NOT_SERVED = frozenset(
    {
        "a scheme that is none",
        "CONNECT",
        "extended CONNECT",
        "a length in disguise",
        "too many fields",
    }
)


async def test_no_request_of_http2_becomes_two_of_http1() -> None:
    async with (
        running_app("web-1", key("web")) as app,
        running_waypoint([service("web", 1), app.workload]) as mesh,
    ):
        connection = await mesh.connect()
        for name, frames in MALFORMED.items():
            peer = RawPeer(await mesh.open("10.96.0.1:80", connection))
            await peer.send(HELLO + frames + get(3, path=b"/good"))
            heard = await peer.read(1, 3)
            status = heard.heads.get(1, [{}])[0].get(b":status", b"")
            is_served = name not in NOT_SERVED
            assert (heard.resets.get(1) == h2.PROTOCOL_ERROR) is is_served, name
            assert status[:1] in {b"4", b"5"} or (is_served and not status), name
            assert heard.heads[3][0][b":status"] == b"200", name
            assert heard.goaway is None, name
        # Only what is good, and what it got is what was asked.
        assert {each.target for each in app.requests} <= {b"/good", b"/"}
        assert len(app.bodies) == len(MALFORMED)
        assert all(b"evil" not in bytes(value) for r in app.requests for _, value in r.headers)


async def test_what_http2_says_reaches_http1_as_it_was_meant() -> None:
    cookies = ((b"cookie", b"a=1"), (b"cookie", b"b=2"), (b"te", b"trailers"))
    trailers: tuple[Pair, ...] = (
        (b"x-sum", b"1"), (b"content-length", b"9"), (b"authorization", b"me"),
        (b"x-forwarded-client-cert", b"root"),
    )  # fmt: skip
    async with (
        running_app("web-1", key("web")) as app,
        running_waypoint([service("web", 1), app.workload]) as mesh,
    ):
        peer = RawPeer(await mesh.open("10.96.0.1:80"))
        await peer.send(
            HELLO
            + head(1, [*POST, *cookies], h2.END_HEADERS)
            + h2.pack_frame(h2.DATA, 0, 1, b"abc")
            + head(1, trailers)
            + head(3, [(b":method", b"OPTIONS"), *GET[1:3], (b":path", b"*")])
            + get(5, (b"host", b"web.shop"))
        )
        heard = await peer.read(1, 3, 5)
        assert [heard.heads[i][0][b":status"] for i in (1, 3, 5)] == [b"200"] * 3
        post = next(each for each in app.requests if each.method == b"POST")
        fields = dict(post.headers)
        assert fields[b"cookie"] == b"a=1; b=2"
        assert fields[b"transfer-encoding"] == b"chunked"
        assert {b"authorization", b"x-forwarded-client-cert", b"content-length"}.isdisjoint(fields)
        assert b"abc" in app.bodies
        assert {each.target for each in app.requests} == {b"/", b"*"}


def bomb(stream_id: int) -> bytes:
    """16 KiB that unpack to 46 MiB."""
    entry = b"\x40\x01x\x7f\xa1\x1e" + b"v" * 4000
    return h2.pack_frame(h2.HEADERS, h2.END_HEADERS, stream_id, entry + b"\xbe" * 12_000)


FLOODS: dict[str, Callable[[int], bytes]] = {
    "rapid reset": lambda i: get(i) + h2.pack_rst(i, h2.CANCEL),
    "made you reset": lambda i: get(i, flags=h2.END_HEADERS) + h2.pack_window_update(i, 0),
    "malformed requests": lambda i: get(i, path=b"x"),
    "extended CONNECT of nothing": lambda i: get(i, (b":protocol", b"x")),
    "CONTINUATION": lambda i: get(1, flags=0) if i == 1 else h2.pack_frame(h2.CONTINUATION, 0, 1),
    "SETTINGS": lambda i: h2.pack_frame(h2.SETTINGS, 0, 0, struct.pack(">HI", 4, i)),
    "PING": lambda _: h2.pack_frame(h2.PING, 0, 0, bytes(8)),
    "empty DATA": lambda i: (
        (get(1, flags=h2.END_HEADERS) if i == 1 else b"") + h2.pack_frame(h2.DATA, 0, 1)
    ),
    "PRIORITY": lambda i: h2.pack_frame(h2.PRIORITY, 0, i, bytes(5)),
    "WINDOW_UPDATE": lambda _: h2.pack_window_update(0, 1),
    "streams beyond the limit": lambda i: get(i, flags=h2.END_HEADERS),
    "unknown frames": lambda _: h2.pack_frame(99, 0, 0, b"?" * 100),
    "HPACK bomb": bomb,
}


async def test_floods_inside_a_tunnel_end_that_tunnel_only() -> None:
    async with (
        running_app("web-1", key("web")) as app,
        running_waypoint([service("web", 1), app.workload]) as mesh,
    ):
        connection = await mesh.connect()
        honest = await mesh.open("10.96.0.1:80", connection)
        for name, frame in FLOODS.items():
            peer = RawPeer(await mesh.open("10.96.0.1:80", connection))

            async def pour(peer: RawPeer = peer, frame: Callable[[int], bytes] = frame) -> None:
                await peer.send(HELLO)
                for start in range(0, 5000, 50):
                    if peer.is_gone:
                        return
                    await peer.send(b"".join(frame(2 * i + 1) for i in range(start, start + 50)))

            async with trio.open_nursery() as nursery:
                nursery.start_soon(pour)
                heard = await peer.read()
            assert heard.goaway == h2.ENHANCE_YOUR_CALM, name
            assert (await fetch(honest))[0].status_code == 200, name


# h2spec's kind of errors: what is sent after the hello, and how the connection or stream 1 ends.
BROKEN: dict[str, tuple[bytes, int]] = {
    "DATA on stream 0": (h2.pack_frame(h2.DATA, 0, 0, b"x"), h2.PROTOCOL_ERROR),
    "DATA on an idle stream": (h2.pack_frame(h2.DATA, 0, 1, b"x"), h2.PROTOCOL_ERROR),
    "HEADERS on stream 0": (get(0), h2.PROTOCOL_ERROR),
    "HEADERS on an even stream": (get(2), h2.PROTOCOL_ERROR),
    "RST_STREAM on an idle stream": (h2.pack_rst(1, 0), h2.PROTOCOL_ERROR),
    "RST_STREAM of 3 bytes": (
        get(1) + h2.pack_frame(h2.RST_STREAM, 0, 1, bytes(3)), h2.FRAME_SIZE_ERROR),
    "WINDOW_UPDATE of 3 bytes": (h2.pack_frame(h2.WINDOW_UPDATE, 0, 0, bytes(3)),
                                 h2.FRAME_SIZE_ERROR),
    "WINDOW_UPDATE of nothing": (h2.pack_window_update(0, 0), h2.PROTOCOL_ERROR),
    "a window beyond its end": (h2.pack_window_update(0, h2.LARGEST_WINDOW),
                                h2.FLOW_CONTROL_ERROR),
    "PING on a stream": (h2.pack_frame(h2.PING, 0, 1, bytes(8)), h2.PROTOCOL_ERROR),
    "PING of 7 bytes": (h2.pack_frame(h2.PING, 0, 0, bytes(7)), h2.FRAME_SIZE_ERROR),
    "SETTINGS on a stream": (h2.pack_frame(h2.SETTINGS, 0, 1), h2.PROTOCOL_ERROR),
    "SETTINGS of 5 bytes": (h2.pack_frame(h2.SETTINGS, 0, 0, bytes(5)), h2.FRAME_SIZE_ERROR),
    "SETTINGS with a wide window": (
        h2.pack_frame(h2.SETTINGS, 0, 0, struct.pack(">HI", 4, 1 << 31)), h2.FLOW_CONTROL_ERROR),
    "SETTINGS with a small frame": (
        h2.pack_frame(h2.SETTINGS, 0, 0, struct.pack(">HI", 5, 100)), h2.PROTOCOL_ERROR),
    "an acknowledgement with content": (h2.pack_frame(h2.SETTINGS, h2.ACK, 0, bytes(6)),
                                        h2.FRAME_SIZE_ERROR),
    "PUSH_PROMISE": (get(1) + h2.pack_frame(h2.PUSH_PROMISE, 4, 1, bytes(4)), h2.PROTOCOL_ERROR),
    "CONTINUATION of nothing": (h2.pack_frame(h2.CONTINUATION, 4, 1, b""), h2.PROTOCOL_ERROR),
    "another frame in a block": (
        get(1, flags=0) + h2.pack_frame(h2.PING, 0, 0, bytes(8)), h2.PROTOCOL_ERROR),
    "another stream in a block": (
        get(1, flags=0) + h2.pack_frame(h2.CONTINUATION, 4, 3, b""), h2.PROTOCOL_ERROR),
    "more padding than payload": (
        get(1, flags=h2.END_HEADERS) + h2.pack_frame(h2.DATA, h2.PADDED, 1, b"\x05abc"),
        h2.PROTOCOL_ERROR),
    "a block that cannot be decoded": (h2.pack_frame(h2.HEADERS, 5, 1, b"\xff\xff\xff\xff"),
                                       h2.COMPRESSION_ERROR),
    "a stream that depends on itself": (h2.pack_frame(h2.PRIORITY, 0, 1, b"\0\0\0\x01\0"),
                                        h2.PROTOCOL_ERROR),
    "a frame beyond the limit": (b"\xff\xff\xff\x00\x00\x00\x00\x00\x01", h2.FRAME_SIZE_ERROR),
    "HEADERS on a stream that was passed over": (get(5) + get(3), h2.STREAM_CLOSED),
    "GOAWAY on a stream": (h2.pack_frame(h2.GOAWAY, 0, 1, bytes(8)), h2.PROTOCOL_ERROR),
}  # fmt: skip


async def test_broken_connections_are_told_why() -> None:
    async with (
        running_app("web-1", key("web")) as app,
        running_waypoint([service("web", 1), app.workload]) as mesh,
    ):
        connection = await mesh.connect()
        for name, (frames, code) in BROKEN.items():
            peer = RawPeer(await mesh.open("10.96.0.1:80", connection))
            await peer.send(HELLO + frames)
            assert (await peer.read()).goaway == code, name
        peer = RawPeer(await mesh.open("10.96.0.1:80", connection))
        await peer.send(h2.PREFACE + get(1))
        assert (await peer.read()).goaway == h2.PROTOCOL_ERROR


async def test_a_wrong_preface_on_a_port_of_http2_is_not_answered_in_http1() -> None:
    async with (
        running_app("web-1", key("web"), key("old")) as app,
        running_waypoint(
            [service("web", 1, protocol=AppProtocol.HTTP2), service("old", 2), app.workload]
        ) as mesh,
    ):
        nonsense = b"INVALID CONNECTION PREFACE\r\n\r\n"
        assert await _is_refused(mesh, "10.96.0.1:80", nonsense)
        stream = await mesh.open("10.96.0.2:80")
        await stream.send_all(nonsense)
        assert (await settle(stream, b"\n")).startswith(b"HTTP/1.1 400")
        # Who asks in HTTP/1.1 is answered there all the same.
        stream = await mesh.open("10.96.0.1:80")
        await stream.send_all(b"GET /a#b HTTP/1.1\r\nhost: web\r\n\r\n")
        assert (await settle(stream, b"\n")).startswith(b"HTTP/1.1 400")


async def _is_refused(mesh: Mesh, authority: str, hello: bytes, **who: str) -> bool:
    stream = await mesh.open(authority, **who)
    try:
        await stream.send_all(hello)
        return await settle(stream, b"\n") == b""
    except trio.BrokenResourceError:
        return True


async def test_policy_holds_for_connections_that_are_not_http() -> None:
    async def answer(stream: trio.SocketStream) -> None:
        async with stream:
            await settle(stream, b"\n")
            await stream.send_all(b"hello\n")

    only_cart = L7Rule(sources=(L7Source(service_accounts=("shop/cart",)),))
    no_admin = L7Rule(operations=(L7Operation(paths=("/admin*",)),))
    async with (
        running_app("db-1", key("db"), key("raw"), serve=answer) as app,
        running_waypoint(
            [
                service("db", 1, protocol=AppProtocol.TCP),
                service("raw", 2, protocol=AppProtocol.UNKNOWN),
                app.workload,
                traffic(
                    "db", authorizations=(L7Authorization("shop", "a", "ALLOW", (only_cart,)),)
                ),
                traffic("raw", authorizations=(L7Authorization("shop", "d", "DENY", (no_admin,)),)),
            ]
        ) as mesh,
    ):
        assert not await _is_refused(mesh, "10.96.0.1:80", b"\x01\n")
        thief = "spiffe://cluster.local/ns/shop/sa/thief"
        assert await _is_refused(mesh, "10.96.0.1:80", b"\x01\n", identity=thief)
        # What does not look like HTTP to us may to the endpoint: paths cannot be judged there.
        for hello in (b"\r\nGET /admin HTTP/1.1\r\n\r\n", b"\x01\n", b"get /admin\n"):
            assert await _is_refused(mesh, "10.96.0.2:80", hello)


async def test_open_connections_are_cut_when_policy_refuses_them_at_last() -> None:
    async def chat(stream: trio.SocketStream) -> None:
        with contextlib.suppress(trio.BrokenResourceError):
            async with stream:
                while piece := await stream.receive_some(100):
                    await stream.send_all(piece)

    def allowing(account: str) -> TrafficConfig:
        rule = L7Rule(sources=(L7Source(service_accounts=(account,)),))
        return traffic("db", authorizations=(L7Authorization("shop", "a", "ALLOW", (rule,)),))

    async with (
        running_app("db-1", key("db"), serve=chat) as app,
        running_waypoint(
            [service("db", 1, protocol=AppProtocol.TCP), app.workload, allowing("shop/cart")]
        ) as mesh,
    ):
        stream = await mesh.open("10.96.0.1:80")
        await stream.send_all(b"one\n")
        assert await settle(stream, b"\n") == b"one\n"
        await mesh.control_plane.push(allowing("shop/other"))
        with pytest.raises(trio.BrokenResourceError):
            assert await settle(stream, b"never") == b""
