"""One HTTP/2 connection of the control plane over memory streams and a clock that jumps."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest
import trio
import trio.testing

from mesh.errors import LocalProtocolError, RemoteProtocolError, Unavailable
from mesh.http import events as ev
from mesh.http import h2_frames as frames
from mesh.http.driver import Connection, Timing
from mesh.http.h2 import H2Codec, Limits
from mesh.http.stream import SEND_AHEAD, Stream, StreamReset

REQUEST = [(":method", "POST"), (":scheme", "http"), (":path", "/a"), (":authority", "x")]
RESPONSE = [(":status", "200")]
Handler = Callable[[Stream], Awaitable[None]]


@contextlib.asynccontextmanager
async def connected(
    handler: Handler, *, limits: Limits | None = None, timing: Timing | None = None
) -> AsyncIterator[tuple[Connection, Connection]]:
    """A client's and a server's connection, joined."""
    left, right = trio.testing.memory_stream_pair()
    client = Connection(left, limits=limits)
    server = Connection(right, handler=handler, limits=limits, timing=timing)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(client.run)
        nursery.start_soon(server.run)
        await client.ready.wait()
        yield client, server
        nursery.cancel_scope.cancel()


class Peer:
    """A peer that does exactly what the test says: a codec on a memory stream."""

    def __init__(self, stream: trio.abc.Stream, *, client: bool) -> None:
        self.stream = stream
        self.codec = H2Codec(client=client)

    async def flush(self) -> None:
        await self.stream.send_all(self.codec.data_to_send())

    async def read(self) -> list[ev.Event]:
        data = await self.stream.receive_some(1 << 20)
        if not data:
            raise EOFError
        return self.codec.receive_data(data, 0.0)

    async def read_until(self, kind: type) -> list[ev.Event]:
        events: list[ev.Event] = []
        while not any(isinstance(event, kind) for event in events):
            events += await self.read()
        return events


@contextlib.asynccontextmanager
async def scripted(
    handler: Handler | None, *, timing: Timing | None = None, limits: Limits | None = None
) -> AsyncIterator[tuple[Connection, Peer]]:
    """A connection of ours and a peer under the test's control."""
    left, right = trio.testing.memory_stream_pair()
    connection = Connection(left, handler=handler, timing=timing, limits=limits)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(connection.run)
        yield connection, Peer(right, client=handler is not None)
        nursery.cancel_scope.cancel()


async def echo(stream: Stream) -> None:
    await stream.send_headers(RESPONSE)
    while data := await stream.receive():
        await stream.send(data)
    await stream.send_headers([("grpc-status", "0")], end_stream=True)


async def never(stream: Stream) -> None:
    await trio.sleep_forever()


async def read_all(stream: Stream) -> bytes:
    body = b""
    while data := await stream.receive():
        body += data
    return body


# ---- exchanges


async def test_echo_of_more_than_all_windows():
    limits = Limits(stream_window=65535, connection_window=65535)
    async with connected(echo, limits=limits) as (client, server):
        bodies = [bytes([number]) * 500_000 for number in range(3)]

        async def exchange(body: bytes) -> None:
            stream = await client.open_stream(REQUEST)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(lambda: stream.send(body, end_stream=True))
                assert await stream.wait_headers() == tuple(RESPONSE)
                assert await read_all(stream) == body
            assert stream.trailers == (("grpc-status", "0"),)

        async with trio.open_nursery() as nursery:
            for body in bodies:
                nursery.start_soon(exchange, body)
        await trio.testing.wait_all_tasks_blocked()
        assert client.stream_count == server.stream_count == 0
        assert client.is_usable


async def test_unread_data_is_bounded_and_credited_in_the_end():
    limits = Limits(stream_window=65535, connection_window=100_000)
    released = trio.Event()

    async def sleepy(stream: Stream) -> None:
        if not released.is_set():
            await released.wait()
            await stream.send_headers(RESPONSE, end_stream=True)
        else:
            await echo(stream)

    async with connected(sleepy, limits=limits) as (client, _):
        first = await client.open_stream(REQUEST)
        with trio.move_on_after(0.1) as patience:
            await first.send(b"x" * 1_000_000)
        assert patience.cancelled_caught
        released.set()
        # The unread part goes back to the connection's window when the handler ends.
        assert await first.wait_headers()
        first.finish()
        second = await client.open_stream(REQUEST)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(lambda: second.send(b"y" * 300_000, end_stream=True))
            assert len(await read_all(second)) == 300_000


