"""The fast path's event loop: one epoll object, callbacks per descriptor, beside trio.

trio owns everything that decides (accept, dial, handshake, timers, lifetime); this loop
owns the moving of bytes, because a trio task per socket costs more than all our
decisions. Under `SharedClock` the two share one wait: when trio has nothing to do it asks its
clock how long to sleep, and the reactor turns in that time, with trio's own epoll object among
its descriptors, until trio has something to do again. An event then costs one epoll_wait and
its callback. Under another clock one trio task waits for our epoll object and polls it in a
loop, yielding to the other tasks every few milliseconds: the same, at twice the price.

Callbacks are level-triggered, run in trio's thread, never await and never raise for what a peer
did. They may wake tasks and start them, but must not move a deadline without doing so. They
may be called once too often (a descriptor number can be reused within one turn), so they read
and write without blocking and tolerate "not ready".
"""

from __future__ import annotations

import contextlib
import os
import select
import time
from collections.abc import Callable, Sequence
from typing import Protocol

import trio

READABLE = select.EPOLLIN
WRITABLE = select.EPOLLOUT

_EVENTS_PER_POLL = 256
_YIELD_SECONDS = 0.002
_LONGEST_WAIT = 3600.0


class SharedClock(trio.abc.Clock):
    """trio's clock (monotonic seconds), for `trio.run(..., clock=SharedClock())`: a Reactor turns
    whenever trio would sleep.

    trio.testing.wait_all_tasks_blocked does not work with it: trio does not tell clocks of it.
    """

    def __init__(self) -> None:
        self.idle: Callable[[float], float] | None = None
        """Called with the next deadline instead of sleeping; how long trio is to sleep then."""

    def start_clock(self) -> None:
        """It always runs."""

    def current_time(self) -> float:
        """Monotonic seconds."""
        return time.monotonic()

    def deadline_to_sleep_time(self, deadline: float) -> float:
        """How long trio may sleep; asked each time that it has nothing to do."""
        idle = self.idle
        return deadline - time.monotonic() if idle is None else idle(deadline)


class Handler(Protocol):
    """What a descriptor's owner implements."""

    def on_readable(self) -> None:
        """Bytes, an end or an error wait on the descriptor.

        Called for errors and hang-ups even when READABLE was not asked for.
        """
        ...

    def on_writable(self) -> None:
        """The descriptor takes bytes again."""
        ...

    def on_failed(self, error: Exception) -> None:
        """A callback of this handler raised: a bug, already reported. Close everything."""
        ...


class Flushable(Protocol):
    """Something that gathers output during a turn and writes it once at its end."""

    def flush(self) -> None:
        """Write what was gathered."""
        ...

    def on_failed(self, error: Exception) -> None:
        """flush() raised: a bug, already reported. Close everything."""
        ...


class Resumable(Protocol):
    """Something that was woken and goes on before the turn's output is flushed (a fiber)."""

    def resume(self) -> None:
        """Go on. Reports its own bugs."""
        ...


class _Alarm:
    """The descriptor that ends the wait when a trio task defers a flush."""

    def __init__(self) -> None:
        self.fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)

    def ring(self) -> None:
        os.eventfd_write(self.fd, 1)

    def on_readable(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self.fd)

    def on_writable(self) -> None:
        pass

    def on_failed(self, error: Exception) -> None:
        pass


