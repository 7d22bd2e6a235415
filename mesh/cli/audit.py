"""`ambit audit verify`: whether the audit files of redaction are whole."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import click

from mesh.cli.output import FAILED, emit, output_option, say
from mesh.runtime.audit_chain import Fault, verify

_MAX_LINE = 1 << 20


@click.group()
def audit() -> None:
    """Audit records of what waypoints redacted.

    \b
    Examples:
      ambit audit verify audit.jsonl
      ambit audit verify audit.jsonl*
      ambit audit verify audit.jsonl -o json
    """


@audit.command("verify")
@click.argument("files", nargs=-1, required=True, type=click.Path(exists=True, dir_okay=False))
@click.option("--head", "expected", metavar="SEQ:HASH", help="The last record there must be.")
@output_option
def verify_files(files: tuple[str, ...], expected: str | None, form: str) -> None:
    """Say whether every record is there, unchanged and in its place.

    Files of one chain are put in the order of their records. Exit 1 if anything is wrong; the
    first line that is comes first. Records cut off at the end leave no trace in the files: give
    the head that an earlier run printed as --head to notice that.

    \b
    Examples:
      ambit audit verify /var/log/ambit/audit.jsonl*
      ambit audit verify audit.jsonl --head 1200:9f86d08...
      ambit audit verify audit.jsonl -o json
    """
    ordered = sorted(files, key=_first_seq)
    verdict = verify((name, _lines(name)) for name in ordered)
    head = f"{verdict.head.seq}:{verdict.head.hash}"
    if expected is not None:
        seq, _, digest = expected.partition(":")
        if not seq.isdigit() or not digest:
            raise click.BadParameter("not SEQ:HASH", param_hint="--head")
        if verdict.head.seq < int(seq):
            message = f"removed at the end: records {verdict.head.seq + 1} to {seq}"
            verdict.faults.append(Fault(ordered[-1], 0, "removed", message))
        elif verdict.head.seq == int(seq) and verdict.head.hash != digest:
            message = f"record {seq} is not the one that was there"
            verdict.faults.append(Fault(ordered[-1], 0, "changed", message))
    if form in {"json", "yaml"}:
        faults = [
            {"file": each.file, "line": each.line or None, "kind": each.kind,
             "message": each.message}
            for each in verdict.faults
        ]  # fmt: skip
        report = {"ok": not faults, "records": verdict.records, "first": verdict.first,
                  "head": head, "faults": faults, "notes": verdict.notes}  # fmt: skip
        emit(report, form)
    else:
        for each in verdict.faults:
            place = f"{each.file}:{each.line}" if each.line else each.file
            click.echo(f"{place}: {each.kind}: {each.message}")
        if not verdict.faults:
            click.echo(f"{verdict.records} records, unbroken; head {head}")
    for note in verdict.notes:
        say(note)
    if verdict.faults:
        say(f"the chain is broken in {len(verdict.faults)} places")
    sys.exit(FAILED if verdict.faults else 0)


def _lines(name: str) -> Iterator[bytes]:
    with Path(name).open("rb") as file:
        while line := file.readline(_MAX_LINE):
            yield line


def _first_seq(name: str) -> int:
    """By which files are ordered; a file that begins with no record comes last."""
    for line in _lines(name):
        try:
            return int(json.loads(line)["seq"])
        except (ValueError, TypeError, KeyError):
            continue
    return sys.maxsize
