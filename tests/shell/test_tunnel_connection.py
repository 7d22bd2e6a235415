"""TunnelConnection under trio: identities, keepalive, GOAWAY, drain, abuse, cancellation."""

from __future__ import annotations

import socket
import ssl

import pytest
import trio

from mesh.errors import IdentityError, MeshError, Unavailable
from mesh.hbone.connection import Tunnel, TunnelConnection
from mesh.hbone.head import Baggage, ConnectHead
from mesh.http import h2_frames as h2
from mesh.identity import SpiffeId
from mesh.sockets import SocketAddress
from mesh.tls.context import client_context, server_context, verify_server_peer
from mesh.tls.session import handshake
from tests.support.certs import make_ca
from tests.support.tunnels import CA, CLIENT_CONTEXT, SERVER, Link, open_link, tcp_pair

pytestmark = pytest.mark.usefixtures("no_fd_leak")

HEAD = ConnectHead("10.0.0.1:80")
OTHER = SpiffeId("cluster.local", "shop", "other")


def _socket() -> socket.socket:
    return socket.socket(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)


async def _connect(
    link: Link, context: ssl.SSLContext = CLIENT_CONTEXT, expected: SpiffeId = SERVER.identity
) -> TunnelConnection:
    return await TunnelConnection.connect(
        link.reactor,
        _socket(),
        link.address,
        context,
        verify=lambda der: verify_server_peer(der, frozenset({expected})),
        handshake_timeout=5,
    )


async def test_heads_and_identities_arrive() -> None:
    def accept(link: Link, tunnel: Tunnel) -> None:
        link.tunnels.append(tunnel)
        tunnel.respond(200, baggage=Baggage(namespace="shop", workload_name="web"))

    async with open_link(on_tunnel=accept) as link:
        head = ConnectHead(
            "web.shop.svc.cluster.local:80",
            baggage=Baggage(cluster="Kubernetes", namespace="shop", workload_name="cart"),
            traceparent=f"00-{'1' * 32}-{'2' * 16}-00",
            extra=(("x-istio-source", "waypoint"),),
        )
        tunnel = link.client.open_tunnel(head)
        response = await tunnel.wait_response()
        assert response.status == 200
        assert response.baggage == Baggage(
            namespace="shop", workload_type="pod", workload_name="web"
        )
        seen = link.tunnels[0].head
        assert seen.authority == head.authority
        assert seen.traceparent == head.traceparent
        assert seen.header("x-istio-source") == "waypoint"
        assert seen.baggage is not None
        assert seen.baggage.workload_name == "cart"
        assert str(link.servers[0].peer) == "spiffe://cluster.local/ns/shop/sa/cart"
        assert link.client.peer == SERVER.identity
        assert link.servers[0].peer_address.ip == "127.0.0.1"
        tunnel.reset()


async def test_a_server_with_another_identity_is_refused() -> None:
    async with open_link(dial=False) as link:
        with pytest.raises(IdentityError, match=r"expected .*other"):
            await _connect(link, expected=OTHER)


async def test_a_client_whose_certificate_the_server_refuses_fails_at_connect() -> None:
    """In TLS 1.3 the client is done before the server judges; waiting for SETTINGS tells."""
    foreign = make_ca("foreign").issue(OTHER)
    context = client_context(foreign.certificate())
    context.load_verify_locations(cadata=CA.pem.decode())
    listener = socket.create_server(("127.0.0.1", 0))
    listener.setblocking(False)
    async with open_link(dial=False) as link, trio.open_nursery() as nursery:
        link.address = SocketAddress("127.0.0.1", listener.getsockname()[1])

        async def refuse() -> None:
            await trio.lowlevel.wait_readable(listener)
            sock, _ = listener.accept()
            sock.setblocking(False)
            with pytest.raises(IdentityError, match="not trusted"):
                await handshake(
                    sock, server_context(SERVER.certificate()), server_side=True, timeout=5
                )

        nursery.start_soon(refuse)
        with pytest.raises(IdentityError, match="refused the TLS handshake"):
            await _connect(link, context)
    listener.close()


async def test_a_server_of_another_root_is_refused() -> None:
    foreign = make_ca("foreign").issue(OTHER)
    async with open_link(dial=False) as link:
        caught: list[MeshError] = []

        async def serve() -> None:
            try:
                a, b = tcp_pair()
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(_swallow, a, caught)
                    with pytest.raises(IdentityError, match="not trusted"):
                        await handshake(
                            b, client_context(foreign.certificate()), server_side=False, timeout=5
                        )
            finally:
                a.close()

        await serve()
        assert link.servers == []
        assert isinstance(caught[0], IdentityError)


async def _swallow(sock: socket.socket, caught: list[MeshError]) -> None:
    try:
        await handshake(sock, server_context(SERVER.certificate()), server_side=True, timeout=5)
    except MeshError as exc:
        caught.append(exc)


