"""The life of a process: start, signals, drain with a deadline, exit codes, and the guard
around one connection.

`start` is a daemon's whole `main`: read the settings, set up the log, run. The first SIGTERM
or SIGINT sets `Shutdown.requested`; the daemon then drains and returns. When the deadline
passes, or a second signal comes, everything is cancelled. A MeshError that ends the process is
one line on stderr (`ztunnel: XDS_ADDRESS: ...`) and exit code 2 for ConfigError, 1 otherwise.
Anything else is a bug: logged whole, exit code 1. `except Exception` exists only here.
"""

from __future__ import annotations

import functools
import os
import resource
import signal
import sys
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Protocol, TypeVar, TypeVarTuple

import trio

from mesh.errors import ConfigError, MeshError
from mesh.reactor import SharedClock
from mesh.runtime import config as settings
from mesh.runtime import log, memory

Ts = TypeVarTuple("Ts")
C = TypeVar("C")

EXIT_OK = 0
EXIT_FAILED = 1
EXIT_USAGE = 2

DEFAULT_DRAIN_SECONDS = 5.0

_log = log.get("lifecycle")


class Shutdown:
    """That the process was asked to end, by a signal or by `request()`."""

    def __init__(self) -> None:
        self.requested = trio.Event()

    def request(self) -> None:
        """Ask for the drain, as `POST /quitquitquit` does."""
        self.requested.set()

    async def wait(self) -> None:
        """Until the drain is asked for. If cancelled: nothing is changed."""
        await self.requested.wait()


def drain_seconds(
    termination_grace_seconds: float | None = None, deadline_seconds: float | None = None
) -> float:
    """How long open connections may live on after SIGTERM, in seconds.

    An explicit deadline wins. Otherwise the pod's grace period less a margin, so that we
    leave before the kubelet kills: five seconds when it is longer than ten, else one.
    """
    if deadline_seconds is not None:
        return deadline_seconds
    if termination_grace_seconds is None:
        return DEFAULT_DRAIN_SECONDS
    margin = 5.0 if termination_grace_seconds > 10 else 1.0
    return max(1.0, termination_grace_seconds - margin)


class _HasLogSettings(Protocol):
    log_level: str
    log_format: str


def start(
    name: str,
    cls: type[C],
    main: Callable[[C, Shutdown], Awaitable[None]],
    *,
    grace_seconds: Callable[[C], float] | float = DEFAULT_DRAIN_SECONDS,
) -> int:
    """A daemon from argv and environment to exit code.

    `main(config, shutdown)` returns when it has drained. Fields `log_level` and `log_format`
    (`json` or `plain`) of the configuration are used where they exist.
    """
    try:
        resolved = settings.resolve(cls, sys.argv[1:], os.environ)
        config = resolved.config
        _start_log(config, resolved.origins)
    except settings.Shown as shown:
        sys.stdout.write(f"{shown}\n")
        return EXIT_OK
    except MeshError as exc:
        return _report_failure(name, exc)
    memory.settle()
    shutdown = Shutdown()
    seconds = grace_seconds(config) if callable(grace_seconds) else grace_seconds
    return run(
        functools.partial(main, config, shutdown),
        name=name,
        shutdown=shutdown,
        grace_seconds=seconds,
    )


def _start_log(config: object, origins: Mapping[str, settings.Origin]) -> None:
    """Raises ConfigError, by the name that the level was given under."""
    log_format = getattr(config, "log_format", "") or ("plain" if sys.stderr.isatty() else "json")
    try:
        log.configure(json=log_format == "json", level=getattr(config, "log_level", "info"))
    except ValueError as exc:
        raise ConfigError(str(exc), field=origins["log_level"].name or "log_level") from exc


def raise_file_limit() -> None:
    """Open as many descriptors as we may: every connection is two, every pod is eight, and the
    soft limit is made for shells.
    """
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def run(
    main: Callable[[], Awaitable[None]],
    *,
    name: str = "ambit",
    shutdown: Shutdown | None = None,
    grace_seconds: float = DEFAULT_DRAIN_SECONDS,
) -> int:
    """Run `main` under trio until it returns; the process's exit code.

    `shutdown` is what `main` watches. Exit code 0 after a drain, even a forced one.
    """
    try:
        trio.run(_run, main, name, shutdown or Shutdown(), grace_seconds, clock=SharedClock())
    except BaseException as exc:
        return _exit_code(name, exc)
    return EXIT_OK


