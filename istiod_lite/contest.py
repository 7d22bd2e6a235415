"""When somebody else keeps changing what we made: say so, and do not fight in a loop. Pure.

What drifts is put back at once, because most drift is a slip. What drifts again and again is
another's will: a second tool with a template of its own, an operator, a mutating webhook. Each
round of such a fight costs the API server two writes and a Deployment a rollout. So after
`MOST_MENDS` within `WINDOW_SECONDS` an object is left as it is, for a minute and then longer
each time, and its Gateway says who the other is.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from istiod_lite.conditions import IN_SYNC, Condition
from mesh.cluster.api import Object, Ref

MOST_MENDS: Final = 3
WINDOW_SECONDS: Final = 60.0
FIRST_WAIT_SECONDS: Final = 60.0
LONGEST_WAIT_SECONDS: Final = 900.0


@dataclass(slots=True)
class _Round:
    mends: list[float] = field(default_factory=list)
    wait: float = 0.0
    until: float = 0.0
    others: tuple[str, ...] = ()
    # It has drifted once more, and stays so for now.
    is_left: bool = False


class Contests:
    """The objects that drift too often. Times are seconds of any clock that only goes on."""

    def __init__(self) -> None:
        self._rounds: dict[Ref, _Round] = {}
        self._drifting: frozenset[Ref] = frozenset()

    def see(self, drifting: Iterable[Ref], now: float) -> None:
        """What differs now; what no longer does, and has been left alone, is forgiven."""
        self._drifting = frozenset(drifting)
        for ref, each in list(self._rounds.items()):
            quiet_since = max([each.until, *each.mends])
            if ref not in self._drifting and now - quiet_since > WINDOW_SECONDS:
                del self._rounds[ref]

    def may_mend(self, ref: Ref, now: float) -> bool:
        """Whether it is time to put an object back."""
        found = self._rounds.get(ref)
        if found is None or now >= found.until:
            return True
        found.is_left = True
        return False

    def mended(self, ref: Ref, now: float) -> None:
        """It was put back."""
        found = self._rounds.setdefault(ref, _Round())
        found.is_left = False
        found.mends = [each for each in found.mends if now - each < WINDOW_SECONDS] + [now]
        # After a wait one more attempt is enough to see that nothing has changed.
        if len(found.mends) >= MOST_MENDS or found.wait:
            found.wait = min(max(FIRST_WAIT_SECONDS, 2 * found.wait), LONGEST_WAIT_SECONDS)
            found.until = now + found.wait
            found.mends.clear()

    def name_others(self, ref: Ref, others: tuple[str, ...]) -> None:
        """Who writes the fields that we do."""
        if ref in self._rounds:
            self._rounds[ref].others = others

    def is_nameless(self, ref: Ref) -> bool:
        """Whether an object is left as it is and nobody has looked who the other is."""
        found = self._rounds.get(ref)
        return found is not None and found.is_left and not found.others

    def conditions(self) -> Mapping[Ref, Condition]:
        """What to say on Gateways whose objects are left as another made them."""
        found: dict[Ref, Condition] = {}
        for ref in sorted(self._drifting):
            each = self._rounds.get(ref)
            if each is None or not each.is_left:
                continue
            who = ", ".join(each.others) or "somebody"
            message = (
                f"{ref} is changed again and again by {who}: left as it is, and put back "
                f"every {each.wait / 60:.0f} min; let one of the two own it"
            )
            gateway = Ref("Gateway", ref.namespace, ref.name)
            found.setdefault(gateway, Condition(IN_SYNC, "False", "OwnedByAnother", message))
        return found


def owners(obj: Object, patch: Mapping[str, Any], own: str) -> tuple[str, ...]:
    """The field managers, but for `own`, of the fields that a patch would change."""
    entries = (obj.get("metadata") or {}).get("managedFields") or ()
    found = [
        str(each.get("manager", ""))
        for each in entries
        if isinstance(each, Mapping)
        and each.get("manager") != own
        and _owns(each.get("fieldsV1"), patch)
    ]
    return tuple(dict.fromkeys(name for name in found if name))


def _owns(fields: Any, patch: Mapping[str, Any]) -> bool:
    """Whether a set of fields (`f:spec`, …) has one that the patch changes."""
    if not isinstance(fields, Mapping):
        return False
    for key, value in patch.items():
        inner = fields.get(f"f:{key}")
        if inner is None:
            continue
        if not isinstance(value, Mapping) or _owns(inner, value):
            return True
    return False
