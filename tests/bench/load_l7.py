"""The load of bench_waypoint.py: callers on one side of a proxy and the workload on the other, in
one process and one epoll loop, as cheap as Python gets.

    load_l7.py DIRECTORY PORT            then one JSON object a line on stdin, one a line on stdout

DIRECTORY has caller.pem/.key, server.pem/.key and ca.pem; PORT is where the workload's node
accepts HBONE. `{"port": P, "host": H, "authority": A, "kind": K, "streams": N, "seconds": S}` opens
N tunnels to `authority` at the proxy and asks there for S seconds, one request after the other
(over HTTP/2: `at_once` of them); the answer tells what was done, and the latencies in microseconds.
`kind` is a key of KINDS.

Framing is all that is understood of HTTP/2: blocks of fields are prepared, and answers looked at
where they have to begin. Each answer's status and the length of its body are compared.
"""

from __future__ import annotations

import json
import select
import socket
import ssl
import struct
import sys
import time
from collections.abc import Callable
from pathlib import Path

from l7_requests import KINDS, Kind

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
HEAD = struct.Struct("!HBBBI")
DATA, HEADERS, RESET, SETTINGS, PING, GOAWAY, WINDOW = 0, 1, 3, 4, 6, 7, 8
END, END_HEADERS, PADDED, PRIORITY = 1, 4, 8, 0x20
BIG = (1 << 31) - 1
CREDIT = 1 << 24


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    """One frame."""
    size = len(payload)
    return HEAD.pack(size >> 8, size & 255, kind, flags, stream) + payload


class Http2:
    """Frames of one connection, both ways; what happens is told to `owner`."""

    def __init__(self, write: Callable[[bytes], None], owner: object, *, client: bool) -> None:
        self.write = write
        self.owner = owner
        self.next_id = 1
        self._is_server = not client
        self._left = bytearray()
        self._preface = 0 if client else len(PREFACE)
        self._taken = 0
        self.window = 65535
        self.first_window = 65535
        self.largest = 16384
        self.windows: dict[int, int] = {}
        self.waiting: dict[int, tuple[memoryview, bool]] = {}
        settings = struct.pack("!HIHI", 4, BIG, 3, 100_000)
        opening = PREFACE if client else b""
        opening += frame(SETTINGS, 0, 0, settings)
        opening += frame(WINDOW, 0, 0, struct.pack("!I", BIG - 65535))
        write(opening)

    def open(self, block: bytes, *, end: bool) -> int:
        """A new stream."""
        number, self.next_id = self.next_id, self.next_id + 2
        self.windows[number] = self.first_window
        self.write(frame(HEADERS, END_HEADERS | end, number, block))
        return number

    def send(self, stream: int, data: bytes, *, end: bool = False) -> None:
        """Data, as far as the windows let it."""
        if stream in self.waiting:
            old, _ = self.waiting[stream]
            self.waiting[stream] = (memoryview(bytes(old) + data), end)
        else:
            self.waiting[stream] = (memoryview(data), end)
        self._flush(stream)

    def _flush(self, stream: int) -> None:
        view, end = self.waiting[stream]
        window = self.windows.get(stream, 0)
        while len(view) or end:
            size = min(len(view), window, self.window, self.largest)
            if size <= 0 and len(view):
                break
            piece, view = view[:size], view[size:]
            window -= size
            self.window -= size
            last = end and not len(view)
            self.write(frame(DATA, int(last), stream, bytes(piece)))
            if last:
                del self.waiting[stream]
                self.windows.pop(stream, None)
                return
        self.windows[stream] = window
        if len(view):
            self.waiting[stream] = (view, end)
        else:
            del self.waiting[stream]

    def feed(self, data: bytes) -> None:
        """Bytes from the other side."""
        if self._left:
            self._left += data
            data, self._left = bytes(self._left), bytearray()
        at, size = self._preface, len(data)
        if at and size < at:
            self._left += data
            return
        self._preface = 0
        unpack = HEAD.unpack_from
        owner = self.owner
        while size - at >= 9:
            high, low, kind, flags, stream = unpack(data, at)
            end = at + 9 + (high << 8 | low)
            if end > size:
                break
            if kind == DATA:
                self._taken += end - at - 9
                owner.on_data(self, stream, data[at + 9 : end], flags & END)
            elif kind == HEADERS:
                if self._is_server:
                    self.windows.setdefault(stream, self.first_window)
                start = at + 9 + (5 if flags & PRIORITY else 0)
                owner.on_headers(self, stream, data[start:end], flags & END)
            elif kind == WINDOW:
                (more,) = struct.unpack_from("!I", data, at + 9)
                if stream:
                    if stream in self.windows:
                        self.windows[stream] += more
                        if stream in self.waiting:
                            self._flush(stream)
                else:
                    self.window += more
                    for each in list(self.waiting):
                        self._flush(each)
            elif kind == SETTINGS and not flags & 1:
                for place in range(at + 9, end, 6):
                    name, value = struct.unpack_from("!HI", data, place)
                    if name == 4:
                        change, self.first_window = value - self.first_window, value
                        for each in self.windows:
                            self.windows[each] += change
                    elif name == 5:
                        self.largest = value
                self.write(frame(SETTINGS, 1, 0))
            elif kind == PING and not flags & 1:
                self.write(frame(PING, 1, 0, data[at + 9 : end]))
            elif kind == RESET:
                self.windows.pop(stream, None)
                self.waiting.pop(stream, None)
                owner.on_reset(self, stream)
            elif kind == GOAWAY and struct.unpack_from("!I", data, at + 13)[0]:
                raise SystemExit(f"GOAWAY {data[at + 9 : end]!r}")
            at = end
        if at < size:
            self._left += data[at:]
        if self._taken > CREDIT:
            self.write(frame(WINDOW, 0, 0, struct.pack("!I", self._taken)))
            self._taken = 0


