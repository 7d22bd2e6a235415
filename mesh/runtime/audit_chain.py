"""Records that prove their order: JSON lines, each with the hash of the one before it. Pure.

A line ends with `"prev"`, the hash of the record before, and `"hash"`, SHA-256 over all of the line
before it. `seq` counts from 1 over all files of a chain. A line that a crash cut short stays, and
the next record says so (`event: continued`, `torn_bytes`), so that no gap is silent.

Whoever may write the files may also forge a whole chain, or cut its end off: keep the last hash
elsewhere (`ambit audit verify` prints it) to notice that.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any

GENESIS = "0" * 64
_SEAL = re.compile(rb',"hash":"([0-9a-f]{64})"\}\Z')


@dataclass(frozen=True, slots=True)
class Head:
    """The last record of a chain."""

    seq: int = 0
    hash: str = GENESIS


def seal(fields: dict[str, Any], head: Head) -> tuple[bytes, Head]:
    """The line of the next record (with its newline) and the new head."""
    record = {"seq": head.seq + 1, **fields, "prev": head.hash}
    body = json.dumps(record, separators=(",", ":"), ensure_ascii=True).encode("ascii")
    digest = sha256(body).hexdigest()
    return body[:-1] + f',"hash":"{digest}"}}\n'.encode("ascii"), Head(head.seq + 1, digest)


def read_line(line: bytes) -> tuple[dict[str, Any], Head] | None:
    """A record whose own hash is right, and the head after it; None: it has been changed."""
    found = _SEAL.search(line)
    if found is None:
        return None
    digest = found.group(1).decode("ascii")
    body = line[: found.start()] + b"}"
    if sha256(body).hexdigest() != digest:
        return None
    try:
        record = json.loads(body)
    except ValueError:
        return None
    if not isinstance(record, dict) or not isinstance(record.get("seq"), int):
        return None
    return record, Head(record["seq"], digest)


@dataclass(frozen=True, slots=True)
class Fault:
    """What is wrong at a line. `kind`: changed, removed, truncated, reordered."""

    file: str
    line: int
    kind: str
    message: str


@dataclass(slots=True)
class Verdict:
    """What a chain says."""

    faults: list[Fault] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    records: int = 0
    first: int = 0
    head: Head = Head()


def verify(files: Iterable[tuple[str, Iterable[bytes]]]) -> Verdict:
    """Judge the lines of files, in the order of their records. Reading goes on after a fault."""
    verdict = Verdict()
    head: Head | None = None
    bad: list[tuple[str, int, bytes]] = []
    for name, lines in files:
        for number, raw in enumerate(lines, 1):
            found = read_line(raw.rstrip(b"\n"))
            if found is None:
                bad.append((name, number, raw))
                continue
            record, new = found
            torn = len(bad[0][2].rstrip(b"\n")) if len(bad) == 1 else -1
            if record.get("event") == "continued" and record.get("torn_bytes") == torn:
                where = f"{bad[0][0]}:{bad[0][1]}"
                verdict.notes.append(f"{where}: cut short by a crash, continued by the next record")
                bad = []
            verdict.faults += [_changed(*each[:2]) for each in bad]
            fault = None if head is None else _link(name, number, record, head, len(bad))
            bad = []
            if fault is not None:
                verdict.faults.append(fault)
            if head is None:
                verdict.first = new.seq
            verdict.records += 1
            head = new
    if bad and not bad[-1][2].endswith(b"\n"):
        name, number, raw = bad.pop()
        message = f"the last line is cut short after {len(raw)} bytes"
        verdict.faults.append(Fault(name, number, "truncated", message))
    verdict.faults += [_changed(*each[:2]) for each in bad]
    verdict.head = head or Head()
    if verdict.first > 1:
        verdict.notes.append(f"records 1 to {verdict.first - 1} are in none of these files")
    return verdict


def _changed(name: str, number: int) -> Fault:
    return Fault(name, number, "changed", "the record does not have its own hash any more")


def _link(name: str, number: int, record: dict[str, Any], head: Head, changed: int) -> Fault | None:
    """Whether a record follows the head, but for the `changed` lines between them."""
    seq = record["seq"]
    if changed and seq == head.seq + 1 + changed:
        return None
    if seq == head.seq + 1 and record.get("prev") == head.hash:
        return None
    if seq > head.seq + 1:
        gone = f"{head.seq + 1}" if seq == head.seq + 2 else f"{head.seq + 1} to {seq - 1}"
        return Fault(name, number, "removed", f"removed before it: records {gone}")
    if seq <= head.seq:
        return Fault(name, number, "reordered", f"record {seq} stands after record {head.seq}")
    return Fault(name, number, "changed", f"record {head.seq} was replaced: its hash is another")
