"""Which version of each resource a client has, kept as what differs from what all have. Pure.

Most clients hold the same: all of a type as it was at some moment. That moment's versions are one
mapping, made once and shared; a client owns only its differences. Ten thousand resources held
by two hundred clients are then one dictionary, not two hundred.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import MappingProxyType

_NOTHING: Mapping[str, str] = MappingProxyType({})
# How many differences a client may collect before it is compared with the present again.
_FEW = 64
_SHARE = 8


class HeldVersions:
    """Name to version of one client and type. `shared` must not change while it is used here."""

    __slots__ = ("_own", "_shared")

    def __init__(self, held: Mapping[str, str] = _NOTHING) -> None:
        self._shared: Mapping[str, str] = _NOTHING
        # None: the shared mapping has it, the client does not.
        self._own: dict[str, str | None] = dict(held)

    def get(self, name: str) -> str | None:
        """The version that the client has; None if it has none."""
        return self._own[name] if name in self._own else self._shared.get(name)

    def __contains__(self, name: str) -> bool:
        return self.get(name) is not None

    def __bool__(self) -> bool:
        if not self._shared:
            return bool(self._own)
        return next(iter(self), None) is not None

    def __iter__(self) -> Iterator[str]:
        own = self._own
        yield from (name for name, version in own.items() if version is not None)
        yield from (name for name in self._shared if name not in own)

    def put(self, name: str, version: str) -> None:
        """The client has it now."""
        if self._shared.get(name) == version:
            self._own.pop(name, None)
        else:
            self._own[name] = version

    def drop(self, name: str) -> None:
        """The client has it no longer."""
        if name in self._shared:
            self._own[name] = None
        else:
            self._own.pop(name, None)

    def as_dict(self) -> dict[str, str]:
        """All of it, as the caller's own."""
        found = dict(self._shared)
        for name, version in self._own.items():
            if version is None:
                del found[name]
            else:
                found[name] = version
        return found

    @property
    def is_far(self) -> bool:
        """Whether so much differs that `share` is worth its work."""
        return len(self._own) > _FEW + len(self._shared) // _SHARE

    def share(self, shared: Mapping[str, str]) -> None:
        """Keep the same as differences from `shared`, in time that grows with its size."""
        if shared is self._shared:
            return
        held = self.as_dict()
        own: dict[str, str | None] = {}
        if held != shared:
            own = {name: version for name, version in held.items() if shared.get(name) != version}
            own.update((name, None) for name in shared if name not in held)
        self._shared, self._own = shared, own

    def take(self, shared: Mapping[str, str]) -> None:
        """The client has exactly `shared`."""
        self._shared, self._own = shared, {}

    def differing(self, wanted: Mapping[str, str]) -> set[str]:
        """The names that the client has otherwise than `wanted`, has too many or has not."""
        if wanted is self._shared:
            return set(self._own)
        held = self.as_dict()
        found = {name for name, version in wanted.items() if held.get(name) != version}
        found.update(name for name in held if name not in wanted)
        return found
