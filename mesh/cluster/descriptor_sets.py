"""Descriptor sets in policies: whether they are some, and know the fields that rules name. Pure.

The waypoint decodes messages by them (`waypoint.filters.redact.descriptors`); here is only what can
be said of a policy as it is written.
"""

from __future__ import annotations

import base64

from google.protobuf import descriptor_pb2
from google.protobuf.message import DecodeError

from mesh.cluster.fields import Reader, shown

MAX_DESCRIPTORS = 1 << 20


def check_descriptors(spec: Reader) -> None:
    """`descriptors`, `descriptorFile` and `grpcFields` fit together. Raises ConfigError."""
    text = spec.get("descriptors").text()
    file = spec.get("descriptorFile")
    if text and file.text():
        file.fail("beside descriptors: they come from one place")
    names: frozenset[str] = frozenset()
    if text:
        if len(text) > MAX_DESCRIPTORS:
            spec.get("descriptors").fail(f"more than {MAX_DESCRIPTORS} characters")
        try:
            names = field_names(base64.b64decode("".join(text.split()), validate=True))
        except ValueError as error:
            spec.get("descriptors").fail(f"not a FileDescriptorSet in base64: {error}")
    for rule in spec.get("rules").items():
        for each in rule.get("grpcFields").items():
            if not text and not file.text():
                rule.get("grpcFields").fail("needs descriptors or descriptorFile of the policy")
            if text and not each.text().startswith("$") and each.text() not in names:
                each.fail(f"no field of that name in descriptors: {shown(each.value)}")


def field_names(raw: bytes) -> frozenset[str]:
    """Full names of all fields in a FileDescriptorSet. Raises ValueError."""
    found = descriptor_pb2.FileDescriptorSet()
    try:
        found.ParseFromString(raw)
    except DecodeError as error:
        raise ValueError(str(error)) from error
    if not found.file:
        raise ValueError("it has no files")
    names: set[str] = set()
    waiting = [(file.package, message) for file in found.file for message in file.message_type]
    while waiting:
        scope, message = waiting.pop()
        name = f"{scope}.{message.name}" if scope else message.name
        names |= {f"{name}.{field.name}" for field in message.field}
        waiting += [(name, inner) for inner in message.nested_type]
    return frozenset(names)