@pytest.mark.parametrize("garbage", [b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01\xff\xff"])
async def test_garbage_instead_of_tls_ends_the_handshake(garbage: bytes) -> None:
    a, b = tcp_pair()
    a.send(garbage)
    a.shutdown(socket.SHUT_WR)
    with pytest.raises(MeshError):
        await handshake(b, server_context(SERVER.certificate()), server_side=True, timeout=5)
    assert b.fileno() == -1
    a.close()


async def test_a_silent_peer_does_not_hold_a_handshake() -> None:
    a, b = tcp_pair()
    with pytest.raises(Unavailable, match=r"within 0\.05 s"):
        await handshake(b, server_context(SERVER.certificate()), server_side=True, timeout=0.05)
    assert b.fileno() == -1
    a.close()


async def test_cancelling_a_handshake_closes_the_socket() -> None:
    a, b = tcp_pair()
    with trio.move_on_after(0.02):
        await handshake(b, server_context(SERVER.certificate()), server_side=True, timeout=5)
    assert b.fileno() == -1
    a.close()


async def test_nobody_listening_is_unavailable() -> None:
    async with open_link(dial=False) as link:
        with socket.create_server(("127.0.0.1", 0)) as gone:
            link.address = SocketAddress("127.0.0.1", gone.getsockname()[1])
        with pytest.raises(Unavailable, match="Connection refused"):
            await _connect(link)


async def test_keepalive_notices_a_silent_peer() -> None:
    async with open_link(dial=False) as link:
        client = await link.dial(ping_seconds=0.05, ping_timeout_seconds=1.0)
        link.client = client
        with trio.fail_after(30):
            while client._reads < 5:  # answered pings keep it alive
                await trio.sleep(0.01)
        assert client.is_usable
        near, _, tunnel, _ = await link.pipe()
        link.reactor.mute(link.servers[0]._fd)
        with trio.fail_after(30):
            await client.wait_closed()
            assert "no sign of life" in str(client.failure)
            assert (await tunnel.wait_closed()).error == client.failure
            with pytest.raises(trio.BrokenResourceError):
                await near.receive_some(1)


async def test_goaway_of_the_server_lets_tunnels_finish_then_closes_in_order() -> None:
    async with open_link() as link:
        near, far, tunnel, served = await link.pipe()
        server = link.servers[0]
        server.goaway()
        with trio.fail_after(30):
            while link.client.is_usable:
                await trio.sleep(0.01)
        with pytest.raises(Unavailable):
            link.client.open_tunnel(HEAD)
        await near.send_all(b"still here")
        assert await far.receive_some(100) == b"still here"
        await near.send_eof()
        await far.send_eof()
        with trio.fail_after(30):
            assert (await tunnel.wait_closed()).error is None
            assert (await served.wait_closed()).error is None
            await link.client.wait_closed()
            await server.wait_closed()
        assert link.client.failure is None
        assert server.failure is None


async def test_a_tunnel_on_its_way_when_the_server_drains_is_served() -> None:
    async with open_link() as link:
        tunnel = link.client.open_tunnel(HEAD)
        link.servers[0].goaway()
        with trio.fail_after(30):
            await link.arrived.wait()
            link.tunnels[0].respond(200)
            assert (await tunnel.wait_response()).status == 200
        tunnel.reset()


async def test_drain_of_an_idle_connection_is_quick_and_a_deadline_is_kept() -> None:
    async with open_link() as link:
        with trio.fail_after(30):
            await link.servers[0].drain(30)
            await link.client.wait_closed()
        assert link.client.failure is None
    async with open_link() as link:
        _, _, tunnel, served = await link.pipe()
        with trio.fail_after(30):
            await link.servers[0].drain(0.1)
            assert (await served.wait_closed()).error == "drain deadline"
            assert (await tunnel.wait_closed()).error


async def test_the_client_that_goes_away_closes_after_its_last_tunnel() -> None:
    async with open_link() as link:
        near, far, tunnel, _ = await link.pipe()
        link.client.goaway()
        assert not link.client.is_usable
        await near.send_eof()
        await far.send_eof()
        with trio.fail_after(30):
            assert (await tunnel.wait_closed()).error is None
            await link.client.wait_closed()
            await link.servers[0].wait_closed()
        assert link.servers[0].failure is None


async def test_a_flood_gets_goaway_and_costs_only_that_connection() -> None:
    async with open_link() as link:
        bystander = link.client
        attacker = await link.dial()
        near, _, tunnel, _ = await link.pipe(attacker)
        for _ in range(3000):
            attacker.core.out += h2.pack_frame(h2.SETTINGS, 0, 0)
        attacker.touch()
        with trio.fail_after(30):
            assert (await tunnel.wait_closed()).error
            await attacker.wait_closed()
        assert "too many SETTINGS" in str(link.servers[1].failure)
        with pytest.raises(trio.BrokenResourceError):
            await near.receive_some(1)
        assert bystander.is_usable


async def test_the_stream_limit_of_the_server_is_kept_on_both_sides() -> None:
    async with open_link() as link:
        assert link.client.max_tunnels == 200
        tunnels = [link.client.open_tunnel(HEAD) for _ in range(200)]
        with pytest.raises(Unavailable):
            link.client.open_tunnel(HEAD)
        with trio.fail_after(30):
            while len(link.tunnels) < 200:
                await trio.sleep(0.01)
        tunnels[0].reset()
        link.client.open_tunnel(HEAD)


async def test_a_bug_in_on_tunnel_costs_one_tunnel() -> None:
    def broken(link: Link, tunnel: Tunnel) -> None:
        raise ZeroDivisionError

    with pytest.raises(ExceptionGroup) as caught:  # noqa: PT012
        async with open_link(on_tunnel=broken) as link:
            tunnel = link.client.open_tunnel(HEAD)
            with pytest.raises(Unavailable, match="INTERNAL_ERROR"):
                await tunnel.wait_response()
            assert link.client.is_usable
    assert caught.group_contains(ZeroDivisionError)


async def test_cancelling_wait_response_resets_the_stream() -> None:
    async with open_link() as link:
        tunnel = link.client.open_tunnel(HEAD)
        await link.arrived.wait()
        with trio.move_on_after(0.01):
            await tunnel.wait_response()
        with trio.fail_after(30):
            assert (await link.tunnels[0].wait_closed()).error
        link.tunnels[0].respond(200)
        link.tunnels[0].refuse(503)
        assert link.client.tunnel_count == 0
        assert link.client.is_usable
