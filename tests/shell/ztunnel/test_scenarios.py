"""The scenarios that Istio tests its own ztunnel by, in captured pods with real TLS.

What a peer with a good certificate may ask of 15008 and what it is answered; an application tunnel
with PROXY protocol; ends of servers and proxies; calls from inside pods to the proxy's own ports.
"""

from __future__ import annotations

import contextlib
import socket
import struct
from collections.abc import AsyncIterator

import pytest
import trio

from mesh import netns
from mesh.hbone.connection import TunnelConnection
from mesh.hbone.head import ConnectHead
from mesh.model.authorization import Action, Authorization, Clause, PolicyScope, Rule
from mesh.model.service import Service, ServicePort
from mesh.model.workload import ApplicationTunnel, NetworkAddress
from mesh.sockets import SocketAddress
from mesh.tls.context import client_context, verify_server_peer
from tests.support.applications import ask, echo, is_reset, read_line
from tests.support.captured import (
    CapturedMesh,
    CapturedPod,
    can_make_namespaces,
    captured_mesh,
)

pytestmark = [
    pytest.mark.lab,
    pytest.mark.skipif(not can_make_namespaces(), reason="no permission for namespaces"),
]

PEER = "spiffe://cluster.local/ns/shop/sa/peer"
NOBODY = Authorization("nobody", "shop", PolicyScope.NAMESPACE, Action.DENY, (Rule((Clause(()),)),))


@contextlib.asynccontextmanager
async def hbone(
    mesh: CapturedMesh, peer: CapturedPod, server: CapturedPod
) -> AsyncIterator[TunnelConnection]:
    """A tunnel connection to `server`, dialled by hand in the name of PEER."""
    with netns.inside(peer.fd):
        sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    connection = await TunnelConnection.connect(
        mesh.node.reactor,
        sock,
        SocketAddress(server.ip, 15008),
        client_context(mesh.ca.issue(PEER).certificate()),
        verify=lambda leaf: verify_server_peer(leaf, frozenset({server.workload().identity})),
    )
    async with trio.open_nursery() as nursery:
        nursery.start_soon(connection.run)
        yield connection
        nursery.cancel_scope.cancel()


def tunnelled(mesh: CapturedMesh) -> tuple[CapturedPod, CapturedPod]:
    """An outsider with a certificate, and a captured server."""
    web, peer = mesh.add("web"), mesh.add("peer", enrolled=False)
    mesh.know(web.workload(), peer.workload())
    return peer, web


async def test_what_a_peer_is_answered() -> None:
    async with captured_mesh() as mesh:
        peer, web = tunnelled(mesh)
        mesh.nursery.start_soon(trio.serve_listeners, echo, [web.listen(8080)])
        expected = {
            f"{web.ip}:8080": 200,
            f"{web.ip}:8081": 503,  # nobody listens
            f"{peer.ip}:8080": 400,  # another pod
            "10.99.99.99:8080": 400,
            "127.0.0.1:8080": 400,
            "[::1]:8080": 400,
            f"{web.ip}:15008": 503,  # a tunnel in the tunnel
            f"{web.ip}:15001": 503,
            f"{web.ip}:15006": 503,
            "absent.shop.svc.cluster.local:80": 503,
            "nonsense": 400,
            f"{web.ip}:0": 400,
            f"{web.ip}:65536": 400,
        }
        async with hbone(mesh, peer, web) as connection:
            told = {}
            for authority in expected:
                tunnel = connection.open_tunnel(ConnectHead(authority))
                told[authority] = (await tunnel.wait_response()).status
                tunnel.reset()
            assert told == expected
            mesh.judge_by(NOBODY)
            tunnel = connection.open_tunnel(ConnectHead(f"{web.ip}:8080"))
            assert (await tunnel.wait_response()).status == 401
            line = await mesh.notes.wait(response_flags="DENY")
            assert "shop/nobody" in str(line)


