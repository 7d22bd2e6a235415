"""The load of bench_tunnel.py: a sink and the clients that use it, as cheap as Python gets.

    load.py sink HOST PORT                  serves until killed
    load.py up|down HOST PORT STREAMS BYTES  moves BYTES in all, over STREAMS connections
    load.py pingpong HOST PORT COUNT        64 bytes there and back, one connection
    load.py connect HOST PORT COUNT AT_ONCE connect, 64 bytes there and back, close
    load.py mix HOST PORT COUNT             pingpong while one upload never ends
    load.py idle HOST PORT COUNT SECONDS    that many connections, used once and held open
    load.py check HOST PORT BYTES           random bytes there and back, compared

One JSON object on stdout. Bulk bytes are sent from page cache (sendfile) and thrown away in the
kernel (MSG_TRUNC), so that the processors belong to the proxies. The first byte of a connection
says what it wants: U or D with a count of bytes, E for echo. Who sends waits for the other side's
last word before it closes.
"""

from __future__ import annotations

import json
import mmap
import os
import select
import signal
import socket
import struct
import sys
import time
from collections.abc import Callable

PIECE = 1 << 18
MESSAGE = b"E" * 64
ORDER = struct.Struct("!cQ")
COUNT = struct.Struct("!Q")
_BUFFER = bytearray(PIECE)


def _pages() -> int:
    fd = os.memfd_create("pages")
    os.truncate(fd, PIECE)
    return fd


_PAGES = _pages()


def _discard(sock: socket.socket) -> int:
    """Throw away what is there; bytes, -1 when nothing is."""
    try:
        return sock.recv_into(_BUFFER, PIECE, socket.MSG_TRUNC | socket.MSG_DONTWAIT)
    except BlockingIOError:
        return -1


def _send(sock: socket.socket, count: int) -> int:
    """Send up to `count` bytes; bytes, 0 when it takes none."""
    try:
        return os.sendfile(sock.fileno(), _PAGES, 0, min(count, PIECE))
    except BlockingIOError:
        return 0


# ---- the sink


def sink(host: str, port: int) -> None:
    """Serve for ever."""
    listener = socket.create_server((host, port), backlog=1024)
    listener.setblocking(False)
    poll = select.epoll()
    poll.register(listener, select.EPOLLIN)
    known: dict[int, tuple[socket.socket, Callable[[], bool]]] = {}
    while True:
        for fd, _ in poll.poll():
            if fd == listener.fileno():
                _accept_all(listener, poll, known)
                continue
            sock, turn = known[fd]
            try:
                open_still = turn()
            except OSError:
                open_still = False
            if not open_still:
                del known[fd]
                sock.close()


def _accept_all(
    listener: socket.socket,
    poll: select.epoll,
    known: dict[int, tuple[socket.socket, Callable[[], bool]]],
) -> None:
    while True:
        try:
            sock, _ = listener.accept()
        except BlockingIOError:
            return
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        poll.register(sock, select.EPOLLIN)
        known[sock.fileno()] = (sock, _Service(sock, poll).turn)


class _Service:
    """One connection of the sink."""

    def __init__(self, sock: socket.socket, poll: select.epoll) -> None:
        self.sock, self.poll = sock, poll
        self.wants = b""
        self.left = 0

    def turn(self) -> bool:
        """Do what can be done; False when the connection is over."""
        if self.wants == b"D" and self.left:
            self.left -= _send(self.sock, self.left)
            if not self.left:
                self.poll.modify(self.sock, select.EPOLLIN)
            return True
        if self.wants == b"U" and self.left:
            count = _discard(self.sock)
            self._took(max(count, 0))
            return count != 0
        data = self.sock.recv(1 << 16)
        if not data:
            return False
        if not self.wants:
            self.wants = data[:1]
            if self.wants in b"UD":
                _, self.left = ORDER.unpack_from(data)
                if self.wants == b"D":
                    self.poll.modify(self.sock, select.EPOLLOUT)
                    return True
                self._took(len(data) - ORDER.size)
                return True
        # The clients never have more under way than a socket's buffer takes.
        return self.wants != b"E" or self.sock.send(data) == len(data)

    def _took(self, count: int) -> None:
        self.left -= count
        if not self.left:
            self.sock.send(b"!")


# ---- the clients


def _connect(host: str, port: int) -> socket.socket:
    sock = socket.create_connection((host, port), timeout=10)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock


def bulk(wants: str, host: str, port: int, streams: int, total: int) -> dict[str, float]:
    """Bytes in one direction."""
    each = total // streams
    socks = {sock.fileno(): sock for sock in (_connect(host, port) for _ in range(streams))}
    left = dict.fromkeys(socks, each)
    poll = select.epoll()
    started = time.perf_counter()
    for fd, sock in socks.items():
        sock.setblocking(False)
        sock.send(ORDER.pack(wants[:1].upper().encode(), each))
        poll.register(fd, select.EPOLLOUT if wants == "up" else select.EPOLLIN)
    while socks:
        for fd, _ in poll.poll(30) or _stalled():
            if wants == "up" and left[fd]:
                left[fd] -= _send(socks[fd], left[fd])
                if not left[fd]:
                    poll.modify(fd, select.EPOLLIN)
                continue
            count = _discard(socks[fd])
            if count == 0:
                raise SystemExit(f"ended with {left[fd]} of {each} bytes to go")
            left[fd] -= max(count, 0)
            # An upload is over with the sink's word, a download with its last byte.
            if left[fd] < (wants == "down"):
                poll.unregister(fd)
                socks.pop(fd).close()
    return {"seconds": time.perf_counter() - started, "bytes": each * streams}


