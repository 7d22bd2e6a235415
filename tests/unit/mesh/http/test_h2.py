"""The HTTP/2 codec of the control plane: windows, floods, GOAWAY, and peers that break rules."""

from __future__ import annotations

import hpack
import pytest

from mesh.errors import LocalProtocolError, RemoteProtocolError
from mesh.http import events as ev
from mesh.http import h2_frames as frames
from mesh.http.abuse import TokenBucket
from mesh.http.h2 import H2Codec, Limits

REQUEST = [
    (":method", "POST"),
    (":scheme", "http"),
    (":path", "/a"),
    (":authority", "x"),
]
RESPONSE = [(":status", "200")]
NOW = 100.0


def block(*extra: tuple[str, str]) -> bytes:
    return bytes(hpack.Encoder().encode([*REQUEST, *extra]))


def headers(stream_id: int, *, end: bool = False) -> bytes:
    return frames.pack_headers(stream_id, block(), end_stream=end, max_frame=16384)


def started_server(**kwargs: object) -> H2Codec:
    server = H2Codec(client=False, **kwargs)
    server.data_to_send()
    events = server.receive_data(frames.PREFACE + frames.pack_frame(frames.SETTINGS, 0, 0), NOW)
    assert events == [ev.SettingsReceived()]
    server.data_to_send()
    return server


def pair(limits: Limits | None = None) -> tuple[H2Codec, H2Codec]:
    client, server = H2Codec(client=True, limits=limits), H2Codec(client=False, limits=limits)
    for _ in range(2):
        exchange(client, server)
        exchange(server, client)
    return client, server


def exchange(source: H2Codec, target: H2Codec) -> list[ev.Event]:
    return target.receive_data(source.data_to_send(), NOW)


def sent_frames(codec: H2Codec) -> list[tuple[int, int, bytes]]:
    """(type, stream, payload) of what is due."""
    data, out = codec.data_to_send(), []
    while data:
        high, low, kind, _, stream_id = frames.HEADER.unpack_from(data)
        length = high << 8 | low
        out.append((kind, stream_id, data[9 : 9 + length]))
        data = data[9 + length :]
    return out


def goaway_code(codec: H2Codec) -> int:
    kind, stream_id, payload = sent_frames(codec)[-1]
    assert (kind, stream_id) == (frames.GOAWAY, 0)
    return int.from_bytes(payload[4:8], "big")


def broken(codec: H2Codec, data: bytes) -> RemoteProtocolError:
    with pytest.raises(RemoteProtocolError) as caught:
        codec.receive_data(data, NOW)
    assert codec.failed
    assert goaway_code(codec) == caught.value.h2_code
    return caught.value


# ---- an exchange


@pytest.mark.parametrize("piece", [1, 7, 10_000])
def test_request_and_response(piece: int) -> None:
    client, server = pair()
    stream_id = client.open_stream(REQUEST)
    client.send_data(stream_id, b"body", end_stream=True)
    wire, events = client.data_to_send(), []
    for start in range(0, len(wire), piece):
        events += server.receive_data(wire[start : start + piece], NOW)
    assert events == [
        ev.RequestReceived(1, tuple(REQUEST)),
        ev.DataReceived(1, b"body", 4),
        ev.StreamEnded(1),
    ]
    server.send_headers(1, RESPONSE)
    server.send_data(1, b"answer")
    server.send_headers(1, [("grpc-status", "0")], end_stream=True)
    assert exchange(server, client) == [
        ev.ResponseReceived(1, tuple(RESPONSE)),
        ev.DataReceived(1, b"answer", 6),
        ev.TrailersReceived(1, (("grpc-status", "0"),)),
        ev.StreamEnded(1),
    ]


def test_header_bytes_are_latin1_and_lossless() -> None:
    server = started_server()
    data = bytes(hpack.Encoder().encode([*REQUEST, ("x", b"\xe9\xff")]))
    (event,) = server.receive_data(
        frames.pack_headers(1, data, end_stream=False, max_frame=16384), NOW
    )
    assert isinstance(event, ev.RequestReceived)
    assert event.headers[-1] == ("x", "éÿ")


def test_windows_open_only_when_data_is_acknowledged() -> None:
    client, server = pair(Limits(stream_window=65535, connection_window=65535))
    stream_id = client.open_stream(REQUEST)
    exchange(client, server)
    sent = 0
    while room := client.sendable(stream_id):
        client.send_data(stream_id, b"x" * room)
        sent += room
    assert sent == 65535
    received = exchange(client, server)
    assert exchange(server, client) == []
    assert client.sendable(stream_id) == 0
    server.acknowledge(stream_id, sum(event.credit for event in received))
    assert {event.stream_id for event in exchange(server, client)} == {0, stream_id}
    assert client.sendable(stream_id) > 0


def test_a_peer_that_overruns_the_window_is_cut_off() -> None:
    server = started_server(limits=Limits(stream_window=65535, connection_window=65535))
    server.receive_data(headers(1), NOW)
    data = frames.pack_frame(frames.DATA, 0, 1, b"x" * 16384)
    assert broken(server, data * 5).h2_code == frames.FLOW_CONTROL_ERROR


