from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import structlog
import trio
from structlog.testing import LogCapture

from mesh.errors import ConfigError, MeshError, Unavailable
from mesh.runtime import lifecycle, metrics
from mesh.runtime.lifecycle import Shutdown, drain_seconds, guard, supervise

ROOT = Path(__file__).parents[2]

PROGRAM = """
from __future__ import annotations
import sys
from dataclasses import dataclass
import trio
from mesh.errors import ConfigError, Unavailable
from mesh.runtime import lifecycle
from mesh.runtime.config import setting

@dataclass(frozen=True, slots=True)
class Example:
    '''An example.'''
    mode: str = setting(env="MODE", doc="What to do.")
    grace_seconds: float = setting(env="GRACE", default=5.0, doc="Drain.")

async def serve(config: Example, shutdown: lifecycle.Shutdown) -> None:
    if config.mode == "bug":
        raise ZeroDivisionError("oops")
    if config.mode == "unavailable":
        raise Unavailable("nobody at istiod:15012", hint="is istiod up?")
    if config.mode == "late-config":
        async with trio.open_nursery():
            raise ConfigError("no such file", field="CA_DIR")
    if config.mode == "both":
        async def fail() -> None:
            raise Unavailable("nobody")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(fail)
            raise ZeroDivisionError("oops")
    print("started", flush=True)
    await shutdown.wait()
    print("draining", flush=True)
    if config.mode == "stubborn":
        await trio.sleep_forever()
    print("drained", flush=True)

sys.exit(lifecycle.start("example", Example, serve, grace_seconds=lambda c: c.grace_seconds))
"""


class Program:
    def __init__(self, tmp_path: Path) -> None:
        self._path = tmp_path / "program.py"
        self._path.write_text(textwrap.dedent(PROGRAM))

    def start(self, *argv: str, **environ: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, str(self._path), *argv],
            env={"PYTHONPATH": str(ROOT), "PATH": os.environ["PATH"], **environ},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *argv: str, **environ: str) -> tuple[int, str, str]:
        with self.start(*argv, **environ) as process:
            out, err = process.communicate(timeout=30)
        return process.returncode, out, err


@pytest.fixture
def program(tmp_path: Path) -> Program:
    return Program(tmp_path)


def test_config_error_is_one_line_and_a_hint_and_exit_2(program: Program) -> None:
    assert program.run() == (
        2,
        "",
        "example: MODE: is required but not set\nexample: hint: set MODE: What to do.\n",
    )
    code, _, err = program.run("--mod=x")
    assert (code, err) == (
        2,
        "example: unknown flag --mod\nexample: hint: did you mean --mode?\n",
    )


def test_config_error_inside_a_nursery_is_exit_2(program: Program) -> None:
    assert program.run(MODE="late-config") == (2, "", "example: CA_DIR: no such file\n")


def test_other_mesh_error_is_exit_1(program: Program) -> None:
    code, _, err = program.run(MODE="unavailable")
    assert code == 1
    assert err == "example: nobody at istiod:15012\nexample: hint: is istiod up?\n"


@pytest.mark.parametrize("mode", ["bug", "both"])
def test_bug_is_logged_whole(program: Program, mode: str) -> None:
    code, _, err = program.run(MODE=mode)
    assert code == 1
    (line,) = err.splitlines()
    assert '"event": "bug"' in line
    assert "ZeroDivisionError: oops" in line
    assert "Traceback" in line


def test_help_and_print_config(program: Program) -> None:
    code, out, _ = program.run("--print-config", MODE="x")
    assert code == 0
    assert out.splitlines()[0] == "mode = x             # environment MODE"
    assert "--mode text" in program.run("--help")[1]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_drains(program: Program, number: int) -> None:
    with program.start(MODE="normal") as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "started\n"
        process.send_signal(number)
        out, err = process.communicate(timeout=30)
    assert (process.returncode, out) == (0, "draining\ndrained\n")
    assert "shutdown_requested" in err


def test_deadline_ends_a_drain(program: Program) -> None:
    with program.start(MODE="stubborn", GRACE="200ms") as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "started\n"
        process.terminate()
        out, err = process.communicate(timeout=30)
    assert (process.returncode, out) == (0, "draining\n")
    assert "drain_deadline_passed" in err


