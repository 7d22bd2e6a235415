"""A door from the lab's nodes to one port of the machine outside: for a collector that runs there.

The lab has no way out, by design. Who asks for traces at `localhost` means the machine's, so a
small process stays behind in the caller's network namespace and opens connections to that one
address, when the lab asks; their descriptors go through a unix socket. On each node the same
port of loopback leads there (`mesh.lab.doorway`), so the address is the same inside; the same port
of the node's own address does for its pods. Nothing else passes. No trio here: the process that
forks must not have it.
"""

from __future__ import annotations

import array
import ctypes
import os
import select
import signal
import socket
from typing import NoReturn

from mesh.errors import Unavailable

ENVIRONMENT = "AMBIT_LAB_DOOR"
CONNECT_SECONDS = 5.0
_PR_SET_PDEATHSIG = 1
_REFUSED = b"-"
_OPENED = b"+"


def leave_behind(host: str, port: int) -> socket.socket:
    """Fork the process that stays outside; the lab's end of the socket to it.

    Only the calling thread may exist. The process ends with its parent, or when nobody
    holds the lab's end any more.
    """
    inside, outside = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    if os.fork() == 0:
        _stand(outside.detach(), host, port)
    outside.close()
    return inside


def _stand(fd: int, host: str, port: int) -> NoReturn:
    try:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        # Whoever reads the caller's pipes to their end must not wait for us.
        null = os.open(os.devnull, os.O_RDWR)
        for each in (0, 1, 2):
            os.dup2(null, each)
        keep = os.dup2(fd, 3)
        os.closerange(4, os.sysconf("SC_OPEN_MAX"))
        with socket.socket(fileno=keep) as asked:
            while asked.recv(1):
                _answer(asked, host, port)
    finally:
        os._exit(0)


def _answer(asked: socket.socket, host: str, port: int) -> None:
    try:
        with socket.create_connection((host, port), timeout=CONNECT_SECONDS) as opened:
            told = array.array("i", [opened.fileno()])
            asked.sendmsg([_OPENED], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, told)])
    except OSError:
        asked.send(_REFUSED)


def ask(door: socket.socket) -> socket.socket:
    """A connection to the outside, opened out there. Blocks. Raises Unavailable."""
    try:
        door.send(_OPENED)
        # One request at a time, so what comes is the answer to ours.
        if not select.select([door], [], [], 2 * CONNECT_SECONDS)[0]:
            raise Unavailable("the process outside does not answer")
        said, fds, _, _ = socket.recv_fds(door, 1, 1)
    except OSError as exc:
        raise Unavailable(f"the process outside is gone: {exc.strerror}") from exc
    if said != _OPENED or not fds:
        raise Unavailable("nobody listens outside")
    return socket.socket(fileno=fds[0])
