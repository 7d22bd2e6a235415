"""The fixture `no_fd_leak` fails the test that leaves a descriptor open."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest_plugins = ["pytester"]

CONFTEST = Path(__file__).parents[1] / "conftest.py"


def test_a_leak_is_found(pytester: pytest.Pytester) -> None:
    pytester.makeconftest(CONFTEST.read_text())
    pytester.makepyfile(
        test_it="""
        import os
        kept = []
        def test_leaks(no_fd_leak): kept.extend(os.pipe())
        def test_closes(no_fd_leak):
            for fd in os.pipe(): os.close(fd)
        """
    )
    result = pytester.runpytest_subprocess("-p", "no:randomly", "-W", "ignore")
    result.stdout.fnmatch_lines(["*descriptors left open: *pipe:*"])
    result.assert_outcomes(passed=2, errors=1)
