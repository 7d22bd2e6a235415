"""A receiver that writes down what an H2Core says, for transcripts and twin tests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mesh.http.h2_core import H2Core, Stream
from mesh.http.hpack_table import Pair


class Recorder:
    """`events` are tuples: (name, stream id or None, detail...); neighbouring DATA is merged."""

    def __init__(self) -> None:
        self.events: list[tuple[Any, ...]] = []
        self.core: H2Core | None = None
        self.consume = True

    def on_headers(self, stream: Stream, pairs: Sequence[Pair]) -> None:
        self.events.append(("headers", stream.id, tuple(pairs)))

    def on_data(self, stream: Stream, views: Sequence[memoryview], total: int) -> None:
        data = b"".join(views)
        assert len(data) == total > 0
        if self.events and self.events[-1][:2] == ("data", stream.id):
            data = self.events.pop()[2] + data
        self.events.append(("data", stream.id, data))
        if self.consume and self.core is not None:
            self.core.credit(stream, total)

    def on_end(self, stream: Stream) -> None:
        self.events.append(("end", stream.id))

    def on_reset(self, stream: Stream, code: int, *, by_peer: bool) -> None:
        self.events.append(("reset", stream.id, code, by_peer))

    def on_closed(self, stream: Stream) -> None:
        self.events.append(("closed", stream.id))

    def on_stream_room(self, stream: Stream) -> None:
        self.events.append(("room", stream.id))

    def on_connection_room(self) -> None:
        self.events.append(("room", None))

    def on_settings(self) -> None:
        self.events.append(("settings", None))

    def on_pong(self, payload: bytes) -> None:
        self.events.append(("pong", None, payload))

    def on_goaway(self, code: int, debug: bytes) -> None:
        self.events.append(("goaway", None, code, debug))

    def take(self) -> list[tuple[Any, ...]]:
        events, self.events = self.events, []
        return events


def make_core(*, client: bool, **options: Any) -> tuple[H2Core, Recorder]:
    """A core and its recorder."""
    recorder = Recorder()
    core = H2Core(recorder, client=client, **options)
    recorder.core = core
    return core, recorder


def take_out(core: H2Core) -> bytes:
    """What the core wants to send."""
    out, core.out = bytes(core.out), bytearray()
    return out
