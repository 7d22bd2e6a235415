"""Which callers keep something open without going on: slow bodies, slow readers, idle connections.

No timer for each request: now and then every connection says what it waits for and how far it is
(`Mark`), and what has not moved for as long as its kind may is told to end. That costs nothing per
byte. Streams on which both sides have simply nothing to say (gRPC, WebSocket, a slow endpoint)
are nobody's fault and have no mark. Pure: takes `now`, in seconds of any clock.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

Kind = Literal["body", "unread", "left", "head", "idle"]
"""A request's body that does not come, an answer that is not read, one for a caller that has closed
its side and perhaps left, a head in parts, no request.
"""


@dataclass(frozen=True, slots=True)
class Mark:
    """What is waited for, and how far it is: any number that changes with every step."""

    kind: Kind
    progress: int = 0


class Expirable(Protocol):
    """A connection or one of its streams."""

    def expire(self, kind: Kind) -> None:
        """It has waited too long: end."""
        ...


class Watched(Protocol):
    """A caller's connection."""

    def marks(self) -> Iterable[tuple[Expirable, Mark]]:
        """Itself or its streams, each with what it waits for now."""
        ...


class IdleWatch:
    """`limits` in seconds. The resolution is that of the calls to `sweep`."""

    def __init__(self, limits: Mapping[Kind, float]) -> None:
        self._limits = limits
        self._seen: dict[Expirable, tuple[Mark, float]] = {}

    def sweep(self, connections: Iterable[Watched], now: float) -> None:
        """Look at every connection; end what has not moved for too long."""
        before, seen = self._seen, dict[Expirable, tuple[Mark, float]]()
        for connection in connections:
            for each, mark in list(connection.marks()):  # ending one may take others along
                was, since = before.get(each, (mark, now))
                if was != mark:
                    since = now
                if now - since >= self._limits[mark.kind]:
                    each.expire(mark.kind)
                else:
                    seen[each] = (mark, since)
        self._seen = seen