async def _run(
    main: Callable[[], Awaitable[None]], name: str, shutdown: Shutdown, grace_seconds: float
) -> None:
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_watch_signals, signals, shutdown, nursery.cancel_scope)
            nursery.start_soon(
                _enforce_deadline, name, shutdown, grace_seconds, nursery.cancel_scope
            )
            await main()
            nursery.cancel_scope.cancel()


async def _watch_signals(signals: Any, shutdown: Shutdown, scope: trio.CancelScope) -> None:
    async for number in signals:
        if shutdown.requested.is_set():
            _log.warning("shutdown_forced", signal=signal.Signals(number).name)
            scope.cancel()
            return
        _log.info("shutdown_requested", signal=signal.Signals(number).name)
        shutdown.request()


async def _enforce_deadline(
    name: str, shutdown: Shutdown, grace_seconds: float, scope: trio.CancelScope
) -> None:
    await shutdown.wait()
    await trio.sleep(grace_seconds)
    _log.warning("drain_deadline_passed", process=name, seconds=grace_seconds)
    scope.cancel()


def _exit_code(name: str, exc: BaseException) -> int:
    bugs, expected = _split(exc)
    if bugs is None and expected is not None and isinstance(leaves(expected)[0], MeshError):
        return _report_failure(name, leaves(expected)[0])
    report_bug(name, bugs or exc)
    return EXIT_FAILED


def _report_failure(name: str, exc: BaseException) -> int:
    sys.stderr.write(f"{name}: {exc}\n")
    hint = getattr(exc, "hint", "")
    if hint:
        sys.stderr.write(f"{name}: hint: {hint}\n")
    return EXIT_USAGE if isinstance(exc, ConfigError) else EXIT_FAILED


def _is_bug(exc: BaseException) -> bool:
    return isinstance(exc, Exception) and not isinstance(exc, (MeshError, BaseExceptionGroup))


def _split(exc: BaseException) -> tuple[BaseException | None, BaseException | None]:
    """(bugs, the rest: MeshError, cancellation, exits), through exception groups."""
    if isinstance(exc, BaseExceptionGroup):
        return exc.split(_is_bug)
    return (exc, None) if _is_bug(exc) else (None, exc)


def leaves(exc: BaseException) -> list[BaseException]:
    """The plain exceptions inside a group, or the exception itself."""
    if isinstance(exc, BaseExceptionGroup):
        return [leaf for inner in exc.exceptions for leaf in leaves(inner)]
    return [exc]


def report_bug(name: str, exc: BaseException, **fields: object) -> None:
    """Log an unexpected exception whole, with its trace, as event `bug`."""
    _log.error("bug", where=name, exc_info=exc, **fields)


def call(name: str, fn: Callable[[], object]) -> None:
    """Call back; a bug in `fn` is logged and ends only this call."""
    try:
        fn()
    except Exception as exc:
        report_bug(name, exc)


async def supervise(name: str, fn: Callable[[*Ts], Awaitable[object]], *args: *Ts) -> None:
    """Run one connection's task, so that a bug in it ends that connection only.

    A MeshError is the caller's to record and is raised on; out of a group the first one,
    after bugs beside it were logged. Cancellation passes untouched.
    Raises MeshError. If cancelled: `fn` is cancelled, nothing is logged.
    """
    try:
        await fn(*args)
    except MeshError:
        raise
    except (Exception, BaseExceptionGroup) as exc:
        bugs, rest = _split(exc)
        if bugs is not None:
            report_bug(name, bugs)
        if rest is None:
            return
        if isinstance(rest, Exception):
            raise leaves(rest)[0] from None
        raise rest from None  # a cancellation is in it, which belongs to an outer scope


async def guard(name: str, fn: Callable[[*Ts], Awaitable[object]], *args: *Ts) -> None:
    """Like `supervise`, for a task started in a nursery that nobody else watches: a
    MeshError is logged in one line instead of raised. If cancelled: `fn` is cancelled.
    """
    try:
        await supervise(name, fn, *args)
    except MeshError as exc:
        _log.info("task_failed", where=name, error=str(exc), flag=exc.flag)