class Secure:
    """TLS over a non-blocking socket."""

    def __init__(self, loop: Loop, sock: socket.socket, context: ssl.SSLContext, *, server: bool):
        self.loop, self.sock = loop, sock
        self._is_server = server
        self._in, self._out = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._in, self._out, server_side=server)
        self._said = bytearray()
        self._unsent = b""
        self.http: Http2 | None = None
        self.is_ready = False
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        loop.add(sock.fileno(), self)
        self._shake()

    def write(self, data: bytes) -> None:
        """At the end of this turn."""
        self._said += data
        self.loop.dirty.add(self)

    def flush(self) -> None:
        """Encrypt and send."""
        if not self.is_ready or self.sock.fileno() < 0:
            return
        if self._said:
            said, self._said = self._said, bytearray()
            self._tls.write(said)
        data = self._unsent + self._out.read()
        if not data:
            return
        try:
            sent = self.sock.send(data)
        except BlockingIOError:
            sent = 0
        except OSError as error:
            if not self._is_server:
                raise SystemExit(f"a connection broke: {error}") from error
            return
        self._unsent = data[sent:]
        self.loop.watch(self.sock.fileno(), writable=bool(self._unsent))

    def on_events(self) -> None:
        """Readable, or writable."""
        if self._unsent and self.is_ready:
            self.flush()
        try:
            data = self.sock.recv(1 << 18)
        except BlockingIOError:
            return
        except OSError as error:
            if not self._is_server:
                raise SystemExit(f"a connection broke: {error}") from error
            # A proxy gives up connections that nobody uses; a request lost so has no answer of 200.
            data = b""
        if not data:
            self.loop.remove(self.sock.fileno())
            self.sock.close()
            return
        self._in.write(data)
        if not self.is_ready:
            self._shake()
        if self.is_ready:
            while True:
                try:
                    plain = self._tls.read(1 << 18)
                except ssl.SSLWantReadError:
                    break
                except ssl.SSLZeroReturnError:
                    break
                if not plain:
                    break
                assert self.http is not None
                self.http.feed(plain)

    def _shake(self) -> None:
        try:
            self._tls.do_handshake()
            self.is_ready = True
        except ssl.SSLWantReadError:
            pass
        out = self._out.read()
        if out:
            self.sock.setblocking(True)
            self.sock.sendall(out)
            self.sock.setblocking(False)
        if self.is_ready:
            self.loop.dirty.add(self)


