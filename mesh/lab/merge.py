"""Three-way merge of what a file says, what it said before, and what the live object has become.

Pure. A field that the file changed is taken from the file; a field that it did not touch keeps
its live value. So a label that `enroll` set survives the next edit of the file, and an edit of
that very label wins. Lists are values: they change as a whole.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_ABSENT = object()


def merge_patch_for(
    last: Mapping[str, Any] | None, new: Mapping[str, Any], live: Mapping[str, Any]
) -> dict[str, Any]:
    """The JSON merge patch that brings `live` to what the file asks for; {} for nothing.

    `last` is what the file said before (None: it did not have the object).
    """
    before = last or {}
    patch: dict[str, Any] = {}
    for key, value in new.items():
        earlier = before.get(key, _ABSENT)
        now = live.get(key, _ABSENT)
        if isinstance(value, Mapping):
            below = earlier if isinstance(earlier, Mapping) else {}
            if isinstance(now, Mapping):
                inner = merge_patch_for(below, value, now)
                if inner:
                    patch[key] = inner
            elif value != earlier:
                patch[key] = value
        elif value != earlier and value != now:
            patch[key] = value
    for key in before:
        if key not in new and key in live:
            patch[key] = None
    return patch
