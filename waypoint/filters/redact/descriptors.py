"""Descriptor sets of gRPC services: which message a method takes and gives.

A set is what `protoc --include_imports --descriptor_set_out` writes. Fields are named in full
(`shop.v1.User.email`, wherever such a message occurs) or by a path from the method's message
(`$.user.email`, `$..email`, in the grammar of JSON paths, names as in the .proto or in JSON).
"""

from __future__ import annotations

import base64
import binascii
import contextlib
from collections.abc import Sequence
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import DecodeError

from mesh.errors import ConfigError

MAX_SET_BYTES = 4 << 20


class Descriptors:
    """The messages of some services. Lookups are kept."""

    __slots__ = ("_known", "_methods", "_pool")

    def __init__(self, data: bytes) -> None:
        """`data` is a serialized FileDescriptorSet. Raises ConfigError."""
        if len(data) > MAX_SET_BYTES:
            raise ConfigError(f"descriptors of {len(data)} bytes, allowed are {MAX_SET_BYTES}")
        found = descriptor_pb2.FileDescriptorSet()
        try:
            found.ParseFromString(data)
        except DecodeError as exc:
            raise ConfigError("descriptors are no FileDescriptorSet", hint=_HINT) from exc
        if not found.file:
            raise ConfigError("descriptors are empty", hint=_HINT)
        self._pool = descriptor_pool.DescriptorPool()
        self._methods: dict[bytes, tuple[Any, Any]] = {}
        self._known: dict[str, Any] = {}
        try:
            for file in _in_order(found):
                self._pool.Add(file)
            for file in found.file:
                for service in file.service:
                    self._add(".".join(filter(None, (file.package, service.name))), service)
        except (KeyError, TypeError, ValueError) as exc:
            raise ConfigError("descriptors cannot be put together", hint=_HINT) from exc

    def _add(self, name: str, service: descriptor_pb2.ServiceDescriptorProto) -> None:
        for method in service.method:
            self._methods[f"/{name}/{method.name}".encode()] = (
                self.message(method.input_type.lstrip(".")),
                self.message(method.output_type.lstrip(".")),
            )

    def of_method(self, path: bytes) -> tuple[Any, Any] | None:
        """Classes of what a method (`/package.Service/Method`) takes and gives; None: unknown."""
        return self._methods.get(path)

    def message(self, name: str) -> Any:
        """The class of a message. Raises KeyError."""
        if name not in self._known:
            found = self._pool.FindMessageTypeByName(name)
            self._known[name] = message_factory.GetMessageClass(found)
        return self._known[name]

    def has_field(self, name: str) -> bool:
        """Whether there is a field of that full name."""
        message, _, field = name.rpartition(".")
        try:
            return field in self._pool.FindMessageTypeByName(message).fields_by_name
        except KeyError:
            return False


class DescriptorSets:
    """The sets of several policies, asked in their order: who knows a name decides."""

    __slots__ = ("_sets",)

    def __init__(self, sets: Sequence[Descriptors]) -> None:
        self._sets = tuple(sets)

    def of_method(self, path: bytes) -> tuple[Any, Any] | None:
        """See `Descriptors.of_method`."""
        return next((m for each in self._sets if (m := each.of_method(path)) is not None), None)

    def message(self, name: str) -> Any:
        """See `Descriptors.message`."""
        for each in self._sets:
            with contextlib.suppress(KeyError):
                return each.message(name)
        raise KeyError(name)

    def has_field(self, name: str) -> bool:
        """See `Descriptors.has_field`."""
        return any(each.has_field(name) for each in self._sets)


def decode(text: str) -> bytes:
    """Base64 of a set, as a policy carries it. Raises ConfigError."""
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except binascii.Error as exc:
        raise ConfigError("descriptors are not base64", hint=_HINT) from exc


def _in_order(files: descriptor_pb2.FileDescriptorSet) -> list[Any]:
    """Each file after those it imports."""
    by_name = {file.name: file for file in files.file}
    done: dict[str, Any] = {}
    waiting = list(by_name)
    while waiting:
        left = [
            name
            for name in waiting
            if any(each in by_name and each not in done for each in by_name[name].dependency)
        ]
        if len(left) == len(waiting):
            raise ConfigError("descriptors import each other in a circle")
        done |= {name: by_name[name] for name in waiting if name not in left}
        waiting = left
    return list(done.values())


_HINT = "protoc --include_imports --descriptor_set_out=/dev/stdout x.proto | base64 -w0"
