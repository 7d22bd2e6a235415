"""Sockets for transparent capture: listeners inside a pod, marked and source-spoofing
outgoing sockets, and the original destination of a redirected connection.

Every function takes the network namespace as a descriptor; None means the caller's own.
All sockets come back non-blocking. Marks and ports are Istio's, so that either side's
node agent can be exchanged.
"""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import os
import socket
import struct
import sys
from collections.abc import Iterator
from typing import NamedTuple

from mesh import netns
from mesh.errors import KernelError, Unavailable

SO_MARK = 36
SOL_IP = 0
SOL_IPV6 = 41
IP_TRANSPARENT = 19
IPV6_TRANSPARENT = 75
SO_ORIGINAL_DST = 80

PROXY_MARK = 0x539
OUTBOUND_PORT = 15001
INBOUND_PLAINTEXT_PORT = 15006
HBONE_PORT = 15008
DNS_PORT = 15053
_INTERNET = frozenset({socket.AF_INET, socket.AF_INET6})
PRIVATE_PORTS = frozenset({OUTBOUND_PORT, INBOUND_PLAINTEXT_PORT, HBONE_PORT})

LISTEN_BACKLOG = 1024
KEEPALIVE_SECONDS = 180
KEEPALIVE_PROBES = 9

LINGER_RESET = struct.pack("ii", 1, 0)
LINGER_OFF = struct.pack("ii", 0, 0)


class SocketAddress(NamedTuple):
    """An IP address in canonical text (IPv4-mapped becomes IPv4) and a port."""

    ip: str
    port: int

    def __str__(self) -> str:
        return f"[{self.ip}]:{self.port}" if ":" in self.ip else f"{self.ip}:{self.port}"


def canonical_ip(ip: str) -> str:
    """Canonical text of an address: `::ffff:10.0.0.1` is `10.0.0.1`, scope ids are cut."""
    if ip.startswith("::ffff:") and "." in ip:
        ip = ip[7:]
    elif "%" in ip:
        ip = ip.partition("%")[0]
    # The same few for thousands of connections, all of which keep it.
    return sys.intern(ip)


def from_sockaddr(address: tuple[str, int] | tuple[str, int, int, int]) -> SocketAddress:
    """The first two parts of what `getpeername()` gives, canonical."""
    return SocketAddress(canonical_ip(address[0]), address[1])


def accept(
    listener: socket.socket, family: socket.AddressFamily
) -> tuple[socket.socket, SocketAddress]:
    """A TCP connection from `listener`, whose family the caller keeps, as it is: blocking. Raises
    OSError. `listener.accept()` costs three times as much, for enumerations that nobody reads.
    """
    fd, address = listener._accept()  # type: ignore[attr-defined]  # noqa: SLF001 - see above
    return socket.socket(family, socket.SOCK_STREAM, 0, fd), from_sockaddr(address)


_HINTS = {
    errno.EADDRINUSE: "`ss -ltnp` shows who has the port; end that program or set another port",
    errno.EPERM: "run it as root, or with the capabilities that its manifest names",
    errno.EACCES: "run it as root, or set a port from 1024 up",
}


@contextlib.contextmanager
def _kernel(what: str) -> Iterator[None]:
    try:
        yield
    except OSError as exc:
        raise _failed(what, exc) from exc


def _failed(what: str, exc: OSError) -> KernelError:
    return KernelError(
        f"{what}: {exc.strerror or exc}",
        errno=exc.errno or 0,
        command=what,
        hint=_HINTS.get(exc.errno or 0, ""),
    )


def _family(ip: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in ip else socket.AF_INET


def open_socket(
    family: int, kind: int = socket.SOCK_STREAM, *, namespace: int | None = None
) -> socket.socket:
    """A non-blocking socket born in `namespace`. Raises KernelError."""
    try:
        if namespace is None:
            return socket.socket(family, kind | socket.SOCK_NONBLOCK)
        with netns.inside(namespace):
            return socket.socket(family, kind | socket.SOCK_NONBLOCK)
    except OSError as exc:
        raise _failed("socket", exc) from exc


def open_listener(
    port: int,
    *,
    namespace: int | None = None,
    host: str = "::",
    mark: int = 0,
    backlog: int = LISTEN_BACKLOG,
    shares_port: bool = False,
) -> socket.socket:
    """A TCP listener; host `::` serves IPv4 and IPv6 together, and falls back to
    `0.0.0.0` where the kernel has no IPv6. With `shares_port` a second process may listen
    there too (SO_REUSEPORT), as our successor does while we drain.
    Raises KernelError naming address and port.
    """
    try:
        listener = open_socket(_family(host), namespace=namespace)
    except KernelError as exc:
        if host != "::" or exc.errno != errno.EAFNOSUPPORT:
            raise
        return open_listener(
            port,
            namespace=namespace,
            host="0.0.0.0",
            mark=mark,
            backlog=backlog,
            shares_port=shares_port,
        )
    try:
        with _kernel(f"listen on {SocketAddress(host, port)}"):
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if shares_port:
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            _set_inherited(listener)
            if mark:
                listener.setsockopt(socket.SOL_SOCKET, SO_MARK, mark)
            if listener.family == socket.AF_INET6:
                listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, int(host != "::"))
            listener.bind((host, port))
            listener.listen(backlog)
    except BaseException:
        listener.close()
        raise
    return listener


