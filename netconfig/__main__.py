"""`python -m netconfig`: the node agent."""

from __future__ import annotations

import sys

from mesh.runtime import lifecycle
from netconfig.app import run
from netconfig.config import NetconfigConfig

if __name__ == "__main__":
    sys.exit(lifecycle.start("netconfig", NetconfigConfig, run))
