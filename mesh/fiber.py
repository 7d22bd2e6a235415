"""FAST PATH: a connection's coroutine without a trio task.

A task that waits three times costs more than all that a connection decides. A fiber is the same
`async def`, stepped by the reactor: it starts at once, parks in `Signal.wait`, and goes on at
the end of the turn in which the signal was set. `Signal.wait` and `in_task` work in a trio task
as well, so that code which uses nothing else runs either way, and tests run it as tasks.

In a fiber nothing of trio may be awaited (that is reported as a bug), but for what `in_task`
wraps: a task of its own, for the few that wait for a dial, a name or a certificate. A fiber is
cancelled by raising `Cut` where it waits; like trio's Cancelled it must not be swallowed
before the fiber's work is over. Its owner is a `Fibers`, which can cut all of them.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Coroutine, Generator
from typing import Any, TypeVar, TypeVarTuple

import trio
from mypy_extensions import mypyc_attr

from mesh.reactor import Reactor

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

_PARKED = object()
_current: Fiber | None = None


@mypyc_attr(native_class=False)
class Cut(BaseException):
    """This fiber is cancelled. Whoever catches it cleans up and lets it go on."""


def current() -> Fiber | None:
    """The fiber that runs now, None in a trio task."""
    return _current


class Fiber:
    """Made by `Fibers.start`."""

    __slots__ = ("_coroutine", "_is_ready", "_is_running", "_owner", "is_cut")

    def __init__(self, owner: Fibers, coroutine: Coroutine[Any, Any, object]) -> None:
        self._owner = owner
        self._coroutine = coroutine
        self.is_cut = self._is_running = self._is_ready = False

    def wake(self) -> None:
        """Go on at the end of this turn. Idempotent."""
        if not self._is_ready:
            self._is_ready = True
            self._owner.reactor.wake(self)

    def cancel(self) -> None:
        """Raise Cut where it waits, now; in a fiber that runs, where it waits next."""
        if not self.is_cut:
            self.is_cut = True
            if not self._is_running:
                self.step(Cut())

    def resume(self) -> None:
        """For the reactor: it was woken."""
        if self._is_ready:
            self._is_ready = False
            self.step(None)

    def step(self, error: BaseException | None) -> None:
        """For its owner: run until it waits again, with `error` raised where it waits."""
        global _current
        owner = self._owner
        if self not in owner.alive:
            return
        before, _current = _current, self
        self._is_running = True
        try:
            if error is None:
                waits_for: object = self._coroutine.send(None)
            else:
                waits_for = self._coroutine.throw(error)
        except StopIteration:
            owner.ended(self)
        except Cut:
            owner.ended(self)
        except Exception as exc:
            owner.ended(self)
            owner.reactor.report_bug(exc, self)
        else:
            if waits_for is not _PARKED:
                self.step(RuntimeError(f"a fiber awaits {waits_for!r} of trio without in_task"))
        finally:
            self._is_running = False
            _current = before


class Fibers:
    """The fibers of one owner, who cuts them when its own time is over."""

    def __init__(self, reactor: Reactor) -> None:
        self.reactor = reactor
        self.alive: set[Fiber] = set()
        self._ended: trio.Event | None = None

    def __len__(self) -> int:
        return len(self.alive)

    def start(self, coroutine: Coroutine[Any, Any, object]) -> None:
        """Run `coroutine` until it waits for the first time. An exception that it raises is a
        bug, told to the reactor's `on_bug`.
        """
        fiber = Fiber(self, coroutine)
        self.alive.add(fiber)
        fiber.step(None)

    def cut(self) -> None:
        """Cancel all, now."""
        for fiber in tuple(self.alive):
            fiber.cancel()

    def ended(self, fiber: Fiber) -> None:
        """For a fiber: its coroutine is over."""
        self.alive.discard(fiber)
        if not self.alive and self._ended is not None:
            self._ended.set()
            self._ended = None

    async def wait_ended(self) -> None:
        """Until none is alive."""
        while self.alive:
            if self._ended is None:
                self._ended = trio.Event()
            await self._ended.wait()


class Signal:
    """Set once; one fiber and any number of trio tasks may wait for it."""

    __slots__ = ("_event", "_fiber", "is_set")

    def __init__(self) -> None:
        self.is_set = False
        self._fiber: Fiber | None = None
        self._event: trio.Event | None = None

    def set(self) -> None:
        """Wake who waits. Idempotent."""
        self.is_set = True
        if self._fiber is not None:
            self._fiber.wake()
            self._fiber = None
        if self._event is not None:
            self._event.set()

    def wait(self) -> Awaitable[None]:
        """Until it is set. If cancelled: nothing is changed."""
        return self

    def __await__(self) -> Generator[Any, Any, None]:
        """As `wait`. A bare generator: thousands of connections wait here, and each `async def`
        is a frame.
        """
        fiber = _current
        if fiber is None:
            if self._event is None:
                self._event = trio.Event()
                if self.is_set:
                    self._event.set()
            yield from self._event.wait().__await__()
            return
        while not self.is_set:
            if self._fiber not in (None, fiber):
                raise RuntimeError("a second fiber waits for one signal")
            self._fiber = fiber
            if not fiber.is_cut:
                yield _PARKED
            if fiber.is_cut:
                raise Cut


async def in_task(nursery: trio.Nursery | None, fn: Callable[[*Ts], Awaitable[T]], *args: *Ts) -> T:
    """Await something of trio: as it is in a task; from a fiber in a new task of `nursery`.

    Raises what `fn` raises. If cancelled: the task is cancelled and its result dropped, so
    `fn` must own nothing when it returns, or give it to somebody first.
    """
    if _current is None:
        return await fn(*args)
    if nursery is None:
        raise RuntimeError("a fiber needs a nursery for what it awaits of trio")
    done = Signal()
    scope = trio.CancelScope()
    results: list[T] = []
    errors: list[Exception] = []

    async def run() -> None:
        try:
            with scope:
                results.append(await fn(*args))
        except Exception as exc:
            errors.append(exc)
        finally:
            done.set()

    nursery.start_soon(run)
    try:
        await done.wait()
    except Cut:
        scope.cancel()
        raise
    if errors:
        raise errors[0]
    if not results:  # the nursery was cancelled: its owner is about to cut us
        raise Cut
    return results[0]
