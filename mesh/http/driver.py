"""One HTTP/2 connection of the control plane on a trio stream, either end of it.

One task reads, one writes, one watches the clock (PING keepalive, idleness, the first
SETTINGS); on the server each request is a task of its own, cancelled when the peer cuts its
stream. Everything that waits has a bound: unread DATA by the windows, unsent bytes by
`SEND_AHEAD`, a peer that takes nothing by `stall_seconds`.

The rules of the protocol live in `mesh.http.h2`; who dials and who accepts in
`mesh.http.client` and `mesh.http.server`.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import assert_never

import trio

from mesh.errors import MeshError, ProtocolError, RemoteProtocolError, Unavailable
from mesh.http import events as ev
from mesh.http import h2_frames as frames
from mesh.http.h2 import H2Codec, Limits
from mesh.http.stream import Stream
from mesh.sockets import SocketAddress

READ_BYTES = 64 << 10
CLOSE_SECONDS = 1.0
LINGER_READS = 64
DRAIN_ROUND_TRIP_SECONDS = 1.0
_KEEPALIVE = b"ambit-ka"
_DRAIN = b"ambit-dr"


@dataclass(frozen=True, slots=True)
class Timing:
    """How patient a connection is. Seconds; infinity turns one off."""

    ping_seconds: float = 30.0
    """Without a byte from the peer for so long, PING it."""
    ping_timeout: float = 10.0
    idle_seconds: float = math.inf
    """Without a stream for so long, end the connection."""
    settings_seconds: float = 10.0
    stall_seconds: float = math.inf
    """A stream whose peer takes nothing for so long is reset."""


class Connection:
    """Streams over one trio stream, which it owns: it is closed when `run` ends.

    With a `handler` it is a server's, which runs it for every request; without, a client's.
    `peer` and `peer_certificate` (DER) are facts of the transport for whoever handles a
    stream. `failure` says why the connection ended, None after an orderly end.
    """

    def __init__(
        self,
        transport: trio.abc.Stream,
        *,
        handler: Callable[[Stream], Awaitable[None]] | None = None,
        limits: Limits | None = None,
        timing: Timing | None = None,
        peer: SocketAddress | None = None,
        peer_certificate: bytes | None = None,
    ) -> None:
        self.peer = peer if peer is not None else SocketAddress("", 0)
        self.peer_certificate = peer_certificate
        self.failure: MeshError | None = None
        self.timing = timing if timing is not None else Timing()
        self.codec = H2Codec(client=handler is None, limits=limits)
        self.ready = trio.Event()
        """The peer's SETTINGS came."""
        self.draining = trio.Event()
        """One of the ends has sent GOAWAY."""
        self.closed = trio.Event()
        self._transport = transport
        self._handler = handler
        self._streams: dict[int, Stream] = {}
        self._accept_up_to = frames.LARGEST_STREAM_ID
        self._scope = trio.CancelScope()
        self._wake_writer = trio.Event()
        self._slots = trio.lowlevel.ParkingLot()
        self._heard = trio.Event()
        self._last_heard = -math.inf
        self._idle_since = -math.inf
        self._drain_pong = trio.Event()
        self._ending = trio.Event()
        self._writing = trio.CancelScope(shield=True)

    @property
    def is_server(self) -> bool:
        """Whether the peer opens the streams."""
        return self._handler is not None

    @property
    def is_usable(self) -> bool:
        """Whether new streams may be opened."""
        return not (self.is_over or self.draining.is_set())

    @property
    def is_over(self) -> bool:
        """Whether nothing can be sent on streams any more."""
        return self._ending.is_set() or self.codec.failed

    @property
    def stream_count(self) -> int:
        """Streams that are not over."""
        return len(self._streams)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Carry the connection until it ends; `failure` tells how. Raises nothing but bugs of
        the handler. If cancelled: handlers are cancelled, a GOAWAY is tried, all is closed.
        """
        self._last_heard = self._idle_since = trio.current_time()
        try:
            with self._scope:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._write)
                    nursery.start_soon(self._watch)
                    task_status.started()
                    try:
                        await self._read(nursery)
                    finally:
                        # Also when a handler or the outside cancels the nursery: the body is
                        # cancelled with it, and the shielded writer is told to come to an end.
                        self._begin_end()
                    nursery.cancel_scope.cancel()
        finally:
            try:
                await self._close_transport()
            finally:
                self.closed.set()

    def close(self, failure: MeshError | None = None) -> None:
        """End the connection now, with GOAWAY; `failure` is kept as the reason."""
        if self._ending.is_set() or self._scope.cancel_called:
            return
        self.failure = self.failure or failure
        if isinstance(failure, RemoteProtocolError):
            self.codec.fail(failure)
        self._scope.cancel()

    async def drain(self) -> None:
        """Announce the end and wait until the streams are over, then close.

        Streams that the peer opens before it hears of it are still served (RFC 9113
        section 6.8). If cancelled: GOAWAY was sent, the streams go on; call `close`.
        """
        if not self.draining.is_set():
            self.draining.set()
            self.codec.send_goaway(last_stream_id=frames.LARGEST_STREAM_ID)
            if not self.codec.failed:
                self.codec.ping(_DRAIN)
            self.wake_writer()
            with trio.move_on_after(DRAIN_ROUND_TRIP_SECONDS):
                await self._drain_pong.wait()
            self._accept_up_to = self.codec.highest_inbound_stream
            self.codec.send_goaway()
            self.wake_writer()
        while self._streams and not self._ending.is_set():
            await self._slots.park()
        self.close()

    async def open_stream(self, headers: Sequence[tuple[str, str]]) -> Stream:
        """Send a request head, once the peer takes one more stream.

        Raises Unavailable when the connection drains or is gone. If cancelled: no stream.
        """
        await trio.lowlevel.checkpoint()
        while True:
            if not self.is_usable:
                raise self.failure_for_streams()
            if self.codec.can_open():
                break
            await self._slots.park()
        stream = Stream(self, self.codec.open_stream(headers), ())
        self._streams[stream.id] = stream
        self.wake_writer()
        return stream

    def failure_for_streams(self) -> MeshError:
        """What a stream that cannot go on raises."""
        if isinstance(self.failure, Unavailable):
            return Unavailable(str(self.failure))
        reason = self.failure or ("draining" if self.draining.is_set() else "closed")
        return Unavailable(f"the connection to {self.peer} is gone: {reason}")

    # ---- for streams

    def wake_writer(self) -> None:
        """There may be bytes to send."""
        self._wake_writer.set()

    def forget(self, stream: Stream) -> None:
        """The stream is over."""
        if self._streams.pop(stream.id, None) is None:
            return
        self._idle_since = trio.current_time()
        self._slots.unpark_all()
        if not self._streams and self._drained_by_peer():
            self.close()

    # ---- reading

    async def _read(self, nursery: trio.Nursery) -> None:
        try:
            while True:
                try:
                    data = await self._transport.receive_some(READ_BYTES)
                except (trio.BrokenResourceError, trio.ClosedResourceError, OSError) as exc:
                    raise Unavailable(f"{self.peer} broke the connection: {_cause(exc)}") from exc
                if not data:
                    if self._streams:
                        raise Unavailable(f"{self.peer} closed the connection")
                    return
                self._last_heard = trio.current_time()
                self._heard.set()
                for event in self.codec.receive_data(bytes(data), self._last_heard):
                    self._dispatch(event, nursery)
                self.wake_writer()
        except (ProtocolError, Unavailable) as exc:
            self.failure = self.failure or exc

    def _dispatch(self, event: ev.Event, nursery: trio.Nursery) -> None:
        match event:
            case ev.RequestReceived():
                self._accept(event, nursery)
            case ev.ResponseReceived():
                if stream := self._streams.get(event.stream_id):
                    stream.on_headers(event.headers)
            case ev.TrailersReceived():
                if stream := self._streams.get(event.stream_id):
                    stream.on_trailers(event.headers)
            case ev.DataReceived():
                stream = self._streams.get(event.stream_id)
                if stream is None or not stream.on_data(event.data, event.credit):
                    self.codec.acknowledge(event.stream_id, event.credit)
            case ev.StreamEnded():
                if stream := self._streams.get(event.stream_id):
                    stream.on_end()
            case ev.StreamCut():
                if stream := self._streams.get(event.stream_id):
                    stream.on_cut(event.code)
            case ev.WindowOpened():
                if not event.stream_id:
                    self._wake_senders()
                elif stream := self._streams.get(event.stream_id):
                    stream.wake_sender()
            case ev.SettingsReceived():
                self.ready.set()
                self._slots.unpark_all()
                self._wake_senders()
            case ev.PongReceived():
                if event.payload == _DRAIN:
                    self._drain_pong.set()
            case ev.GoawayReceived():
                self._on_goaway(event)
            case _:
                assert_never(event)

    def _accept(self, event: ev.RequestReceived, nursery: trio.Nursery) -> None:
        if self._handler is None or event.stream_id > self._accept_up_to:
            self.codec.reset(event.stream_id, frames.REFUSED_STREAM)
            return
        stream = Stream(self, event.stream_id, event.headers)
        self._streams[stream.id] = stream
        nursery.start_soon(self._serve, stream, self._handler)

    async def _serve(self, stream: Stream, handler: Callable[[Stream], Awaitable[None]]) -> None:
        try:
            with stream.scope:
                await handler(stream)
        except MeshError:
            pass  # ends this stream only; the handler has recorded what it wanted to
        finally:
            stream.finish()

    def _on_goaway(self, event: ev.GoawayReceived) -> None:
        if event.code != frames.NO_ERROR:
            name = frames.error_name(event.code)
            self.failure = self.failure or Unavailable(
                f"{self.peer} ended the connection: {name} {event.debug}".rstrip()
            )
        self.draining.set()
        self._slots.unpark_all()
        for stream in list(self._streams.values()):
            if not self.is_server and stream.id > event.last_stream_id:
                stream.on_failure(Unavailable(f"{self.peer} is draining and refused the request"))
        if self._drained_by_peer() and not self._streams:
            self.close()

    def _drained_by_peer(self) -> bool:
        return not self.is_server and self.draining.is_set()

    # ---- writing

    async def _write(self) -> None:
        # Shielded, because a write cut short is half a frame: when the connection ends the
        # writer gets CLOSE_SECONDS for what is queued, the GOAWAY last.
        with self._writing:
            try:
                while True:
                    while data := self.codec.data_to_send():
                        await self._transport.send_all(data)
                        self._wake_senders()
                    if self._ending.is_set():
                        return
                    await self._wake_writer.wait()
                    self._wake_writer = trio.Event()
            except (trio.BrokenResourceError, trio.ClosedResourceError, OSError) as exc:
                # The reader knows better: an orderly end, or a GOAWAY that says why.
                with trio.move_on_after(CLOSE_SECONDS):
                    await self._ending.wait()
                    return
                self.failure = self.failure or Unavailable(
                    f"{self.peer} broke the connection: {_cause(exc)}"
                )
                self._scope.cancel()

    def _wake_senders(self) -> None:
        for stream in self._streams.values():
            stream.wake_sender()

    # ---- time

    async def _watch(self) -> None:
        timing = self.timing
        with trio.move_on_after(timing.settings_seconds) as patience:
            await self.ready.wait()
        if patience.cancelled_caught:
            self.close(RemoteProtocolError("no SETTINGS came", h2_code=frames.SETTINGS_TIMEOUT))
            return
        while True:
            idle_at = math.inf if self._streams else self._idle_since + timing.idle_seconds
            ping_at = self._last_heard + timing.ping_seconds
            now = trio.current_time()
            if idle_at <= now:
                self.close()
                return
            if ping_at <= now:
                await self._ping()
            else:
                # Streams come and go while we sleep; an idle time that started meanwhile
                # is over at the earliest after a whole period of it.
                await trio.sleep_until(min(ping_at, idle_at, now + timing.idle_seconds))

    async def _ping(self) -> None:
        await trio.lowlevel.checkpoint()  # nothing may be sent once the scope is cancelled
        self._heard = trio.Event()
        self.codec.ping(_KEEPALIVE)
        self.wake_writer()
        with trio.move_on_after(self.timing.ping_timeout):
            await self._heard.wait()
            return
        self.close(Unavailable(f"{self.peer} did not answer a PING"))
        await trio.sleep_forever()

    # ---- the end

    def _begin_end(self) -> None:
        if not self.codec.failed:
            self.codec.send_goaway(frames.NO_ERROR, str(self.failure or ""))
        self._ending.set()
        self._writing.deadline = trio.current_time() + CLOSE_SECONDS
        self.wake_writer()
        failure = self.failure_for_streams()
        for stream in list(self._streams.values()):
            stream.on_failure(failure)
        self._slots.unpark_all()

    async def _close_transport(self) -> None:
        if self.codec.failed and not self._writing.cancelled_caught:
            with trio.CancelScope(shield=True, deadline=trio.current_time() + CLOSE_SECONDS):
                await self._linger()
        await trio.aclose_forcefully(self._transport)

    async def _linger(self) -> None:
        # Closing a socket with unread bytes sends RST, which takes the GOAWAY away from the
        # peer again: end our side first, and read for a moment what is still on its way.
        bottom = self._transport
        while isinstance(bottom, trio.SSLStream):
            bottom = bottom.transport_stream
        if not isinstance(bottom, trio.SocketStream):
            return
        with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            await bottom.send_eof()
            for _ in range(LINGER_READS):
                if not await bottom.receive_some(READ_BYTES):
                    return


def _cause(exc: BaseException) -> str:
    return str(exc.__cause__ or exc) or type(exc).__name__