class Loop:
    """One epoll."""

    def __init__(self) -> None:
        self._poll = select.epoll()
        self._known: dict[int, Secure | Acceptor] = {}
        self.dirty: set[Secure] = set()

    def add(self, fd: int, handler: Secure | Acceptor) -> None:
        """Readable from now on."""
        self._known[fd] = handler
        self._poll.register(fd, select.EPOLLIN)

    def watch(self, fd: int, *, writable: bool) -> None:
        """Writable as well, or not."""
        self._poll.modify(fd, select.EPOLLIN | (select.EPOLLOUT if writable else 0))

    def remove(self, fd: int) -> None:
        """No more of it."""
        self._known.pop(fd, None)
        self._poll.unregister(fd)

    def turn(self, seconds: float) -> None:
        """Once around."""
        for each in self.dirty:
            each.flush()
        self.dirty.clear()
        for fd, _ in self._poll.poll(seconds):
            handler = self._known.get(fd)
            if handler is not None:
                handler.on_events()


# ---- the workload


class Acceptor:
    """The workload's node and the workload: accepts tunnels, answers what comes in them."""

    def __init__(self, loop: Loop, listener: socket.socket, context: ssl.SSLContext) -> None:
        self._loop, self._listener, self._context = loop, listener, context
        self.kind: Kind | None = None
        self._inner: dict[tuple[Http2, int], Http2] = {}
        self._asked: dict[tuple[Http2, int], bytes] = {}
        self._tunnelled: set[Http2] = set()
        self._said: list[bytes] = []
        loop.add(listener.fileno(), self)

    def on_events(self) -> None:
        """Somebody dials."""
        sock, _ = self._listener.accept()
        sock.setblocking(False)
        secure = Secure(self._loop, sock, self._context, server=True)
        secure.http = Http2(secure.write, self, client=False)

    def on_headers(self, http: Http2, stream: int, block: bytes, end: int) -> None:
        """A CONNECT; or, inside a tunnel, a request."""
        if http in self._tunnelled:
            if end:
                self._answer_http2(http, stream)
            return
        http.write(frame(HEADERS, END_HEADERS, stream, b"\x88"))

    def on_data(self, http: Http2, stream: int, data: bytes, end: int) -> None:
        """Bytes of a tunnel; or, inside one, of a request."""
        if http in self._tunnelled:
            if end:
                self._answer_http2(http, stream)
            return
        kind = self.kind
        assert kind is not None
        if end:
            http.send(stream, b"", end=True)
            self._asked.pop((http, stream), None)
            return
        key = (http, stream)
        inner = self._inner.get(key)
        if inner is not None:
            self._feed(http, stream, inner, data)
            return
        asked = self._asked.get(key, b"")
        if not asked and data.startswith(PREFACE[:4]):
            inner = Http2(self._said.append, self, client=False)
            self._tunnelled.add(inner)
            self._inner[key] = inner
            self._feed(http, stream, inner, data)
            return
        asked += data
        count = asked.count(kind.asked)
        if count and asked.endswith(kind.asked):
            self._asked[key] = b""
            http.send(stream, kind.answer * count)
        else:
            self._asked[key] = asked

    def _feed(self, http: Http2, stream: int, inner: Http2, data: bytes) -> None:
        inner.feed(data)
        if self._said:
            http.send(stream, b"".join(self._said))
            self._said.clear()

    def _answer_http2(self, http: Http2, stream: int) -> None:
        kind = self.kind
        assert kind is not None
        http.windows.setdefault(stream, http.first_window)
        http.write(frame(HEADERS, END_HEADERS, stream, kind.answer_block))
        if kind.trailers:
            http.send(stream, kind.body)
            http.write(frame(HEADERS, END_HEADERS | END, stream, kind.trailers))
            http.windows.pop(stream, None)
        else:
            http.send(stream, kind.body, end=True)

    def on_reset(self, http: Http2, stream: int) -> None:
        """A tunnel was cut."""
        self._inner.pop((http, stream), None)
        self._asked.pop((http, stream), None)


