"""The HTTP/2 server of the control plane on loopback: TLS, limits, floods beside honest clients."""

from __future__ import annotations

import contextlib
import ssl
from collections.abc import AsyncIterator
from functools import partial
from typing import Any

import hpack
import pytest
import trio
import trustme

from mesh.errors import IdentityError, MeshError, RemoteProtocolError, Unavailable
from mesh.http import h2_frames as frames
from mesh.http.client import open_connection
from mesh.http.driver import Connection, Timing
from mesh.http.server import ServerSettings, serve_http2
from mesh.http.stream import Stream
from mesh.sockets import SocketAddress, open_listener

pytestmark = pytest.mark.usefixtures("no_fd_leak")

REQUEST = [(":method", "POST"), (":scheme", "http"), (":path", "/a"), (":authority", "x")]
RESPONSE = [(":status", "200")]


async def answer(stream: Stream) -> None:
    while await stream.receive():
        pass
    await stream.send_headers(RESPONSE, end_stream=True)


@contextlib.asynccontextmanager
async def serving(
    context: ssl.SSLContext | None = None, **kwargs: Any
) -> AsyncIterator[tuple[SocketAddress, list[MeshError]]]:
    failures: list[MeshError] = []
    listener = open_listener(0, host="127.0.0.1")
    kwargs.setdefault("on_failure", lambda peer, failure: failures.append(failure))
    async with trio.open_nursery() as nursery:
        serve = partial(serve_http2, listener, context, answer, **kwargs)
        yield await nursery.start(serve), failures
        nursery.cancel_scope.cancel()


async def reported(failures: list[MeshError], count: int = 1) -> MeshError:
    """The last of `count` failures: they are told when all is closed, after the peer saw it."""
    with trio.fail_after(30):
        while len(failures) < count:
            await trio.sleep(0.01)
    assert len(failures) == count
    return failures[-1]


async def ask(connection: Connection) -> None:
    with trio.fail_after(30):
        stream = await connection.open_stream(REQUEST)
        await stream.send(b"x" * 1000, end_stream=True)
        assert await stream.wait_headers() == tuple(RESPONSE)
        stream.finish()


async def read_goaway(stream: trio.SocketStream) -> int:
    """The error code of the GOAWAY with which the server ended the connection."""
    data = bytearray()
    with trio.fail_after(30):
        while more := await stream.receive_some(65536):
            data += more
    code = None
    while len(data) >= 9:
        high, low, kind, _, _ = frames.HEADER.unpack_from(data)
        length = high << 8 | low
        if kind == frames.GOAWAY:
            code = int.from_bytes(data[13:17], "big")
        del data[: 9 + length]
    assert code is not None
    return code


def rapid_reset() -> bytes:
    block = bytes(hpack.Encoder().encode(REQUEST))
    return b"".join(
        frames.pack_headers(stream_id, block, end_stream=False, max_frame=16384)
        + frames.pack_rst(stream_id, frames.CANCEL)
        for stream_id in range(1, 10_001, 2)
    )


FLOODS = {
    "rapid reset": rapid_reset(),
    "ping": frames.pack_frame(frames.PING, 0, 0, b"12345678") * 5000,
    "settings": frames.pack_frame(frames.SETTINGS, 0, 0) * 5000,
}


@pytest.mark.parametrize("flood", FLOODS.values(), ids=FLOODS.keys())
async def test_a_flood_ends_its_own_connection_only(flood):
    async with (
        serving() as (address, failures),
        open_connection(*address, None) as honest,
    ):
        await ask(honest)
        attacker = await trio.open_tcp_stream(*address)
        async with attacker:
            await attacker.send_all(frames.PREFACE + frames.pack_frame(frames.SETTINGS, 0, 0))
            # The server may end the connection while the flood is still on its way.
            with contextlib.suppress(trio.BrokenResourceError):
                await attacker.send_all(flood)
            assert await read_goaway(attacker) == frames.ENHANCE_YOUR_CALM
        await ask(honest)
        async with open_connection(*address, None) as other:
            await ask(other)
        assert isinstance(await reported(failures), RemoteProtocolError)


async def test_a_flood_whose_answers_nobody_reads():
    async with serving() as (address, failures):
        attacker = await trio.open_tcp_stream(*address)
        async with attacker:
            await attacker.send_all(frames.PREFACE + frames.pack_frame(frames.SETTINGS, 0, 0))
            ping = frames.pack_frame(frames.PING, 0, 0, b"12345678") * 100
            with pytest.raises(trio.BrokenResourceError):  # noqa: PT012
                with trio.fail_after(30):
                    while True:
                        await attacker.send_all(ping)
        await reported(failures)
        async with open_connection(*address, None) as other:
            await ask(other)


async def test_no_more_connections_than_allowed():
    async with serving(settings=ServerSettings(max_connections=1)) as (address, _):
        async with open_connection(*address, None) as first:
            await ask(first)
            with pytest.raises(Unavailable):
                async with open_connection(*address, None):
                    pass
            await ask(first)
        with trio.fail_after(30):
            while True:
                try:
                    async with open_connection(*address, None) as second:
                        await ask(second)
                        break
                except Unavailable:
                    await trio.sleep(0.01)


