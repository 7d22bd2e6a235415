"""Who refers to whom, both ways: what lets a change touch only what depends on it. Pure."""

from __future__ import annotations

from collections.abc import Iterable

from mesh.cluster.api import Ref


class Relation:
    """Objects and what they refer to. Order of insertion is kept."""

    def __init__(self) -> None:
        self._forward: dict[Ref, dict[Ref, None]] = {}
        self._backward: dict[Ref, dict[Ref, None]] = {}

    def set(self, source: Ref, targets: Iterable[Ref]) -> tuple[Ref, ...]:
        """Replace what `source` refers to; everything it refers or referred to."""
        old = self._forward.pop(source, {})
        for target in old:
            sources = self._backward[target]
            del sources[source]
            if not sources:
                del self._backward[target]
        new = dict.fromkeys(targets)
        if new:
            self._forward[source] = new
        for target in new:
            self._backward.setdefault(target, {})[source] = None
        return tuple(dict.fromkeys((*old, *new)))

    def of(self, source: Ref) -> tuple[Ref, ...]:
        """What `source` refers to."""
        return tuple(self._forward.get(source, ()))

    def to(self, target: Ref) -> tuple[Ref, ...]:
        """Who refers to `target`."""
        return tuple(self._backward.get(target, ()))
