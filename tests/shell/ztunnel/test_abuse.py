"""Attacks on a captured pod's 15008 over real TLS, by a pod that holds a good certificate.

Each flood ends with GOAWAY ENHANCE_YOUR_CALM after a bounded number of bytes, while an honest
peer goes on talking to the same pod and a new one gets in.
"""

from __future__ import annotations

import contextlib
import socket
import struct
from collections.abc import AsyncIterator, Iterator

import pytest
import trio
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from mesh.hbone.head import ConnectHead, encode_request
from mesh.http import h2_frames as h2
from mesh.http.hpack_table import encode_block
from mesh.tls.context import client_context
from mesh.tls.session import PLAIN, WOULD_BLOCK, TlsSession, handshake
from tests.support.applications import ask, echo, read_line, read_to_end
from tests.support.captured import (
    CapturedMesh,
    can_make_namespaces,
    captured_mesh,
)
from tests.support.certs import CertificateAuthority, Leaf
from ztunnel.inbound import HANDSHAKES_PER_SOURCE

pytestmark = [
    pytest.mark.lab,
    pytest.mark.skipif(not can_make_namespaces(), reason="no permission for namespaces"),
]

MALLORY = "spiffe://cluster.local/ns/shop/sa/mallory"
HELLO = h2.PREFACE + h2.pack_frame(h2.SETTINGS, 0, 0)


class Mesh:
    """Echo in `web`, honest `curl`, and `mallory` outside of the mesh with a certificate."""

    def __init__(self, mesh: CapturedMesh) -> None:
        self.mesh = mesh
        self.curl, self.web = mesh.add("curl"), mesh.add("web")
        self.mallory = mesh.add("mallory", enrolled=False)
        mesh.know(self.curl.workload(), self.web.workload(), self.mallory.workload())
        mesh.nursery.start_soon(trio.serve_listeners, echo, [self.web.listen(8080)])

    async def dial(self, leaf: Leaf | None = None) -> TlsSession:
        """TLS to web's 15008, in mallory's name."""
        leaf = leaf or self.mesh.ca.issue(MALLORY)
        stream = await self.mallory.connect(self.web.ip, 15008)
        sock = socket.socket(fileno=stream.socket.detach())
        return await handshake(
            sock, client_context(leaf.certificate()), server_side=False, timeout=30
        )


@contextlib.asynccontextmanager
async def attacked() -> AsyncIterator[Mesh]:
    """Inside, an honest tunnel is used without pause; it and a new one must work at the end."""
    async with captured_mesh() as captured:
        mesh = Mesh(captured)
        lasting = await mesh.curl.connect(mesh.web.ip, 8080)
        await read_line(lasting)
        count = 0

        async def go_on() -> None:
            nonlocal count
            while True:
                await lasting.send_all(b"x" * 100)
                heard = b""
                while len(heard) < 100:
                    heard += await lasting.receive_some(100 - len(heard))
                count += 1
                await trio.sleep(0.001)

        async with lasting, trio.open_nursery() as nursery:
            nursery.start_soon(go_on)
            yield mesh
            before = count
            with trio.fail_after(30):
                while count < before + 3:
                    await trio.sleep(0.01)
            assert await ask(await mesh.curl.connect(mesh.web.ip, 8080), b"hi") == (
                mesh.curl.ip,
                b"hi",
            )
            nursery.cancel_scope.cancel()


async def pour(session: TlsSession, chunks: Iterator[bytes]) -> int:
    """Send until the peer has had enough; how many bytes went out."""
    sent = 0
    try:
        for chunk in chunks:
            session.encrypt(chunk)
            while not session.flush():
                await trio.lowlevel.wait_writable(session.sock)
            sent += len(chunk)
            await trio.lowlevel.checkpoint()
    except OSError:
        pass
    return sent


