"""WebSocket peers (RFC 6455), and HTTP/2 streams that carry one (RFC 8441, by the h2 package).

`ChatServer` echoes frame by frame; `join` opens a chat over HTTP/1.1, `H2Call` and `serve_http2`
are either end over HTTP/2.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import os
import struct
from collections.abc import Awaitable, Callable, Iterable

import h2.config
import h2.connection
import h2.errors
import h2.events
import h2.exceptions
import h2.settings
import trio

from tests.support.waypoints import Mesh

CONTINUATION, TEXT, BINARY, CLOSE, PING, PONG = 0, 1, 2, 8, 9, 10
_KEY = base64.b64encode(b"0123456789abcdef")
_GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
ASK = (
    b"GET /chat HTTP/1.1\r\nhost: web\r\nconnection: keep-alive, Upgrade\r\nupgrade: WebSocket\r\n"
    b"sec-websocket-version: 13\r\nsec-websocket-key: " + _KEY + b"\r\n\r\n"
)


def frame(opcode: int, payload: bytes = b"", *, fin: bool = True, masks: bool = True) -> bytes:
    size = len(payload)
    head = bytes((opcode | (0x80 if fin else 0),))
    mask = 0x80 if masks else 0
    if size < 126:
        head += bytes((mask | size,))
    elif size < 1 << 16:
        head += struct.pack(">BH", mask | 126, size)
    else:
        head += struct.pack(">BQ", mask | 127, size)
    if not masks:
        return head + payload
    chosen = os.urandom(4)
    key_stream = (chosen * (size // 4 + 1))[:size]
    mixed = int.from_bytes(payload, "big") ^ int.from_bytes(key_stream, "big")
    return head + chosen + mixed.to_bytes(size, "big")


def accept_of(head: bytes) -> bytes:
    """What RFC 6455 makes of the key in a request's head."""
    lines = [each.partition(b":") for each in head.split(b"\r\n")]
    asked = next(value for name, _, value in lines if name.lower() == b"sec-websocket-key")
    return base64.b64encode(hashlib.sha1(asked.strip() + _GUID).digest())


