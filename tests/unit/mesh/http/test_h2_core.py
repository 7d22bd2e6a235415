"""H2Core, transcript by transcript: what it hears, what it answers, what it refuses."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

import pytest

from mesh.errors import LocalProtocolError, RemoteProtocolError
from mesh.http import h2_frames as h2
from mesh.http.abuse import TokenBucket
from mesh.http.h2_core import H2Core
from mesh.http.hpack_table import encode_block
from tests.support.h2_script import Recorder, make_core, take_out

CONNECT = ((b":method", b"CONNECT"), (b":authority", b"10.0.0.1:80"))
BLOCK = encode_block(CONNECT)
SETTINGS = h2.pack_frame(h2.SETTINGS, 0, 0)
END = h2.END_STREAM
WHOLE = h2.END_HEADERS


def settings(**values: int) -> bytes:
    names = {
        "table": h2.HEADER_TABLE_SIZE,
        "push": h2.ENABLE_PUSH,
        "streams": h2.MAX_CONCURRENT_STREAMS,
        "window": h2.INITIAL_WINDOW_SIZE,
        "frame": h2.MAX_FRAME_SIZE,
        "connect": h2.ENABLE_CONNECT_PROTOCOL,
    }
    body = b"".join(struct.pack(">HI", names[name], value) for name, value in values.items())
    return h2.pack_frame(h2.SETTINGS, 0, 0, body)


def headers(stream_id: int, block: bytes = BLOCK, flags: int = WHOLE) -> bytes:
    return h2.pack_frame(h2.HEADERS, flags, stream_id, block)


def data(stream_id: int, payload: bytes, flags: int = 0) -> bytes:
    return h2.pack_frame(h2.DATA, flags, stream_id, payload)


def feed(core: H2Core, *frames: bytes, now: float = 0.0) -> None:
    core.receive(memoryview(b"".join(frames)), now)


def server(**options: Any) -> tuple[H2Core, Recorder]:
    core, recorder = make_core(client=False, **options)
    feed(core, h2.PREFACE, SETTINGS)
    take_out(core)
    recorder.take()
    return core, recorder


def client(**options: Any) -> tuple[H2Core, Recorder]:
    core, recorder = make_core(client=True, **options)
    feed(core, SETTINGS)
    take_out(core)
    recorder.take()
    return core, recorder


def refused(core: H2Core, *frames: bytes, now: float = 0.0) -> int:
    with pytest.raises(RemoteProtocolError) as caught:
        feed(core, *frames, now=now)
    return caught.value.h2_code


# ---- opening


def test_the_client_opens_with_preface_settings_and_window() -> None:
    core, _ = make_core(client=True, settings=h2.LocalSettings(max_header_list=16384))
    assert take_out(core) == (
        h2.PREFACE
        + h2.pack_frame(
            h2.SETTINGS,
            0,
            0,
            struct.pack(">HIHIHIHI", 6, 16384, 4, 4 << 20, 5, 1 << 20, 2, 0),
        )
        + h2.pack_window_update(0, (16 << 20) - 65535)
    )


def test_the_server_announces_its_stream_limit() -> None:
    core, _ = make_core(client=False)
    assert struct.pack(">HI", 3, 200) in take_out(core)


def test_settings_are_acknowledged_and_taken_over() -> None:
    core, recorder = make_core(client=True)
    take_out(core)
    assert (core.peer_max_frame, core.peer_window, core.send_window) == (16384, 65535, 65535)
    assert core.peer_max_streams == 100
    feed(core, settings(streams=7, window=1 << 20, frame=1 << 20))
    assert take_out(core) == h2.pack_frame(h2.SETTINGS, h2.ACK, 0)
    assert (core.peer_max_frame, core.peer_window) == (1 << 20, 1 << 20)
    assert core.peer_max_streams == 7
    assert recorder.take() == [("settings", None)]


@pytest.mark.parametrize("cut", [1, 10, 23])
def test_the_preface_is_compared_as_it_comes(cut: int) -> None:
    core, _ = make_core(client=False)
    feed(core, h2.PREFACE[:cut])
    assert refused(core, b"\0") == h2.PROTOCOL_ERROR


def test_http1_is_refused_at_its_first_byte() -> None:
    core, _ = make_core(client=False)
    assert refused(core, b"GET / HTTP/1.1\r\n") == h2.PROTOCOL_ERROR


@pytest.mark.parametrize(
    "frame",
    [headers(1), h2.pack_frame(h2.PING, 0, 0, bytes(8)), data(1, b"x"), h2.pack_frame(99, 0, 0)],
)
def test_the_first_frame_must_be_settings(frame: bytes) -> None:
    core, _ = make_core(client=False)
    assert refused(core, h2.PREFACE, frame) == h2.PROTOCOL_ERROR


def test_an_acknowledgement_is_not_the_first_settings() -> None:
    core, _ = make_core(client=True)
    assert refused(core, h2.pack_frame(h2.SETTINGS, h2.ACK, 0)) == h2.PROTOCOL_ERROR


# ---- a stream's life


def test_a_tunnel_from_connect_to_the_end() -> None:
    core, recorder = server()
    feed(core, headers(1), data(1, b"hello "), data(1, b"world", END))
    assert recorder.take() == [
        ("headers", 1, CONNECT),
        ("data", 1, b"hello world"),
        ("end", 1),
    ]
    stream = core.streams[1]
    core.send_headers(stream, encode_block(((b":status", b"200"),)))
    core.send_data(stream, b"answer")
    core.end(stream)
    assert take_out(core) == (
        headers(1, b"\x20\x88") + data(1, b"answer") + h2.pack_frame(h2.DATA, END, 1)
    )
    assert recorder.take() == [("closed", 1)]
    assert core.streams == {}


def test_an_end_in_the_head_and_an_empty_end() -> None:
    core, recorder = server()
    feed(core, headers(1, flags=WHOLE | END), headers(3), data(3, b"", END))
    assert recorder.take() == [
        ("headers", 1, CONNECT),
        ("end", 1),
        ("headers", 3, CONNECT),
        ("end", 3),
    ]


def test_interleaved_streams_keep_their_own_bytes() -> None:
    core, recorder = server()
    feed(core, headers(1), headers(3), data(1, b"a"), data(3, b"b"), data(1, b"c"))
    assert recorder.take()[2:] == [("data", 1, b"a"), ("data", 3, b"b"), ("data", 1, b"c")]


def test_data_is_streamed_not_reassembled() -> None:
    core, recorder = server()
    feed(core, headers(1))
    recorder.take()
    frame = data(1, bytes(1 << 20), END)
    feed(core, frame[:1000])
    assert recorder.take() == [("data", 1, bytes(991))]
    feed(core, frame[1000:])
    assert recorder.take() == [("data", 1, bytes((1 << 20) - 991)), ("end", 1)]


def test_padding_is_not_payload_but_counts_for_the_windows() -> None:
    core, recorder = server()
    feed(core, headers(1))
    recorder.take()
    window = core.streams[1].receive_window
    for byte in data(1, b"\x04data" + bytes(4), h2.PADDED | END):
        feed(core, bytes((byte,)))
    assert recorder.take() == [("data", 1, b"data"), ("end", 1)]
    assert window - core.streams[1].receive_window == 9


def test_continuation_and_priority_and_padding_in_heads() -> None:
    core, recorder = server()
    framed = b"\x03" + struct.pack(">IB", 0, 7) + BLOCK[:4] + bytes(3)
    feed(
        core,
        headers(1, framed, h2.PADDED | h2.PRIORITY_FLAG | END),
        h2.pack_frame(h2.CONTINUATION, 0, 1, BLOCK[4:6]),
        h2.pack_frame(h2.CONTINUATION, WHOLE, 1, BLOCK[6:]),
    )
    assert recorder.take() == [("headers", 1, CONNECT), ("end", 1)]


def test_long_heads_leave_in_continuations() -> None:
    core, _ = client()
    block = encode_block((*CONNECT, (b"x", b"y" * 40000)))
    core.open(block, None)
    out = take_out(core)
    peer, recorder = server()
    feed(peer, out)
    assert recorder.take()[0][2][2] == (b"x", b"y" * 40000)
    assert out.count(struct.pack(">BBI", h2.CONTINUATION, 0, 1)) == 1


def test_a_response_and_interim_responses_and_trailers() -> None:
    core, recorder = client()
    stream = core.open(BLOCK, "owner")
    assert (stream.id, stream.owner) == (1, "owner")
    trailers = encode_block(((b"grpc-status", b"0"),))
    feed(
        core,
        headers(1, encode_block(((b":status", b"103"),))),
        headers(1, b"\x88"),
        data(1, b"x"),
        headers(1, trailers, WHOLE | END),
    )
    assert recorder.take() == [
        ("headers", 1, ((b":status", b"103"),)),
        ("headers", 1, ((b":status", b"200"),)),
        ("data", 1, b"x"),
        ("headers", 1, ((b"grpc-status", b"0"),)),
        ("end", 1),
    ]


def test_resets_both_ways() -> None:
    core, recorder = server()
    feed(core, headers(1), headers(3), h2.pack_rst(1, h2.CANCEL))
    assert recorder.take()[2:] == [("closed", 1), ("reset", 1, h2.CANCEL, True)]
    stream = core.streams[3]
    core.reset(stream, h2.CONNECT_ERROR)
    core.reset(stream, h2.CANCEL)
    assert take_out(core) == h2.pack_rst(3, h2.CONNECT_ERROR)
    assert recorder.take() == [("closed", 3)]


# ---- windows


def test_stream_credit_follows_consumption_at_half_a_window() -> None:
    core, recorder = server()
    recorder.consume = False
    feed(core, headers(1), data(1, bytes(1 << 20)), data(1, bytes(1 << 20)))
    stream = core.streams[1]
    assert take_out(core) == b""
    core.credit(stream, (2 << 20) - 1)
    assert take_out(core) == b""
    core.credit(stream, 1)
    assert take_out(core) == h2.pack_window_update(1, 2 << 20)


def test_connection_credit_follows_receipt() -> None:
    core, recorder = server()
    recorder.consume = False
    feed(core, *(headers(i) for i in (1, 3, 5)))
    take_out(core)
    for stream_id in (1, 3):
        feed(core, *(data(stream_id, bytes(1 << 20)) for _ in range(4)))
    assert take_out(core) == h2.pack_window_update(0, 8 << 20)


def test_data_of_closed_streams_is_credited_to_the_connection() -> None:
    core, recorder = server()
    feed(core, headers(1))
    core.reset(core.streams[1], h2.CANCEL)
    take_out(core)
    recorder.take()
    feed(core, *(data(1, bytes(1 << 20)) for _ in range(8)))
    assert take_out(core) == h2.pack_window_update(0, 8 << 20)
    assert recorder.take() == []


def test_a_stream_window_exceeded_resets_the_stream() -> None:
    core, recorder = server()
    recorder.consume = False
    feed(core, headers(1), *(data(1, bytes(1 << 20)) for _ in range(4)))
    recorder.take()
    feed(core, data(1, b"x"))
    assert take_out(core) == h2.pack_rst(1, h2.FLOW_CONTROL_ERROR)
    assert recorder.take() == [("closed", 1), ("reset", 1, h2.FLOW_CONTROL_ERROR, False)]


def test_the_connection_window_exceeded_ends_the_connection() -> None:
    limits = h2.LocalSettings(stream_window=1 << 20, connection_window=1 << 16)
    core, recorder = server(settings=limits)
    recorder.consume = False
    frames = [headers(1), data(1, bytes(60000))]
    feed(core, *frames)  # credited on receipt, at once more than half
    assert refused(core, data(1, bytes(1 << 17))) == h2.FLOW_CONTROL_ERROR


def test_sending_is_bounded_by_both_windows_and_room_is_announced_once() -> None:
    core, recorder = client()
    first, second = core.open(BLOCK, None), core.open(BLOCK, None)
    take_out(core)
    core.send_data(first, bytes(65535))
    assert core.room(first) == 0 == core.room(second)
    with pytest.raises(LocalProtocolError):
        core.send_data(second, b"x")
    assert len(take_out(core)) == 65535 + 4 * 9
    feed(core, h2.pack_window_update(0, 100))
    assert recorder.take() == [("room", None)]
    assert (core.room(first), core.room(second)) == (0, 100)
    first.starved = True
    feed(core, h2.pack_window_update(1, 50), h2.pack_window_update(1, 50))
    assert recorder.take() == [("room", 1)]
    assert core.room(first) == 100


def test_a_smaller_initial_window_can_go_below_zero_and_come_back() -> None:
    core, recorder = client()
    stream = core.open(BLOCK, None)
    core.send_data(stream, bytes(60000))
    feed(core, settings(window=1000))
    assert stream.send_window == 1000 - 60000
    stream.starved = True
    feed(core, h2.pack_window_update(1, 59000))
    assert ("room", 1) not in recorder.take()
    feed(core, h2.pack_window_update(1, 1))
    assert ("room", 1) in recorder.take()


@pytest.mark.parametrize(
    ("frames", "code"),
    [
        ([h2.pack_window_update(0, 0)], h2.PROTOCOL_ERROR),
        ([h2.pack_window_update(0, h2.LARGEST_WINDOW)], h2.FLOW_CONTROL_ERROR),
        ([settings(window=1 << 31)], h2.FLOW_CONTROL_ERROR),
        (
            [
                headers(1),
                h2.pack_window_update(1, h2.LARGEST_WINDOW - 65535),
                settings(window=65536),
            ],
            h2.FLOW_CONTROL_ERROR,
        ),
    ],
)
def test_windows_that_overflow_end_the_connection(frames: list[bytes], code: int) -> None:
    core, _ = server()
    assert refused(core, *frames) == code


@pytest.mark.parametrize(
    ("increment", "code"), [(0, h2.PROTOCOL_ERROR), (h2.LARGEST_WINDOW, h2.FLOW_CONTROL_ERROR)]
)
def test_bad_stream_updates_reset_the_stream(increment: int, code: int) -> None:
    core, recorder = server()
    feed(core, headers(1), h2.pack_window_update(1, increment))
    assert take_out(core) == h2.pack_rst(1, code)
    assert recorder.take()[-1] == ("reset", 1, code, False)


# ---- what is refused


@pytest.mark.parametrize(
    ("frames", "code"),
    [
        ([headers(0)], h2.PROTOCOL_ERROR),
        ([headers(2)], h2.PROTOCOL_ERROR),
        ([data(0, b"x")], h2.PROTOCOL_ERROR),
        ([data(1, b"x")], h2.PROTOCOL_ERROR),
        ([h2.pack_rst(0, 0)], h2.PROTOCOL_ERROR),
        ([h2.pack_rst(1, 0)], h2.PROTOCOL_ERROR),
        ([h2.pack_window_update(1, 1)], h2.PROTOCOL_ERROR),
        ([h2.pack_frame(h2.SETTINGS, 0, 1)], h2.PROTOCOL_ERROR),
        ([h2.pack_frame(h2.PING, 0, 1, bytes(8))], h2.PROTOCOL_ERROR),
        ([h2.pack_frame(h2.GOAWAY, 0, 1, bytes(8))], h2.PROTOCOL_ERROR),
        ([h2.pack_frame(h2.PRIORITY, 0, 0, bytes(5))], h2.PROTOCOL_ERROR),
        ([h2.pack_frame(h2.PRIORITY, 0, 3, struct.pack(">IB", 3, 0))], h2.PROTOCOL_ERROR),
        ([h2.pack_frame(h2.PUSH_PROMISE, 4, 1, bytes(4))], h2.PROTOCOL_ERROR),
        ([h2.pack_frame(h2.CONTINUATION, 4, 1)], h2.PROTOCOL_ERROR),
        ([headers(1, flags=0), headers(1)], h2.PROTOCOL_ERROR),
        ([headers(1, flags=0), data(1, b"x")], h2.PROTOCOL_ERROR),
        ([headers(1, flags=0), h2.pack_frame(99, 0, 1)], h2.PROTOCOL_ERROR),
        ([headers(1, flags=0), h2.pack_frame(h2.CONTINUATION, 4, 3)], h2.PROTOCOL_ERROR),
        ([headers(1, b"\xff" + BLOCK, WHOLE | h2.PADDED)], h2.PROTOCOL_ERROR),
        ([headers(1, b"", WHOLE | h2.PADDED)], h2.FRAME_SIZE_ERROR),
        ([headers(1), data(1, b"", h2.PADDED)], h2.FRAME_SIZE_ERROR),
        ([headers(1), data(1, b"\x05data", h2.PADDED)], h2.PROTOCOL_ERROR),
        ([headers(1), h2.pack_header((1 << 20) + 1, h2.DATA, 0, 1)], h2.FRAME_SIZE_ERROR),
        ([h2.pack_header((1 << 20) + 1, 99, 0, 1)], h2.FRAME_SIZE_ERROR),
        ([h2.pack_frame(h2.PING, 0, 0, bytes(7))], h2.FRAME_SIZE_ERROR),
        ([h2.pack_frame(h2.RST_STREAM, 0, 1, bytes(5))], h2.FRAME_SIZE_ERROR),
        ([h2.pack_frame(h2.WINDOW_UPDATE, 0, 0, bytes(3))], h2.FRAME_SIZE_ERROR),
        ([h2.pack_frame(h2.SETTINGS, 0, 0, bytes(5))], h2.FRAME_SIZE_ERROR),
        ([h2.pack_frame(h2.SETTINGS, h2.ACK, 0, bytes(6))], h2.FRAME_SIZE_ERROR),
        ([h2.pack_frame(h2.GOAWAY, 0, 0, bytes(7))], h2.FRAME_SIZE_ERROR),
        ([settings(frame=16383)], h2.PROTOCOL_ERROR),
        ([settings(frame=1 << 24)], h2.PROTOCOL_ERROR),
        ([settings(push=2)], h2.PROTOCOL_ERROR),
        ([settings(connect=2)], h2.PROTOCOL_ERROR),
        ([headers(1, b"\x80")], h2.COMPRESSION_ERROR),
        ([headers(1, b"\x3f\xe1\xff\x03")], h2.COMPRESSION_ERROR),
        ([h2.pack_header(70000, h2.HEADERS, WHOLE, 1)], h2.ENHANCE_YOUR_CALM),
        ([h2.pack_header(20000, h2.GOAWAY, 0, 0)], h2.ENHANCE_YOUR_CALM),
    ],
)
def test_broken_connections(frames: list[bytes], code: int) -> None:
    core, _ = server()
    assert refused(core, *frames) == code


def test_the_client_refuses_what_only_servers_hear() -> None:
    for frames, code in (
        ([settings(push=1)], h2.PROTOCOL_ERROR),
        ([headers(1, b"\x88")], h2.PROTOCOL_ERROR),
        ([headers(2, b"\x88")], h2.PROTOCOL_ERROR),
        ([h2.pack_frame(h2.PUSH_PROMISE, 4, 1, bytes(4))], h2.PROTOCOL_ERROR),
    ):
        core, _ = client()
        assert refused(core, *frames) == code


@pytest.mark.parametrize(
    ("frames", "code"),
    [
        ([data(1, b"", END), data(1, b"x")], h2.STREAM_CLOSED),
        ([data(1, b"", END), headers(1, flags=WHOLE | END)], h2.STREAM_CLOSED),
        ([headers(1)], h2.PROTOCOL_ERROR),
        ([headers(1, flags=WHOLE | END)], h2.PROTOCOL_ERROR),
    ],
)
def test_broken_streams_of_a_server(frames: list[bytes], code: int) -> None:
    core, recorder = server()
    feed(core, headers(1), *frames)
    assert take_out(core).endswith(h2.pack_rst(1, code))
    assert recorder.take()[-1] == ("reset", 1, code, False)


@pytest.mark.parametrize(
    "frames",
    [
        [data(1, b"before the answer")],
        [headers(1, encode_block(((b"x", b"no status"),)))],
        [headers(1, encode_block(((b":status", b"100"),)), WHOLE | END)],
        [headers(1, b"\x88"), headers(1, b"\x88", WHOLE | END)],
    ],
)
def test_broken_streams_of_a_client(frames: list[bytes]) -> None:
    core, recorder = client()
    core.open(BLOCK, None)
    feed(core, *frames)
    assert recorder.take()[-1] == ("reset", 1, h2.PROTOCOL_ERROR, False)


def test_malformed_requests_are_reset_and_never_heard_of() -> None:
    core, recorder = server()
    feed(core, headers(1, encode_block((*CONNECT, (b"connection", b"close")))))
    assert take_out(core) == h2.pack_rst(1, h2.PROTOCOL_ERROR)
    assert recorder.take() == []


def test_streams_beyond_the_limit_are_refused() -> None:
    core, recorder = server(settings=h2.LocalSettings(max_streams=2))
    feed(core, headers(1), headers(3), headers(5))
    assert take_out(core) == h2.pack_rst(5, h2.REFUSED_STREAM)
    assert [event[1] for event in recorder.take()] == [1, 3]
    feed(core, h2.pack_rst(1, 8), headers(7))
    assert 7 in core.streams


def test_stream_ids_only_grow() -> None:
    core, recorder = server()
    feed(core, headers(5))
    assert refused(core, headers(3)) == h2.STREAM_CLOSED
    assert [event[1] for event in recorder.take()] == [5]
    assert list(core.streams) == [5]


def test_a_header_list_that_unpacks_too_far_ends_the_connection() -> None:
    core, _ = server(settings=h2.LocalSettings(max_header_list=4096))
    bomb = b"\x40\x01x" + b"\x7f\x80\x01" + b"y" * 255 + b"\xbe" * 30
    assert refused(core, headers(1, bomb)) == h2.ENHANCE_YOUR_CALM


# ---- floods


@pytest.mark.parametrize(
    ("first", "frame"),
    [
        ([], SETTINGS),
        ([], h2.pack_frame(h2.SETTINGS, h2.ACK, 0)),
        ([], h2.pack_frame(h2.PING, 0, 0, bytes(8))),
        ([], h2.pack_frame(h2.PING, h2.ACK, 0, bytes(8))),
        ([], h2.pack_frame(h2.PRIORITY, 0, 1, struct.pack(">IB", 0, 0))),
        ([], h2.pack_frame(h2.GOAWAY, 0, 0, bytes(8))),
        ([], h2.pack_frame(99, 0, 0, b"what?")),
        ([], h2.pack_window_update(0, 1)),
        ([headers(1)], h2.pack_window_update(1, 1)),
        ([headers(1)], data(1, b"")),
        ([headers(1)], data(1, b"\x01\x00", h2.PADDED)),
        ([headers(1), h2.pack_rst(1, 8)], h2.pack_rst(1, 8)),
        ([headers(1), h2.pack_window_update(1, 0)], headers(1, flags=WHOLE | END)),
        ([headers(1), h2.pack_rst(1, 8)], data(1, b"x")),
    ],
)
def test_floods_of_cheap_frames_meet_the_bucket(first: list[bytes], frame: bytes) -> None:
    core, _ = server()
    feed(core, *first)
    feed(core, *([frame] * 900))
    assert refused(core, *([frame] * 300)) == h2.ENHANCE_YOUR_CALM


def _open_until_refused(core: H2Core, number: int, per_stream: Callable[[int], bytes]) -> int:
    for stream_id in range(1, 2 * number, 2):
        try:
            feed(core, headers(stream_id), per_stream(stream_id))
        except RemoteProtocolError as exc:
            return exc.h2_code
    return h2.NO_ERROR


def test_rapid_reset_meets_the_bucket() -> None:
    core, _ = server()
    assert (
        _open_until_refused(core, 1500, lambda stream_id: h2.pack_rst(stream_id, h2.CANCEL))
        == h2.ENHANCE_YOUR_CALM
    )


def test_made_you_reset_meets_the_bucket() -> None:
    core, _ = server()
    assert (
        _open_until_refused(core, 1500, lambda stream_id: h2.pack_window_update(stream_id, 0))
        == h2.ENHANCE_YOUR_CALM
    )


def test_continuations_are_counted() -> None:
    core, _ = server()
    feed(core, headers(1, flags=0))
    empty = h2.pack_frame(h2.CONTINUATION, 0, 1)
    assert refused(core, *([empty] * 40)) == h2.ENHANCE_YOUR_CALM
    core, _ = server(settings=h2.LocalSettings(max_header_list=1000))
    feed(core, headers(1, bytes(900), flags=0))
    assert refused(core, h2.pack_frame(h2.CONTINUATION, 0, 1, bytes(400))) == h2.ENHANCE_YOUR_CALM


def test_honest_traffic_does_not_touch_the_bucket() -> None:
    """Many answered tunnels that end or are reset, many window updates for much data."""
    core, _ = server(bucket=TokenBucket(burst=3, rate=0))
    for number in range(1, 4001, 2):
        feed(core, headers(number))
        stream = core.streams[number]
        core.send_headers(stream, b"\x88")
        core.spend(stream, 1000)
        feed(core, h2.pack_window_update(0, 1000), h2.pack_window_update(number, 1000))
        if number % 4 == 1:
            feed(core, h2.pack_rst(number, h2.CONNECT_ERROR))
        else:
            core.end(stream)
            feed(core, data(number, b"", END), h2.pack_rst(number, h2.NO_ERROR))
        take_out(core)
    assert core.streams == {}


def test_the_bucket_fills_again_with_time() -> None:
    core, _ = server()
    feed(core, *([SETTINGS] * 990), now=1.0)
    feed(core, *([SETTINGS] * 30), now=2.0)
    assert refused(core, *([SETTINGS] * 60), now=2.0) == h2.ENHANCE_YOUR_CALM


# ---- ping and goaway


def test_pings_are_answered_and_answers_reported() -> None:
    core, recorder = server()
    feed(core, h2.pack_frame(h2.PING, 0, 0, b"12345678"))
    assert take_out(core) == h2.pack_frame(h2.PING, h2.ACK, 0, b"12345678")
    core.ping(b"abcdefgh")
    assert take_out(core) == h2.pack_frame(h2.PING, 0, 0, b"abcdefgh")
    feed(core, h2.pack_frame(h2.PING, h2.ACK, 0, b"abcdefgh"))
    assert recorder.take() == [("pong", None, b"abcdefgh")]


def test_goaway_of_the_peer_refuses_the_streams_beyond_its_line() -> None:
    core, recorder = client()
    first, second = core.open(BLOCK, None), core.open(BLOCK, None)
    feed(core, h2.pack_goaway(1, h2.NO_ERROR, b"bye"))
    assert recorder.take() == [
        ("closed", 3),
        ("reset", 3, h2.REFUSED_STREAM, True),
        ("goaway", None, h2.NO_ERROR, b"bye"),
    ]
    assert not first.closed
    assert second.closed
    assert not core.can_open
    with pytest.raises(LocalProtocolError):
        core.open(BLOCK, None)
    feed(core, headers(1, b"\x88"), data(1, b"x", END))
    assert recorder.take()[-1] == ("end", 1)


def test_our_goaway_in_two_steps() -> None:
    core, recorder = server()
    feed(core, headers(1))
    core.goaway(soon=True)
    feed(core, headers(3))
    core.goaway()
    assert take_out(core) == h2.pack_goaway(h2.LARGEST_STREAM_ID, 0) + h2.pack_goaway(3, 0)
    recorder.take()
    feed(core, headers(5), data(5, b"ignored"))
    assert recorder.take() == []
    assert sorted(core.streams) == [1, 3]


def test_the_peer_limit_bounds_opening() -> None:
    core, _ = client()
    feed(core, settings(streams=1))
    stream = core.open(BLOCK, None)
    assert not core.can_open
    core.reset(stream, h2.CANCEL)
    assert core.can_open


# ---- the frame buffer


@pytest.mark.parametrize("max_frame", [16384, 100_000, 1 << 20])
@pytest.mark.parametrize("count", [1, 16374, 16375, 16376, 65536, 100_000])
def test_frames_built_in_place_parse_back(count: int, max_frame: int) -> None:
    buffer = h2.FrameBuffer(100_000)
    payload = bytes(range(256)) * 400
    slots = buffer.slots(200_000, max_frame)
    assert sum(map(len, slots)) == 100_000
    left = payload[:count]
    for slot in slots:
        piece, left = left[: len(slot)], left[len(slot) :]
        slot[: len(piece)] = piece
    frames = bytes(buffer.seal(count, 200_000, max_frame, 1))
    core, recorder = server()
    feed(core, headers(1), frames)
    assert recorder.take()[1:] == [("data", 1, payload[:count])]


def test_a_stream_reset_while_its_bytes_are_handed_on_hears_no_more() -> None:
    core, recorder = server()
    feed(core, headers(1), headers(3))
    recorder.take()
    deliver = recorder.on_data

    def reset_first(stream: Any, views: Any, total: int) -> None:
        deliver(stream, views, total)
        if stream.id == 1:
            core.reset(stream, h2.CONNECT_ERROR)

    recorder.on_data = reset_first  # type: ignore[method-assign]
    feed(core, data(1, b"a"), data(3, b"b"), data(1, b"c"), data(3, b"d"), data(1, b"e", END))
    assert recorder.take() == [("data", 1, b"a"), ("closed", 1), ("data", 3, b"bd")]


def test_two_streams_in_one_buffer_where_one_cuts_the_other() -> None:
    core, recorder = server()
    feed(core, headers(1), headers(3))
    recorder.take()
    deliver = recorder.on_data

    def cut_the_other(stream: Any, views: Any, total: int) -> None:
        deliver(stream, views, total)
        core.reset(core.streams.get(4 - stream.id, stream), h2.CANCEL)

    recorder.on_data = cut_the_other  # type: ignore[method-assign]
    feed(core, data(1, b"a"), data(3, b"b" * 10)[:12])
    feed(core, b"b" * 7)
    assert recorder.take() == [("data", 1, b"a"), ("closed", 3)]


def test_trailers_of_a_request_are_no_answer_to_it() -> None:
    core, recorder = client()
    stream = core.open(BLOCK, None)
    core.send_headers(stream, encode_block([(b"x-sum", b"1")]), end_stream=True)
    feed(core, headers(1, encode_block([(b":status", b"200")])), data(1, b"ok", END))
    kinds = [event[0] for event in recorder.take() if event[0] != "settings"]
    assert kinds == ["headers", "data", "end", "closed"]
    # Nor does a block without a status pass as one.
    stream = core.open(BLOCK, None)
    core.send_headers(stream, encode_block([(b"x-sum", b"1")]), end_stream=True)
    feed(core, headers(3, encode_block([(b"x", b"y")]), WHOLE | END))
    assert [event[0] for event in recorder.take()] == ["closed", "reset"]
