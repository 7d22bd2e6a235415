"""`python -m ztunnel`."""

from __future__ import annotations

import sys

from mesh import compiled

sys.exit(compiled.run("ztunnel.app"))