class Reader:
    """Exactly as many bytes as asked for; EOFError at the end."""

    def __init__(self, stream: trio.abc.ReceiveStream | H2Call, data: bytes = b"") -> None:
        self._stream = stream
        self._data = bytearray(data)

    async def take(self, count: int) -> bytes:
        with trio.fail_after(30):
            while len(self._data) < count:
                piece = await self._stream.receive_some(65536)
                if not piece:
                    raise EOFError
                self._data += piece
        found = bytes(self._data[:count])
        del self._data[:count]
        return found

    async def head(self) -> bytes:
        found = b""
        while not found.endswith(b"\r\n\r\n"):
            found += await self.take(1)
        return found

    async def frame(self) -> tuple[int, bool, bytes]:
        """Opcode, whether it is the last, payload."""
        first, size = await self.take(2)
        masked, size = size & 0x80, size & 0x7F
        if size == 126:
            size = int.from_bytes(await self.take(2), "big")
        elif size == 127:
            size = int.from_bytes(await self.take(8), "big")
        mask = await self.take(4) if masked else b"\0\0\0\0"
        data = await self.take(size)
        plain = int.from_bytes(data, "big") ^ int.from_bytes((mask * (size // 4 + 1))[:size], "big")
        return first & 0x0F, bool(first & 0x80), plain.to_bytes(size, "big")


class ChatServer:
    """Echoes messages frame by frame, answers pings, closes with the code it is closed with."""

    def __init__(self) -> None:
        self.heads: list[bytes] = []
        self.closed: list[bytes] = []

    async def serve(self, stream: trio.SocketStream) -> None:
        reader = Reader(stream)
        with contextlib.suppress(trio.BrokenResourceError, EOFError):
            async with stream:
                while True:
                    head = await reader.head()
                    self.heads.append(head)
                    if b"upgrade: websocket" not in head.lower() or b"/refuse" in head:
                        await stream.send_all(b"HTTP/1.1 426 x\r\ncontent-length: 2\r\n\r\nno")
                        continue
                    await stream.send_all(
                        b"HTTP/1.1 101 Switching Protocols\r\nupgrade: websocket\r\n"
                        b"connection: Upgrade\r\nsec-websocket-accept: " + accept_of(head)
                        + b"\r\n\r\n" + frame(TEXT, b"welcome", masks=False)
                    )  # fmt: skip
                    await self.chat(stream, reader)
                    return

    async def chat(self, stream: trio.SocketStream | H2Call, reader: Reader) -> None:
        while True:
            opcode, fin, payload = await reader.frame()
            if opcode == PING:
                await stream.send_all(frame(PONG, payload, masks=False))
            elif opcode == CLOSE:
                self.closed.append(payload)
                await stream.send_all(frame(CLOSE, payload, masks=False))
                return
            elif payload == b"bye":
                await stream.send_all(frame(CLOSE, struct.pack(">H", 1001), masks=False))
                self.closed.append((await reader.frame())[2])
                return
            elif opcode != PONG:
                await stream.send_all(frame(opcode, payload, fin=fin, masks=False))


class H2Call:
    """One stream of an HTTP/2 connection as a stream of bytes; `head` is what the peer answered."""

    def __init__(self, stream: trio.abc.Stream, *, client: bool) -> None:
        config = h2.config.H2Configuration(client_side=client, header_encoding=None)
        self.talk = h2.connection.H2Connection(config)
        self._stream = stream
        self._turn = trio.Lock()
        self._room = trio.Condition()
        self._came = trio.Condition()
        self._data = bytearray()
        self.stream_id = 1
        self.head: dict[bytes, bytes] = {}
        self.trailers: dict[bytes, bytes] = {}
        self.takes_connect = False
        self.has_ended = False
        self.reset: int | None = None
        self.is_gone = False

    async def begin(self, takes_connect: bool = True) -> None:
        """The preface, the SETTINGS."""
        if not self.talk.config.client_side and takes_connect:
            self.talk.local_settings[h2.settings.SettingCodes.ENABLE_CONNECT_PROTOCOL] = 1
            self.talk.local_settings.acknowledge()
        self.talk.initiate_connection()
        await self.flush()

    async def flush(self) -> None:
        """Out with what there is."""
        async with self._turn:
            with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
                if data := self.talk.data_to_send():
                    await self._stream.send_all(data)

    async def run(self) -> None:
        """Reads until the connection ends."""
        code = h2.settings.SettingCodes.ENABLE_CONNECT_PROTOCOL
        while not self.is_gone:
            try:
                data = await self._stream.receive_some(65536)
                events = self.talk.receive_data(data) if data else []
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                data, events = b"", []
            for event in events:
                match event:
                    case h2.events.RemoteSettingsChanged():
                        self.takes_connect = code in event.changed_settings
                    case h2.events.RequestReceived() | h2.events.ResponseReceived():
                        self.head = {bytes(n): bytes(v) for n, v in event.headers}
                        self.stream_id, self.has_ended, self.reset = event.stream_id, False, None
                        self._data.clear()
                    case h2.events.TrailersReceived():
                        self.trailers = {bytes(n): bytes(v) for n, v in event.headers}
                    case h2.events.DataReceived():
                        self._data += event.data
                        if event.flow_controlled_length:
                            self.talk.acknowledge_received_data(
                                event.flow_controlled_length, event.stream_id
                            )
                    case h2.events.StreamEnded() if event.stream_id == self.stream_id:
                        self.has_ended = True
                    case h2.events.StreamReset() if event.stream_id == self.stream_id:
                        self.reset = int(event.error_code)
            self.is_gone = not data
            await self.flush()
            for condition in (self._came, self._room):
                async with condition:
                    condition.notify_all()

    async def wait(self, until: Callable[[], object]) -> None:
        """Until something holds, or the connection is over."""
        with trio.fail_after(30):
            async with self._came:
                while not until() and not self.is_gone:
                    await self._came.wait()

    async def send_head(self, head: Iterable[tuple[bytes, bytes]], *, ends: bool = False) -> None:
        """A request or a response."""
        self.talk.send_headers(self.stream_id, list(head), end_stream=ends)
        await self.flush()

    # ---- a stream of bytes

    async def send_all(self, data: bytes) -> None:
        """As the windows allow."""
        view = memoryview(data)
        while view:
            most = self.talk.max_outbound_frame_size
            room = min(self.talk.local_flow_control_window(self.stream_id), most)
            if room <= 0:
                async with self._room:
                    await self._room.wait()
                continue
            self.talk.send_data(self.stream_id, bytes(view[:room]))
            view = view[room:]
            await self.flush()

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """Data; empty at the end."""
        await self.wait(lambda: self._data or self.has_ended or self.reset is not None)
        if self.reset is not None and not self._data:
            raise trio.BrokenResourceError
        count = len(self._data) if max_bytes is None else max_bytes
        found = bytes(self._data[:count])
        del self._data[:count]
        return found

    async def send_eof(self) -> None:
        """Our END_STREAM."""
        self.talk.end_stream(self.stream_id)
        await self.flush()

    async def send_reset(self) -> None:
        """RST_STREAM."""
        self.talk.reset_stream(self.stream_id, h2.errors.ErrorCodes.CANCEL)
        await self.flush()


def serve_http2(
    handle: Callable[[H2Call], Awaitable[None]], *, takes_connect: bool = True
) -> Callable[[trio.SocketStream], Awaitable[None]]:
    """An application: one request at a time, handed over when its head has come."""

    async def serve(stream: trio.SocketStream) -> None:
        call = H2Call(stream, client=False)
        async with stream, trio.open_nursery() as nursery:
            nursery.start_soon(call.run)
            await call.begin(takes_connect)
            while True:
                await call.wait(lambda: call.head)
                if call.is_gone:
                    return
                with contextlib.suppress(EOFError, trio.BrokenResourceError):
                    await handle(call)
                call.head = {}

    return serve


async def join(mesh: Mesh, more: bytes = b"") -> tuple[trio.SocketStream, Reader]:
    """An open chat; `more` is sent in the same breath as the request."""
    stream = await mesh.open("10.96.0.1:80")
    await stream.send_all(ASK + more)
    reader = Reader(stream)
    head = (await reader.head()).lower()
    assert head.startswith(b"http/1.1 101 ")
    assert b"\r\nupgrade: websocket\r\n" in head
    assert accept_of(ASK).lower() in head
    assert await reader.frame() == (TEXT, True, b"welcome")
    return stream, reader
