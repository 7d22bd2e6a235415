"""`python -m ztunnel`."""

from __future__ import annotations

import sys

from mesh.runtime import lifecycle
from ztunnel.app import main
from ztunnel.config import ZtunnelConfig

sys.exit(
    lifecycle.start(
        "ztunnel", ZtunnelConfig, main, grace_seconds=lambda config: config.drain_seconds + 1.0
    )
)
