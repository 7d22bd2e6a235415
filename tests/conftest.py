"""What every test may use: the hypothesis profiles, the descriptor-leak fixture, and the closing
section `not run here`, which names each test that this machine could not run and why.

A skip without a reason fails the run: nothing is left out silently. With AMBIT_COMPILED=require
everything runs on the compiled modules (mesh/compiled.py).
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from mesh import compiled

if os.environ.get(compiled.SWITCH) == "require":
    # Then the tests themselves, too: otherwise only the daemons that they start.
    compiled.use()

# Deadline-free, because two shared cores say nothing about a slow example.
settings.register_profile(
    "ci", max_examples=50, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile("long", max_examples=2000, deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


def _open_descriptors() -> dict[int, str]:
    found = {}
    for name in os.listdir("/proc/self/fd"):
        try:
            found[int(name)] = str(Path("/proc/self/fd", name).readlink())
        except OSError:  # the descriptor of this very listing, closed by now
            continue
    return found


@pytest.fixture
def no_fd_leak() -> Iterator[None]:
    """Fails the test that leaves a descriptor open: `pytestmark = usefixtures("no_fd_leak")`."""
    # What is there by now is not looked at again: a full collection takes a second late in a run.
    gc.collect()
    gc.freeze()
    before = _open_descriptors()
    yield
    gc.collect()
    left = {fd: what for fd, what in _open_descriptors().items() if before.get(fd) != what}
    assert not left, f"descriptors left open: {left}"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """The closing section; printed also when everything ran, so that its absence means a crash."""
    skipped = terminalreporter.stats.get("skipped", [])
    terminalreporter.section("not run here")
    for report in skipped:
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        terminalreporter.write_line(f"{report.nodeid}: {reason.removeprefix('Skipped: ')}")
    terminalreporter.write_line(
        f"{len(skipped)} not run here"
        if skipped
        else "0 not run here: this machine ran everything that was selected"
    )


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Iterator[pytest.TestReport]:
    """A skip must say what is missing."""
    report: pytest.TestReport = yield
    if report.skipped and isinstance(report.longrepr, tuple):
        reason = report.longrepr[2].removeprefix("Skipped").removeprefix(":").strip()
        if not reason or reason == "unconditional skip":
            report.outcome = "failed"
            report.longrepr = f"{item.nodeid} is skipped without a reason"
    return report
