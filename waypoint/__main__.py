"""`python -m waypoint`."""

from __future__ import annotations

import sys

from mesh import compiled

sys.exit(compiled.run("waypoint.app"))
