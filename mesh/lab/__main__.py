"""`python -m mesh.lab`: what `mesh.lab.launch` starts as PID 1 of a lab's namespaces.

Not for people: `ambit lab up` starts it, hands it the control socket and reads how it went.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import trio

from mesh.errors import MeshError
from mesh.lab import control, launch, mounts
from mesh.lab.door import ENVIRONMENT as DOOR
from mesh.lab.report import status_of
from mesh.lab.serve_control import serve_control
from mesh.lab.supervisor import Supervisor
from mesh.runtime.lifecycle import leaves

_ENDING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class Reporter:
    """The pipe to the process that started us."""

    def __init__(self, fd: int) -> None:
        os.set_inheritable(fd, False)
        self._fd = fd

    def tell(self, message: Mapping[str, Any]) -> None:
        """Send one report; nobody listening is fine."""
        with contextlib.suppress(OSError):
            os.write(self._fd, json.dumps(message).encode() + b"\n")

    def close(self) -> None:
        """Nothing more will be reported."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


async def _live(
    settings: launch.LabSettings,
    listener: socket.socket,
    reporter: Reporter,
    door: socket.socket | None,
) -> None:
    avoid = (sys.prefix, sys.base_prefix, __file__, settings.directory, Path.cwd())
    hide = mounts.choose_run_place([Path(each) for each in avoid])
    run = mounts.prepare_run_directory(hide)
    supervisor = Supervisor(settings, run, hide, os.environ, door)

    async def watch_signals() -> None:
        with trio.open_signal_receiver(*_ENDING) as seen:
            async for _ in seen:
                supervisor.state.end.set()

    def on_ready() -> None:
        reporter.tell({"ready": status_of(supervisor.state)})
        reporter.close()
        if settings.detach:
            supervisor.state.speaker.is_quiet = True
            launch.let_go_of_terminal()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(watch_signals)
        await supervisor.run(lambda lab: serve_control(lab, listener), on_ready)
        nursery.cancel_scope.cancel()


def main() -> int:
    """Run the lab to its end; the exit code."""
    reporter = Reporter(int(os.environ.pop(launch.REPORT_ENVIRONMENT)))
    listener = socket.socket(fileno=int(os.environ.pop(launch.LISTENER_ENVIRONMENT)))
    settings = launch.LabSettings.from_json(os.environ.pop(launch.SETTINGS_ENVIRONMENT))
    os.set_inheritable(listener.fileno(), False)
    door = None
    if DOOR in os.environ:
        door = socket.socket(fileno=int(os.environ.pop(DOOR)))
        os.set_inheritable(door.fileno(), False)
    failed: list[MeshError] = []
    try:
        trio.run(_live, settings, listener, reporter, door)
    except* MeshError as group:
        failed = [leaf for leaf in leaves(group) if isinstance(leaf, MeshError)]
    if failed:
        reporter.tell(control.error_answer(failed[0]))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
