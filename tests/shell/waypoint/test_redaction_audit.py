"""The audit file: appended, renamed when full, continued after a restart and after a crash."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import trio

from mesh.errors import ConfigError
from mesh.runtime.audit_chain import verify
from waypoint.filters.redact.audit import AuditLog


async def write(path: Path, *numbers: int, max_bytes: int = 1 << 20) -> None:
    log = AuditLog(path, max_bytes=max_bytes, linger=0)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(log.run)
        for number in numbers:
            log.record({"event": "redaction", "n": number})
            with trio.fail_after(20):
                while log.head.seq == 0 or log._waiting:
                    await trio.sleep(0.001)
        nursery.cancel_scope.cancel()


def files(path: Path) -> list[tuple[str, list[bytes]]]:
    found = [*sorted(path.parent.glob(path.name + ".*")), path]
    return [(each.name, each.read_bytes().splitlines(keepends=True)) for each in found]


async def test_restarts_and_renames_keep_the_chain(tmp_path: Path) -> None:
    path = tmp_path / "logs" / "audit.jsonl"
    for begin in (0, 3, 6):
        await write(path, begin, begin + 1, begin + 2, max_bytes=300)
    assert len(files(path)) > 2
    verdict = verify(files(path))
    assert (verdict.faults, verdict.records) == ([], 9)
    lines = [json.loads(line)["n"] for _, each in files(path) for line in each]
    assert lines == list(range(9))
    assert path.stat().st_mode & 0o077 == 0


async def test_a_line_cut_short_by_a_crash(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    await write(path, 0, 1)
    path.write_bytes(path.read_bytes()[:-20])
    await write(path, 2)
    verdict = verify(files(path))
    assert not verdict.faults
    assert "cut short by a crash" in verdict.notes[0]
    assert [json.loads(line)["event"] for line in files(path)[0][1][2:]] == [
        "continued",
        "redaction",
    ]


async def test_what_the_disk_did_not_take_is_counted(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    log = AuditLog(path)
    path.mkdir()
    log.record({"event": "redaction"})
    await log._write_out()
    path.rmdir()
    log.record({"event": "redaction"})
    await log._write_out()
    first, second = (json.loads(line) for line in path.read_bytes().splitlines())
    assert second["event"] == "lost"
    assert list(second["records"].values()) == [1]
    assert first["seq"] == 1


async def test_what_is_no_chain_is_not_continued(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    path.write_text("something else\n")
    with pytest.raises(ConfigError):
        AuditLog(path)
