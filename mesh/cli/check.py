"""`ambit check`: everything that is wrong or odd about files of YAML, without a cluster.

A cluster stops at an object's first mistake; this goes on. A file is read past an object that
is none, and an object past a field that is wrong: the field is taken out and the rest read
again, until nothing new is found.
"""

from __future__ import annotations

import copy
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import click

from mesh.cli.output import USAGE, emit, output_option, say
from mesh.cluster.api import Fault, Object, Put, Ref, Source
from mesh.cluster.documents import read_documents
from mesh.cluster.fields import format_path, split_path
from mesh.cluster.inventory import PARSERS
from mesh.cluster.tree import FileTree, read_file
from mesh.cluster.validate import TEMPLATES, Finding, Severity, finding_of
from mesh.cluster.validate import check as check_translated
from mesh.errors import ConfigError

# No controller looks at them after us.
check_objects = partial(check_translated, is_translated=False)

MAX_FAULTS_OF_OBJECT = 50


@dataclass(slots=True)
class Read:
    """What was read: objects, each with its place, and what could not be read."""

    objects: list[tuple[Ref, Object, Source]] = field(default_factory=list)
    faults: list[ConfigError] = field(default_factory=list)


@click.command()
@click.argument("paths", nargs=-1, metavar="[FILE|DIR]...", type=click.Path(exists=True))
@output_option
def check(paths: tuple[str, ...], form: str) -> None:
    """Validate and lint Kubernetes YAML, without a cluster.

    Directories are read with everything below them; nothing given means here. Errors are what
    a cluster would refuse, warnings what is allowed but hardly meant. Exit 2 on errors, else 0.

    \b
    Examples:
      ambit check
      ambit check manifests/examples/shop
      ambit check web.yaml policies/ -o json
    """
    read = Read()
    for path in paths or (".",):
        read_path(path, read)
    findings = find(read)
    amounts = Counter(each.severity for each in findings)
    is_bad = amounts[Severity.ERROR] > 0
    unchecked = Counter(
        ref.kind for ref, _, _ in read.objects if ref.kind not in {*PARSERS, *TEMPLATES}
    )
    if form in {"json", "yaml"}:
        report = {
            "ok": not is_bad,
            "objects": len(read.objects),
            "errors": amounts[Severity.ERROR],
            "warnings": amounts[Severity.WARNING],
            "unchecked": dict(sorted(unchecked.items())),
            "findings": [as_data(each) for each in findings],
        }
        emit(report, form)
    else:
        for each in findings:
            click.echo(as_line(each, wide=form == "wide"))
    said = f"{_count(amounts[Severity.ERROR], 'error')}, "
    said += f"{_count(amounts[Severity.WARNING], 'warning')}"
    say(f"{said} in {_count(len(read.objects), 'object')}")
    if unchecked:
        kinds = ", ".join(f"{amount} {kind}" for kind, amount in sorted(unchecked.items()))
        say(f"read, but not checked: {kinds}")
    sys.exit(USAGE if is_bad else 0)


def read_path(path: str, into: Read) -> None:
    """Read a file, or every file of a directory, past all that is wrong with it."""
    if not Path(path).is_dir():
        _read_file(path, into)
        return
    # A tree of its own for each directory: what stands twice is found later, over all paths.
    before = len(into.objects)
    for event in FileTree(Path(path), is_patient=False).rescan().events:
        if isinstance(event, Put) and event.source is not None:
            into.objects.append((event.ref, event.object, event.source))
        elif isinstance(event, Fault):
            # The tree lets go of a file at its first mistake; read again to find the others.
            once_more = Read()
            if Path(event.error.file).is_file():
                _read_file(event.error.file, once_more)
            if once_more.faults:
                into.faults += once_more.faults
                into.objects += once_more.objects
            else:
                into.faults.append(event.error)
    # Of two that say the same, the later in order of files is the one too many.
    inside = into.objects[before:]
    into.objects[before:] = sorted(inside, key=lambda each: (each[2].file, each[2].line))


def _read_file(path: str, into: Read) -> None:
    try:
        data, _ = read_file(path)
        documents = read_documents(data, path, complain=into.faults.append)
    except ConfigError as error:
        into.faults.append(error)
        return
    into.objects += [(each.ref, each.object, each.source) for each in documents]


