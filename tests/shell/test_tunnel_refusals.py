"""Requests that are no tunnels, sent by hand over mTLS: what breaks HTTP is told by its own code,
what is good HTTP is answered, and what comes after the answer is judged until its end.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator

import pytest
import trio

from mesh.http import h2_frames as h2
from tests.support.raw_http2 import GET, HELLO, RawPeer, get, head
from tests.support.tunnels import CLIENT_CONTEXT, Link, open_link

pytestmark = pytest.mark.usefixtures("no_fd_leak")

CONNECT = ((b":method", b"CONNECT"), (b":authority", b"10.0.0.1:80"))
OPEN = h2.END_HEADERS
# A stream whose end we know: what it says comes after what was asked before.
FENCE = head(3, [(b":method", b"GET")])

MALFORMED = {
    "no method": head(1, GET[1:]),
    "no scheme": head(1, [each for each in GET if each[0] != b":scheme"]),
    "no path": head(1, GET[:-1]),
    "an empty path": get(1, path=b""),
    "an unknown pseudo-header": head(1, [*GET, (b":test", b"x")]),
    "a response's pseudo-header": head(1, [*GET, (b":status", b"200")]),
    "a CONNECT with a path": head(1, [*CONNECT, (b":path", b"/")]),
    "an extended CONNECT": head(
        1, [*CONNECT, (b":protocol", b"websocket"), (b":path", b"/"), (b":scheme", b"http")]
    ),
    "a CONNECT without authority": head(1, CONNECT[:1]),
}
BROKEN_LATER = {
    "a second head": (get(1, flags=OPEN) + get(1, flags=OPEN), h2.PROTOCOL_ERROR),
    "pseudo-headers in trailers": (get(1, flags=OPEN) + head(1, GET[:1]), h2.PROTOCOL_ERROR),
    "less than was declared": (
        get(1, (b"content-length", b"5"), flags=OPEN)
        + h2.pack_frame(h2.DATA, h2.END_STREAM, 1, b"x"),
        h2.PROTOCOL_ERROR,
    ),
    "a window of nothing": (get(1, flags=OPEN) + h2.pack_window_update(1, 0), h2.PROTOCOL_ERROR),
    "a window beyond its end": (
        get(1, flags=OPEN) + h2.pack_window_update(1, h2.LARGEST_WINDOW),
        h2.FLOW_CONTROL_ERROR,
    ),
    "more than anybody reads": (
        get(1, flags=OPEN) + 5 * h2.pack_frame(h2.DATA, 0, 1, bytes(16384)),
        h2.NO_ERROR,
    ),
}
OVER = {
    "DATA after the end": get(1) + h2.pack_frame(h2.DATA, 0, 1, b"x"),
    "HEADERS after the end": get(1) + get(1),
    "DATA after a reset": get(1, flags=OPEN)
    + h2.pack_rst(1, h2.CANCEL)
    + h2.pack_frame(h2.DATA, 0, 1, b"x"),
}


@contextlib.asynccontextmanager
async def raw(link: Link) -> AsyncIterator[RawPeer]:
    """A connection to the server of `link`, by hand."""
    stream = await trio.open_tcp_stream(link.address.ip, link.address.port)
    tls = trio.SSLStream(stream, CLIENT_CONTEXT, https_compatible=True)
    try:
        await tls.do_handshake()
        peer = RawPeer(tls)
        await peer.send(HELLO)
        yield peer
    finally:
        await trio.aclose_forcefully(tls)


async def test_what_is_no_http_is_reset_and_not_answered() -> None:
    async with open_link(dial=False) as link:
        for name, frames in MALFORMED.items():
            async with raw(link) as peer:
                await peer.send(frames)
                heard = await peer.read(1)
                assert heard.resets == {1: h2.PROTOCOL_ERROR}, name
                assert not heard.heads, name


async def test_what_comes_after_the_answer_is_judged_until_its_end() -> None:
    async with open_link(dial=False) as link:
        for name, (frames, code) in BROKEN_LATER.items():
            async with raw(link) as peer:
                await peer.send(frames + FENCE)
                heard = await peer.read(3)
                assert heard.heads[1] == [{b":status": b"400"}], name
                assert heard.resets == {1: code, 3: h2.PROTOCOL_ERROR}, name
        for name, frames in OVER.items():
            async with raw(link) as peer:
                await peer.send(frames + FENCE)
                heard = await peer.read(3)
                assert h2.STREAM_CLOSED in {heard.goaway, heard.resets.get(1)}, name


async def test_a_good_request_is_answered_and_nothing_is_left_of_it() -> None:
    options = {"ping_seconds": 0.2}
    async with open_link(dial=False, server_options=options) as link, raw(link) as peer:
        declared = (b"content-length", b"1")
        body = h2.pack_frame(h2.DATA, h2.END_STREAM, 1, b"x")
        await peer.send(get(1, declared, flags=OPEN) + body + FENCE)
        heard = await peer.read(3)
        assert heard.heads[1] == [{b":status": b"400"}]
        assert 1 not in heard.resets
        # One that never ends is cut some seconds later: no stream is left for good.
        await peer.send(get(5, flags=OPEN))
        await peer.read(5)
        assert heard.heads[5] == [{b":status": b"400"}]
        heard.ended.discard(5)
        assert (await peer.read(5)).resets[5] == h2.NO_ERROR
        assert link.servers[0].tunnel_count == 0


async def test_a_request_that_never_ends_does_not_keep_a_connection_that_drains() -> None:
    async with open_link(dial=False) as link, raw(link) as peer:
        await peer.send(get(1, flags=OPEN))
        await peer.read(1)
        assert link.servers[0].tunnel_count == 1
        link.servers[0].goaway()
        assert link.servers[0].tunnel_count == 0
