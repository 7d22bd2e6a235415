"""The state of a running lab, shared by the tasks that keep it true.

Tasks wait on its events and work on the newest state, so a burst of changes costs one round:
`replan` (objects changed), `reroute` (pods or Services changed), `changed` (anything did).
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import trio

from mesh.cluster.validate import Finding
from mesh.errors import ConfigError
from mesh.lab.daemons import Daemon
from mesh.lab.kernel import Kernel
from mesh.lab.kubelet import PodRunner
from mesh.lab.launch import LabSettings
from mesh.lab.live import Live
from mesh.lab.names import Zone
from mesh.lab.pod_files import wall_clock
from mesh.lab.processes import Log, Processes
from mesh.lab.services import Key
from mesh.lab.topology import Plan

DOMAIN = "cluster.local"


class Speaker:
    """Lines for a person: to stderr until the lab is detached, and to the lab's own log."""

    def __init__(self, path: Path) -> None:
        self.log = Log(path)
        self.is_quiet = False

    def say(self, message: str) -> None:
        """Print and log, line by line."""
        self.log.write(f"{wall_clock()} {message}\n".encode())
        if not self.is_quiet:
            with contextlib.suppress(OSError):
                sys.stderr.write("".join(f"ambit: {line}\n" for line in message.splitlines()))
                sys.stderr.flush()

    def complain(self, error: ConfigError) -> None:
        """Print a fault of a file, and its hint."""
        self.say(f"{error}" + (f"\nhint: {error.hint}" if error.hint else ""))


@dataclass(eq=False, slots=True)
class LabState:
    """Everything that is known of a lab."""

    settings: LabSettings
    run_directory: Path
    hide: str
    speaker: Speaker
    live: Live
    kernel: Kernel
    processes: Processes = field(default_factory=Processes)
    plan: Plan = field(default_factory=Plan)
    runners: dict[Key, PodRunner] = field(default_factory=dict)
    stopping: set[PodRunner] = field(default_factory=set)
    daemons: dict[str, Daemon] = field(default_factory=dict)
    zone: Zone = field(default_factory=lambda: Zone(DOMAIN))
    phase: str = "starting"
    file_faults: Callable[[], Sequence[ConfigError]] = tuple
    findings: Callable[[], Sequence[Finding]] = tuple
    is_planned: bool = False
    is_routed: bool = False
    began: float = field(default_factory=trio.current_time)
    end: trio.Event = field(default_factory=trio.Event)
    changed: trio.Event = field(default_factory=trio.Event)
    replan: trio.Event = field(default_factory=trio.Event)
    reroute: trio.Event = field(default_factory=trio.Event)

    def notify(self) -> None:
        """Wake whoever waits for any change."""
        self.changed.set()
        self.changed = trio.Event()

    def ask_reroute(self) -> None:
        """Services or pods changed."""
        self.is_routed = False
        self.reroute.set()
        self.notify()

    def ask_replan(self) -> None:
        """Objects changed that the plan is made of."""
        self.is_planned = False
        self.replan.set()
        self.notify()

    def unready(self) -> Iterator[PodRunner]:
        """Pods that do not serve yet; those that completed are not among them."""
        for runner in self.runners.values():
            if not runner.is_ready and runner.phase != "Succeeded":
                yield runner

    async def wait_settled(self) -> None:
        """Wait until the plan is carried out and everything in it is ready."""
        while True:
            is_running = self.is_planned and set(self.runners) >= set(self.plan.pods)
            is_served = all(daemon.state == "ready" for daemon in self.daemons.values())
            if is_running and is_served and self.is_routed and not any(self.unready()):
                return
            await self.changed.wait()