async def test_something_else_than_http2():
    async with serving() as (address, failures):
        stream = await trio.open_tcp_stream(*address)
        async with stream:
            await stream.send_all(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
            assert await read_goaway(stream) == frames.PROTOCOL_ERROR
        assert isinstance(await reported(failures), RemoteProtocolError)


async def test_the_callers_error_comes_out_as_it_is():
    async with serving() as (address, _):
        with pytest.raises(ZeroDivisionError) as caught:
            async with open_connection(*address, None):
                raise ZeroDivisionError
        assert caught.value.__cause__ is None
        with trio.move_on_after(0.05) as patience:
            async with open_connection(*address, None):
                await trio.sleep_forever()
        assert patience.cancelled_caught


async def test_cancellation_wins_over_a_failure_but_not_over_a_bug():
    async with serving() as (address, _):
        with trio.CancelScope() as scope:
            async with open_connection(*address, None):
                scope.cancel()
                raise Unavailable("lost")
        assert scope.cancelled_caught
        with pytest.RaisesGroup(ZeroDivisionError), trio.CancelScope() as scope:
            async with open_connection(*address, None):
                scope.cancel()
                raise ZeroDivisionError


async def test_dialling_a_server_of_something_else():
    async def http1(stream: trio.SocketStream) -> None:
        async with stream:
            await stream.send_all(b"HTTP/1.1 400 Bad Request\r\n\r\n")

    async with trio.open_nursery() as nursery:
        (listener,) = await nursery.start(partial(trio.serve_tcp, http1, 0, host="127.0.0.1"))
        address = listener.socket.getsockname()
        with pytest.raises((RemoteProtocolError, Unavailable)):
            async with open_connection(*address, None):
                pass
        nursery.cancel_scope.cancel()


async def test_a_name_that_does_not_resolve():
    with pytest.raises(Unavailable, match="does not resolve"):
        async with open_connection("nobody.invalid", 1, None, connect_timeout=20):
            pass


# ---- TLS


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


def contexts(authority: trustme.CA, *, alpn: str = "h2") -> tuple[ssl.SSLContext, ssl.SSLContext]:
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("localhost").configure_cert(server)
    server.set_alpn_protocols(["h2"])
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    authority.configure_trust(client)
    client.set_alpn_protocols([alpn])
    return server, client


async def test_tls_with_alpn(authority):
    server, client = contexts(authority)
    async with (
        serving(server) as (address, failures),
        open_connection(*address, client, "localhost") as connection,
    ):
        await ask(connection)
        assert connection.peer_certificate is not None
        assert not failures


async def test_without_h2_in_alpn(authority):
    server, client = contexts(authority, alpn="http/1.1")
    async with serving(server) as (address, failures):
        with pytest.raises(RemoteProtocolError, match="ALPN"):
            async with open_connection(*address, client, "localhost"):
                pass
        assert "ALPN" in str(await reported(failures))


async def test_a_client_that_never_speaks_tls(authority):
    server, _ = contexts(authority)
    settings = ServerSettings(handshake_seconds=0.2)
    async with serving(server, settings=settings) as (address, failures):
        stream = await trio.open_tcp_stream(*address)
        async with stream:
            with trio.fail_after(30):
                assert await stream.receive_some(100) == b""
        assert "too long" in str(await reported(failures))
        stream = await trio.open_tcp_stream(*address)
        async with stream:
            await stream.send_all(b"GET / HTTP/1.1\r\n\r\n")
            with contextlib.suppress(trio.BrokenResourceError), trio.fail_after(30):
                while await stream.receive_some(100):
                    pass
        assert isinstance(await reported(failures, 2), IdentityError)


async def test_a_client_that_speaks_tls_and_then_nothing(authority):
    server, client = contexts(authority)
    settings = ServerSettings(timing=Timing(settings_seconds=0.2))
    async with serving(server, settings=settings) as (address, failures):
        transport = await trio.open_tcp_stream(*address)
        stream = trio.SSLStream(
            transport, client, server_hostname="localhost", https_compatible=True
        )
        async with stream:
            await stream.do_handshake()
            with trio.fail_after(30):
                while await stream.receive_some(1000):
                    pass
        assert "no SETTINGS" in str(await reported(failures))


# ---- drain


async def test_drain_closes_the_listener_and_idle_connections():
    drain = trio.Event()
    listener = open_listener(0, host="127.0.0.1")
    async with trio.open_nursery() as nursery:
        address = await nursery.start(partial(serve_http2, listener, None, answer, drain=drain))
        async with open_connection(*address, None) as connection:
            await ask(connection)
            drain.set()
            with trio.fail_after(30):
                await connection.closed.wait()
        with pytest.raises(Unavailable, match="refused"):
            async with open_connection(*address, None):
                pass
