"""trio and the reactor on one wait: nothing that wakes trio may be lost or starved."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
import time
from collections.abc import Awaitable, Callable, Iterator

import pytest
import trio

from mesh.reactor import Reactor, SharedClock

pytestmark = pytest.mark.usefixtures("no_fd_leak")


class Echo:
    """Gives back what comes; two of them on one pair keep the reactor busy for ever."""

    def __init__(self, sock: socket.socket, then: Callable[[], None] = lambda: None) -> None:
        self.sock, self.then = sock, then

    def on_readable(self) -> None:
        with contextlib.suppress(BlockingIOError):
            self.sock.send(self.sock.recv(64))
            self.then()

    def on_writable(self) -> None:
        pass

    def on_failed(self, error: Exception) -> None:
        raise AssertionError from error


@contextlib.contextmanager
def _pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    a, b = socket.socketpair()
    a.setblocking(False)
    b.setblocking(False)
    with a, b:
        yield a, b


@contextlib.contextmanager
def _ball(reactor: Reactor) -> Iterator[None]:
    """Two descriptors that are always ready for each other."""
    with _pair() as (a, b):
        reactor.add(a.fileno(), Echo(a))
        reactor.add(b.fileno(), Echo(b))
        a.send(b"ball")
        yield
        reactor.remove(a.fileno())
        reactor.remove(b.fileno())


def run(test: Callable[[Reactor], Awaitable[None]]) -> None:
    """Run `test` beside a reactor that shares trio's wait."""
    bugs: list[Exception] = []

    async def main() -> None:
        with Reactor(lambda error, _: bugs.append(error)) as reactor:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(reactor.run)
                with trio.fail_after(60):
                    clock = trio.lowlevel.current_clock()
                    assert isinstance(clock, SharedClock)
                    while clock.idle is None:  # else trio's epoll object was not found
                        await trio.sleep(0.001)
                    await test(reactor)
                nursery.cancel_scope.cancel()
            # It is trio's own clock again: nothing of the reactor is called any more.
            assert clock.idle is None
            await trio.sleep(0.001)

    trio.run(main, clock=SharedClock())
    assert not bugs


def test_deadlines_end_the_wait_and_are_not_early() -> None:
    async def test(_: Reactor) -> None:
        for seconds in (0.02, 0.001, 0.0):
            begun = time.monotonic()
            with trio.move_on_after(seconds) as scope:
                await trio.sleep_forever()
            assert scope.cancelled_caught
            assert time.monotonic() - begun >= seconds

    run(test)


def test_an_earlier_deadline_set_by_a_task_is_kept() -> None:
    async def test(_: Reactor) -> None:
        scope = trio.CancelScope(deadline=trio.current_time() + 1000)

        async def hurry() -> None:
            await trio.sleep(0.01)
            scope.deadline = trio.current_time()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(hurry)
            with scope:
                await trio.sleep_forever()
        assert scope.cancelled_caught

    run(test)


def test_threads_wake_tasks_also_while_the_reactor_sleeps() -> None:
    async def test(_: Reactor) -> None:
        for _round in range(20):
            assert await trio.to_thread.run_sync(lambda: 7) == 7
        token, woken = trio.lowlevel.current_trio_token(), trio.Event()
        timer = threading.Timer(0.02, token.run_sync_soon, [woken.set])
        timer.start()
        await woken.wait()
        timer.join()

    run(test)


def test_signals_are_received() -> None:
    async def test(_: Reactor) -> None:
        with trio.open_signal_receiver(signal.SIGUSR1) as signals:
            timer = threading.Timer(0.02, os.kill, [os.getpid(), signal.SIGUSR1])
            timer.start()
            async for number in signals:
                assert number == signal.SIGUSR1
                break
            timer.join()

    run(test)


def test_trios_own_sockets_work_under_a_busy_reactor() -> None:
    async def test(reactor: Reactor) -> None:
        near, far = (trio.SocketStream(trio.socket.from_stdlib_socket(s)) for s in _open_pair())
        with _ball(reactor):
            for number in range(50):
                await near.send_all(bytes([number]))
                assert await far.receive_some(1) == bytes([number])
                await trio.sleep(0)
            assert await trio.to_thread.run_sync(lambda: 7) == 7
            with trio.move_on_after(0.01) as scope:
                await trio.sleep_forever()
            assert scope.cancelled_caught
        await near.aclose()
        await far.aclose()

    run(test)


def test_the_reactor_works_under_busy_tasks() -> None:
    async def test(reactor: Reactor) -> None:
        echoed = 0

        def count() -> None:
            nonlocal echoed
            echoed += 1

        with _pair() as (a, b):
            reactor.add(a.fileno(), Echo(a, count))
            # Tasks that are always runnable: trio never has nothing to do.
            for number in range(20):
                b.send(b"x")
                while echoed <= number:
                    await trio.lowlevel.checkpoint()
            reactor.remove(a.fileno())

    run(test)


def test_a_callback_may_wake_start_and_cancel_tasks() -> None:
    async def test(reactor: Reactor) -> None:
        woken, scope = trio.Event(), trio.CancelScope()
        async with trio.open_nursery() as nursery:

            async def sleeper() -> None:
                with scope:
                    await trio.sleep_forever()

            async def waker() -> None:
                woken.set()

            def act() -> None:
                nursery.start_soon(waker)
                scope.cancel()

            nursery.start_soon(sleeper)
            await trio.sleep(0.01)
            with _pair() as (a, b):
                reactor.add(a.fileno(), Echo(a, act))
                b.send(b"x")
                await woken.wait()
                reactor.remove(a.fileno())
        assert scope.cancelled_caught

    run(test)


def test_what_a_flush_defers_is_flushed() -> None:
    async def test(reactor: Reactor) -> None:
        done = trio.Event()

        class Chain:
            def __init__(self, left: int) -> None:
                self.left = left

            def flush(self) -> None:
                if self.left:
                    reactor.defer(Chain(self.left - 1))
                else:
                    done.set()

            def on_failed(self, error: Exception) -> None:
                raise AssertionError from error

        with _pair() as (a, b):
            reactor.add(a.fileno(), Echo(a, lambda: reactor.defer(Chain(3))))
            b.send(b"x")
            await done.wait()
            reactor.remove(a.fileno())

    run(test)


def _open_pair() -> tuple[socket.socket, socket.socket]:
    a, b = socket.socketpair()
    a.setblocking(False)
    b.setblocking(False)
    return a, b
