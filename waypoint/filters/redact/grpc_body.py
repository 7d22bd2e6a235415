"""gRPC by field: length-prefixed messages, decoded by a descriptor, redacted, and encoded again.

Text fields (string, bytes) take what an action makes; numbers, enums and truth values, which have
no room for it, are cleared. Fields that the descriptor does not know, messages that are too long,
and codings that are not ours cannot be inspected. One message at a time is held.
"""

from __future__ import annotations

from typing import Any, Final

from google.protobuf.message import DecodeError, Message
from google.protobuf.unknown_fields import UnknownFieldSet

from waypoint.filters.redact import views
from waypoint.filters.redact.descriptors import DescriptorSets
from waypoint.filters.redact.encoded_body import CODINGS, BrokenCoding, pack, unpack
from waypoint.filters.redact.path_tree import NOTHING, PathTree, Place, Step
from waypoint.filters.redact.rules import Plan, Report
from waypoint.filters.redact.text_body import redact_value

MAX_MESSAGE: Final = 4 << 20
_TRAILERS: Final = 0x80
"""The flag of the last frame of gRPC-Web."""
_ANY: Final = "google.protobuf.Any"


class GrpcRedactor:
    """A `BodyFilter`. `message` is the class that the method's descriptor names."""

    __slots__ = (
        "_coding", "_descriptors", "_held", "_is_over", "_location", "_message", "_plan",
        "_report", "_root", "_through",
    )  # fmt: skip

    def __init__(
        self, plan: Plan, report: Report, message: Any, coding: bytes, location: str
    ) -> None:
        assert plan.descriptors is not None  # noqa: S101 - only made for such plans
        self._plan = plan
        self._report = report
        self._descriptors: DescriptorSets = plan.descriptors
        self._message = message
        self._coding = coding
        self._location = location
        self._held = b""
        self._through = 0
        """Bytes of a message that is passed on unseen."""
        tree: PathTree | None = plan.grpc_paths
        self._root = tree.root if tree is not None else None

    def feed(self, data: bytes) -> bytes:
        """Whole messages. Raises `Blocked`."""
        held = self._held + data
        out: list[bytes] = []
        place = 0
        while place < len(held):
            if self._through:
                taken = min(self._through, len(held) - place)
                out.append(held[place : place + taken])
                self._through -= taken
                place += taken
                continue
            if len(held) - place < 5:
                break
            flag, size = held[place], int.from_bytes(held[place + 1 : place + 5], "big")
            if size > MAX_MESSAGE:
                self._plan.pass_unseen(self._report, "a gRPC message that is too long")
                self._through = 5 + size
                continue
            if len(held) - place < 5 + size:
                break
            raw = held[place + 5 : place + 5 + size]
            out.append(self._frame(flag, raw))
            place += 5 + size
        self._held = held[place:]
        return b"".join(out)

    def finish(self) -> bytes:
        """Nothing, unless a message is cut short. Raises `Blocked`."""
        if not self._held and not self._through:
            return b""
        self._plan.pass_unseen(self._report, "a gRPC message is cut short")
        return self._held

    def _frame(self, flag: int, raw: bytes) -> bytes:
        new = raw
        if flag & _TRAILERS:
            new = self._text(raw, f"{self._location} trailers")
        elif flag & 1 and self._coding not in CODINGS:
            self._plan.pass_unseen(self._report, "gRPC message coding is not known")
        else:
            try:
                plain = unpack(self._coding, raw, MAX_MESSAGE) if flag & 1 else raw
                found = self._message()
                found.ParseFromString(plain)
            except (BrokenCoding, DecodeError):
                self._plan.pass_unseen(self._report, "a gRPC message cannot be decoded")
            else:
                if self._fields(found, self._root):
                    new = found.SerializeToString()
                    new = pack(self._coding, new) if flag & 1 else new
        return bytes((flag,)) + len(new).to_bytes(4, "big") + new

    def _fields(self, message: Message, place: Place | None) -> bool:
        """Redact a message; whether it has changed."""
        name = message.DESCRIPTOR.full_name
        if name == _ANY:
            return self._any(message, place)
        if len(UnknownFieldSet(message)):
            self._plan.pass_unseen(self._report, "fields that the descriptor does not know")
        changed = False
        for field, value in message.ListFields():
            step = _step(place, field)
            step = self._plan.grpc_fields.get(field.full_name, step)
            changed |= self._field(message, field, value, step)
        return changed

    def _any(self, message: Any, place: Place | None) -> bool:
        try:
            inner = self._descriptors.message(message.type_url.rpartition("/")[2])()
            inner.ParseFromString(message.value)
        except (KeyError, DecodeError):
            self._plan.pass_unseen(self._report, "google.protobuf.Any of an unknown type")
            return False
        changed = self._fields(inner, place)
        if changed:
            message.value = inner.SerializeToString()
        return changed

    def _field(self, message: Any, field: Any, value: Any, step: Step) -> bool:
        if step.rule is not None and self._plan.drops(step.rule):
            self._plan.take(self._report, step.rule, b"", f"{self._location} {step.path}")
            message.ClearField(field.name)
            return True
        if _is_map(field):
            return self._map(field.message_type.fields_by_name["value"], value, step)
        if not field.is_repeated:
            if field.message_type is not None:
                return self._fields(value, step.place)
            put = self._scalar(field, value, step)
            if put is not None:
                setattr(message, field.name, put)
            return put is not None
        changed = False
        for index, each in enumerate(value):
            inner = _element(step, index)
            if field.message_type is not None:
                changed |= self._fields(each, inner.place)
                continue
            put = self._scalar(field, each, inner)
            if put is not None:
                value[index] = put
                changed = True
        return changed

    def _map(self, field: Any, value: Any, step: Step) -> bool:
        changed = False
        for key in list(value):
            place = step.place
            inner = (place.members.get(str(key)) or place.other if place else None) or NOTHING
            inner = inner if step.rule is None else step
            if field.message_type is not None:
                changed |= self._fields(value[key], inner.place)
                continue
            put = self._scalar(field, value[key], inner)
            if put is not None:
                value[key] = put
                changed = True
        return changed

    def _scalar(self, field: Any, value: Any, step: Step) -> Any:
        """What to put in its place; None: it stays."""
        is_text = isinstance(value, str | bytes)
        if step.rule is None:
            if not is_text:
                return None
            raw = value.encode() if isinstance(value, str) else value
            new = self._text(raw, f"{self._location} {field.full_name}")
            return None if new == raw else _like(value, new)
        raw = value if isinstance(value, bytes) else str(value).encode()
        put = self._plan.take(self._report, step.rule, raw, f"{self._location} {step.path}")
        if put is None:
            return None
        return _like(value, put) if is_text else type(value)(0)

    def _text(self, raw: bytes, location: str) -> bytes:
        for scanner in self._plan.scanners:
            raw = redact_value(self._plan, self._report, scanner, views.TEXT, raw, location)
        return raw


def _like(value: str | bytes, new: bytes) -> str | bytes:
    return new.decode("utf-8", "replace") if isinstance(value, str) else new


def _is_map(field: Any) -> bool:
    return field.message_type is not None and field.message_type.GetOptions().map_entry


def _step(place: Place | None, field: Any) -> Step:
    """A field is a member by either of its names."""
    if place is None:
        return NOTHING
    return (
        place.members.get(field.name)
        or place.members.get(field.json_name)
        or place.other
        or NOTHING
    )  # fmt: skip


def _element(step: Step, index: int) -> Step:
    """An element of a repeated field; what takes the field takes each."""
    if step.rule is not None or step.place is None:
        return step
    return step.place.elements.get(index) or step.place.other_element or NOTHING
