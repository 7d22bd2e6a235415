"""H2Core against the h2 package: the same bytes, cut anywhere, mean the same to both."""

from __future__ import annotations

import contextlib
from typing import Any

import h2.config
import h2.connection
import h2.events
import h2.settings
import hypothesis.strategies as st
from hypothesis import given

from mesh.errors import RemoteProtocolError
from mesh.http import h2_frames
from mesh.http.h2_core import H2Core
from mesh.http.hpack_table import encode_block
from tests.support.h2_script import make_core, take_out

Script = list[tuple[Any, ...]]

_NAMES = st.sampled_from(["baggage", "forwarded", "traceparent", "x-istio-source"])
_VALUES = st.text(st.characters(min_codepoint=33, max_codepoint=126), max_size=200)
_STEPS = st.one_of(
    st.tuples(st.just("open"), st.lists(st.tuples(_NAMES, _VALUES), max_size=3), st.booleans()),
    st.tuples(
        st.just("data"),
        st.integers(0, 9),
        st.integers(0, 70_000),
        st.one_of(st.none(), st.integers(0, 255)),
    ),
    st.tuples(st.just("end"), st.integers(0, 9)),
    st.tuples(st.just("reset"), st.integers(0, 9), st.integers(0, 11)),
    st.tuples(st.just("ping"), st.binary(min_size=8, max_size=8)),
    st.tuples(st.just("settings"), st.integers(0, 1 << 20), st.integers(16384, 1 << 20)),
    st.tuples(st.just("window"), st.integers(0, 9), st.integers(1, 1 << 20)),
)
_SCRIPTS = st.lists(_STEPS, max_size=40)
_CUTS = st.lists(st.integers(1, 5000), min_size=1, max_size=50)


def _library(*, client: bool) -> h2.connection.H2Connection:
    config = h2.config.H2Configuration(client_side=client, header_encoding=None)
    connection = h2.connection.H2Connection(config)
    connection.local_settings = h2.settings.Settings(
        client=client,
        initial_values={
            h2.settings.SettingCodes.INITIAL_WINDOW_SIZE: 4 << 20,
            h2.settings.SettingCodes.MAX_FRAME_SIZE: 1 << 20,
            h2.settings.SettingCodes.MAX_HEADER_LIST_SIZE: 64 << 10,
            **({} if client else {h2.settings.SettingCodes.MAX_CONCURRENT_STREAMS: 200}),
        },
    )
    connection.max_inbound_frame_size = 1 << 20
    connection.initiate_connection()
    connection.increment_flow_control_window((16 << 20) - 65535)
    return connection


def _facts(events: list[h2.events.Event]) -> list[tuple[Any, ...]]:
    """The library's events in the Recorder's words; neighbouring DATA merged."""
    out: list[tuple[Any, ...]] = []
    for event in events:
        match event:
            case h2.events.RequestReceived() | h2.events.ResponseReceived():
                pairs = tuple((bytes(n), bytes(v)) for n, v in event.headers)
                out.append(("headers", event.stream_id, pairs))
            case h2.events.DataReceived() if event.data:
                data = event.data
                if out and out[-1][:2] == ("data", event.stream_id):
                    data = out.pop()[2] + data
                out.append(("data", event.stream_id, data))
            case h2.events.StreamEnded():
                out.append(("end", event.stream_id))
            case h2.events.StreamReset():
                out.append(("reset", event.stream_id, int(event.error_code), True))
            case h2.events.PingAckReceived():
                out.append(("pong", None, event.ping_data))
    return out


_SHARED = {"headers", "data", "end", "reset", "pong"}


