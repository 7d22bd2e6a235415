"""Three-way merge of what a file says, what it said before, and what the live object has become.

Pure. A field that the file changed is taken from the file; a field that it did not touch keeps
its live value. So a label that `enroll` set survives the next edit of the file, and an edit of
that very label wins. Lists are values: they change as a whole.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_ABSENT = object()
_ADDRESSING = ("type", "clusterIP", "clusterIPs", "ipFamilies", "ipFamilyPolicy")


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


def service_patch_for(
    last: Mapping[str, Any] | None, new: Mapping[str, Any], live: Mapping[str, Any]
) -> dict[str, Any]:
    """As `merge_patch_for`, for a Service.

    How it is addressed is one thing in five fields, most of them filled in live: if a file
    changes one of them, what was filled in for the others goes.
    """
    patch = merge_patch_for(last, new, live)
    before, wanted, now = (_spec(each) for each in (last or {}, new, live))
    if last and wanted and any(before.get(key) != wanted.get(key) for key in _ADDRESSING):
        spec = patch.setdefault("spec", {})
        for key in _ADDRESSING:
            if wanted.get(key) != now.get(key):
                spec[key] = wanted.get(key)
    return patch


def _spec(obj: Mapping[str, Any]) -> Mapping[str, Any]:
    spec = obj.get("spec")
    return spec if isinstance(spec, Mapping) else {}