async def test_streams_wait_for_their_turn():
    gate = trio.Event()

    async def wait(stream: Stream) -> None:
        await gate.wait()
        await stream.send_headers(RESPONSE, end_stream=True)

    async with connected(wait, limits=Limits(max_streams=1)) as (client, _):
        first = await client.open_stream(REQUEST)
        with trio.move_on_after(0.05) as patience:
            await client.open_stream(REQUEST)
        assert patience.cancelled_caught
        gate.set()
        await first.wait_headers()
        first.finish()
        with trio.fail_after(30):
            second = await client.open_stream(REQUEST)
            await second.wait_headers()
        assert second.id == 3


# ---- cuts


async def test_a_cut_by_the_client_cancels_the_handler():
    ended = trio.Event()
    started = trio.Event()

    async def wait(stream: Stream) -> None:
        started.set()
        try:
            await trio.sleep_forever()
        finally:
            ended.set()

    async with connected(wait) as (client, server):
        stream = await client.open_stream(REQUEST)
        await started.wait()
        stream.finish()
        with trio.fail_after(30):
            await ended.wait()
        await trio.testing.wait_all_tasks_blocked()
        assert server.stream_count == 0
        with pytest.raises(StreamReset):
            await stream.receive()


async def test_whoever_waits_learns_of_the_cut():
    async def cut(stream: Stream) -> None:
        await stream.receive()
        stream.reset(frames.ENHANCE_YOUR_CALM)

    limits = Limits(stream_window=65535, connection_window=65535)
    async with connected(cut, limits=limits) as (client, _):
        stream = await client.open_stream(REQUEST)
        async with trio.open_nursery() as nursery:

            async def fails(function: Callable[[], Awaitable[object]]) -> None:
                with pytest.raises(StreamReset, match="ENHANCE_YOUR_CALM") as caught:
                    await function()
                assert caught.value.h2_code == frames.ENHANCE_YOUR_CALM

            nursery.start_soon(fails, stream.wait_headers)
            nursery.start_soon(fails, stream.receive)
            nursery.start_soon(fails, lambda: stream.send(b"x" * 1_000_000))


async def test_an_early_answer_wins_over_the_cut_behind_it():
    async def refuse(stream: Stream) -> None:
        await stream.send_headers([(":status", "200"), ("grpc-status", "7")], end_stream=True)

    async with connected(refuse) as (client, _):
        stream = await client.open_stream(REQUEST)
        with pytest.raises(StreamReset):  # noqa: PT012
            while True:
                await stream.send(b"x" * 10_000)
        assert ("grpc-status", "7") in await stream.wait_headers()
        assert await stream.receive() == b""


async def test_a_handler_that_fails_cuts_its_stream_only():
    async def fail(stream: Stream) -> None:
        if ("x", "fail") in stream.headers:
            raise Unavailable("not now")
        await echo(stream)

    async with connected(fail) as (client, _):
        stream = await client.open_stream([*REQUEST, ("x", "fail")])
        with pytest.raises(StreamReset, match="INTERNAL_ERROR"):
            await stream.wait_headers()
        stream = await client.open_stream(REQUEST)
        await stream.send(b"", end_stream=True)
        assert await stream.wait_headers()


async def test_a_bug_in_a_handler_comes_out_of_run():
    async def bug(stream: Stream) -> None:
        raise ZeroDivisionError

    left, right = trio.testing.memory_stream_pair()
    client = Connection(left)
    with pytest.RaisesGroup(pytest.RaisesGroup(ZeroDivisionError)):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(client.run)
            nursery.start_soon(Connection(right, handler=bug).run)
            stream = await client.open_stream(REQUEST)
            with pytest.raises((StreamReset, Unavailable)):
                await stream.wait_headers()
            await client.closed.wait()


async def test_sending_twice_to_the_end_is_our_bug():
    async with connected(echo) as (client, _):
        stream = await client.open_stream(REQUEST)
        await stream.send(b"", end_stream=True)
        with pytest.raises(LocalProtocolError):
            await stream.send(b"x")


# ---- cancelling each wait


