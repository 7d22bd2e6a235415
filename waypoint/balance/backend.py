"""A service's port as requests are sent to it: its endpoints as of one state of the Store, what was
set for it, and which endpoint the next request gets.

Usually two are drawn and the one with less expected work wins (P2C with EWMA). A session or a hash
decides first, if there is one; endpoints that were ejected, or failed this request already, are
passed over as long as others are left.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Generic, Protocol, TypeVar

from mesh.model.balancing import Candidate
from mesh.model.route import DEFAULT_BACKEND, BackendSettings
from waypoint.balance import session as sessions
from waypoint.balance.budget import RetryBudget
from waypoint.balance.ring import Ring
from waypoint.balance.session import AFFINITY, Session
from waypoint.filters.chain import Request
from waypoint.match import first_parameter


class Clock(Protocol):
    """Where time comes from."""

    def now(self) -> float:
        """Monotonic seconds."""
        ...

    def wall(self) -> float:
        """Seconds since the epoch."""
        ...


class Random(Protocol):
    """The part of `random.Random` used here."""

    def random(self) -> float:
        """At least 0, below 1."""
        ...

    def randbytes(self, n: int) -> bytes:
        """`n` bytes."""
        ...


class Drawn(Protocol):
    """What the choice looks at: the part of an `upstream.Endpoint` used here."""

    active: int
    ejected_until: float
    turn: int

    @property
    def candidate(self) -> Candidate:
        """Where it is."""
        ...

    @property
    def load(self) -> float:
        """Expected work before a new request is through."""
        ...


E = TypeVar("E", bound=Drawn)


class BackendState(Generic[E]):
    """See the module. `settings` and `endpoints` change by `update`."""

    __slots__ = ("_clock", "_key", "_limits", "_ring", "_rng", "_session", "_tokens",
                 "budget", "endpoints", "has_affinity", "reason", "settings",
                 "version")  # fmt: skip

    def __init__(self, service: str, port: int, clock: Clock, rng: Random) -> None:
        self._key = (service, port)
        self._clock = clock
        self._rng = rng
        self._limits = DEFAULT_BACKEND.limits
        self._session: Session | None = None
        self._ring: Ring[E] | None = None
        self._tokens: dict[Session, dict[bytes, E]] = {}
        self.budget = RetryBudget(self._limits)
        self.endpoints: Sequence[E] = ()
        self.has_affinity = False
        self.reason = ""
        self.settings: BackendSettings = DEFAULT_BACKEND
        self.version = -1

    def update(self, endpoints: Sequence[E], settings: BackendSettings, reason: str) -> None:
        """What the Store says now; `reason` is why there is no endpoint."""
        if settings.limits != self._limits:
            in_flight, self._limits = self.budget.in_flight, settings.limits
            self.budget = RetryBudget(settings.limits)
            self.budget.in_flight = in_flight
        if settings.session != self.settings.session:
            service, port = self._key
            scope, kept = f"{service}:{port}", settings.session
            self._session = Session(kept, scope) if kept is not None else None
        self.settings, self.reason = settings, reason
        self.endpoints = endpoints
        self.has_affinity = (
            settings.session is not None or settings.balancing.kind == "CONSISTENT_HASH"
        )
        self._ring = None
        self._tokens.clear()

    @property
    def active(self) -> int:
        """Requests on their way."""
        return sum(each.active for each in self.endpoints)

    # ---- which one

    def draw(self, excluded: Collection[E] = ()) -> E:
        """An endpoint by load, or as the service's settings say; there is one at least."""
        candidates = self.endpoints
        if len(candidates) == 1:
            return candidates[0]
        return self._draw_of(self._usable(excluded))

    def find(self, request: Request, session: Session | None, excluded: Collection[E] = ()) -> E:
        """The endpoint of a request's session, or of its hash; else as `draw`. What the response
        has to carry is noted in the request.
        """
        usable = self._usable(excluded)
        session = session or self._session
        if session is not None:
            return self._in_session(request, session, usable)
        key = self._hashed(request)
        if key is None:
            return self._draw_of(usable)
        if self._ring is None:
            named = [
                (f"{e.candidate.workload.uid}:{e.candidate.port}", e.candidate.workload.capacity, e)
                for e in self.endpoints
            ]
            self._ring = Ring(named, self.settings.balancing.ring_size)
        return self._ring.find(key, frozenset(usable)) or self._draw_of(usable)

    def _usable(self, excluded: Collection[E]) -> Sequence[E]:
        candidates, outlier = self.endpoints, self.settings.outlier
        now = self._clock.now()
        usable = [each for each in candidates if each.ejected_until <= now]
        out = len(candidates) - len(usable)
        if out and outlier is not None:
            too_many = out > 1 and out * 100 > outlier.max_ejection_percent * len(candidates)
            too_few = len(usable) * 100 < outlier.min_health_percent * len(candidates)
            if too_many or too_few or not usable:
                usable = list(candidates)  # nobody is out, then
        if excluded:
            usable = [each for each in usable if each not in excluded] or usable
        return usable

    def _draw_of(self, usable: Sequence[E]) -> E:
        count = len(usable)
        if count == 1:
            return usable[0]
        kind = self.settings.balancing.kind
        if kind == "ROUND_ROBIN":
            return self._next_of(usable)
        rng = self._rng
        first = int(rng.random() * count)
        if kind == "RANDOM":
            return usable[first]
        second = int(rng.random() * (count - 1))
        second += second >= first
        a, b = usable[first], usable[second]
        return a if a.load <= b.load else b

    def _next_of(self, usable: Sequence[E]) -> E:
        """In turn, each as often as its capacity says: smooth weighted round robin."""
        total, best = 0, usable[0]
        for each in usable:
            weight = max(1, each.candidate.workload.capacity)
            total += weight
            each.turn += weight
            if each.turn > best.turn:
                best = each
        best.turn -= total
        return best

    # ---- sessions and hashes

    def _in_session(self, request: Request, session: Session, usable: Sequence[E]) -> E:
        now = self._clock.wall()
        tokens = self._tokens.get(session)
        if tokens is None:
            tokens = self._tokens[session] = {
                session.endpoint_token(each.candidate.workload.uid, each.candidate.port): each
                for each in self.endpoints
            }
        backend = session.backend_token(*self._key)
        brought = session.read(request, now)
        if brought is not None and brought[0] == backend:
            known = tokens.get(brought[1])
            if known is not None and known in usable:
                return known
        chosen = self._draw_of(usable)
        token = session.endpoint_token(chosen.candidate.workload.uid, chosen.candidate.port)
        request.notes[AFFINITY] = session.begin(backend, token, now)
        return chosen

    def _hashed(self, request: Request) -> bytes | None:
        """What the endpoint depends on; None: on nothing."""
        balancing = self.settings.balancing
        kind, _, plain = balancing.hash_on.partition(":")
        name = plain.encode("latin-1", "replace")
        if kind == "source-ip":
            return request.source_ip.encode()
        if kind == "header":
            return request.headers.get(name.lower())
        if kind == "query":
            return first_parameter(request.query, name)
        value = sessions.cookie(request, name)
        if value is None and balancing.cookie_seconds is not None:
            value = self._rng.randbytes(16).hex().encode()
            request.notes[AFFINITY] = sessions.set_cookie(
                name, value, balancing.cookie_path, balancing.cookie_seconds
            )
        return value
