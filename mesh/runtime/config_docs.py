"""The reference page of all settings, generated from the daemons' configuration classes.

    python -m mesh.runtime.config_docs netconfig.config ztunnel.config > docs/reference/config.md

A test of the house compares the committed page with this output. The modules are named on the
command line because nothing in `mesh` may import a daemon.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from mesh.runtime import config

HEAD = """\
# Settings

Generated from the configuration classes; `make docs` writes this page anew.

Every setting is read from its flag, else from its environment variable, else from the file
given with `--config FILE` (YAML, the name in the first column as key), else the default.
`--print-config` shows every value with its origin. An unknown flag, an unknown key of the file
or a value that cannot be read stops the start with exit code 2. A *duration* is `90s`, `1m30s`,
`24h`, or a bare number of seconds; a *list* is separated by commas.
"""


def render(classes: Mapping[str, type[Any]]) -> str:
    """The page, one section for each daemon in the given order."""
    return HEAD + "".join(_section(name, cls) for name, cls in classes.items())


def _section(name: str, cls: type[Any]) -> str:
    rows = [
        "",
        f"## {name}",
        "",
        "| Setting | Flag | Environment | Type | Default | Meaning |",
        "|---|---|---|---|---|---|",
    ]
    for row in config.describe(cls):
        default = "*required*" if row.required else f"`{row.default}`"
        kind = " \\| ".join(f"`{choice}`" for choice in row.choices) or row.type
        env = ", ".join(f"`{variable}`" for variable in row.env)
        meaning = " ".join(row.doc.split()).replace("|", "\\|")
        rows.append(f"| `{row.name}` | `{row.flag}` | {env} | {kind} | {default} | {meaning} |")
    return "\n".join(rows) + "\n"


def find_class(module: str) -> type[Any]:
    """The one class of settings that `module` defines. Raises ValueError."""
    found = [
        one
        for one in vars(importlib.import_module(module)).values()
        if isinstance(one, type) and one.__module__ == module and config.has_settings(one)
    ]
    if len(found) != 1:
        raise ValueError(f"{module} defines {len(found)} classes of settings, not one")
    return found[0]


def main(argv: Sequence[str]) -> int:
    """Modules -> the page on stdout."""
    classes = {module.partition(".")[0]: find_class(module) for module in argv}
    sys.stdout.write(render(classes))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
