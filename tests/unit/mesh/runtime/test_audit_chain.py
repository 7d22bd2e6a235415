"""A chain of records: what has been done to its files is said, at the first line that shows it."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from mesh.cli.main import ambit
from mesh.runtime.audit_chain import GENESIS, Head, read_line, seal, verify


def chain(count: int = 6) -> list[bytes]:
    head, lines = Head(), []
    for number in range(count):
        line, head = seal({"event": "redaction", "n": number, "text": "\u00e9"}, head)
        lines.append(line)
    return lines


def kinds(lines: list[bytes], **more: object) -> list[tuple[str, int]]:
    return [(each.kind, each.line) for each in verify([("a", lines)]).faults]


def test_a_whole_chain_over_two_files() -> None:
    lines = chain()
    verdict = verify([("a", lines[:3]), ("b", lines[3:])])
    assert (verdict.faults, verdict.notes, verdict.records, verdict.first) == ([], [], 6, 1)
    assert verdict.head.seq == 6
    assert json.loads(lines[0])["prev"] == GENESIS
    later = verify([("b", lines[3:])])
    assert not later.faults
    assert later.notes == ["records 1 to 3 are in none of these files"]


@pytest.mark.parametrize("place", range(6))
def test_any_changed_byte_is_noticed(place: int) -> None:
    for offset in range(len(chain()[place]) - 1):
        lines = chain()
        changed = bytearray(lines[place])
        changed[offset] ^= 1
        if changed[offset] == 10:
            continue
        lines[place] = bytes(changed)
        assert kinds(lines)[0] == ("changed", place + 1)


def test_removed_reordered_replaced_and_cut() -> None:
    lines = chain()
    assert kinds(lines[:2] + lines[4:]) == [("removed", 3)]
    assert "records 3 to 4" in verify([("a", lines[:2] + lines[4:])]).faults[0].message
    assert kinds([lines[1], lines[0], *lines[2:]])[0] == ("reordered", 2)
    forged, _ = seal({"event": "redaction", "n": 99}, Head(2, read_line(lines[1][:-1])[1].hash))  # type: ignore[index]
    assert kinds([*lines[:2], forged, *lines[3:]]) == [("changed", 4)]
    assert kinds([*lines[:5], lines[5][:40]]) == [("truncated", 6)]


def test_a_crash_is_continued_in_so_many_words() -> None:
    lines = chain(3)
    head = read_line(lines[1].rstrip(b"\n"))[1]  # type: ignore[index]
    torn = lines[2][:30]
    line, _ = seal({"event": "continued", "torn_bytes": 30}, head)
    verdict = verify([("a", [*lines[:2], torn + b"\n", line])])
    assert not verdict.faults
    assert verdict.notes == ["a:3: cut short by a crash, continued by the next record"]
    lie, _ = seal({"event": "continued", "torn_bytes": 31}, head)
    assert kinds([*lines[:2], torn + b"\n", lie])[0] == ("changed", 3)


def test_the_command(tmp_path) -> None:  # type: ignore[no-untyped-def]
    lines = chain()
    old, new = tmp_path / "audit.jsonl.000000000003", tmp_path / "audit.jsonl"
    old.write_bytes(b"".join(lines[:3]))
    new.write_bytes(b"".join(lines[3:]))
    run = CliRunner().invoke
    done = run(ambit, ["audit", "verify", str(new), str(old), "-o", "json"])
    assert done.exit_code == 0, done.output
    head = json.loads(done.stdout)["head"]
    assert head.startswith("6:")
    new.write_bytes(b"".join(lines[3:5]))
    assert run(ambit, ["audit", "verify", str(old), str(new)]).exit_code == 0
    done = run(ambit, ["audit", "verify", str(old), str(new), "--head", head])
    assert (done.exit_code, "records 6 to 6" in done.stdout) == (1, True)
    new.write_bytes(lines[3] + lines[4].replace(b'"n":4', b'"n":5'))
    done = run(ambit, ["audit", "verify", str(old), str(new)])
    assert done.exit_code == 1
    assert done.stdout.startswith(f"{new}:2: changed: ")