def test_second_signal_forces(program: Program) -> None:
    with program.start(MODE="stubborn", GRACE="60s") as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "started\n"
        process.terminate()
        assert process.stdout.readline() == "draining\n"
        process.terminate()
        _, err = process.communicate(timeout=30)
    assert process.returncode == 0
    assert "shutdown_forced" in err


@pytest.mark.parametrize(
    ("grace", "deadline", "expected"),
    [(None, None, 5.0), (30.0, None, 25.0), (10.0, None, 9.0), (1.0, None, 1.0), (30.0, 3.0, 3.0)],
)
def test_drain_deadline_rule(grace: float | None, deadline: float | None, expected: float) -> None:
    assert drain_seconds(grace, deadline) == expected


@pytest.fixture
def logged() -> list[str]:
    capture = LogCapture()
    before = structlog.get_config()
    structlog.configure(processors=[capture])
    yield capture.entries
    structlog.configure(**before)


async def fail_with(*errors: Exception) -> None:
    if len(errors) == 1:
        raise errors[0]
    raise ExceptionGroup("several", errors)


async def test_supervise_swallows_and_logs_a_bug(logged: list[dict[str, object]]) -> None:
    await supervise("inbound", fail_with, ZeroDivisionError("x"))
    assert [(entry["event"], entry["where"]) for entry in logged] == [("bug", "inbound")]


async def test_supervise_raises_mesh_errors_on(logged: list[dict[str, object]]) -> None:
    with pytest.raises(Unavailable):
        await supervise("inbound", fail_with, Unavailable("x"))
    assert logged == []


async def test_supervise_splits_a_group(logged: list[dict[str, object]]) -> None:
    group = ExceptionGroup("inner", [Unavailable("the one"), ValueError("bug")])
    with pytest.raises(Unavailable, match="the one"):
        await supervise("inbound", fail_with, group, KeyError("bug"))
    (entry,) = logged
    assert [type(leaf) for leaf in lifecycle.leaves(entry["exc_info"])] == [ValueError, KeyError]


async def test_supervise_passes_cancellation(logged: list[dict[str, object]]) -> None:
    with trio.move_on_after(0.01) as scope:
        await supervise("inbound", trio.sleep_forever)
    assert scope.cancelled_caught
    assert logged == []


async def test_bug_while_cancelled_is_logged_and_the_cancellation_kept(
    logged: list[dict[str, object]],
) -> None:
    async def cleanup_fails() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.sleep_forever)
            try:
                await trio.sleep_forever()
            finally:
                raise ValueError("in the cleanup")

    with trio.move_on_after(0.01) as scope:
        await supervise("inbound", cleanup_fails)
        await trio.sleep_forever()
    assert scope.cancelled_caught
    assert [entry["event"] for entry in logged] == ["bug"]


async def test_guard_raises_nothing(logged: list[dict[str, object]]) -> None:
    await guard("inbound", fail_with, Unavailable("x"))
    await guard("inbound", fail_with, ValueError("x"))
    assert [entry["event"] for entry in logged] == ["task_failed", "bug"]


def test_run_returns_the_exit_code() -> None:
    async def fine() -> None:
        await trio.sleep(0)

    async def wrong() -> None:
        raise ConfigError("no")

    async def failed() -> None:
        raise MeshError("no")

    assert lifecycle.run(fine) == 0
    assert lifecycle.run(wrong) == 2
    assert lifecycle.run(failed) == 1


async def test_shutdown_by_request() -> None:
    shutdown = Shutdown()
    shutdown.request()
    with trio.fail_after(30):
        await shutdown.wait()


async def test_loop_lag_is_measured() -> None:
    registry = metrics.new_registry("x", "1")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(lambda: metrics.watch_loop_lag(registry, interval_seconds=0.01))
        await trio.sleep(0.02)
        # A blocking call in the loop is what the gauge is for.
        subprocess.run(["sleep", "0.1"], check=True)
        await trio.sleep(0.05)
        nursery.cancel_scope.cancel()
    worst = registry.get_sample_value("ambit_event_loop_lag_max_seconds")
    assert worst is not None
    assert worst > 0.05