@pytest.mark.parametrize("stage", ["headers", "receive", "send"])
async def test_a_cancelled_wait_leaves_the_connection_whole(stage):
    async def slow(stream: Stream) -> None:
        if ("x", "slow") in stream.headers:
            await trio.sleep_forever()
        await echo(stream)

    limits = Limits(stream_window=65535, connection_window=1 << 20)
    async with connected(slow, limits=limits) as (client, server):
        stream = await client.open_stream([*REQUEST, ("x", "slow")])
        with trio.move_on_after(0.05) as patience:
            if stage == "headers":
                await stream.wait_headers()
            elif stage == "receive":
                await stream.receive()
            else:
                await stream.send(b"x" * 1_000_000)
        assert patience.cancelled_caught
        stream.finish()
        with trio.fail_after(30):
            stream = await client.open_stream(REQUEST)
            await stream.send(b"hello", end_stream=True)
            assert await read_all(stream) == b"hello"
        await trio.testing.wait_all_tasks_blocked()
        assert server.stream_count == 0


async def test_cancelling_the_connection_closes_and_tells_the_peer():
    left, right = trio.testing.memory_stream_pair()
    connection = Connection(left, handler=never)
    peer = Peer(right, client=True)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(connection.run)
        peer.codec.open_stream(REQUEST)
        await peer.flush()
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    events = await peer.read()
    assert events[-1] == ev.GoawayReceived(1, frames.NO_ERROR, "")
    with pytest.raises(EOFError):
        await peer.read()
    assert connection.closed.is_set()
    with pytest.raises(trio.ClosedResourceError):
        await left.send_all(b"x")


# ---- a peer that does not read


async def test_a_stuck_peer_costs_a_bounded_amount_of_memory():
    sent = 0

    async def pour(stream: Stream) -> None:
        nonlocal sent
        await stream.send_headers(RESPONSE)
        while True:
            await stream.send(b"x" * 10_000)
            sent += 10_000

    async with scripted(pour) as (connection, peer):
        peer.codec.open_stream(REQUEST)
        await peer.flush()
        await trio.testing.wait_all_tasks_blocked()
        # the transport took the first piece, the writer holds one, the codec queues one more
        assert connection.codec.pending <= SEND_AHEAD + 20_000
        assert sent <= 4 * SEND_AHEAD


async def test_a_peer_that_takes_nothing_loses_its_stream(autojump_clock):
    failures = []

    async def pour(stream: Stream) -> None:
        await stream.send_headers(RESPONSE)
        try:
            await stream.send(b"x" * 1_000_000)
        except Unavailable as exc:
            failures.append(str(exc))
            raise

    timing = Timing(stall_seconds=60)
    async with connected(pour, timing=timing, limits=Limits(stream_window=65535)) as (client, _):
        stream = await client.open_stream(REQUEST)
        await trio.sleep(59)
        assert not failures
        await trio.sleep(2)
        assert len(failures) == 1
        assert "takes no data" in failures[0]
        await stream.receive()
        with pytest.raises(StreamReset, match="CANCEL"):
            await stream.receive()
        assert client.is_usable


# ---- time


async def test_no_settings(autojump_clock):
    async with scripted(never) as (connection, _):
        start = trio.current_time()
        await connection.closed.wait()
        assert trio.current_time() - start == pytest.approx(10, abs=0.1)
        assert isinstance(connection.failure, RemoteProtocolError)
        assert connection.failure.h2_code == frames.SETTINGS_TIMEOUT


@pytest.mark.parametrize("side", ["client", "server"])
async def test_a_silent_peer_is_pinged_and_given_up(autojump_clock, side):
    handler = never if side == "server" else None
    async with scripted(handler) as (connection, peer):
        await peer.flush()
        await connection.ready.wait()
        start = trio.current_time()
        await connection.closed.wait()
        assert trio.current_time() - start == pytest.approx(40, abs=0.1)
        assert isinstance(connection.failure, Unavailable)
        assert "PING" in str(connection.failure)
        with pytest.raises(Unavailable, match="PING"):
            await connection.open_stream(REQUEST)


async def test_a_peer_that_answers_is_kept_for_hours(autojump_clock):
    async with connected(never) as (client, server):
        stream = await client.open_stream(REQUEST)
        await trio.sleep(4 * 3600)
        assert client.is_usable
        assert server.stream_count == 1
        stream.finish()


async def test_an_idle_connection_is_ended_but_not_a_used_one(autojump_clock):
    async with connected(never, timing=Timing(idle_seconds=100)) as (client, server):
        stream = await client.open_stream(REQUEST)
        await trio.sleep(1000)
        assert client.is_usable
        stream.finish()
        start = trio.current_time()
        await client.closed.wait()
        assert 100 <= trio.current_time() - start <= 201
        assert server.failure is None


# ---- GOAWAY


