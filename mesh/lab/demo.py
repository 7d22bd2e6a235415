"""The story that `ambit lab demo` tells: the mesh at work on this machine, in a lab of its own.

This module brings the lab up as a user would, copies the example application, and tells
the steps of `mesh.lab.story` and `mesh.lab.story_l7` one after the other.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import trio

from mesh.errors import ConfigError, MeshError, Unavailable
from mesh.lab.control import LabClient
from mesh.lab.story import FIRST_STEPS, LAST_STEPS, NODES, POLL_SECONDS, Failed, Story, in_thread
from mesh.lab.story_l7 import L7_STEPS
from mesh.lab.story_objects import TRACES

EXAMPLE = Path(__file__).resolve().parents[2] / "manifests" / "examples" / "shop"
STEPS = (*FIRST_STEPS, *L7_STEPS, *LAST_STEPS)
STEP_SECONDS = 90.0


@dataclass(frozen=True, slots=True)
class Step:
    """One step of the story, told."""

    name: str
    ok: bool
    detail: str


@asynccontextmanager
async def own_lab(name: str, directory: Path) -> AsyncIterator[LabClient]:
    """A lab brought up by `ambit lab up` as a user would, and taken down at the end."""
    log = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the process below
    argv = [sys.executable, "-m", "mesh.cli", "lab", "up", "--name", name]
    argv += ["--dir", str(directory), "--nodes", str(NODES)]
    async with trio.open_nursery() as nursery:
        run = partial(
            trio.run_process,
            argv,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            check=False,
            env=os.environ | TRACES,
        )
        process = await nursery.start(run)
        try:
            client = LabClient(name)
            with trio.move_on_after(30) as waiting:
                while not await in_thread(client.is_up):
                    if process.poll() is not None:
                        log.seek(0)
                        said = log.read().decode(errors="replace").strip()
                        raise Unavailable(said or f"the lab ended with {process.returncode}")
                    await trio.sleep(POLL_SECONDS)
            if waiting.cancelled_caught:
                raise Unavailable("the lab did not come up within 30 s")
            yield client
        finally:
            if process.poll() is None:
                process.terminate()
                with trio.CancelScope(shield=True), trio.move_on_after(10):
                    await process.wait()
            log.close()
            nursery.cancel_scope.cancel()


async def tell(
    listener: Callable[[str, Step | None], None], *, keep_going: bool = False
) -> tuple[list[Step], float]:
    """Tell the whole story.

    `listener(name, None)` is called when a step begins and `listener(name, step)` when it
    ended. Returns the steps told and the seconds taken. Raises MeshError when not even a
    lab can be had.
    """
    if not EXAMPLE.is_dir():
        raise ConfigError(f"the example application is missing: {EXAMPLE}")
    started = trio.current_time()
    told: list[Step] = []
    with tempfile.TemporaryDirectory(prefix="ambit-demo-") as temporary:
        directory = Path(temporary)
        for source in sorted(EXAMPLE.glob("*.yaml")):
            if source.name == "40-redis.yaml" and shutil.which("redis-server") is None:
                continue
            shutil.copy(source, directory)
        async with own_lab(f"demo-{os.getpid()}", directory) as client:
            story = Story(client, directory)
            for name, step in STEPS:
                listener(name, None)
                try:
                    with trio.fail_after(STEP_SECONDS):
                        result = Step(name, True, await step(story))
                except Failed as failed:
                    result = Step(name, False, str(failed))
                except trio.TooSlowError:
                    result = Step(name, False, f"took longer than {STEP_SECONDS:.0f} s")
                except MeshError as error:
                    result = Step(name, False, str(error))
                told.append(result)
                listener(name, result)
                if not result.ok and (not keep_going or name == "lab-up"):
                    break
            if story.held is not None:
                await story.held.aclose()
    return told, trio.current_time() - started


def as_json(told: list[Step], seconds: float) -> dict[str, Any]:
    """The contract of `ambit lab demo -o json`."""
    ok = len(told) == len(STEPS) and all(step.ok for step in told)
    return {"ok": ok, "seconds": round(seconds, 2), "steps": [asdict(step) for step in told]}