def test_streams_are_counted_on_both_sides() -> None:
    client, server = pair(Limits(max_streams=2))
    assert client.can_open()
    for _ in range(2):
        client.open_stream(REQUEST)
    assert not client.can_open()
    exchange(client, server)
    server.reset(1, frames.CANCEL)
    assert exchange(server, client) == [ev.StreamCut(1, frames.CANCEL, by_peer=True)]
    assert client.can_open()
    server = started_server(limits=Limits(max_streams=2))
    server.receive_data(headers(1) + headers(3), NOW)
    broken(server, headers(5))


def test_reset_of_a_stream_that_is_gone_does_nothing() -> None:
    client, server = pair()
    client.open_stream(REQUEST, end_stream=True)
    exchange(client, server)
    server.send_headers(1, RESPONSE, end_stream=True)
    exchange(server, client)
    client.reset(1, frames.CANCEL)
    assert client.data_to_send() == b""


def test_our_own_mistakes_are_local() -> None:
    client, _ = pair()
    with pytest.raises(LocalProtocolError):
        client.send_data(7, b"x")
    with pytest.raises(LocalProtocolError):
        client.open_stream([*REQUEST, ("x", "☂")])


# ---- GOAWAY


def test_streams_go_on_after_goaway_in_both_directions() -> None:
    client, server = pair()
    client.open_stream(REQUEST)
    exchange(client, server)
    server.send_goaway(frames.NO_ERROR, "bye", last_stream_id=1)
    server.send_headers(1, RESPONSE)
    assert exchange(server, client) == [
        ev.ResponseReceived(1, tuple(RESPONSE)),
        ev.GoawayReceived(1, frames.NO_ERROR, "bye"),
    ]
    client.send_data(1, b"more", end_stream=True)
    assert exchange(client, server) == [ev.DataReceived(1, b"more", 4), ev.StreamEnded(1)]
    server.send_headers(1, [("grpc-status", "0")], end_stream=True)
    assert exchange(server, client)[-1] == ev.StreamEnded(1)


@pytest.mark.parametrize("piece", [1, 3, 9, 11, 100])
def test_goaway_cut_anywhere_among_other_frames(piece: int) -> None:
    client, _ = pair()
    wire = (
        frames.pack_frame(frames.PING, frames.ACK, 0, b"12345678")
        + frames.pack_goaway(5, 2, b"x" * 30)
        + frames.pack_frame(frames.PING, frames.ACK, 0, b"abcdefgh")
    )
    events = []
    for start in range(0, len(wire), piece):
        events += client.receive_data(wire[start : start + piece], NOW)
    expected = {
        ev.PongReceived(b"12345678"),
        ev.GoawayReceived(5, 2, "x" * 30),
        ev.PongReceived(b"abcdefgh"),
    }
    assert set(events) == expected
    assert len(events) == 3


@pytest.mark.parametrize(
    "frame",
    [
        frames.pack_frame(frames.GOAWAY, 0, 0, b"1234567"),
        frames.pack_frame(frames.GOAWAY, 0, 0, b"1" * 5000),
        frames.pack_frame(frames.GOAWAY, 0, 1, b"12345678"),
    ],
)
def test_malformed_goaways(frame: bytes) -> None:
    client, _ = pair()
    broken(client, frame)


# ---- floods


def rapid_reset(count: int) -> bytes:
    cut = (
        headers(stream_id) + frames.pack_rst(stream_id, frames.CANCEL)
        for stream_id in range(1, 2 * count, 2)
    )
    return b"".join(cut)


def provoked_resets(count: int) -> bytes:
    """DATA behind END_STREAM: it is the server that resets."""
    data = frames.pack_frame(frames.DATA, 0, 1, b"x")
    return headers(1, end=True) + data * count


def empty_data(count: int) -> bytes:
    return headers(1) + frames.pack_frame(frames.DATA, 0, 1) * count


FLOODS = {
    "rapid reset": rapid_reset,
    "provoked resets": provoked_resets,
    "ping": lambda n: frames.pack_frame(frames.PING, 0, 0, b"12345678") * n,
    "pong": lambda n: frames.pack_frame(frames.PING, frames.ACK, 0, b"12345678") * n,
    "settings": lambda n: frames.pack_frame(frames.SETTINGS, 0, 0) * n,
    "priority": lambda n: frames.pack_frame(frames.PRIORITY, 0, 1, b"\0\0\0\0\x10") * n,
    "window update": lambda n: frames.pack_window_update(0, 1) * n,
    "empty data": empty_data,
    "unknown frames": lambda n: frames.pack_frame(0x42, 0, 0) * n,
    "goaway": lambda n: frames.pack_goaway(0, 0) * n,
}