class Reactor:
    """One epoll object and its callbacks; `run()` turns it.

    `on_bug(error, handler)` is told of every exception that a callback let escape; the
    handler is then closed through its `on_failed`, and the loop goes on.
    Use from one trio run only. `close()` (or leaving the `with` block) frees the
    descriptors; handlers close their own.
    """

    def __init__(self, on_bug: Callable[[Exception, object], None]) -> None:
        self._on_bug = on_bug
        self._epoll = select.epoll()
        self._handlers: dict[int, Handler] = {}
        self._events: dict[int, int] = {}
        self._deferred: list[Flushable] = []
        self._woken: list[Resumable] = []
        self._alarm = _Alarm()
        self._waiting = True
        self._rung = False
        self.add(self._alarm.fd, self._alarm)

    def __enter__(self) -> Reactor:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Free the epoll and alarm descriptors. Handlers stay open: their owners close them."""
        if not self._epoll.closed:
            self._epoll.close()
            os.close(self._alarm.fd)
            self._handlers.clear()
            self._events.clear()

    def add(self, fd: int, handler: Handler, events: int = READABLE) -> None:
        """Watch `fd` for `events`. Raises ValueError when it is already watched."""
        if fd in self._handlers:
            raise ValueError(f"descriptor {fd} already has a handler")
        self._epoll.register(fd, events)
        self._handlers[fd] = handler
        self._events[fd] = events

    def modify(self, fd: int, events: int) -> None:
        """Change what `fd` is watched for; also ends `mute`.

        With 0 errors and hang-ups are still reported. Unknown descriptors are ignored, so
        that a late "resume" of something closed cannot bring it back.
        """
        before = self._events.get(fd)
        if before is None or before == events:
            return
        if before < 0:
            self._epoll.register(fd, events)
        else:
            self._epoll.modify(fd, events)
        self._events[fd] = events

    def mute(self, fd: int) -> None:
        """Report nothing of `fd`, not even a hang-up (which would repeat for ever),
        until the next `modify`.
        """
        if self._events.get(fd, -1) >= 0:
            self._epoll.unregister(fd)
            self._events[fd] = -1

    def remove(self, fd: int) -> None:
        """Forget `fd`; call before closing it. Unknown descriptors are ignored."""
        if self._handlers.pop(fd, None) is None:
            return
        if self._events.pop(fd) >= 0:
            with contextlib.suppress(OSError):
                self._epoll.unregister(fd)

    def forget(self, fd: int) -> None:
        """As `remove`, for a descriptor without a duplicate that is closed next: the kernel
        then stops watching it by itself.
        """
        if self._handlers.pop(fd, None) is not None:
            del self._events[fd]

    def defer(self, flushable: Flushable) -> None:
        """Call `flushable.flush()` once, at the end of this turn (or soon, outside of one)."""
        self._deferred.append(flushable)
        if self._waiting and not self._rung and not self._epoll.closed:
            self._rung = True
            self._alarm.ring()

    def wake(self, resumable: Resumable) -> None:
        """Call `resumable.resume()` in this turn, before anything is flushed (or soon)."""
        self._woken.append(resumable)
        if self._waiting and not self._rung and not self._epoll.closed:
            self._rung = True
            self._alarm.ring()

    def report_bug(self, error: Exception, where: object) -> None:
        """Hand an exception that should not have been to `on_bug`."""
        self._on_bug(error, where)

    async def run(self) -> None:
        """Turn until cancelled. If cancelled: handlers stay open, their owners close them."""
        clock = trio.lowlevel.current_clock()
        if isinstance(clock, SharedClock) and clock.idle is None:
            fd = await _find_trio(self._alarm, self._epoll.fileno())
            if fd is not None:
                await self._run_shared(clock, fd)
        await self._run_nested()

    async def _run_shared(self, clock: SharedClock, trio_fd: int) -> None:
        guest = _Guest(self)
        self.add(trio_fd, guest)
        self._waiting = False  # no alarm: we turn before anything sleeps
        trio.lowlevel.add_instrument(guest)
        clock.idle = guest.idle
        try:
            await trio.sleep_forever()
        finally:
            clock.idle = None
            trio.lowlevel.remove_instrument(guest)
            self.remove(trio_fd)
            self._waiting = True

    def turn_until(self, deadline: float, is_over: Callable[[], bool]) -> None:
        """Turn, sleeping in between, until the deadline (monotonic) or until `is_over()`."""
        poll, clock = self._epoll.poll, time.monotonic
        if self._deferred or self._woken:
            self._turn(())
        while not is_over() and (left := deadline - clock()) > 0:
            self._turn(poll(min(left, _LONGEST_WAIT), _EVENTS_PER_POLL))

    def turn_once(self) -> None:
        """Handle what is there, without sleeping."""
        ready = self._epoll.poll(0, _EVENTS_PER_POLL)
        if ready or self._deferred or self._woken:
            self._turn(ready)

    async def _run_nested(self) -> None:
        poll = self._epoll.poll
        epoll_fd = self._epoll.fileno()
        clock = time.monotonic
        while True:
            await trio.lowlevel.wait_readable(epoll_fd)
            self._waiting = self._rung = False
            try:
                started = clock()
                while (ready := poll(0, _EVENTS_PER_POLL)) or self._deferred or self._woken:
                    self._turn(ready)
                    if clock() - started > _YIELD_SECONDS:
                        await trio.lowlevel.checkpoint()
                        started = clock()
            finally:
                self._waiting = True

    def _turn(self, ready: Sequence[tuple[int, int]]) -> None:
        handlers = self._handlers
        for fd, events in ready:
            handler = handlers.get(fd)
            if handler is None:
                continue
            try:
                if events & WRITABLE:
                    handler.on_writable()
                    if events == WRITABLE or handlers.get(fd) is not handler:
                        continue
                handler.on_readable()
            except Exception as error:
                self._failed(handler, error, fd)
        # Fibers first, so that what they say goes out with the rest. Both may cause more of both.
        while self._woken or self._deferred:
            woken, self._woken = self._woken, []
            for resumable in woken:
                resumable.resume()
            if self._woken:
                continue
            deferred, self._deferred = self._deferred, []
            for flushable in deferred:
                try:
                    flushable.flush()
                except Exception as error:
                    self._failed(flushable, error, None)

    def _failed(self, failed: Handler | Flushable, error: Exception, fd: int | None) -> None:
        self._on_bug(error, failed)
        try:
            failed.on_failed(error)
        except Exception as second:
            self._on_bug(second, failed)
        if fd is not None and self._handlers.get(fd) is failed:
            self.remove(fd)


class _Guest(trio.abc.Instrument):
    """trio as one of the reactor's descriptors: readable when trio's own waits have ended."""

    def __init__(self, reactor: Reactor) -> None:
        self._reactor = reactor
        self._is_wanted = False
        self._has_idled = False

    def idle(self, deadline: float) -> float:
        """Turn the reactor until trio has something to do. trio is not to sleep after it."""
        self._has_idled = True
        self._is_wanted = False
        self._reactor.turn_until(deadline, lambda: self._is_wanted)
        return 0.0

    def task_scheduled(self, task: trio.lowlevel.Task) -> None:
        """A callback woke a task, or started one."""
        self._is_wanted = True

    def before_io_wait(self, timeout: float) -> None:
        """trio is about to look at its descriptors: it goes on without having idled."""
        if self._has_idled:
            self._has_idled = False
        else:
            self._reactor.turn_once()

    def on_readable(self) -> None:
        """One of trio's descriptors is ready."""
        self._is_wanted = True

    def on_writable(self) -> None:
        """Never asked for."""

    def on_failed(self, error: Exception) -> None:
        """Nothing here fails."""


async def _find_trio(alarm: _Alarm, ours: int) -> int | None:
    """trio's epoll object: the one besides `ours` that watches the alarm when trio waits for it.
    None when there is no such thing.
    """
    alarm.ring()
    await trio.lowlevel.wait_readable(alarm.fd)
    return next((fd for fd in _watchers(alarm.fd) if fd != ours), None)


def _watchers(watched: int) -> list[int]:
    """The epoll objects of this process that have `watched` among their descriptors."""
    found = []
    with contextlib.suppress(OSError):
        for name in os.listdir("/proc/self/fdinfo"):
            with contextlib.suppress(FileNotFoundError), open(f"/proc/self/fdinfo/{name}") as info:
                if any(line.split()[:2] == ["tfd:", str(watched)] for line in info):
                    found.append(int(name))
    return found
