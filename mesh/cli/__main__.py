"""`python -m mesh.cli` is `ambit`."""

from __future__ import annotations

from mesh.cli.main import main

if __name__ == "__main__":
    main()
