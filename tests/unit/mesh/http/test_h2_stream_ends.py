"""H2Core after a stream's end: what the peer may still send on it, and what it may not."""

from __future__ import annotations

import pytest

from mesh.errors import RemoteProtocolError
from mesh.http import h2_frames as h2
from mesh.http.h2_core import H2Core
from mesh.http.hpack_table import encode_block
from tests.support.h2_script import Recorder, make_core, take_out

CONNECT = ((b":method", b"CONNECT"), (b":authority", b"10.0.0.1:80"))
END = h2.END_STREAM
WHOLE = h2.END_HEADERS


def headers(stream_id: int, block: bytes = encode_block(CONNECT), flags: int = WHOLE) -> bytes:
    return h2.pack_frame(h2.HEADERS, flags, stream_id, block)


def data(stream_id: int, payload: bytes, flags: int = 0) -> bytes:
    return h2.pack_frame(h2.DATA, flags, stream_id, payload)


def feed(core: H2Core, *frames: bytes) -> None:
    core.receive(memoryview(b"".join(frames)), 0.0)


def server(settings: h2.LocalSettings | None = None) -> tuple[H2Core, Recorder]:
    core, recorder = make_core(client=False, settings=settings or h2.LocalSettings())
    feed(core, h2.PREFACE, h2.pack_frame(h2.SETTINGS, 0, 0))
    take_out(core)
    recorder.take()
    return core, recorder


def refused(core: H2Core, *frames: bytes) -> int:
    with pytest.raises(RemoteProtocolError) as caught:
        feed(core, *frames)
    return caught.value.h2_code


@pytest.mark.parametrize("ends", [h2.pack_rst(1, h2.CANCEL), data(1, b"", END)])
def test_a_peer_that_ended_a_stream_sends_nothing_more_on_it(ends: bytes) -> None:
    """RFC 9113 section 5.1, states "half-closed (remote)" and "closed"."""
    core, recorder = server()
    feed(core, headers(1))
    stream = core.streams[1]
    feed(core, ends)
    core.send_headers(stream, b"\x88", end_stream=True)
    take_out(core)
    assert not core.streams
    feed(core, data(1, b"late"))
    assert take_out(core) == h2.pack_rst(1, h2.STREAM_CLOSED)
    feed(core, h2.pack_window_update(1, 1))
    assert take_out(core) == b""
    assert ("data", 1, b"late") not in recorder.take()
    assert refused(core, headers(1, flags=WHOLE | END)) == h2.STREAM_CLOSED


def test_what_was_on_its_way_to_a_stream_that_we_ended_is_no_fault() -> None:
    core, _ = server(settings=h2.LocalSettings(max_streams=1))
    feed(core, headers(1), headers(3))  # the second is refused
    core.reset(core.streams[1], h2.CANCEL)
    feed(core, headers(5))
    feed(core, h2.pack_window_update(5, 0))  # an error of that stream
    bad = encode_block([*CONNECT, (b"X", b"y")])
    feed(core, headers(7, bad))
    take_out(core)
    for stream_id in (1, 3, 5, 7):
        feed(core, data(stream_id, b"late"), headers(stream_id, flags=WHOLE | END))
    assert take_out(core) == b""
    # Long ago is not remembered stream by stream, and not held against anybody.
    core, _ = server()
    for stream_id in range(1, 2401, 2):
        feed(core, headers(stream_id))
        core.reset(core.streams[stream_id], h2.CANCEL)
    take_out(core)
    feed(core, data(1, b"late"), data(2399, b"late"))
    assert take_out(core) == b""
