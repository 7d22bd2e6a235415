"""One HTTP/2 exchange as trio code sees it: wait, receive, send, reset.

A stream belongs to a `mesh.http.driver.Connection`, which feeds it (`on_*`, synchronous).
What the peer sends is kept until `receive` takes it, and only then credited, so unread
bytes are bounded by the stream's window. `send` waits for the peer's window and while
`SEND_AHEAD` bytes of the connection are unsent.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

import trio

from mesh.errors import LocalProtocolError, MeshError, RemoteProtocolError, Unavailable
from mesh.http import h2_frames as frames
from mesh.http.events import Headers

if TYPE_CHECKING:
    from mesh.http.driver import Connection

SEND_AHEAD: Final = 64 << 10


class StreamReset(RemoteProtocolError):
    """The stream was cut with `h2_code`, by the peer or for its fault."""


class Stream:
    """A request and its response. One task may receive while another sends.

    `headers` is the peer's head: the request's on a server, on a client the response's once
    `wait_headers` returned. `trailers` are set when `receive` has given b"".
    """

    def __init__(self, connection: Connection, stream_id: int, headers: Headers) -> None:
        self.connection = connection
        self.id = stream_id
        self.headers = headers
        self.trailers: Headers = ()
        self.scope = trio.CancelScope()
        """Around the server's handler; cancelled when the peer cuts the stream."""
        self.ended_by_peer = False
        self.ended_by_us = False
        self._failure: MeshError | None = None
        self._unread = bytearray()
        self._credit = 0
        self._over = False
        self._receivers = trio.lowlevel.ParkingLot()
        self._senders = trio.lowlevel.ParkingLot()

    # ---- receiving

    async def wait_headers(self) -> Headers:
        """The response's head (client). Raises StreamReset or Unavailable."""
        await trio.lowlevel.checkpoint()
        while not self.headers:
            if self._failure is not None:
                raise self._failure
            await self._receivers.park()
        return self.headers

    async def receive(self) -> bytes:
        """Some of the body, b"" at its end. Raises StreamReset or Unavailable; what came
        before the failure is given first. If cancelled: nothing is lost.
        """
        await trio.lowlevel.checkpoint()
        while not self._unread:
            if self.ended_by_peer:
                return b""
            if self._failure is not None:
                raise self._failure
            await self._receivers.park()
        data = bytes(self._unread)
        self._unread.clear()
        self._give_credit()
        return data

    # ---- sending

    async def send_headers(
        self, headers: Sequence[tuple[str, str]], *, end_stream: bool = False
    ) -> None:
        """The response's head, or trailers (then with `end_stream`).

        Raises StreamReset or Unavailable. If cancelled: nothing was sent.
        """
        await trio.lowlevel.checkpoint()
        await self._wait_room(windowed=False)
        self.connection.codec.send_headers(self.id, headers, end_stream=end_stream)
        self._sent(end_stream)

    async def send(self, data: bytes, *, end_stream: bool = False) -> None:
        """Body. Raises StreamReset or Unavailable. If cancelled: a part may be sent, so the
        stream must be reset.
        """
        await trio.lowlevel.checkpoint()
        view = memoryview(data)
        while True:
            room = await self._wait_room(windowed=bool(view))
            piece, view = view[:room], view[room:]
            last = not view
            if piece or end_stream:
                ends = end_stream and last
                self.connection.codec.send_data(self.id, bytes(piece), end_stream=ends)
                self._sent(ends)
            if last:
                return

    async def _wait_room(self, *, windowed: bool) -> int:
        """Until something may be sent; how much body."""
        codec = self.connection.codec
        # Wake-ups are no progress: the patience is for the whole wait.
        deadline = trio.current_time() + self.connection.timing.stall_seconds
        while True:
            if self._failure is not None:
                raise self._failure
            if self.ended_by_us or self._over:
                raise LocalProtocolError("the stream was already ended")
            if self.connection.is_over:
                raise self.connection.failure_for_streams()
            if codec.pending < SEND_AHEAD:
                room = codec.sendable(self.id) if windowed else 0
                if room or not windowed:
                    return room
            with trio.move_on_at(deadline) as patience:
                await self._senders.park()
            if patience.cancelled_caught:
                self.reset(frames.CANCEL)
                raise Unavailable(f"{self.connection.peer} takes no data")

    def _sent(self, end_stream: bool) -> None:
        if end_stream:
            self.ended_by_us = True
            self._check_over()
        self.connection.wake_writer()

    # ---- the end

    def reset(self, code: int = frames.CANCEL) -> None:
        """Cut the stream; nothing happens when it is over or its connection is gone."""
        if self._over:
            return
        if not self.connection.codec.failed:
            self.connection.codec.reset(self.id, code)
        if self._failure is None:
            name = frames.error_name(code)
            self._failure = StreamReset(f"the stream was cut by us: {name}", h2_code=code)
        self._finish_now()
        self.connection.wake_writer()

    def finish(self) -> None:
        """The user is done: what is unread is credited, what is open is cut.

        A server that has answered whole cuts the rest of the request with NO_ERROR
        (RFC 9113 section 8.1), otherwise INTERNAL_ERROR; a client cuts with CANCEL.
        """
        if not self._over:
            if not self.connection.is_server:
                self.reset(frames.CANCEL)
            else:
                self.reset(frames.NO_ERROR if self.ended_by_us else frames.INTERNAL_ERROR)
        self._unread.clear()
        self._give_credit()

    def _give_credit(self) -> None:
        credit, self._credit = self._credit, 0
        if credit and not self.connection.codec.failed:
            self.connection.codec.acknowledge(self.id, credit)
            self.connection.wake_writer()

    def _check_over(self) -> None:
        if self.ended_by_us and self.ended_by_peer:
            self._finish_now()

    def _finish_now(self) -> None:
        self._over = True
        self._receivers.unpark_all()
        self._senders.unpark_all()
        self.connection.forget(self)

    # ---- for the connection

    def on_headers(self, headers: Headers) -> None:
        """The response's head came."""
        self.headers = headers
        self._receivers.unpark_all()

    def on_trailers(self, headers: Headers) -> None:
        """Trailers came; `on_end` follows."""
        self.trailers = headers

    def on_data(self, data: bytes, credit: int) -> bool:
        """Body came. False when nobody will take it, so that it is credited at once."""
        if self._over:
            return False
        if not data:
            return False  # padding only
        self._unread += data
        self._credit += credit
        self._receivers.unpark_all()
        return True

    def on_end(self) -> None:
        """The peer sends no more."""
        self.ended_by_peer = True
        self._receivers.unpark_all()
        self._check_over()

    def on_cut(self, code: int) -> None:
        """RST_STREAM. After a whole response it only says that our request is not needed."""
        name = frames.error_name(code)
        self.on_failure(StreamReset(f"the peer cut the stream: {name}", h2_code=code))

    def on_failure(self, failure: MeshError) -> None:
        """The stream cannot go on."""
        if self._failure is None:
            self._failure = failure
        self._finish_now()
        self.scope.cancel()

    def wake_sender(self) -> None:
        """There may be room."""
        self._senders.unpark_all()