async def goaway_code(session: TlsSession) -> int | None:
    """The code of the last GOAWAY before the end; None without one."""
    heard, code = bytearray(), None
    with trio.fail_after(60), contextlib.suppress(OSError):
        while not session.peer_closed:
            count = session.fill()
            if count == WOULD_BLOCK:
                await trio.lowlevel.wait_readable(session.sock)
                continue
            if not count:
                break
            more = True
            while more:
                size, more = session.take()
                heard += PLAIN[:size]
    session.close()
    while len(heard) >= 9:
        high, low, kind, _, _ = h2.HEADER.unpack_from(heard)
        size = high << 8 | low
        if kind == h2.GOAWAY:
            code = struct.unpack_from(">I", heard, 13)[0]
        del heard[: 9 + size]
    return code


def connect(stream_id: int, authority: str, flags: int = h2.END_HEADERS) -> bytes:
    block = encode_block(encode_request(ConnectHead(authority)))
    return h2.pack_frame(h2.HEADERS, flags, stream_id, block)


def bomb(stream_id: int) -> bytes:
    """64 KiB that unpack to more than 100 MiB: one long value, named again and again."""
    entry = b"\x40\x01x\x7f\xa1\x1e" + b"v" * 4000
    return h2.pack_frame(h2.HEADERS, h2.END_HEADERS, stream_id, entry + b"\xbe" * 50_000)


FLOODS = {
    "rapid reset": lambda i, to: connect(i, to) + h2.pack_rst(i, h2.CANCEL),
    "made you reset": lambda i, to: connect(i, to) + h2.pack_window_update(i, 0),
    "made you reset by DATA": lambda i, to: (
        connect(i, to, h2.END_HEADERS | h2.END_STREAM) + h2.pack_frame(h2.DATA, 0, i, b"late")
    ),
    "CONTINUATION": lambda i, to: (
        connect(1, to, 0) if i == 1 else h2.pack_frame(h2.CONTINUATION, 0, 1)
    ),
    "SETTINGS": lambda i, to: h2.pack_frame(h2.SETTINGS, 0, 0, struct.pack(">HI", 4, i)),
    "PING": lambda i, to: h2.pack_frame(h2.PING, 0, 0, bytes(8)),
    "empty DATA": lambda i, to: (connect(1, to) if i == 1 else b"") + h2.pack_frame(h2.DATA, 0, 1),
    "padding only": lambda i, to: (
        (connect(1, to) if i == 1 else b"") + h2.pack_frame(h2.DATA, h2.PADDED, 1, b"\x01\x00")
    ),
    "PRIORITY": lambda i, to: h2.pack_frame(h2.PRIORITY, 0, i, bytes(5)),
    "WINDOW_UPDATE": lambda i, to: h2.pack_window_update(0, 1),
    "streams beyond the limit": lambda i, to: connect(i, to),
    "unknown frames": lambda i, to: h2.pack_frame(99, 0, 0, b"?" * 100),
    "malformed requests": lambda i, to: h2.pack_frame(h2.HEADERS, h2.END_HEADERS, i, b"\x82"),
    "HPACK bomb": lambda i, to: bomb(i),
    "a head of a megabyte": lambda i, to: (
        h2.pack_frame(h2.HEADERS, 0, 1, bytes(16000))
        if i == 1
        else h2.pack_frame(h2.CONTINUATION, 0, 1, bytes(16000))
    ),
}


@pytest.mark.parametrize("name", FLOODS)
async def test_a_flood_is_told_to_calm_down(name: str) -> None:
    async with attacked() as mesh:
        session = await mesh.dial()
        frame, authority = FLOODS[name], f"{mesh.web.ip}:8080"

        def chunks() -> Iterator[bytes]:
            yield HELLO
            for number in range(0, 200_000, 50):
                yield b"".join(frame(2 * i + 1, authority) for i in range(number, number + 50))

        sent = await pour(session, chunks())
        assert await goaway_code(session) == h2.ENHANCE_YOUR_CALM
        # What fits into the sockets on the way, at most, and far from everything.
        assert sent < 12 << 20
        proxy = mesh.web.proxy
        assert proxy is not None
        with trio.fail_after(30):
            while proxy.inbound_tunnels > 1 or len(proxy.inbound_connections) > 1:
                await trio.sleep(0.01)


