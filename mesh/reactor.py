"""The fast path's event loop: one epoll object, callbacks per descriptor, beside trio.

trio owns everything that decides (accept, dial, handshake, timers, lifetime); this loop
owns the moving of bytes, because a trio task per socket costs more than all our
decisions. It is hosted "nested": one trio task waits for the epoll descriptor itself and
then polls in a loop, yielding to the other tasks every few milliseconds.

Callbacks are level-triggered, run inside the reactor's trio task, never await and never
raise for what a peer did. They may be called once too often (a descriptor number can be
reused within one turn), so they read and write without blocking and tolerate "not ready".
"""

from __future__ import annotations

import contextlib
import os
import select
import time
from collections.abc import Callable
from typing import Protocol

import trio

READABLE = select.EPOLLIN
WRITABLE = select.EPOLLOUT

_EVENTS_PER_POLL = 256
_YIELD_SECONDS = 0.002


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

    def defer(self, flushable: Flushable) -> None:
        """Call `flushable.flush()` once, at the end of this turn (or soon, outside of one)."""
        self._deferred.append(flushable)
        if self._waiting and not self._rung and not self._epoll.closed:
            self._rung = True
            self._alarm.ring()

    def report_bug(self, error: Exception, where: object) -> None:
        """Hand an exception that should not have been to `on_bug`."""
        self._on_bug(error, where)

    async def run(self) -> None:
        """Turn until cancelled. If cancelled: handlers stay open, their owners close them."""
        poll = self._epoll.poll
        epoll_fd = self._epoll.fileno()
        clock = time.monotonic
        while True:
            await trio.lowlevel.wait_readable(epoll_fd)
            self._waiting = self._rung = False
            try:
                started = clock()
                while (ready := poll(0, _EVENTS_PER_POLL)) or self._deferred:
                    self._turn(ready)
                    if clock() - started > _YIELD_SECONDS:
                        await trio.lowlevel.checkpoint()
                        started = clock()
            finally:
                self._waiting = True

    def _turn(self, ready: list[tuple[int, int]]) -> None:
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
        if self._deferred:
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