async def test_proxy_protocol_says_who_calls_whom_before_the_first_byte() -> None:
    async with captured_mesh() as mesh:
        peer, web = tunnelled(mesh)
        mesh.know(web.workload(application_tunnel=ApplicationTunnel("PROXY", 9000)))
        heard = bytearray()

        async def read(stream: trio.SocketStream) -> None:
            async with stream:
                async for data in stream:
                    heard.extend(data)

        mesh.nursery.start_soon(trio.serve_listeners, read, [web.listen(9000, "::")])
        async with hbone(mesh, peer, web) as connection:
            tunnel = connection.open_tunnel(ConnectHead("10.1.2.3:80"))
            assert (await tunnel.wait_response()).status == 200
            tunnel.send(b"hello")
            tunnel.end()
            length = 16 + 12 + 3 + len(PEER) + 5
            with trio.fail_after(30):
                while len(heard) < length:
                    await trio.sleep(0.01)
            source_port = connection.local_address.port
        # The PROXY protocol, version 2, section 2.2.
        assert bytes(heard[:12]) == b"\r\n\r\n\0\r\nQUIT\n"
        assert heard[12:14] == b"\x21\x11"
        assert struct.unpack("!H", heard[14:16]) == (12 + 3 + len(PEER),)
        addresses = socket.inet_aton(peer.ip) + socket.inet_aton("10.1.2.3")
        assert heard[16:28] == addresses + struct.pack("!HH", source_port, 80)
        assert heard[28:31] == b"\xd0" + struct.pack("!H", len(PEER))
        assert heard[31:] == PEER.encode() + b"hello"


async def test_a_server_that_shuts_down_ends_its_connections_in_order() -> None:
    async with captured_mesh() as mesh:
        curl, web = mesh.add("curl"), mesh.add("web")
        mesh.know(curl.workload(), web.workload())
        async with trio.open_nursery() as server:
            server.start_soon(trio.serve_listeners, echo, [web.listen(8080)])
            stream = await curl.connect(web.ip, 8080)
            await read_line(stream)
            server.cancel_scope.cancel()
        async with stream:
            with trio.fail_after(30):
                assert await stream.receive_some(1) == b""
        assert await is_reset(await curl.connect(web.ip, 8080))


async def test_a_drain_that_is_cut_short_looks_like_no_end() -> None:
    async with captured_mesh() as mesh:
        curl, web = mesh.add("curl"), mesh.add("web")
        mesh.know(curl.workload(), web.workload())
        mesh.nursery.start_soon(trio.serve_listeners, echo, [web.listen(8080)])
        stream = await curl.connect(web.ip, 8080)
        await read_line(stream)
        assert web.proxy is not None
        await web.proxy.drain(0.05)
        await web.proxy.stop()
        assert await is_reset(stream)
        line = await mesh.notes.wait(direction="inbound")
        assert "stopped serving" in str(line["error"])


@pytest.mark.parametrize("port", [15001, 15006, 15008, 15053])
async def test_calls_to_the_proxys_ports_from_everywhere_inside_lead_nowhere(port: int) -> None:
    """By loopback, own address, neighbour, service, either family; no loop comes of it."""
    async with captured_mesh() as mesh:
        curl, web = mesh.add("curl"), mesh.add("web")
        vip = "10.96.0.99"
        service = Service(
            "web",
            "shop",
            "web.shop.svc.cluster.local",
            (NetworkAddress("", vip),),
            ports={port: ServicePort(port, port)},
        )
        key = "shop/web.shop.svc.cluster.local"
        mesh.know(service, curl.workload(), web.workload(services={key: {port: port}}))
        mesh.nursery.start_soon(trio.serve_listeners, echo, [web.listen(8080)])
        for host in ("127.0.0.1", "::1", curl.ip, curl.ip6, web.ip, web.ip6, vip):
            try:
                stream = await curl.connect(host, port)
            except OSError:
                continue
            async with stream:
                with contextlib.suppress(trio.BrokenResourceError), trio.fail_after(30):
                    await stream.send_all(b"\0\5hello")
                    await stream.send_eof()
                    # Perhaps an alert of TLS; never an echo, never silence.
                    while heard := await stream.receive_some(1000):
                        assert b"hello" not in heard
        assert len(mesh.notes.lines) < 25
        assert await ask(await curl.connect(web.ip, 8080), b"hi") == (curl.ip, b"hi")
