"""How the command line speaks. The rules:

- data goes to stdout, everything else to stderr as `ambit: …`, lower case, no full stop;
- an error is followed by `ambit: hint: …` whenever there is something to do about it;
- exit 0 ok, 1 failed, 2 usage or configuration, 3 not found, 4 unreachable;
- `-o json` and `-o yaml` are a contract; tables are for people;
- progress is shown on a terminal only.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NoReturn

import click

from mesh.errors import ConfigError, KernelError, MeshError, Unavailable

FAILED = 1
USAGE = 2
NOT_FOUND = 3
UNREACHABLE = 4


class NotFound(MeshError):
    """The thing asked for does not exist."""


def say(message: str) -> None:
    """Lines for a person, on stderr."""
    for line in message.splitlines():
        click.echo(f"ambit: {line}", err=True)


def fail(message: str, *, hint: str = "", code: int = FAILED) -> NoReturn:
    """Print the error and its hint, and leave with `code`."""
    say(message)
    if hint:
        say(f"hint: {hint}")
    sys.exit(code)


def exit_code(error: MeshError) -> int:
    """The exit code of an expected failure."""
    from mesh.lab.control import NotThere  # not needed before something fails

    match error:
        case NotFound() | NotThere():
            return NOT_FOUND
        case ConfigError():
            return USAGE
        case Unavailable():
            return UNREACHABLE
        case KernelError():
            return FAILED
        case _:
            return FAILED


@contextlib.contextmanager
def errors() -> Iterator[None]:
    """Turn expected failures into one line, a hint and an exit code."""
    try:
        yield
    except MeshError as error:
        fail(str(error), hint=error.hint, code=exit_code(error))
    except KeyboardInterrupt:
        sys.exit(130)


output_option = click.option(
    "-o",
    "--output",
    "form",
    type=click.Choice(["table", "wide", "json", "yaml"]),
    default="table",
    show_default=True,
    help="How to print.",
)


def emit(
    data: Any,
    form: str,
    *,
    columns: Sequence[tuple[str, str]] = (),
    rows: Sequence[Mapping[str, Any]] = (),
) -> None:
    """Print `data` as JSON or YAML, or `rows` as a table of (heading, key) `columns`.

    Tables are plain text with aligned columns, as kubectl's: they survive pipes.
    """
    if form == "json":
        click.echo(json.dumps(data, indent=2, ensure_ascii=False))
        return
    if form == "yaml":
        import yaml

        click.echo(yaml.safe_dump(data, sort_keys=False, allow_unicode=True), nl=False)
        return
    table = [[heading for heading, _ in columns]]
    table += [[text(row.get(key)) for _, key in columns] for row in rows]
    widths = [max(len(line[i]) for line in table) for i in range(len(columns))]
    for line in table:
        cells = [cell.ljust(width) for cell, width in zip(line, widths, strict=True)]
        click.echo("   ".join(cells).rstrip())


def text(value: Any) -> str:
    """A value as a table cell."""
    if value is None or value == "":
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return ",".join(text(item) for item in value) or "-"
    return str(value)
