"""Filters of others, in Python: found by entry point, held to a time budget and to what they said
should happen when they fail.

A package names a `Declaration` in the entry point group `ambit.waypoint.filters`; a route's
ExtensionRef (group `filters.ambit.dev`, kind `Filter`) asks for it by name. What it raises, and a
decision later than its budget, counts as a failure: a filter that fails closed answers 500, one
that fails open is as if it had not been called, its half-made changes taken back. A body has no
way back (some of it has gone), so a failure there always cuts the exchange, visibly.

Python cannot stop a call that computes. One that is late several times in a row is therefore not
called again for a while. Custom filters are trusted code: this bounds mistakes, not malice.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import Final, Literal, TypeVar

import trio

from waypoint.filters.chain import (
    Blocked,
    BodyFilter,
    Filter,
    PassingFilter,
    Request,
    Respond,
    Response,
    Verdict,
    Wait,
)

GROUP: Final = "ambit.waypoint.filters"
API_GROUP: Final = "filters.ambit.dev"
API_KIND: Final = "Filter"
_STRIKES: Final = 3
_REST_SECONDS: Final = 10.0

T = TypeVar("T")
Clock = Callable[[], float]


@dataclass(frozen=True, slots=True)
class Declaration:
    """A custom filter as its package declares it. `make` gets the namespace of the route that asks.
    `budget_seconds` is for each call, `wait_seconds` for the answer to a `Wait`.
    """

    make: Callable[[str], Filter]
    on_failure: Literal["Open", "Closed"] = "Closed"
    budget_seconds: float = 0.01
    wait_seconds: float = 1.0


class CustomFilters:
    """The filters that are installed. Looked up once, loaded when a route first asks for one."""

    def __init__(
        self, found: Iterable[EntryPoint] | None = None, clock: Clock = time.perf_counter
    ) -> None:
        if found is None:
            found = entry_points(group=GROUP)
        self._found = {each.name: each for each in found}
        self._clock = clock

    def make(self, extension: str) -> Filter | None:
        """The filter of `group/kind/namespace/name`; None when no package declares that. One that
        cannot be loaded answers 500 to every request.
        """
        group, _, rest = extension.partition("/")
        kind, _, rest = rest.partition("/")
        namespace, _, name = rest.partition("/")
        entry = self._found.get(name)
        if group != API_GROUP or kind != API_KIND or entry is None:
            return None
        try:
            declared = entry.load()
            if not isinstance(declared, Declaration):
                return _Refusing(name, "its entry point is not a Declaration")
            return Guarded(name, declared, declared.make(namespace), self._clock)
        except Exception as error:  # whatever a stranger's module raises while it is imported
            return _Refusing(name, f"it cannot be loaded: {type(error).__name__}")


class _Refusing(PassingFilter):
    def __init__(self, name: str, why: str) -> None:
        self.name = name
        self._respond = _failure(name, why)

    def on_request(self, request: Request) -> Verdict:
        del request
        return self._respond


class Guarded(PassingFilter):
    """A custom filter with its budget kept and its failures caught."""

    def __init__(self, name: str, declared: Declaration, inner: Filter, clock: Clock) -> None:
        self.name = name
        self._declared = declared
        self._inner = inner
        self._clock = clock
        self._strikes = 0
        self._rests_until = 0.0

    def on_request(self, request: Request) -> Verdict:
        """What the filter says, in time; else what it declared."""
        before = (request.method, request.scheme, request.authority, request.path, request.query)
        pairs = list(request.headers.pairs)
        verdict, failed = self._call(lambda: self._inner.on_request(request))
        if failed:
            (
                request.method,
                request.scheme,
                request.authority,
                request.path,
                request.query,
            ) = before
            request.headers.pairs = pairs
            return self._failed(request, failed)
        if isinstance(verdict, Wait):
            asked = verdict.ask
            return Wait(lambda: self._wait(request, asked))
        return verdict

    def on_response(self, request: Request, response: Response) -> Respond | None:
        """The same for the response's head."""
        status, pairs = response.status, list(response.headers.pairs)
        respond, failed = self._call(lambda: self._inner.on_response(request, response))
        if failed:
            response.status, response.headers.pairs = status, pairs
            return self._failed(request, failed)
        return respond

    def open_request_body(self, request: Request) -> BodyFilter | None:
        """The filter's own, guarded."""
        opened, failed = self._call(lambda: self._inner.open_request_body(request))
        return self._body(opened, self._failed(request, failed) if failed else None)

    def open_response_body(self, request: Request, response: Response) -> BodyFilter | None:
        """The filter's own, guarded."""
        opened, failed = self._call(lambda: self._inner.open_response_body(request, response))
        return self._body(opened, self._failed(request, failed) if failed else None)

    def _body(self, opened: BodyFilter | None, respond: Respond | None) -> BodyFilter | None:
        if opened is None and respond is None:
            return None
        return _GuardedBody(self.name, opened, respond, self._declared.budget_seconds, self._clock)

    def _call(self, call: Callable[[], T]) -> tuple[T | None, str]:
        """What the call returned, and why it failed (empty: it did not)."""
        started = self._clock()
        if started < self._rests_until:
            return None, "it was late too often and is not called for a while"
        try:
            answer = call()
        except Exception as error:  # a stranger's bug ends one request, not the proxy
            return None, f"it raised {type(error).__name__}"
        now = self._clock()
        if now - started <= self._declared.budget_seconds:
            self._strikes = 0
            return answer, ""
        self._strikes += 1
        if self._strikes >= _STRIKES:
            self._strikes = 0
            self._rests_until = now + _REST_SECONDS
        return None, "it took longer than its budget"

    async def _wait(
        self, request: Request, ask: Callable[[], Awaitable[Respond | None]]
    ) -> Respond | None:
        why = "its answer took longer than its budget"
        with trio.move_on_after(self._declared.wait_seconds):
            try:
                return await ask()
            except Exception as error:  # as in _call
                why = f"it raised {type(error).__name__}"
        return self._failed(request, why)

    def _failed(self, request: Request, why: str) -> Respond | None:
        if self._declared.on_failure == "Closed":
            return _failure(self.name, why)
        request.notes.setdefault("custom.failed", []).append(f"{self.name}: {why}")
        return None


class _GuardedBody:
    """A body filter that cuts the exchange when it fails. `respond`: it could not be opened."""

    def __init__(
        self,
        name: str,
        inner: BodyFilter | None,
        respond: Respond | None,
        budget_seconds: float,
        clock: Clock,
    ) -> None:
        self._name = name
        self._inner = inner
        self._respond = respond
        self._budget = budget_seconds
        self._clock = clock

    def feed(self, data: bytes) -> bytes:
        return self._call(lambda inner: inner.feed(data))

    def finish(self) -> bytes:
        return self._call(lambda inner: inner.finish())

    def _call(self, call: Callable[[BodyFilter], bytes]) -> bytes:
        if self._inner is None or self._respond is not None:
            raise Blocked(self._respond or _failure(self._name, "its body could not be opened"))
        started = self._clock()
        try:
            given = call(self._inner)
        except Blocked:
            raise
        except Exception as error:  # as in Guarded
            raise Blocked(_failure(self._name, f"it raised {type(error).__name__}")) from error
        if self._clock() - started > self._budget:
            raise Blocked(_failure(self._name, "it took longer than its budget"))
        return given


def _failure(name: str, why: str) -> Respond:
    return Respond(500, flag="NC", rule=name, reason=f"custom filter {name}: {why}")
