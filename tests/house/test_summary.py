"""The closing section of a run: what was not run is counted and named, with the reason."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest_plugins = ["pytester"]

CONFTEST = Path(__file__).parents[1] / "conftest.py"


def test_what_cannot_run_is_named_with_its_reason(pytester: pytest.Pytester) -> None:
    pytester.makeconftest(CONFTEST.read_text())
    pytester.makepyfile(
        test_it="""
        import pytest
        def test_runs(): pass
        @pytest.mark.skipif(True, reason="needs root")
        def test_root(): pass
        def test_inside(): pytest.skip("no envoy on this machine")
        """
    )
    result = pytester.runpytest_subprocess("-p", "no:randomly", "-W", "ignore")
    result.stdout.fnmatch_lines(
        [
            "*= not run here =*",
            "test_it.py::test_root: needs root",
            "test_it.py::test_inside: no envoy on this machine",
            "2 not run here",
            "*1 passed, 2 skipped*",
        ]
    )


def test_skip_without_a_reason_fails(pytester: pytest.Pytester) -> None:
    pytester.makeconftest(CONFTEST.read_text())
    pytester.makepyfile(
        test_it="""
        import pytest
        @pytest.mark.skip
        def test_lazy(): pass
        def test_lazy_inside(): pytest.skip()
        """
    )
    result = pytester.runpytest_subprocess("-p", "no:randomly", "-W", "ignore")
    result.stdout.fnmatch_lines(["*test_lazy is skipped without a reason*"])
    result.assert_outcomes(failed=1, errors=1)
