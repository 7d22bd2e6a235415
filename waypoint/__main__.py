"""`python -m waypoint`."""

from __future__ import annotations

import sys

from mesh.runtime import lifecycle
from waypoint.app import main
from waypoint.config import WaypointConfig

sys.exit(
    lifecycle.start(
        "waypoint", WaypointConfig, main, grace_seconds=lambda config: config.drain_seconds + 1.0
    )
)