# ---- the callers


class Caller:
    """One tunnel of HTTP/1.1 requests."""

    def __init__(self, load: Load, http: Http2, stream: int) -> None:
        self._load, self._http, self._stream = load, http, stream
        self._read = b""
        self._body = -1
        self._is_chunked = False
        self._began = 0.0

    def start(self) -> None:
        """The tunnel is open."""
        self.ask()

    def ask(self) -> None:
        """The next request."""
        load = self._load
        self._began = time.perf_counter()
        self._http.send(self._stream, load.next_request())

    def on_data(self, data: bytes) -> None:
        """An answer, or part of one."""
        load = self._load
        if self._body < 0:
            read = self._read + data
            at = read.find(b"\r\n\r\n")
            if at < 0:
                self._read = read
                return
            self._read = b""
            if not read.startswith(b"HTTP/1.1 200"):
                load.bad(read[:200])
            self._is_chunked = b"ransfer-encoding: chunked" in read[:at]
            self._body = load.kind.length
            got = len(read) - at - 4
        else:
            got = len(data)
        if self._is_chunked:  # as a proxy may send it on that rewrites bodies
            got = self._body if data.endswith(b"0\r\n\r\n") else 0
        self._body -= got
        if self._body <= 0:
            if self._body < 0:
                load.bad(b"too long an answer")
            self._body = -1
            load.done(self._began)
            if load.is_on:
                self.ask()


class Caller2:
    """One tunnel of HTTP/2."""

    def __init__(self, load: Load, http: Http2, stream: int) -> None:
        self._load, self._outer, self._stream = load, http, stream
        self._http: Http2 | None = None
        self._open: dict[int, list[float]] = {}

    def start(self) -> None:
        """The tunnel is open."""
        self._said: list[bytes] = []
        self._http = Http2(self._said.append, self, client=True)
        for _ in range(self._load.at_once):
            self.ask()
        self._send()

    def _send(self) -> None:
        if self._said:
            said = b"".join(self._said)
            self._said.clear()
            self._outer.send(self._stream, said)

    def ask(self) -> None:
        """The next request."""
        http, load = self._http, self._load
        assert http is not None
        body = load.kind.asked
        stream = http.open(load.next_request(), end=not body)
        self._open[stream] = [time.perf_counter(), 0]
        if body:
            http.send(stream, body, end=True)

    def on_data(
        self, data: bytes | Http2, stream: int = 0, piece: bytes = b"", end: int = 0
    ) -> None:
        """Of the tunnel (one argument), or of a stream in it."""
        if isinstance(data, bytes):
            assert self._http is not None
            self._http.feed(data)
            self._send()
            return
        self._open[stream][1] += len(piece)
        if end:
            self._ended(stream)

    def on_headers(self, http: Http2, stream: int, block: bytes, end: int) -> None:
        """The head of an answer, or its trailers."""
        is_head = not self._open[stream][1] and not end
        # A change of the table's size may come before the status.
        if is_head and b"\x88" not in (block[:1], block[1:2]):
            self._load.bad(block)
        if end:
            self._ended(stream)

    def on_reset(self, http: Http2, stream: int) -> None:
        """An answer was cut."""
        self._load.bad(b"reset")
        self._open.pop(stream, None)

    def _ended(self, stream: int) -> None:
        began, length = self._open.pop(stream)
        load = self._load
        if length != load.kind.length:
            load.bad(b"length %d" % length)
        load.done(began)
        if load.is_on:
            self.ask()


