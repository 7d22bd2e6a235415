"""What a container said last, as its pod's status shows it."""

from __future__ import annotations

import pytest

from mesh.lab.containers import last_line


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        (b"", ""),
        (b"\n \n", ""),
        (b"Traceback:\n  File\nOSError: taken\n\n", "OSError: taken"),
        (b"no newline", "no newline"),
        (b"\x1b[31mred\x1b[0m\xff\n", " [31mred [0m\N{REPLACEMENT CHARACTER}"),
        (b"x" * 900, "x" * 200),
    ],
)
def test_last_line(said, shown):
    assert last_line(said) == shown
