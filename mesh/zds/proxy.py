"""The node proxy's end of ZDS: dial, say hello, receive and acknowledge."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Mapping
from types import TracebackType

import trio

from mesh import netns
from mesh.errors import RemoteProtocolError, Unavailable
from mesh.zds.codec import Add, Message, close_all, decode_request, encode_ack, encode_hello
from mesh.zds.packets import DEADLINE_SECONDS, io, receive, send


async def connect(
    path: str | os.PathLike[str],
    *,
    takes_listeners: bool = False,
    timeout: float = DEADLINE_SECONDS,
) -> ZdsConnection:
    """Dial the node agent and say hello. `timeout` in seconds. With `takes_listeners` an Add
    may bring listening sockets, and say that the answer is to bring them.

    Raises Unavailable (retry with back-off). If cancelled: nothing stays open.
    """
    sock = trio.socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        with trio.fail_after(timeout):
            with io(f"connect to {os.fspath(path)}"):
                await sock.connect(os.fspath(path))
            await send(sock, encode_hello(takes_listeners=takes_listeners))
    except trio.TooSlowError as exc:
        sock.close()
        raise Unavailable(f"ZDS connect to {os.fspath(path)}: timed out") from exc
    except BaseException:
        sock.close()
        raise
    return ZdsConnection(sock)


class ZdsConnection:
    """The proxy's end: `receive`, act, `ack`, and so on. A context manager that closes it."""

    def __init__(self, sock: trio.socket.SocketType) -> None:
        self._sock = sock

    async def receive(self) -> Message:
        """The agent's next message. The caller then owns the descriptors of an `Add`.

        Raises Unavailable when the agent is gone, RemoteProtocolError when it broke the
        protocol (which it has been told by then); in both cases: close and dial again.
        If cancelled: no message is lost and no descriptor stays open.
        """
        fds: list[int] = []
        try:
            data, fds = await receive(self._sock)
            if data:
                message = decode_request(data, fds)
                if isinstance(message, Add) and not netns.is_network_namespace(message.fds[0]):
                    raise RemoteProtocolError("ZDS add carries no network namespace")
                return message
        except RemoteProtocolError as exc:
            close_all(fds)
            # The agent should hear why; whether it still listens does not matter.
            with contextlib.suppress(Unavailable), trio.move_on_after(DEADLINE_SECONDS):
                await self.ack(str(exc))
            raise
        close_all(fds)
        raise Unavailable("ZDS: the node agent closed the connection")

    async def ack(self, error: str = "", listeners: Mapping[int, int] | None = None) -> None:
        """Answer the message received last; with `error` it was not carried out.

        `listeners`: a pod's listening sockets by `Listener`, lent, for the agent to keep.

        Raises Unavailable. If cancelled: the answer may or may not have been sent.
        """
        given = listeners or {}
        await send(self._sock, encode_ack(error, tuple(given)), tuple(given.values()))

    def close(self) -> None:
        """Close the connection; may be called again."""
        self._sock.close()

    def __enter__(self) -> ZdsConnection:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
