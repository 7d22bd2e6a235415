"""What is wrong or odd about the objects of the user's files, taken together.

Looked at after every edit: by `mesh.cluster.validate` here, and by the controller, which knows
what follows from it ("until it is repaired, everything that it could concern is denied").
Each finding is told once for as long as it lasts, and stands in the lab's status.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import trio

from mesh.cluster.api import Object, Put, Ref, Source, ref_of
from mesh.cluster.validate import Finding, Severity, check
from mesh.errors import ConfigError, MeshError
from mesh.lab import fetch
from mesh.lab.live import DEFAULT_NAMESPACES, SYSTEM_NAMESPACE, UserFiles
from mesh.lab.state import LabState
from mesh.lab.system_objects import CONTROLLER_MONITORING_PORT

GATHER_SECONDS = 0.1
# The controller hears of an edit later than we do; a second look finds what it had not yet seen.
ASK_SECONDS = (0.5, 2.0)
ANSWER_SECONDS = 5.0
MOST_TOLD = 50


class Checks:
    """The findings of a lab. `found` is shown in its status."""

    def __init__(self, state: LabState, files: UserFiles) -> None:
        self.found: list[Finding] = []
        self._state = state
        self._files = files
        self._heard: list[Any] = []
        self._told: set[str] = set()

    async def run(self) -> None:
        """Look after every edit. Never returns."""
        while True:
            await self._files.edited.wait()
            await trio.sleep(GATHER_SECONDS)
            await self.look()

    async def look(self, waits: Sequence[float] = ASK_SECONDS) -> None:
        """Look at all objects now, and tell what was not told yet.

        `waits`: seconds before each time that the controller is asked.
        """
        self._files.edited = trio.Event()
        puts = dict(self._files.puts)
        own = await trio.to_thread.run_sync(_check, puts, dict(self._state.live.objects))
        self.found = merged(own, self._heard, puts)
        for seconds in waits:
            if not self._is_controller_there() or self._files.edited.is_set():
                break
            await trio.sleep(seconds)
            self._heard = await self._ask_controller()
            self.found = merged(own, self._heard, puts)
            if len(self.found) == len(own):
                break
        self._tell()

    def _is_controller_there(self) -> bool:
        daemon = self._state.daemons.get("istiod")
        return daemon is not None and daemon.state == "ready"

    async def _ask_controller(self) -> list[Any]:
        """What it found; nothing if it is another program, without such a page."""
        net = self._state.kernel.control_plane
        target = fetch.Target("127.0.0.1", CONTROLLER_MONITORING_PORT, net)
        try:
            with trio.move_on_after(ANSWER_SECONDS):
                status, body = await fetch.request(target, "GET", "/debug/findings")
                listed = json.loads(body) if status == 200 else []
                return listed if isinstance(listed, list) else []
        except (MeshError, ValueError, RecursionError):
            pass
        return []

    def _tell(self) -> None:
        # A fault of the same field was told when it was found.
        known = {_place(fault) for fault in (*self._state.file_faults(), *self._state.plan.faults)}
        current = {str(each): each for each in self.found}
        fresh = [
            each
            for text, each in current.items()
            if text not in self._told and _place_of(each) not in known
        ]
        self._told = set(current)
        for each in fresh[:MOST_TOLD]:
            mark = "" if each.severity is Severity.ERROR else f"{each.severity.value}: "
            hint = f"\nhint: {each.hint}" if each.hint else ""
            self._state.speaker.say(f"{mark}{each}{hint}")
        if len(fresh) > MOST_TOLD:
            self._state.speaker.say(
                f"and {len(fresh) - MOST_TOLD} more: ambit check {self._state.settings.directory}"
            )


def without(faults: Sequence[ConfigError], found: Iterable[Finding]) -> list[Finding]:
    """The findings, but for fields that a fault speaks of already."""
    known = {_place(fault) for fault in faults}
    return [each for each in found if _place_of(each) not in known]


def merged(own: Sequence[Finding], told: Sequence[Any], puts: Mapping[Ref, Put]) -> list[Finding]:
    """Our findings with what the controller told of the same objects.

    In its own words where they say more about the same field, and with what it alone can know.
    """
    refs = {str(ref): ref for ref in puts}
    found = list(own)
    index = {(str(each.ref), each.field): number for number, each in enumerate(found)}
    for each in told:
        finding = _read(each, refs, puts)
        if finding is None:
            continue
        number = index.get((str(finding.ref), finding.field))
        if number is None:
            found.append(finding)
        elif finding.message.startswith(found[number].message):
            hint = found[number].hint or finding.hint
            found[number] = replace(found[number], message=finding.message, hint=hint)
    return found


def _read(told: Any, refs: Mapping[str, Ref], puts: Mapping[Ref, Put]) -> Finding | None:
    if not isinstance(told, Mapping):
        return None
    texts = {key: value for key, value in told.items() if isinstance(value, str)}
    ref = refs.get(texts.get("object", ""))
    if ref is None:
        return None
    is_error = texts.get("severity") == Severity.ERROR.value
    return Finding(
        Severity.ERROR if is_error else Severity.WARNING,
        texts.get("message", ""),
        ref,
        texts.get("field", ""),
        puts[ref].source,
        texts.get("hint", ""),
    )


def _check(puts: Mapping[Ref, Put], live: Mapping[Ref, Object]) -> list[Finding]:
    objects = [(as_live(put.object, live.get(put.ref)), put.source) for put in puts.values()]
    for name in DEFAULT_NAMESPACES:
        given = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}}
        if ref_of(given) not in puts:
            objects.append((given, None))
    # Waypoints may be deployed by command, and are written in no file then.
    objects += [
        (obj, None) for ref, obj in live.items() if ref.kind == "Gateway" and ref not in puts
    ]
    return [each for each in check(objects, SYSTEM_NAMESPACE) if each.ref in puts]


def as_live(written: Object, live: Object | None) -> Object:
    """An object of a file with the labels that it has by now: `enroll` and `waypoint apply` set
    some.
    """
    if live is None or live.get("kind") not in ("Namespace", "Service"):
        return written
    labels = live["metadata"].get("labels") or {}
    return {**written, "metadata": {**written["metadata"], "labels": labels}}


_Place = tuple[str, int, int, str]


def _place(error: ConfigError) -> _Place:
    return error.file, error.line, error.column, error.field


def _place_of(finding: Finding) -> _Place:
    place = finding.source.at(finding.field) if finding.source else Source("")
    return place.file, place.line, place.column, finding.field