def _stalled() -> list[tuple[int, int]]:
    raise SystemExit("no byte moved for 30 s")


def pingpong(host: str, port: int, count: int) -> dict[str, float]:
    """Round trips, in microseconds."""
    sock = _connect(host, port)
    clock = time.perf_counter_ns
    taken = []
    for _ in range(count):
        begun = clock()
        sock.send(MESSAGE)
        if len(sock.recv(64)) != 64:
            raise SystemExit("a message came back in pieces")
        taken.append(clock() - begun)
    sock.close()
    taken.sort()
    return {"p50": taken[count // 2] / 1000, "p99": taken[count * 99 // 100] / 1000}


def connect(host: str, port: int, count: int, at_once: int) -> dict[str, float]:
    """Whole connections, `at_once` at a time."""
    poll = select.epoll()
    waiting: dict[int, socket.socket] = {}
    begun = done = 0
    started = time.perf_counter()
    while done < count:
        while begun < count and len(waiting) < at_once:
            sock = socket.socket()
            sock.setblocking(False)
            sock.connect_ex((host, port))
            waiting[sock.fileno()] = sock
            poll.register(sock, select.EPOLLOUT)
            begun += 1
        for fd, events in poll.poll(30) or _stalled():
            sock = waiting[fd]
            if events & select.EPOLLOUT:
                sock.send(MESSAGE)
                poll.modify(fd, select.EPOLLIN)
            else:
                if len(sock.recv(64)) != 64:
                    raise SystemExit("a connection ended without its answer")
                del waiting[fd]
                sock.close()
                done += 1
    return {"seconds": time.perf_counter() - started, "connections": count}


def mix(host: str, port: int, count: int) -> dict[str, float]:
    """Round trips beside an upload, and how much of that there was."""
    moved = mmap.mmap(-1, 8)
    child = os.fork()
    if not child:
        _upload_for_ever(host, port, moved)
    try:
        begun = time.perf_counter()
        while not COUNT.unpack_from(moved)[0]:
            if time.perf_counter() - begun > 10:
                _stalled()
            time.sleep(0.01)
        started, before = time.perf_counter(), COUNT.unpack_from(moved)[0]
        result = pingpong(host, port, count)
        seconds = time.perf_counter() - started
        result["bytes_per_second"] = (COUNT.unpack_from(moved)[0] - before) / seconds
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    return result


def _upload_for_ever(host: str, port: int, moved: mmap.mmap) -> None:
    sock = _connect(host, port)
    sock.settimeout(30)
    sock.send(ORDER.pack(b"U", 1 << 62))
    sock.setblocking(True)
    total = 0
    while True:
        total += _send(sock, PIECE)
        COUNT.pack_into(moved, 0, total)


def idle(host: str, port: int, count: int, seconds: int) -> dict[str, float]:
    """Connections that have spoken once and stay."""
    socks = []
    for _ in range(count):
        sock = _connect(host, port)
        sock.send(MESSAGE)
        if len(sock.recv(64)) != 64:
            raise SystemExit("a connection ended without its answer")
        socks.append(sock)
    time.sleep(seconds)
    return {"connections": len(socks)}


def check(host: str, port: int, total: int) -> dict[str, float]:
    """Whether what comes back is what was sent."""
    sock = _connect(host, port)
    sock.settimeout(30)
    done = 0
    while done < total:
        sent = b"E" + os.urandom(1 + (done * 7919) % 60_000)
        sock.sendall(sent)
        heard = bytearray()
        while len(heard) < len(sent):
            piece = sock.recv(1 << 16)
            if not piece:
                raise SystemExit(f"ended after {done + len(heard)} bytes")
            heard += piece
        if bytes(heard) != sent:
            raise SystemExit(f"other bytes came back than were sent, after {done}")
        done += len(sent)
    sock.close()
    return {"bytes": done}


def main(words: list[str]) -> None:
    """Run what `words` say."""
    what, host, port = words[0], words[1], int(words[2])
    numbers = [int(word) for word in words[3:]]
    if what == "sink":
        sink(host, port)
    elif what in ("up", "down"):
        print(json.dumps(bulk(what, host, port, *numbers)))
    elif what == "pingpong":
        print(json.dumps(pingpong(host, port, *numbers)))
    elif what == "connect":
        print(json.dumps(connect(host, port, *numbers)))
    elif what in ("mix", "idle", "check"):
        run = {"mix": mix, "idle": idle, "check": check}[what]
        print(json.dumps(run(host, port, *numbers)))
    else:
        raise SystemExit(f"unknown: {what}")


if __name__ == "__main__":
    main(sys.argv[1:])