@pytest.mark.parametrize("flood", FLOODS.values(), ids=FLOODS.keys())
def test_floods_are_told_to_calm_down(flood) -> None:
    few, many = flood(40), flood(200)
    codec = started_server(bucket=TokenBucket(100, 10))
    codec.receive_data(few, NOW)
    assert not codec.failed
    codec = started_server(bucket=TokenBucket(100, 10))
    with pytest.raises(RemoteProtocolError) as caught:  # noqa: PT012
        for start in range(0, len(many), 1000):
            codec.receive_data(many[start : start + 1000], NOW)
    assert caught.value.h2_code == frames.ENHANCE_YOUR_CALM
    assert goaway_code(codec) == frames.ENHANCE_YOUR_CALM
    with pytest.raises(RemoteProtocolError):
        codec.receive_data(few, NOW)


def test_a_ping_each_half_minute_is_no_flood() -> None:
    server = started_server(bucket=TokenBucket(20, 0.1))
    ping = frames.pack_frame(frames.PING, 0, 0, b"12345678")
    for turn in range(500):
        server.receive_data(ping, NOW + 30 * turn)
        assert sent_frames(server) == [(frames.PING, 0, b"12345678")]


def test_window_updates_in_proportion_to_our_data_are_free() -> None:
    server = started_server(bucket=TokenBucket(10, 0))
    server.receive_data(headers(1), NOW)
    server.send_headers(1, RESPONSE)
    for _ in range(1000):
        server.send_data(1, b"x" * 10)
        server.receive_data(
            frames.pack_window_update(0, 10) + frames.pack_window_update(1, 10), NOW
        )
        server.data_to_send()


def test_answers_are_bounded_while_the_peer_does_not_read() -> None:
    server = started_server(bucket=TokenBucket(1e9, 0), limits=Limits(max_pending=5000))
    pings = frames.pack_frame(frames.PING, 0, 0, b"12345678") * 100
    with pytest.raises(RemoteProtocolError, match="does not read"):  # noqa: PT012
        for _ in range(100):
            server.receive_data(pings, NOW)
    assert server.pending < 7000


def test_a_peer_cannot_make_our_table_grow() -> None:
    server = started_server()
    huge = (1).to_bytes(2, "big") + (1 << 30).to_bytes(4, "big")
    server.receive_data(frames.pack_frame(frames.SETTINGS, 0, 0, huge) + headers(1), NOW)
    server.send_headers(1, [*RESPONSE, *((f"n{i}", "v" * 1000) for i in range(10))])
    fields = [payload for kind, _, payload in sent_frames(server) if kind == frames.HEADERS]
    decoder = hpack.Decoder()
    decoder.max_allowed_table_size = 1 << 30
    decoder.decode(fields[0])
    assert decoder.header_table_size == 4096


# ---- peers that break rules


@pytest.mark.parametrize(
    ("extra", "problem"),
    [
        (("Upper", "x"), "uppercase"),
        (("x", "a\r\nb: c"), "value"),
        (("transfer-encoding", "chunked"), "transfer-encoding"),
        ((":path", "/b"), "uplicate|seudo"),
    ],
)
def test_malformed_heads(extra: tuple[str, str], problem: str) -> None:
    server = started_server()
    data = frames.pack_headers(1, block(extra), end_stream=False, max_frame=16384)
    with pytest.raises(RemoteProtocolError, match=f"(?i){problem}"):
        server.receive_data(data, NOW)


def test_header_lists_are_bounded() -> None:
    server = started_server(limits=Limits(max_header_list=8000))
    encoder = hpack.Encoder()
    bomb = encoder.encode([*REQUEST, ("c", "a" * 3000)]) + b"\xbe" * 5
    data = frames.pack_headers(1, bytes(bomb), end_stream=False, max_frame=16384)
    assert broken(server, data).h2_code == frames.ENHANCE_YOUR_CALM


def test_continuation_flood() -> None:
    server = started_server()
    start = frames.pack_frame(frames.HEADERS, 0, 1, block())
    with pytest.raises(RemoteProtocolError):
        server.receive_data(start + frames.pack_frame(frames.CONTINUATION, 0, 1) * 1000, NOW)


@pytest.mark.parametrize(
    "data",
    [
        b"GET / HTTP/1.1\r\nhost: x\r\n\r\n",
        frames.PREFACE + b"\0\0\x08\x06\0\0\0\0\x01" + b"12345678",
        frames.PREFACE + b"\xff\xff\xff\x00\0\0\0\0\x01",
        frames.PREFACE + frames.pack_frame(frames.HEADERS, 0x4, 2, block()),
        frames.PREFACE + frames.pack_frame(frames.HEADERS, 0x4, 1, b"\xff\xff\xff\xff\xff\xff"),
        frames.PREFACE + frames.pack_frame(frames.SETTINGS, 0, 0, b"12345"),
        frames.PREFACE + frames.pack_frame(frames.RST_STREAM, 0, 1, b"\0\0\0\x08"),
        frames.PREFACE + frames.pack_frame(frames.CONTINUATION, 0, 1, b""),
        frames.PREFACE + frames.pack_frame(frames.PUSH_PROMISE, 0x4, 1, b"\0\0\0\x02"),
    ],
)
def test_garbage_ends_the_connection_and_nothing_else(data: bytes) -> None:
    server = H2Codec(client=False)
    server.data_to_send()
    broken(server, data)