async def test_drain_serves_what_is_open_and_then_ends():
    gate = trio.Event()

    async def wait(stream: Stream) -> None:
        await gate.wait()
        await stream.send_headers(RESPONSE)
        await stream.send(b"x" * 50_000)
        await stream.send_headers([("grpc-status", "0")], end_stream=True)

    async with connected(wait) as (client, server):
        stream = await client.open_stream(REQUEST)
        await trio.testing.wait_all_tasks_blocked()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(server.drain)
            await client.draining.wait()
            assert not client.is_usable
            with pytest.raises(Unavailable, match="draining"):
                await client.open_stream(REQUEST)
            gate.set()
            assert await read_all(stream) == b"x" * 50_000
            assert stream.trailers == (("grpc-status", "0"),)
        assert server.closed.is_set() or server.stream_count == 0
        with trio.fail_after(30):
            await client.closed.wait()
        assert client.failure is None


async def test_a_stream_opened_before_the_goaway_arrived_is_served():
    async with scripted(echo) as (connection, peer):
        await peer.flush()
        await connection.ready.wait()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(connection.drain)
            await trio.testing.wait_all_tasks_blocked()
            peer.codec.open_stream(REQUEST, end_stream=True)
            await peer.flush()
            events = await peer.read_until(ev.GoawayReceived)
            assert events[-1] == ev.GoawayReceived(frames.LARGEST_STREAM_ID, 0, "")
            await peer.flush()  # the answer to the PING: it has seen the GOAWAY
            events += await peer.read_until(ev.StreamEnded)
            while ev.GoawayReceived(1, frames.NO_ERROR, "") not in events:
                events += await peer.read()
        assert ev.TrailersReceived(1, (("grpc-status", "0"),)) in events


async def test_a_stream_opened_after_the_drain_is_refused():
    gate = trio.Event()

    async def wait(stream: Stream) -> None:
        await gate.wait()
        await echo(stream)

    async with scripted(wait) as (connection, peer):
        peer.codec.open_stream(REQUEST, end_stream=True)
        await peer.flush()
        await connection.ready.wait()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(connection.drain)
            await peer.read_until(ev.GoawayReceived)
            await peer.flush()
            await peer.read_until(ev.GoawayReceived)
            peer.codec.open_stream(REQUEST, end_stream=True)
            await peer.flush()
            events = await peer.read_until(ev.StreamCut)
            assert events[-1] == ev.StreamCut(3, frames.REFUSED_STREAM, by_peer=True)
            gate.set()


async def test_requests_above_the_last_stream_are_retryable():
    async with scripted(None) as (connection, peer):
        await peer.flush()
        first = await connection.open_stream(REQUEST)
        second = await connection.open_stream(REQUEST)
        await peer.read_until(ev.RequestReceived)
        peer.codec.send_goaway(last_stream_id=first.id)
        peer.codec.send_headers(first.id, RESPONSE, end_stream=True)
        await peer.flush()
        with pytest.raises(Unavailable, match="refused"):
            await second.wait_headers()
        assert await first.wait_headers() == tuple(RESPONSE)


async def test_goaway_with_an_error_is_the_reason():
    async with scripted(None) as (connection, peer):
        await peer.flush()
        stream = await connection.open_stream(REQUEST)
        await peer.read_until(ev.RequestReceived)
        peer.codec.send_goaway(frames.ENHANCE_YOUR_CALM, "too_many_pings")
        await peer.flush()
        await peer.stream.aclose()
        with pytest.raises(Unavailable, match=r"ENHANCE_YOUR_CALM too_many_pings"):
            await stream.wait_headers()


@pytest.mark.parametrize("garbage", [b"HTTP/1.1 400 Bad Request\r\n\r\n", b"\0" * 100])
async def test_garbage_ends_the_connection(garbage):
    async with scripted(None) as (connection, peer):
        await peer.flush()
        stream = await connection.open_stream(REQUEST)
        await peer.stream.send_all(garbage)
        with pytest.raises(Unavailable):
            await stream.wait_headers()
        assert isinstance(connection.failure, RemoteProtocolError)
        with pytest.raises(Unavailable):
            await connection.open_stream(REQUEST)


async def test_end_of_file_while_a_stream_is_open():
    async with scripted(None) as (connection, peer):
        await peer.flush()
        stream = await connection.open_stream(REQUEST)
        await peer.stream.send_eof()
        with pytest.raises(Unavailable, match="closed the connection"):
            await stream.wait_headers()
