"""The one thing that our tests need of a kubelet: `kubectl port-forward` to a process of theirs.

The API server hands a forwarded port on to the node's kubelet, as a WebSocket of the protocol
v4.channel.k8s.io: a data and an error channel for each port. Pods here are no containers; which
local port stands for a pod's is what the test says.
"""

from __future__ import annotations

import base64
import hashlib
import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from urllib.parse import parse_qs, urlsplit

import trustme
from websocket import ABNF
from websocket._abnf import frame_buffer

_GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"


class Kubelet:
    """`ports[namespace/pod, port]` is the local port that stands for it."""

    def __init__(self) -> None:
        self.ports: dict[tuple[str, int], int] = {}
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        trustme.CA().issue_cert("127.0.0.1").configure_cert(self._context)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])

    def status(self) -> dict[str, object]:
        """A node's status, by which the API server finds us."""
        return {
            "addresses": [{"type": "InternalIP", "address": "127.0.0.1"}],
            "daemonEndpoints": {"kubeletEndpoint": {"Port": self.port}},
        }

    def serve(self) -> None:
        """Until closed; each connection in a thread."""
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._answer, args=(connection,), daemon=True).start()

    def close(self) -> None:
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _answer(self, plain: socket.socket) -> None:
        with suppress(OSError), plain:
            plain.settimeout(60)
            with self._context.wrap_socket(plain, server_side=True) as connection:
                head = b""
                while b"\r\n\r\n" not in head:
                    data = connection.recv(4096)
                    if not data:
                        return
                    head += data
                self._forward(connection, head.decode())

    def _forward(self, connection: ssl.SSLSocket, head: str) -> None:
        lines = head.split("\r\n")
        target = urlsplit(lines[0].split(" ")[1])
        fields = {k.lower(): v.strip() for k, _, v in (each.partition(":") for each in lines[1:])}
        pod = target.path.removeprefix("/portForward/")
        port = int(parse_qs(target.query)["port"][0])
        key = fields["sec-websocket-key"].encode()
        accept = base64.b64encode(hashlib.sha1(key + _GUID).digest()).decode()
        connection.sendall(
            "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            f"Sec-WebSocket-Protocol: v4.channel.k8s.io\r\nSec-WebSocket-Accept: {accept}\r\n\r\n"
            .encode()
        )  # fmt: skip

        def send(channel: int, data: bytes) -> None:
            frame = ABNF(1, 0, 0, 0, ABNF.OPCODE_BINARY, 0, bytes([channel]) + data)
            connection.sendall(frame.format())

        for channel in (0, 1):
            send(channel, port.to_bytes(2, "little"))
        local = self.ports.get((pod, port))
        if local is None:
            send(1, f"nobody listens on port {port} of {pod}".encode())
            return
        with socket.create_connection(("127.0.0.1", local), 30) as upstream:
            threading.Thread(target=_requests, args=(connection, upstream), daemon=True).start()
            while data := upstream.recv(1 << 16):
                send(0, data)
            connection.sendall(ABNF(1, 0, 0, 0, ABNF.OPCODE_CLOSE, 0, b"\x03\xe8").format())


def _requests(connection: ssl.SSLSocket, upstream: socket.socket) -> None:
    frames = frame_buffer(connection.recv, True)
    with suppress(Exception):
        while True:
            frame = frames.recv_frame()
            if frame.opcode == ABNF.OPCODE_CLOSE:
                return
            if frame.opcode == ABNF.OPCODE_BINARY and frame.data[:1] == b"\0":
                upstream.sendall(frame.data[1:])


@contextmanager
def running_kubelet() -> Iterator[Kubelet]:
    """One that answers until the end of the block."""
    kubelet = Kubelet()
    threading.Thread(target=kubelet.serve, daemon=True).start()
    try:
        yield kubelet
    finally:
        kubelet.close()
