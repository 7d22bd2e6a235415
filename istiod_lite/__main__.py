"""`python -m istiod_lite`: the controller."""

from __future__ import annotations

import sys

from istiod_lite.app import run
from istiod_lite.config import IstiodConfig
from mesh.runtime import lifecycle

if __name__ == "__main__":
    sys.exit(
        lifecycle.start(
            "istiod", IstiodConfig, run, grace_seconds=lambda config: config.drain_seconds + 2.0
        )
    )