async def _half_open(mesh: Mesh, opening: bytes) -> trio.SocketStream:
    stream = await mesh.mallory.connect(mesh.web.ip, 15008)
    with contextlib.suppress(trio.BrokenResourceError):
        await stream.send_all(opening)
    return stream


@pytest.mark.parametrize("opening", [b"", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"])
async def test_handshakes_that_never_end_are_few_and_keep_nobody_out(opening: bytes) -> None:
    async with attacked() as mesh:
        streams = [await _half_open(mesh, opening) for _ in range(3 * HANDSHAKES_PER_SOURCE)]
        proxy = mesh.web.proxy
        assert proxy is not None
        with trio.fail_after(30):
            # Those beyond the limit are closed at once, the others wait for their deadline.
            for stream in streams[HANDSHAKES_PER_SOURCE:]:
                assert await read_to_end(stream) == b""
            assert proxy.handshakes[mesh.mallory.ip] <= HANDSHAKES_PER_SOURCE
        lines = [line for line in mesh.mesh.notes.lines if "in flight" in str(line.get("error"))]
        assert len(lines) == 2 * HANDSHAKES_PER_SOURCE
        for stream in streams:
            await stream.aclose()
        with trio.fail_after(30):
            while proxy.handshakes:
                await trio.sleep(0.01)


def issue(ca: CertificateAuthority, *names: x509.GeneralName) -> Leaf:
    """A leaf that our CA should never sign."""
    good = ca.issue(MALLORY)
    key = ec.generate_private_key(ec.SECP256R1())
    builder = ca._builder(x509.Name([]), key.public_key(), 1)
    if names:
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=True)
    chain = builder.sign(ca._key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)
    pem = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    return Leaf(good.identity, chain + ca.pem, pem, ca.pem)


URI = x509.UniformResourceIdentifier
OTHER = x509.OtherName(x509.ObjectIdentifier("1.3.6.1.4.1.311.20.2.3"), b"\x0c\x02hi")


@pytest.mark.parametrize(
    "names",
    [
        (),
        (x509.DNSName("web.shop"),),
        (URI("https://cluster.local/ns/shop/sa/mallory"),),
        (URI(MALLORY + "\0.example"),),
        (URI("spiffe://cluster.local\0/ns/shop/sa/mallory"),),
        (URI("spiffe://other.example/ns/shop/sa/mallory"),),
        (OTHER,),
        (URI("spiffe://cluster.local/ns/shop"),),
        (URI("spiffe://cluster.local/ns/" + "x" * 3000 + "/sa/mallory"),),
    ],
    ids=["none", "dns", "https", "nul-behind", "nul-inside", "foreign", "other", "short", "long"],
)
async def test_a_certificate_without_a_good_identity_gets_no_tunnel(
    names: tuple[x509.GeneralName, ...],
) -> None:
    async with attacked() as mesh:
        session = await mesh.dial(issue(mesh.mesh.ca, *names))
        await pour(session, iter([HELLO + connect(1, f"{mesh.web.ip}:8080")]))
        assert await goaway_code(session) is None
        line = await mesh.mesh.notes.wait(response_flags="IDENTITY_ERROR")
        assert mesh.mallory.ip in str(line)


async def test_an_other_name_beside_a_good_identity_is_ignored() -> None:
    async with attacked() as mesh:
        session = await mesh.dial(issue(mesh.mesh.ca, OTHER, URI(MALLORY)))
        session.encrypt(HELLO + connect(1, f"{mesh.web.ip}:8080"))
        assert session.flush()
        with trio.fail_after(30):
            while mesh.web.proxy is None or mesh.web.proxy.inbound_tunnels < 2:
                await trio.sleep(0.01)
        session.close()
