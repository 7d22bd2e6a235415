"""Connection windows that open by consumption: nothing is lost of them, whatever happens."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh.errors import RemoteProtocolError
from mesh.http import h2_frames as h2
from mesh.http.abuse import TokenBucket
from mesh.http.h2_core import H2Core
from mesh.http.hpack_table import encode_block
from tests.support.h2_script import make_core, take_out

LIMITS = h2.LocalSettings(
    stream_window=40_000, largest_window=60_000, connection_window=100_000, holds_connection=True
)
BLOCK = encode_block([(b":method", b"POST"), (b":path", b"/")])


def server() -> H2Core:
    bucket = TokenBucket(burst=1e9)
    core, recorder = make_core(client=False, settings=LIMITS, bucket=bucket)
    recorder.consume = False
    core.receive(memoryview(h2.PREFACE + h2.pack_frame(h2.SETTINGS, 0, 0)), 0.0)
    take_out(core)
    return core


def open_stream(core: H2Core, stream_id: int) -> None:
    core.receive(memoryview(h2.pack_frame(h2.HEADERS, h2.END_HEADERS, stream_id, BLOCK)), 0.0)


def send(core: H2Core, stream_id: int, count: int, flags: int = 0) -> None:
    core.receive(memoryview(h2.pack_frame(h2.DATA, flags, stream_id, bytes(count))), 0.0)


def test_stalled_readers_hold_no_more_than_the_window_together() -> None:
    core = server()
    for stream_id in (1, 3, 5):
        open_stream(core, stream_id)
    send(core, 1, 40_000)
    send(core, 3, 40_000)
    send(core, 5, 20_000)
    assert take_out(core) == b""
    with pytest.raises(RemoteProtocolError) as caught:
        send(core, 5, 1)
    assert caught.value.h2_code == h2.FLOW_CONTROL_ERROR


def test_consumption_and_resets_open_it_again() -> None:
    core = server()
    open_stream(core, 1)
    open_stream(core, 3)
    send(core, 1, 40_000)
    send(core, 3, 40_000, h2.END_STREAM)
    core.credit(core.streams[3], 30_000)  # its end does not matter
    assert take_out(core) == b""
    core.reset(core.streams[1], h2.CANCEL)  # what it held is free
    assert h2.pack_window_update(0, 70_000) in take_out(core)
    core.reset(core.streams[3], h2.CANCEL)
    assert core._receive_window + core._uncredited == 100_000


_steps = st.lists(
    st.tuples(
        st.sampled_from(["open", "data", "end", "credit", "reset", "their reset"]),
        st.integers(0, 5),
        st.integers(0, 20_000),
    ),
    max_size=60,
)


@given(_steps)
def test_nothing_of_the_window_is_ever_lost(steps: list[tuple[str, int, int]]) -> None:
    core = server()
    opened = 0
    for what, which, count in steps:
        streams = list(core.streams.values())
        if what == "open":
            opened += 1
            open_stream(core, 2 * opened - 1)
        elif streams:
            stream = streams[which % len(streams)]
            room = min(stream.receive_window, core._receive_window)
            if what == "data" and not stream.remote_ended:
                send(core, stream.id, min(count, room))
            elif what == "end" and not stream.remote_ended:
                send(core, stream.id, min(count, room), h2.END_STREAM)
            elif what == "credit":
                core.credit(stream, min(count, stream.held))
            elif what == "reset":
                core.reset(stream, h2.CANCEL)
            elif what == "their reset":
                core.receive(memoryview(h2.pack_rst(stream.id, h2.CANCEL)), 0.0)
        held = sum(stream.held for stream in core.streams.values())
        assert core._receive_window + core._uncredited + held == 100_000
    for stream in list(core.streams.values()):
        core.reset(stream, h2.CANCEL)
    assert core._receive_window + core._uncredited == 100_000
