"""What only the start of a daemon needed, given back to the kernel.

Importing leaves free blocks behind, reads megabytes of libraries once (relocations, tables,
the code of initializers), and makes objects that live as long as the process. `settle` ends
that once everything is imported, and `keep_small` does so again now and then for the pages of
libraries: handing out certificates touches some that nobody needs an hour long. What is
used again comes back by a page fault out of the page cache.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
from collections.abc import Iterable
from pathlib import Path
from typing import Final

import trio

# Connections leave no cycles behind: looking for them after every 700 objects is wasted.
GARBAGE_BEFORE_LOOKING: Final = 5000
_MADV_DONTNEED: Final = 4


_FIRST_SECONDS, _KEEP_SMALL_SECONDS = 5.0, 30.0

_libraries: list[tuple[int, int]] = []


def settle_objects() -> None:
    """Give back free blocks, and keep the collector from walking what is there now. A daemon that
    has read a large state does it again: a walk over ten thousand pods stops everything for a
    tenth of a second.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(GARBAGE_BEFORE_LOOKING)
    with contextlib.suppress(OSError, AttributeError):  # no glibc
        ctypes.CDLL(None).malloc_trim(0)


def settle() -> None:
    """Give back free blocks and pages of libraries, and keep the collector from walking what is
    there now. Call it once, before there are threads.
    """
    settle_objects()
    with contextlib.suppress(OSError, AttributeError):  # no such /proc
        with Path("/proc/self/smaps").open(encoding="utf-8", errors="replace") as lines:
            _libraries[:] = unchanged_mappings(lines)
        give_back_libraries()


async def keep_small() -> None:
    """Give back pages of libraries, when the start is over and now and then, for ever; less than a
    millisecond each time.
    """
    await trio.sleep(_FIRST_SECONDS)
    while True:
        give_back_libraries()
        await trio.sleep(_KEEP_SMALL_SECONDS)


def give_back_libraries() -> None:
    """Give back the pages of what was mapped when `settle` was called: Python unloads no library,
    so these addresses are still theirs. Nothing before `settle`.
    """
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    for start, end in _libraries:
        madvise(start, end - start, _MADV_DONTNEED)


def unchanged_mappings(smaps: Iterable[str]) -> list[tuple[int, int]]:
    """Beginning and end of what a process maps of files, cannot write and never wrote to, so
    that the file has all of it; from the lines of /proc/<pid>/smaps.
    """
    found: list[tuple[int, int]] = []
    area: tuple[int, int] | None = None
    for line in smaps:
        words = line.split()
        if not words[0].endswith(":"):
            start, _, end = words[0].partition("-")
            is_read_only_file = "w" not in words[1] and words[1][3] == "p" and words[4] != "0"
            area = (int(start, 16), int(end, 16)) if is_read_only_file else None
        elif area is not None and words[0] == "Anonymous:" and words[1] == "0":
            found.append(area)
    return found