def adopt_listener(fd: int, port: int, *, namespace: int) -> socket.socket:
    """A socket of our own (a duplicate of `fd`, which is lent) for a listener that another
    process opened: it must serve `port` in `namespace`. Raises KernelError.
    """
    duplicate = os.dup(fd)
    try:
        with _kernel(f"listener handed over for port {port}"):
            found = socket.socket(fileno=duplicate)
    except BaseException:
        os.close(duplicate)
        raise
    try:
        if netns.identity_of_socket(fd) != netns.identity(namespace):
            raise KernelError(f"the listener handed over for port {port} is of another pod")
        with _kernel(f"listener handed over for port {port}"):
            serves = found.type == socket.SOCK_DGRAM or found.getsockopt(
                socket.SOL_SOCKET, socket.SO_ACCEPTCONN
            )
            if found.family not in _INTERNET or not serves or found.getsockname()[1] != port:
                raise KernelError(f"what was handed over does not serve port {port}")
            if found.type == socket.SOCK_STREAM:
                _set_inherited(found)
            found.setblocking(False)
    except BaseException:
        found.close()
        raise
    return found


def open_udp(
    host: str,
    port: int,
    *,
    namespace: int | None = None,
    mark: int = 0,
    shares_port: bool = False,
) -> socket.socket:
    """A bound UDP socket; `shares_port` as in `open_listener`. Raises KernelError."""
    bound = open_socket(_family(host), socket.SOCK_DGRAM, namespace=namespace)
    try:
        with _kernel(f"bind udp {SocketAddress(host, port)}"):
            if shares_port:
                bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            if mark:
                bound.setsockopt(socket.SOL_SOCKET, SO_MARK, mark)
            bound.bind((host, port))
    except BaseException:
        bound.close()
        raise
    return bound


def open_outgoing(
    destination: str,
    *,
    namespace: int | None = None,
    mark: int = PROXY_MARK,
    source: str | None = None,
    source_port: int = 0,
    stays_inside: bool = False,
) -> socket.socket:
    """A TCP socket ready to connect to `destination` (an IP), marked as the proxy's own.

    With `source` the socket is bound to that foreign address (IP_TRANSPARENT), so the
    callee sees it as the peer; `source_port` 0 lets the kernel look for one. A connection
    that `stays_inside` its namespace needs no keepalive: the other end cannot vanish unseen.
    Raises KernelError.
    """
    is_v6 = ":" in destination
    outgoing = open_socket(_family(destination), namespace=namespace)
    try:
        outgoing.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if not stays_inside:
            set_keepalive(outgoing)
        if mark:
            outgoing.setsockopt(socket.SOL_SOCKET, SO_MARK, mark)
        if source is not None:
            if is_v6:
                outgoing.setsockopt(SOL_IPV6, IPV6_TRANSPARENT, 1)
            else:
                outgoing.setsockopt(SOL_IP, IP_TRANSPARENT, 1)
            # A plain bind, not IP_BIND_ADDRESS_NO_PORT: bind picks odd ports, connect even
            # ones, so this cannot take the port of the client's own live connection.
            outgoing.bind((source, source_port))
    except OSError as exc:
        outgoing.close()
        raise _failed(f"outgoing socket to {destination}", exc) from exc
    except BaseException:
        outgoing.close()
        raise
    return outgoing


def _set_inherited(listener: socket.socket) -> None:
    """What every connection shall have; the kernel gives it to those that are accepted."""
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    set_keepalive(listener)


def set_keepalive(sock: socket.socket) -> None:
    """Detect dead peers: idle 180 s, every 180 s, nine probes."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, KEEPALIVE_SECONDS)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, KEEPALIVE_SECONDS)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, KEEPALIVE_PROBES)


def original_destination(sock: socket.socket, peer: SocketAddress) -> SocketAddress:
    """Where the application at `peer` dialled before nftables redirected it.

    Falls back to the local address when nothing was redirected; the caller refuses its
    own private ports. Raises Unavailable when the socket is already gone.
    """
    try:
        try:
            if ":" not in peer.ip:
                raw = sock.getsockopt(SOL_IP, SO_ORIGINAL_DST, 16)
                port, packed = struct.unpack_from("!2xH4s", raw)
                return SocketAddress(sys.intern(socket.inet_ntop(socket.AF_INET, packed)), port)
            raw = sock.getsockopt(SOL_IPV6, SO_ORIGINAL_DST, 28)
            port, packed = struct.unpack_from("!2xH4x16s", raw)
            return SocketAddress(canonical_ip(socket.inet_ntop(socket.AF_INET6, packed)), port)
        except OSError as exc:
            if exc.errno not in {errno.ENOENT, errno.ENOPROTOOPT}:
                raise
            return from_sockaddr(sock.getsockname())
    except OSError as exc:
        raise Unavailable(f"connection is gone: {exc.strerror}") from exc


def is_loopback(ip: str) -> bool:
    """Whether an address stays on this machine."""
    return ipaddress.ip_address(ip).is_loopback


def reset_on_close(sock: socket.socket) -> None:
    """Make close() send RST: what a peer must see when a stream was cut, not ended."""
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LINGER_RESET)
    except OSError:
        return


def end_on_close(sock: socket.socket) -> None:
    """Make close() an orderly end again."""
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LINGER_OFF)
    except OSError:
        return
