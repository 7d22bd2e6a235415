"""The reference page of the command line, generated from the commands themselves.

    python -m mesh.cli.reference > docs/reference/cli.md

A test of the house compares the committed page with this output.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator

import click

from mesh.cli.main import ambit

HEAD = """\
# Command line

Generated from the commands; `make docs` writes this page anew.

`ambit` and `kubectl ambit` are one program. Data goes to stdout, everything else to stderr as
`ambit: …`, and an error is followed by `ambit: hint: …` when there is something to do about it.
`-o json` and `-o yaml` are a contract; tables are for people. Exit codes are in
[errors.md](errors.md). `-h` after any verb prints what is written here about it.
"""


def render() -> str:
    """The page: one section for each verb, groups before their members."""
    return HEAD + "".join(_sections(ambit, "ambit", None))


def _sections(command: click.Command, name: str, parent: click.Context | None) -> Iterator[str]:
    # With the settings of `ambit`: click remembers the help option of the first context.
    context = click.Context(command, info_name=name, parent=parent, **command.context_settings)
    yield _section(command, context)
    if isinstance(command, click.Group):
        for below in command.list_commands(context):
            found = command.get_command(context, below)
            if found is not None and not found.hidden:
                yield from _sections(found, below, context)


def _section(command: click.Command, context: click.Context) -> str:
    path = context.command_path
    text, _, examples = inspect.cleandoc(command.help or "").partition("\b\nExamples:\n")
    usage = " ".join([path, *command.collect_usage_pieces(context)])
    lines = ["", f"## {path}", "", f"    {usage}", "", text.strip()]
    if command.epilog:
        lines += ["", command.epilog]
    options = [
        record
        for parameter in command.get_params(context)
        if isinstance(parameter, click.Option)
        and "--help" not in parameter.opts
        and (record := parameter.get_help_record(context)) is not None
    ]
    if options:
        lines += ["", "| Option | Meaning |", "|---|---|"]
        lines += [f"| `{_cell(option)}` | {_cell(meaning)} |" for option, meaning in options]
    if isinstance(command, click.Group):
        below = ", ".join(f"`{each}`" for each in command.list_commands(context))
        lines += ["", f"Verbs: {below}"]
    if examples:
        shown = [f"    {line.strip()}" for line in examples.rstrip().splitlines()]
        lines += ["", "Examples:", "", *shown]
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


if __name__ == "__main__":
    sys.stdout.write(render())
