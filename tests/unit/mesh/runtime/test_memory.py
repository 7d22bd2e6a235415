"""What a daemon gives back after its start: only what the file has, too."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from mesh.runtime.memory import unchanged_mappings

ROOT = Path(__file__).parents[4]

SMAPS = """\
55d0c0000000-55d0c0001000 r--p 00000000 fd:00 131 /usr/bin/python3.11
Size:                  4 kB
Rss:                   4 kB
Anonymous:             0 kB
VmFlags: rd mr mw me
55d0c0001000-55d0c0004000 r-xp 00001000 fd:00 131 /usr/bin/python3.11
Anonymous:             0 kB
55d0c0005000-55d0c0006000 r--p 00003000 fd:00 131 /usr/bin/python3.11
Anonymous:             4 kB
55d0c0006000-55d0c0007000 rw-p 00004000 fd:00 131 /usr/bin/python3.11
Anonymous:             0 kB
55d0c1000000-55d0c1021000 r--p 00000000 00:00 0
Anonymous:             0 kB
7f0000000000-7f0000001000 r--s 00000000 fd:00 77 /var/lib/shared state (deleted)
Anonymous:             0 kB
7f0000002000-7f0000003000 r--p 00000000 fd:00 78 /opt/a name: with spaces.so
Anonymous:             0 kB
7ffd00000000-7ffd00002000 r-xp 00000000 00:00 0 [vdso]
Anonymous:             0 kB
"""

PROGRAM = """
import ctypes, hashlib, json, ssl, sys
from mesh.runtime import memory

def resident():
    with open("/proc/self/smaps_rollup") as lines:
        return {line.split()[0]: int(line.split()[1]) for line in list(lines)[1:]}

before = resident()
memory.settle()
after = resident()
context = ssl.create_default_context()
assert json.loads(json.dumps({"a": [1, 2.5, None]})) == {"a": [1, 2.5, None]}
assert hashlib.sha256(b"abc").hexdigest().startswith("ba7816bf")
memory.give_back_libraries()
assert json.loads(json.dumps([context.protocol])) == [16]
print(before["Rss:"] - before["Anonymous:"], after["Rss:"] - after["Anonymous:"])
"""


def test_only_what_was_never_written_to() -> None:
    assert unchanged_mappings(SMAPS.splitlines()) == [
        (0x55D0C0000000, 0x55D0C0001000),
        (0x55D0C0001000, 0x55D0C0004000),
        (0x7F0000002000, 0x7F0000003000),
    ]


def test_a_process_goes_on_with_fewer_pages_of_its_libraries() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=ROOT, capture_output=True, text=True, check=True
    )
    before, after = map(int, done.stdout.split())
    assert after < before / 2
