"""What the controller costs when the mesh grows: changes, starts, reconnects, memory.

    python tests/bench/bench_controller.py [--clients 200] [--changes 100] [--quick] [-o json]

For meshes of 100 services with 1 000 pods, and 1 000 with 10 000: the whole controller as a
process, `--clients` delta-xDS clients over TLS in two others (see `controller_peers`). A change is
one pod that becomes ready or no longer is; it counts until the last client has sent its ACK. Then
100 000 pods with few clients: start and memory. Kept in .bench/controller.json.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / ".bench" / "controller.json"
# What takes longer is stuck; a client that lost its connection is counted wrongly, for example.
MOST_SECONDS = 180.0
_TICKS = os.sysconf("SC_CLK_TCK")


class Peer:
    """A process that answers lines with lines."""

    def __init__(self, *arguments: object) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.bench.controller_peers", *map(str, arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=None if os.environ.get("BENCH_LOG") else subprocess.DEVNULL,
            cwd=ROOT,
            text=True,
        )
        self._told: queue.SimpleQueue[str] = queue.SimpleQueue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._told.put(line)
        self._told.put("")

    def tell(self, line: str) -> None:
        """Give it an order."""
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def hear(self) -> dict[str, Any]:
        """Its next answer."""
        try:
            line = self._told.get(timeout=MOST_SECONDS)
        except queue.Empty:
            raise SystemExit(
                f"a process of the bench said nothing for {MOST_SECONDS:.0f} s; set BENCH_LOG=1"
            ) from None
        if not line:
            raise SystemExit("a process of the bench ended too early; set BENCH_LOG=1 to see why")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def cpu_seconds(self) -> float:
        """Processor time, of user and system."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / _TICKS

    def rss_mib(self, name: str = "VmRSS") -> float:
        """Resident memory now, or at its peak (VmHWM)."""
        for line in Path(f"/proc/{self.process.pid}/status").read_text().splitlines():
            if line.startswith(f"{name}:"):
                return round(int(line.split()[1]) / 1024, 1)
        return 0.0

    def end(self) -> None:
        """Close its stdin; it leaves by itself, or is made to."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


@contextmanager
def controller(
    services: int, pods: int, clients: int
) -> Iterator[tuple[Peer, list[Peer], dict[str, Any]]]:
    """The controller and its clients, all of which have acknowledged everything."""
    with tempfile.TemporaryDirectory(prefix="ambit-bench-") as directory:
        peers = [Peer("serve", directory, services, pods)]
        try:
            told = peers[0].hear()
            rows = {
                "start, no client: s": round(told["seconds"], 2),
                "start, no client: CPU s": round(peers[0].cpu_seconds(), 2),
                "memory, no client: MiB": peers[0].rss_mib(),
            }
            half = (clients + 1) // 2
            for first, count in ((0, half), (half, clients - half)):
                if count:
                    peers.append(Peer("clients", directory, told["port"], count, first))
            rows |= connect(peers[0], peers[1:], "fresh", "all connect, empty")
            rows |= {
                "memory after that: MiB": peers[0].rss_mib(),
                "memory, peak: MiB": peers[0].rss_mib("VmHWM"),
            }
            yield peers[0], peers[1:], rows
        finally:
            for each in reversed(peers):
                each.end()


def changes(server: Peer, fleets: list[Peer], pods: int, count: int) -> dict[str, float]:
    """One pod after the other."""
    time.sleep(3)  # what the start left behind, such as saving the state
    taken, sizes = [], []
    cpu = server.cpu_seconds()
    for number in range(count):
        server.tell(json.dumps([number * 7 % pods, False]))
        at = server.hear()["at"]
        answers = [each.hear() for each in fleets]
        taken.append((max(each["at"] for each in answers) - at) * 1e3)
        sizes.append(sum(each["bytes"] for each in answers))
    used = (server.cpu_seconds() - cpu) / count
    cuts = statistics.quantiles(taken, n=100)
    return {
        "a change to the last ACK, p50: ms": round(cuts[49], 1),
        "a change to the last ACK, p99: ms": round(cuts[98], 1),
        "a change: controller's CPU ms": round(used * 1e3, 1),
        "a change: bytes to all clients": round(statistics.median(sizes)),
    }


def connect(server: Peer, fleets: list[Peer], how: str, name: str) -> dict[str, float]:
    """All clients at once, until the last has acknowledged what it was told."""
    cpu = server.cpu_seconds()
    for each in fleets:
        each.tell(how)
    begun = min(each.hear()["at"] for each in fleets)
    answers = [each.hear() for each in fleets]
    return {
        f"{name}: s": round(max(each["at"] for each in answers) - begun, 2),
        f"{name}: CPU s": round(server.cpu_seconds() - cpu, 2),
        f"{name}: MB": round(sum(each["bytes"] for each in answers) / 1e6, 2),
    }


def measure(services: int, pods: int, clients: int, count: int) -> dict[str, float]:
    """All of it, for one mesh."""
    with controller(services, pods, clients) as (server, fleets, rows):
        if count:
            rows |= changes(server, fleets, pods, count)
            rows |= connect(server, fleets, "resume", "all connect anew, resuming")
            rows |= connect(server, fleets, "fresh", "all connect anew, empty")
            rows["memory at the end: MiB"] = server.rss_mib()
            rows["memory, peak: MiB"] = server.rss_mib("VmHWM")
        return rows


def main() -> None:
    """Measure, print, keep."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--changes", type=int, default=100)
    parser.add_argument("--quick", action="store_true", help="a tenth of everything")
    parser.add_argument("-o", choices=["table", "json"], default="table")
    options = parser.parse_args()
    tenth = 10 if options.quick else 1
    clients, count = options.clients // tenth, max(20, options.changes // tenth)
    found = {
        f"{services // tenth} services, {pods // tenth} pods, {some} clients": measure(
            services // tenth, pods // tenth, some, each
        )
        for services, pods, some, each in (
            (100, 1_000, clients, count),
            (1_000, 10_000, clients, count),
            (10_000, 100_000, max(2, clients // 20), 0),
        )
    }
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")
    if options.o == "json":
        print(json.dumps(found))
        return
    labels = list(dict.fromkeys(label for rows in found.values() for label in rows))
    for number, title in enumerate(found, 1):
        print(f"{number}: {title}")
    print(f"{'':<42}" + "".join(f"{number:>14}" for number in range(1, len(found) + 1)))
    for label in labels:
        print(f"{label:<42}" + "".join(f"{rows.get(label, ''):>14}" for rows in found.values()))


if __name__ == "__main__":
    main()
