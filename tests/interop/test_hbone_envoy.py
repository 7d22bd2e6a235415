"""HBONE with a real Envoy on the other end, both ways: bytes, ends, refusals."""

from __future__ import annotations

import contextlib
import hashlib
import socket
from pathlib import Path

import pytest
import trio

from mesh.hbone.connection import Tunnel
from mesh.hbone.head import Baggage, ConnectHead
from mesh.sockets import SocketAddress
from tests.support.envoy import free_port, running_envoy, terminating_server, tunnelling_client
from tests.support.tunnels import CLIENT, SERVER, Link, open_link, tcp_pair

pytestmark = [pytest.mark.interop, pytest.mark.usefixtures("no_fd_leak")]

SIZE = 3_000_001


async def _echo_backwards(stream: trio.SocketStream) -> None:
    """Reads everything, then answers its digest and as many bytes again."""
    async with stream:
        digest = hashlib.sha1()
        total = 0
        while data := await stream.receive_some(1 << 16):
            digest.update(data)
            total += len(data)
        await stream.send_all(digest.digest() + bytes(total))


async def _exchange(stream: trio.abc.Stream, seed: int) -> None:
    data = hashlib.sha1(bytes((seed,))).digest() * (SIZE // 20)
    async with stream:
        view = memoryview(data)
        for step in range(1, 1 << 30):
            if not view:
                break
            count = (step * 7919) % 200_000 + 1
            await stream.send_all(view[:count])
            view = view[count:]
        assert isinstance(stream, trio.SocketStream)
        await stream.send_eof()
        answer = bytearray()
        while got := await stream.receive_some(1 << 16):
            answer += got
    assert answer[:20] == hashlib.sha1(data).digest()
    assert len(answer) == 20 + len(data)


async def _pingpong(stream: trio.SocketStream) -> None:
    for number in range(50):
        await stream.send_all(b"ping%03d" % number)
        got = b""
        while len(got) < 7:
            got += await stream.receive_some(100)
        assert got == b"ping%03d" % number


async def _echo(stream: trio.SocketStream) -> None:
    async with stream:
        while data := await stream.receive_some(1 << 16):
            await stream.send_all(data)


async def test_envoy_tunnels_to_us(tmp_path: Path) -> None:
    def accept(link: Link, tunnel: Tunnel) -> None:
        link.tunnels.append(tunnel)
        app, proxy = tcp_pair()
        link.nursery.start_soon(handler, trio.SocketStream(trio.socket.from_stdlib_socket(app)))
        tunnel.respond(200, baggage=Baggage(namespace="shop"))
        tunnel.relay(proxy)

    CLIENT.write(tmp_path, "client")
    async with open_link(on_tunnel=accept, dial=False) as link:
        port = free_port()
        config = tunnelling_client(tmp_path, "client", port, link.address.port, "10.0.0.1:80")
        handler = _echo_backwards
        async with running_envoy(tmp_path, config, port):
            await trio.sleep(0.2)
            link.tunnels.clear()
            with trio.fail_after(60):
                async with trio.open_nursery() as nursery:
                    for seed in range(6):
                        stream = await trio.open_tcp_stream("127.0.0.1", port)
                        nursery.start_soon(_exchange, stream, seed)
                for tunnel in link.tunnels:
                    assert (await tunnel.wait_closed()).error is None
                handler = _echo
                stream = await trio.open_tcp_stream("127.0.0.1", port)
                await _pingpong(stream)
                await stream.aclose()
            head = link.tunnels[0].head
            assert head.authority == "10.0.0.1:80"
            assert head.baggage == Baggage(
                namespace="shop", workload_type="pod", workload_name="envoy"
            )
            assert {str(server.peer) for server in link.servers} == {str(CLIENT.identity)}


async def test_a_refusal_and_a_reset_of_ours_reach_envoys_client(tmp_path: Path) -> None:
    def refuse(link: Link, tunnel: Tunnel) -> None:
        link.tunnels.append(tunnel)
        if len(link.tunnels) % 2:
            tunnel.refuse(401)
        else:
            tunnel.respond(200)
            tunnel.reset(reason="cut")

    CLIENT.write(tmp_path, "client")
    async with open_link(on_tunnel=refuse, dial=False) as link:
        port = free_port()
        config = tunnelling_client(tmp_path, "client", port, link.address.port, "10.0.0.1:80")
        async with running_envoy(tmp_path, config, port):
            for _ in range(4):
                # The end may even arrive before the connect call has returned.
                with trio.fail_after(30), contextlib.suppress(trio.BrokenResourceError, OSError):
                    stream = await trio.open_tcp_stream("127.0.0.1", port)
                    async with stream:
                        assert await stream.receive_some(1) == b""
            assert len(link.tunnels) >= 4


async def test_we_tunnel_to_envoy(tmp_path: Path) -> None:
    SERVER.write(tmp_path, "server")
    async with open_link(dial=False) as link:
        backend = await trio.open_tcp_listeners(0, host="127.0.0.1")
        backend_port = backend[0].socket.getsockname()[1]
        link.nursery.start_soon(trio.serve_listeners, _echo_backwards, backend)
        port = free_port()
        config = terminating_server(tmp_path, "server", port, backend_port)
        async with running_envoy(tmp_path, config, port):
            link.address = SocketAddress("127.0.0.1", port)
            connection = await link.dial()
            assert connection.core.peer_max_frame == 16384

            async def one(seed: int) -> None:
                tunnel = connection.open_tunnel(
                    ConnectHead(f"127.0.0.1:{backend_port}", baggage=Baggage(namespace="shop"))
                )
                assert (await tunnel.wait_response()).status == 200
                app, proxy = tcp_pair()
                tunnel.relay(proxy)
                await _exchange(trio.SocketStream(trio.socket.from_stdlib_socket(app)), seed)
                result = await tunnel.wait_closed()
                assert result.error is None
                assert result.bytes_from_tunnel == result.bytes_to_tunnel + 20

            with trio.fail_after(60):
                async with trio.open_nursery() as nursery:
                    for seed in range(6):
                        nursery.start_soon(one, seed)
                # One connection for all, and a goaway that Envoy understands.
                assert connection.tunnel_count == 0
                connection.goaway()
                await connection.wait_closed()
            assert connection.failure is None


async def test_envoy_without_a_destination_refuses(tmp_path: Path) -> None:
    SERVER.write(tmp_path, "server")
    async with open_link(dial=False) as link:
        port = free_port()
        async with running_envoy(
            tmp_path, terminating_server(tmp_path, "server", port, free_port()), port
        ):
            link.address = SocketAddress("127.0.0.1", port)
            connection = await link.dial()
            tunnel = connection.open_tunnel(ConnectHead("127.0.0.1:1"))
            with trio.fail_after(30):
                assert (await tunnel.wait_response()).status == 503
            assert tunnel.is_closed
            assert connection.is_usable
            connection.close()


async def test_the_death_of_envoy_resets_the_application(tmp_path: Path) -> None:
    SERVER.write(tmp_path, "server")
    async with open_link(dial=False) as link:
        backend = await trio.open_tcp_listeners(0, host="127.0.0.1")
        backend_port = backend[0].socket.getsockname()[1]
        link.nursery.start_soon(trio.serve_listeners, _echo, backend)
        port = free_port()
        config = terminating_server(tmp_path, "server", port, backend_port)
        app: socket.socket
        async with running_envoy(tmp_path, config, port):
            link.address = SocketAddress("127.0.0.1", port)
            connection = await link.dial()
            tunnel = connection.open_tunnel(ConnectHead("127.0.0.1:1"))
            assert (await tunnel.wait_response()).status == 200
            app, proxy = tcp_pair()
            tunnel.relay(proxy)
            stream = link.application(app)
            await _pingpong(stream)
        with trio.fail_after(30):
            with pytest.raises(trio.BrokenResourceError):
                await stream.receive_some(1)
            assert (await tunnel.wait_closed()).error
