"""The reactor beside trio: callbacks, deferred flushes, bugs, fairness, hang-ups."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import AsyncIterator

import pytest
import trio

from mesh.reactor import READABLE, WRITABLE, Reactor

pytestmark = pytest.mark.usefixtures("no_fd_leak")


class Probe:
    """A handler that notes what happens."""

    def __init__(self, sock: socket.socket, *, echo: bool = False, bug: bool = False) -> None:
        self.sock = sock
        self.echo = echo
        self.bug = bug
        self.calls: list[str] = []
        self.data = bytearray()

    def on_readable(self) -> None:
        self.calls.append("readable")
        if self.bug:
            raise ZeroDivisionError
        with contextlib.suppress(BlockingIOError):
            data = self.sock.recv(65536)
            self.data += data
            if self.echo and data:
                self.sock.send(data)

    def on_writable(self) -> None:
        self.calls.append("writable")

    def flush(self) -> None:
        self.calls.append("flush")
        if self.bug:
            raise ZeroDivisionError

    def on_failed(self, error: Exception) -> None:
        self.calls.append("failed")


@contextlib.asynccontextmanager
async def _running() -> AsyncIterator[tuple[Reactor, list[Exception]]]:
    bugs: list[Exception] = []
    with Reactor(on_bug=lambda error, _where: bugs.append(error)) as reactor:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(reactor.run)
            yield reactor, bugs
            nursery.cancel_scope.cancel()


@contextlib.contextmanager
def _pair() -> AsyncIterator[tuple[socket.socket, socket.socket]]:  # type: ignore[misc]
    a, b = socket.socketpair()
    a.setblocking(False)
    b.setblocking(False)
    with a, b:
        yield a, b


async def test_events_modify_mute_and_remove() -> None:
    async with _running() as (reactor, bugs):
        with _pair() as (a, b):
            probe = Probe(a)
            reactor.add(a.fileno(), probe)
            b.send(b"one")
            await trio.sleep(0.02)
            assert probe.data == b"one"
            assert probe.calls == ["readable"]
            reactor.modify(a.fileno(), 0)
            b.send(b"two")
            await trio.sleep(0.02)
            assert probe.calls == ["readable"]
            reactor.mute(a.fileno())
            b.close()
            await trio.sleep(0.02)
            assert probe.calls == ["readable"]
            reactor.modify(a.fileno(), READABLE | WRITABLE)
            await trio.sleep(0.01)
            assert probe.data == b"onetwo"
            assert "writable" in probe.calls
            reactor.remove(a.fileno())
            reactor.remove(a.fileno())
            reactor.modify(a.fileno(), READABLE)  # a late resume brings nothing back
            count = len(probe.calls)
            await trio.sleep(0.02)
            assert len(probe.calls) == count
    assert bugs == []


async def test_a_descriptor_has_one_handler() -> None:
    async with _running() as (reactor, _):
        with _pair() as (a, _b):
            reactor.add(a.fileno(), Probe(a))
            with pytest.raises(ValueError, match="already"):
                reactor.add(a.fileno(), Probe(a))
            reactor.remove(a.fileno())


async def test_defer_flushes_once_also_when_called_by_a_task() -> None:
    async with _running() as (reactor, _):
        await trio.sleep(0.02)  # the reactor waits
        with _pair() as (a, _b):
            probe = Probe(a)
            reactor.defer(probe)
            await trio.sleep(0.02)
            assert probe.calls == ["flush"]


async def test_a_bug_closes_its_handler_and_nobody_else() -> None:
    async with _running() as (reactor, bugs):
        with _pair() as (a, b), _pair() as (c, d):
            broken, healthy = Probe(a, bug=True), Probe(c)
            reactor.add(a.fileno(), broken)
            reactor.add(c.fileno(), healthy)
            b.send(b"x")
            d.send(b"y")
            await trio.sleep(0.02)
            assert broken.calls == ["readable", "failed"]
            assert healthy.data == b"y"
            reactor.defer(broken)
            await trio.sleep(0.02)
            assert broken.calls[2:] == ["flush", "failed"]
            reactor.remove(c.fileno())
    assert [type(bug) for bug in bugs] == [ZeroDivisionError, ZeroDivisionError]


async def test_busy_descriptors_do_not_starve_tasks() -> None:
    """Two handlers that feed each other for ever leave room for trio."""
    async with _running() as (reactor, _):
        with _pair() as (a, b):
            reactor.add(a.fileno(), Probe(a, echo=True))
            reactor.add(b.fileno(), Probe(b, echo=True))
            a.send(b"ball")
            with trio.fail_after(30):
                for _ in range(20):
                    await trio.sleep(0.001)
            reactor.remove(a.fileno())
            reactor.remove(b.fileno())
