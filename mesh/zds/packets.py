"""Packets with descriptors on a SOCK_SEQPACKET socket, for both ends of ZDS."""

from __future__ import annotations

import contextlib
import socket
import struct
from collections.abc import Iterator, Sequence

import trio

from mesh.errors import RemoteProtocolError, Unavailable
from mesh.zds.codec import MAX_LISTENERS, PACKET_BYTES, close_all

DEADLINE_SECONDS = 5.0

# Room for more descriptors than are allowed, so that a surplus is seen and closed by us.
_ANCILLARY_BYTES = socket.CMSG_SPACE((MAX_LISTENERS + 8) * struct.calcsize("i"))


@contextlib.contextmanager
def io(what: str) -> Iterator[None]:
    """OSError and use after close become Unavailable."""
    try:
        yield
    except trio.ClosedResourceError as exc:
        raise Unavailable(f"ZDS {what}: connection closed") from exc
    except OSError as exc:
        raise Unavailable(f"ZDS {what}: {exc.strerror or exc}") from exc


async def send(sock: trio.socket.SocketType, data: bytes, fds: Sequence[int] = ()) -> None:
    """One packet. Raises Unavailable. If cancelled: it may have been sent."""
    ancillary = []
    if fds:
        rights = struct.pack(f"{len(fds)}i", *fds)
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)]
    with io("send"):
        await sock.sendmsg([data], ancillary)


async def receive(sock: trio.socket.SocketType) -> tuple[bytes, list[int]]:
    """One packet and the descriptors with it, now the caller's; no bytes at the end.

    Raises RemoteProtocolError when either was cut short, after closing what came.
    """
    with io("receive"):
        data, ancillary, flags, _ = await sock.recvmsg(
            PACKET_BYTES, _ANCILLARY_BYTES, socket.MSG_CMSG_CLOEXEC
        )
    fds: list[int] = []
    for level, kind, payload in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            count = len(payload) // struct.calcsize("i")
            fds += struct.unpack_from(f"{count}i", payload)
    if flags & socket.MSG_TRUNC:
        close_all(fds)
        raise RemoteProtocolError(f"ZDS packet is longer than {PACKET_BYTES} bytes")
    if flags & socket.MSG_CTRUNC:
        close_all(fds)
        raise RemoteProtocolError("ZDS packet with descriptors that could not be received")
    return data, fds
