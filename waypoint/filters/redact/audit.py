"""The audit of redaction: one record for each request in which something was found, or could not be
looked into. Policy, rule, detector, action, location, count; never a value, nor what holds one.

Records are chained (`mesh.runtime.audit_chain`) and go to one file, which is renamed when it is
full. They are written in batches by a thread; a record that finds the buffer full is not forgotten
in silence, and neither is one that the disk did not take: the next record counts them.
"""

from __future__ import annotations

import os
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import trio

from mesh.errors import ConfigError
from mesh.runtime import log
from mesh.runtime.audit_chain import Head, read_line, seal
from waypoint.filters.redact.rules import FLAG, Report, RuleKey

if TYPE_CHECKING:
    from waypoint.config import WaypointConfig
    from waypoint.exchange import Exchange

_TAIL = 1 << 20
_log = log.get("audit")


def open_audit(config: WaypointConfig) -> AuditLog | None:
    """The audit that the settings ask for. Raises ConfigError."""
    if not config.audit_file:
        return None
    return AuditLog(Path(config.audit_file), max_bytes=config.audit_max_bytes)


def audit_fields(exchange: Exchange) -> dict[str, Any] | None:
    """What the record of a request says; None: there is nothing to say."""
    request = exchange.request
    report: Report | None = request.notes.get("redaction report")
    if report is None or not (report.counts or report.uninspected or exchange.flag == FLAG):
        return None
    counts = {key: count for key, count in report.counts.items() if key[0].audits}
    if not counts and not report.uninspected and exchange.flag != FLAG:
        return None
    trace = request.headers.get(b"traceparent") or b""
    return {
        "event": "redaction",
        "trace_id": trace[3:35].decode("latin-1"),
        "source": str(exchange.inbound.source),
        "service": request.service,
        "method": exchange.hide(request.method)[0],
        "route": request.route,
        "status": exchange.status,
        "blocked_by": f"{exchange.policy}/{exchange.rule_name}" if exchange.flag == FLAG else None,
        "found": [_entry(key, where, count) for (key, where), count in counts.items()],
        "uninspected": dict(report.uninspected),
    }


def _entry(key: RuleKey, where: str, count: int) -> dict[str, Any]:
    return {
        "policy": key.policy,
        "rule": key.rule,
        "detector": key.detector,
        "action": key.action,
        "location": where,
        "count": count,
        "dry_run": key.is_dry_run,
    }


class AuditLog:
    """Appends records to `path`; `run` must run somewhere in the daemon's tree."""

    def __init__(
        self, path: Path, *, max_bytes: int = 64 << 20, limit: int = 65536, linger: float = 0.05
    ) -> None:
        """Raises ConfigError: the file cannot be read or written, or is no chain."""
        self._path = path
        self._max_bytes = max_bytes
        self._limit = limit
        self._linger = linger
        self._waiting: list[dict[str, Any]] = []
        self._wake = trio.Event()
        self._lost: Counter[str] = Counter()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self.head, torn = _open_chain(path)
        except OSError as exc:
            raise ConfigError(f"audit file {path}: {exc.strerror}", field="AUDIT_FILE") from exc
        if torn:
            self.record({"event": "continued", "torn_bytes": torn})

    def record(self, fields: dict[str, Any]) -> None:
        """Queue one record."""
        if len(self._waiting) >= self._limit:
            self._lost["buffer full"] += 1
            return
        self._waiting.append(
            {"time": datetime.now(UTC).isoformat(timespec="milliseconds"), **fields}
        )
        self._wake.set()

    def record_exchange(self, exchange: Exchange) -> None:
        """The record of a request that is over, if there is something to say."""
        fields = audit_fields(exchange)
        if fields is not None:
            self.record(fields)

    async def run(self) -> None:
        """Write out what was recorded. If cancelled: writes the rest first."""
        try:
            while True:
                await self._wake.wait()
                await trio.sleep(self._linger)
                await self._write_out()
        finally:
            with trio.CancelScope(shield=True, deadline=trio.current_time() + 2):
                await self._write_out()

    async def _write_out(self) -> None:
        self._wake = trio.Event()
        batch, self._waiting = self._waiting, []
        if self._lost:
            batch.append({"event": "lost", "records": dict(self._lost)})
        if not batch:
            return
        try:
            self.head = await trio.to_thread.run_sync(self._append, batch, self.head)
        except OSError as exc:
            self._lost[exc.strerror or "write failed"] += len(batch)
            _log.error("audit_write_failed", path=str(self._path), error=exc.strerror)
        else:
            self._lost.clear()

    def _append(self, batch: list[dict[str, Any]], head: Head) -> Head:
        lines = []
        first = head
        for fields in batch:
            line, head = seal(fields, head)
            lines.append(line)
        if self._path.exists() and self._path.stat().st_size >= self._max_bytes:
            self._path.rename(self._path.with_name(f"{self._path.name}.{first.seq:012d}"))
        descriptor = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        try:
            data = memoryview(b"".join(lines))
            size = os.fstat(descriptor).st_size
            try:
                while data:
                    data = data[os.write(descriptor, data) :]
            except OSError:
                os.ftruncate(descriptor, size)  # all or nothing: the chain goes on from before
                raise
        finally:
            os.close(descriptor)
        return head


def _open_chain(path: Path) -> tuple[Head, int]:
    """The last record, also of a file that was renamed, and how many bytes of a line follow it."""
    for each in (path, *sorted(path.parent.glob(path.name + ".*"), reverse=True)):
        if not each.exists() or not each.stat().st_size:
            continue
        with each.open("rb") as file:
            file.seek(max(0, each.stat().st_size - _TAIL))
            lines = file.read().splitlines(keepends=True)
        torn = b""
        if not lines[-1].endswith(b"\n"):
            torn = lines.pop()
            with each.open("ab") as file:
                file.write(b"\n")
        for line in reversed(lines):
            found = read_line(line.rstrip(b"\n"))
            if found is not None:
                return found[1], len(torn)
        raise ConfigError(
            f"audit file {each} ends with no record",
            field="AUDIT_FILE",
            hint=f"ambit audit verify {each}; then move it away",
        )
    return Head(), 0