def _shared(events: list[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    """What the library tells, too. DATA that had something else between it (SETTINGS) is merged
    here, as it is there.
    """
    out: list[tuple[Any, ...]] = []
    for event in events:
        if event[0] not in _SHARED:
            continue
        if out and event[0] == "data" and out[-1][:2] == event[:2]:
            event = (*event[:2], out.pop()[2] + event[2])
        out.append(event)
    return out


def _cut_feed(core: H2Core, data: bytes, cuts: list[int]) -> None:
    offset = turn = 0
    while offset < len(data):
        size = cuts[turn % len(cuts)]
        # A fresh buffer each time: nobody may keep a view.
        buffer = bytearray(data[offset : offset + size])
        core.receive(memoryview(buffer), 0.0)
        buffer[:] = bytes(len(buffer))
        offset += size
        turn += 1


def _perform(peer: h2.connection.H2Connection, script: Script) -> None:
    """What a correct client may do, as far as the script and the windows allow."""
    opened: list[int] = []
    alive: list[int] = []
    for step in script:
        target = alive[step[1] % len(alive)] if alive and isinstance(step[1], int) else None
        match step:
            case ("open", extra, ends):
                stream_id = peer.get_next_available_stream_id()
                head = [(":method", "CONNECT"), (":authority", "10.0.0.1:80"), *extra]
                peer.send_headers(stream_id, head, end_stream=ends)
                opened.append(stream_id)
                if not ends:
                    alive.append(stream_id)
            case ("data", _, size, padding) if target is not None:
                overhead = 0 if padding is None else padding + 1
                room = min(peer.local_flow_control_window(target), peer.max_outbound_frame_size)
                if room > overhead:
                    size = min(size, room - overhead)
                    peer.send_data(target, b"d" * size, pad_length=padding)
            case ("end", _) if target is not None:
                peer.end_stream(target)
                alive.remove(target)
            case ("reset", _, code) if target is not None:
                peer.reset_stream(target, code)
                alive.remove(target)
            case ("ping", payload):
                peer.ping(payload)
            case ("settings", window, frame):
                peer.update_settings(
                    {
                        h2.settings.SettingCodes.INITIAL_WINDOW_SIZE: window,
                        h2.settings.SettingCodes.MAX_FRAME_SIZE: frame,
                    }
                )
            case ("window", _, increment) if target is not None:
                peer.increment_flow_control_window(increment)
                peer.increment_flow_control_window(increment, stream_id=target)


@given(_SCRIPTS, _CUTS)
def test_a_servers_view_of_a_correct_client(script: Script, cuts: list[int]) -> None:
    peer, twin = _library(client=True), _library(client=False)
    core, recorder = make_core(client=False)
    peer.receive_data(take_out(core))
    _perform(peer, script)
    wire = peer.data_to_send()
    facts = _facts(twin.receive_data(wire))
    _cut_feed(core, wire, cuts)
    assert _shared(recorder.events) == facts
    assert core.send_window == twin.outbound_flow_control_window
    for stream_id, stream in core.streams.items():
        assert stream.send_window == twin._get_stream_by_id(stream_id).outbound_flow_control_window
    # What we answer (acknowledgements, pongs, credit) is lawful to the client.
    peer.receive_data(take_out(core))


@given(_SCRIPTS, _CUTS, st.integers(16384, 1 << 20), st.integers(0, 1 << 20))
def test_what_our_client_sends_is_what_a_server_of_the_library_hears(
    script: Script, cuts: list[int], frame: int, window: int
) -> None:
    server = _library(client=False)
    server.update_settings(
        {
            h2.settings.SettingCodes.INITIAL_WINDOW_SIZE: window,
            h2.settings.SettingCodes.MAX_FRAME_SIZE: frame,
        }
    )
    core, recorder = make_core(client=True)
    server.max_inbound_frame_size = frame
    _cut_feed(core, server.data_to_send(), cuts)
    wire = bytearray(take_out(core))
    expected: list[tuple[Any, ...]] = []
    alive: list[Any] = []
    for step in script:
        target = alive[step[1] % len(alive)] if alive and isinstance(step[1], int) else None
        match step:
            case ("open", extra, ends):
                pairs = (
                    (b":method", b"CONNECT"),
                    (b":authority", b"10.0.0.1:80"),
                    *((n.encode(), v.encode()) for n, v in extra),
                )
                stream = core.open(encode_block(pairs), None, end_stream=ends)
                expected.append(("headers", stream.id, pairs))
                if ends:
                    expected.append(("end", stream.id))
                else:
                    alive.append(stream)
            case ("data", _, size, _) if target is not None:
                size = min(size, core.room(target))
                if size > 0:
                    core.send_data(target, b"d" * size)
                    data = b"d" * size
                    if expected[-1][:2] == ("data", target.id):
                        data = expected.pop()[2] + data
                    expected.append(("data", target.id, data))
            case ("end", _) if target is not None:
                core.end(target)
                expected.append(("end", target.id))
                alive.remove(target)
            case ("reset", _, code) if target is not None:
                core.reset(target, code)
                expected.append(("reset", target.id, code, True))
                alive.remove(target)
            case ("ping", payload):
                core.ping(payload)
        wire += take_out(core)
    assert _facts(server.receive_data(bytes(wire))) == expected
    _cut_feed(core, server.data_to_send(), cuts)
    assert "reset" not in {event[0] for event in recorder.events if event[-1] is False}


@given(st.binary(max_size=400), _CUTS, st.booleans())
def test_any_bytes_are_survived(noise: bytes, cuts: list[int], client: bool) -> None:
    """Only RemoteProtocolError ever comes out, whatever comes in."""
    core, _ = make_core(client=client)
    opening = b"" if client else h2_frames.PREFACE
    with contextlib.suppress(RemoteProtocolError):
        _cut_feed(core, opening + h2_frames.pack_frame(h2_frames.SETTINGS, 0, 0) + noise, cuts)


_FRAMES = st.builds(
    h2_frames.pack_frame,
    st.integers(0, 11),
    st.integers(0, 255),
    st.integers(0, 7),
    st.one_of(st.binary(max_size=40), st.sampled_from([bytes(4), bytes(5), bytes(8), b"\x88"])),
)


@given(st.lists(_FRAMES, max_size=20), _CUTS, st.booleans())
def test_any_frames_are_survived_and_cuts_do_not_matter(
    frames: list[bytes], cuts: list[int], client: bool
) -> None:
    block = encode_block(((b":method", b"CONNECT"), (b":authority", b"10.0.0.1:80")))
    opening = h2_frames.pack_frame(h2_frames.SETTINGS, 0, 0)
    if not client:
        opening = h2_frames.PREFACE + opening
        opening += h2_frames.pack_headers(1, block, end_stream=False, max_frame=16384)
    results = []
    for each in (cuts, [1 << 20]):
        core, recorder = make_core(client=client)
        if client:
            core.settings_received = True
            core.open(block, None)
        outcome: int | None = None
        try:
            _cut_feed(core, opening + b"".join(frames), each)
        except RemoteProtocolError as exc:
            outcome = exc.h2_code
        results.append(
            (outcome, recorder.events if outcome is None else None, sorted(core.streams))
        )
    assert results[0][:2] == results[1][:2]