def find(read: Read) -> list[Finding]:
    """Everything there is to say, in the order of files and lines."""
    found = [finding_of(error) for error in read.faults]
    together = check_objects([(obj, source) for _, obj, source in read.objects])
    suspects = {each.ref for each in together if each.severity is Severity.ERROR}
    repaired: dict[Ref, _Trial] = {}
    objects: list[tuple[Object, Source | None]] = []
    for ref, obj, source in read.objects:
        if ref in suspects:
            trial = _Trial(obj)
            repaired.setdefault(ref, trial)
            found += _errors_of(trial, source)
            objects.append((trial.object, source))
        else:
            objects.append((obj, source))
    for each in together:
        # What is odd between objects is asked below, without what is wrong: a Service with a
        # mistake in it is there all the same.
        if each.severity is Severity.ERROR or each.ref in suspects:
            found.append(each)
    for each in check_objects(objects) if repaired else together:
        mended = repaired.get(each.ref) if each.ref is not None else None
        if each.severity is Severity.ERROR:
            continue
        if mended is None:
            found.append(each)
        elif (field := mended.place_of(each.field)) is not None:
            found.append(replace(each, field=field))
    told = {(each.source, each.ref, each.field, each.message): each for each in found}
    return sorted(told.values(), key=_place)


class _Trial:
    """An object that loses one wrong part after the other, and what its parts were called."""

    def __init__(self, obj: Object) -> None:
        self.object = copy.deepcopy(obj)
        # By identity of a list: which element of the original each of its elements was.
        self._origins: dict[int, list[int]] = {}
        self.told: list[tuple[str | int, ...]] = []

    def place_of(self, name: str) -> str | None:
        """The original name of a field; None if it only misses what was taken out."""
        where = self.original(split_path(name))
        return None if self.is_told(where) else format_path(where)

    def is_told(self, where: tuple[str | int, ...]) -> bool:
        """Whether something there was wrong already."""
        return any(earlier[: len(where)] == where for earlier in self.told)

    def original(self, path: Sequence[str | int]) -> tuple[str | int, ...]:
        """A path as it was before anything was taken out."""
        value: Any = self.object
        found: list[str | int] = []
        for step in path:
            if isinstance(value, list) and isinstance(step, int):
                origins = self._origins.get(id(value), range(len(value)))
                found.append(origins[step] if step < len(origins) else step)
                value = value[step] if step < len(value) else None
            else:
                found.append(step)
                value = value.get(step) if isinstance(value, dict) else None
        return tuple(found)

    def take_out(self, path: Sequence[str | int]) -> bool:
        """Remove what is at `path`, else what should contain it; False at the top."""
        while len(path) > 1:
            holder = self._at(path[:-1])
            last = path[-1]
            if isinstance(holder, dict) and holder.get(str(last)) is not None:
                del holder[last]
                return True
            if isinstance(holder, list) and isinstance(last, int) and last < len(holder):
                self._origins.setdefault(id(holder), list(range(len(holder)))).pop(last)
                del holder[last]
                return True
            path = path[:-1]
        return False

    def _at(self, path: Sequence[str | int]) -> Any:
        value: Any = self.object
        for step in path:
            try:
                value = value[step]
            except (KeyError, IndexError, TypeError):
                return None
        return value


def _errors_of(trial: _Trial, source: Source) -> Iterator[Finding]:
    """All errors of one object, which loses what is wrong."""
    while len(trial.told) < MAX_FAULTS_OF_OBJECT:
        error = next(
            (e for e in check_objects([(trial.object, source)]) if e.severity is Severity.ERROR),
            None,
        )
        if error is None:
            return
        path = split_path(error.field)
        where = trial.original(path)
        # What only misses the part that we took out is no news.
        if not trial.is_told(where):
            trial.told.append(where)
            yield replace(error, field=format_path(where))
        if not trial.take_out(path):
            return


def _position(finding: Finding) -> Source | None:
    return finding.source.at(finding.field) if finding.source else None


def _place(finding: Finding) -> tuple[str, int, int, str]:
    place = _position(finding) or Source("")
    return place.file, place.line or 0, place.column or 0, finding.severity.value


def as_line(finding: Finding, *, wide: bool = False) -> str:
    """`file:line:column: error: field: message`, which editors can jump by; then the hint."""
    place = _position(finding)
    about = str(finding.ref) if wide and finding.ref else ""
    parts = (str(place or ""), finding.severity.value, about, finding.field, finding.message)
    hint = f"\n    hint: {finding.hint}" if finding.hint else ""
    return ": ".join(part for part in parts if part) + hint


def as_data(finding: Finding) -> dict[str, Any]:
    """A finding for `-o json`; what is not known is null."""
    place, ref = _position(finding) or Source(""), finding.ref
    return {
        "severity": finding.severity.value,
        "file": place.file or None,
        "line": place.line or None,
        "column": place.column or None,
        "kind": ref.kind if ref else None,
        "namespace": (ref.namespace or None) if ref else None,
        "name": ref.name if ref else None,
        "field": finding.field or None,
        "message": finding.message,
        "hint": finding.hint or None,
    }


def _count(number: int, word: str) -> str:
    return f"{number} {word}{'' if number == 1 else 's'}"
