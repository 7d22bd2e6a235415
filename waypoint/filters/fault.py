"""Faults made on purpose: a share of requests waits, a share is aborted."""

from __future__ import annotations

from typing import Protocol

import trio

from mesh.model.route import Fault
from waypoint.filters.chain import PassingFilter, Request, Respond, Verdict, Wait


class Random(Protocol):
    """The part of `random.Random` used here."""

    def random(self) -> float:
        """At least 0, below 1."""
        ...


class FaultFilter(PassingFilter):
    """One fault; each request is drawn for the delay and for the abort by itself."""

    name = "fault"

    def __init__(self, fault: Fault, rng: Random) -> None:
        self.fault = fault
        self._rng = rng

    def on_request(self, request: Request) -> Verdict:
        """Wait, abort, both or neither."""
        del request
        fault = self.fault
        is_delayed = self._is_drawn(fault.delay_percent) and fault.delay_seconds > 0
        aborted: Respond | None = None
        if fault.abort_status and self._is_drawn(fault.abort_percent):
            aborted = Respond(
                fault.abort_status, b"fault filter abort", flag="FI", reason="aborted on purpose"
            )
        if not is_delayed:
            return aborted

        async def ask() -> Respond | None:
            await trio.sleep(fault.delay_seconds)
            return aborted

        return Wait(ask)

    def _is_drawn(self, percent: float) -> bool:
        return self._rng.random() * 100 < percent