class Load:
    """One connection of tunnels to the proxy, and what they measured."""

    def __init__(self, loop: Loop, context: ssl.SSLContext, order: dict[str, object]) -> None:
        self._order = order
        self.kind = KINDS[str(order["kind"])]
        self.at_once = int(str(order.get("at_once", 1)))
        self.is_on = True
        self.count = self.errors = 0
        self.first_error = b""
        self.latencies: list[float] = []
        self._turn = 0
        self._callers: dict[int, Caller | Caller2] = {}
        self._connected: set[int] = set()
        sock = socket.create_connection((str(order["host"]), int(str(order["port"]))), 10)
        sock.setblocking(False)
        self.secure = Secure(loop, sock, context, server=False)
        http = Http2(self.secure.write, self, client=True)
        self.secure.http = http
        self.http = http

    def open_tunnels(self) -> None:
        """As many as were ordered."""
        authority = str(self._order["authority"]).encode()
        block = b"\x02\x07CONNECT\x01" + bytes([len(authority)]) + authority
        for _ in range(int(str(self._order["streams"]))):
            stream = self.http.open(block, end=False)
            made = Caller2 if self.kind.http2 else Caller
            self._callers[stream] = made(self, self.http, stream)

    def next_request(self) -> bytes:
        """In turn."""
        requests = self.kind.requests
        self._turn = (self._turn + 1) % len(requests)
        return requests[self._turn]

    def done(self, began: float) -> None:
        """One answer."""
        self.count += 1
        self.latencies.append(time.perf_counter() - began)

    def bad(self, what: bytes) -> None:
        """A wrong answer."""
        self.errors += 1
        self.first_error = self.first_error or what

    def on_headers(self, http: Http2, stream: int, block: bytes, end: int) -> None:
        """The answer to a CONNECT."""
        if stream in self._connected:
            return
        if end or b"\x88" not in block[:4]:
            raise SystemExit(f"a tunnel was refused: {block!r}")
        self._connected.add(stream)
        self._callers[stream].start()

    def on_data(self, http: Http2, stream: int, data: bytes, end: int) -> None:
        """Bytes of a tunnel."""
        if data:
            self._callers[stream].on_data(data)

    def on_reset(self, http: Http2, stream: int) -> None:
        """A tunnel was cut."""
        raise SystemExit("a tunnel was cut")


def _context(directory: Path, name: str, side: int) -> ssl.SSLContext:
    context = ssl.SSLContext(side)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_verify_locations(directory / "ca.pem")
    context.load_cert_chain(directory / f"{name}.pem", directory / f"{name}.key")
    context.set_alpn_protocols(["h2"])
    return context


def main(directory: Path, port: int) -> None:
    """Serve, and do what stdin says."""
    loop = Loop()
    caller = _context(directory, "caller", ssl.PROTOCOL_TLS_CLIENT)
    listener = socket.create_server(("127.0.0.2", port), backlog=128)
    listener.setblocking(False)
    far = Acceptor(loop, listener, _context(directory, "server", ssl.PROTOCOL_TLS_SERVER))
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        load = Load(loop, caller, order)
        far.kind = load.kind
        while not load.secure.is_ready:
            loop.turn(1)
        load.open_tunnels()
        begun = time.perf_counter()
        seconds = order["seconds"]
        while time.perf_counter() - begun < seconds:
            loop.turn(0.1)
        load.is_on = False
        took, count = time.perf_counter() - begun, load.count
        until = time.perf_counter() + 1
        while (
            time.perf_counter() < until
            and load.count < count + int(order["streams"]) * load.at_once
        ):
            loop.turn(0.02)
        seen = sorted(load.latencies)
        loop.remove(load.secure.sock.fileno())
        load.secure.sock.close()
        answer = {
            "count": count,
            "all": load.count,
            "rate": count / took,
            "p50": seen[len(seen) // 2] * 1e6 if seen else 0,
            "p99": seen[len(seen) * 99 // 100] * 1e6 if seen else 0,
            "errors": load.errors,
            "error": load.first_error.decode("latin-1"),
        }
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
