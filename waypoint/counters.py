"""Counts of what a waypoint does beside answering: copies, sheddings, retries that were not made.

Labels are names of Services and fixed words, so their number is bounded by the mesh's. A request
that is simply answered counts nothing here.
"""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter


class Counters:
    """One set for the whole waypoint."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.mirrored = Counter(
            "ambit_mirrored_requests",
            "Copies of requests (RequestMirror), by the mirror's service and what came of them.",
            ("destination_service", "outcome"),
            registry=registry,
        )
        self.shed = Counter(
            "ambit_shed_requests",
            "Requests answered 503 because a bound was reached, by the bound.",
            ("bound",),
            registry=registry,
        )
