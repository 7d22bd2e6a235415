"""ZDS messages and their bytes, by `mesh/proto/zds.proto`. Pure, but for `Add.close`.

Whatever comes from the other end is bounded: a packet by its size, a name by its length, an
Add by its one descriptor.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

from google.protobuf.message import DecodeError

from mesh.errors import LocalProtocolError, RemoteProtocolError
from mesh.proto import zds_pb2

PACKET_BYTES = 1024
_ERROR_BYTES = 900
_MAX_UID = 128
_MAX_NAME = 253


@dataclass(frozen=True, slots=True)
class Add:
    """Carry this pod's traffic; `fds[0]` is its network namespace."""

    uid: str
    name: str
    namespace: str
    service_account: str
    fds: tuple[int, ...] = ()

    def close(self) -> None:
        """Close the descriptors, for an owner that has no use for them."""
        close_all(self.fds)


@dataclass(frozen=True, slots=True)
class Keep:
    """Snapshot only: this pod still exists, keep what you have of it."""

    uid: str


@dataclass(frozen=True, slots=True)
class Del:
    """This pod is no longer to be carried."""

    uid: str


@dataclass(frozen=True, slots=True)
class SnapshotSent:
    """Every pod has been named; whatever was not is gone."""


Message: TypeAlias = Add | Keep | Del | SnapshotSent


def encode_hello() -> bytes:
    """The proxy's first packet."""
    return bytes(zds_pb2.ZdsHello(version=zds_pb2.V1).SerializeToString())


def decode_hello(data: bytes) -> None:
    """Check the proxy's first packet. Raises RemoteProtocolError."""
    hello = zds_pb2.ZdsHello()
    _parse(hello, data, "hello")
    if hello.version != zds_pb2.V1:
        raise RemoteProtocolError(f"ZDS version {hello.version} is not spoken here, only 1")


def encode_request(message: Message) -> bytes:
    """One message of the agent, without its descriptors. Raises LocalProtocolError."""
    request = zds_pb2.WorkloadRequest()
    match message:
        case Add():
            request.add.uid = message.uid
            info = request.add.workload_info
            info.name, info.namespace = message.name, message.namespace
            info.service_account = message.service_account
        case Keep():
            request.keep.uid = message.uid
        case Del():
            # `del` is a word of Python, so the field cannot be an attribute.
            getattr(request, "del").uid = message.uid
        case SnapshotSent():
            request.snapshot_sent.SetInParent()
    data = bytes(request.SerializeToString())
    if len(data) > PACKET_BYTES:
        raise LocalProtocolError(f"ZDS message of {len(data)} bytes, at most {PACKET_BYTES} fit")
    return data


def decode_request(data: bytes, fds: Sequence[int] = ()) -> Message:
    """What the agent says. Raises RemoteProtocolError; `fds` then stay the caller's."""
    request = zds_pb2.WorkloadRequest()
    _parse(request, data, "request")
    kind = request.WhichOneof("payload")
    if kind != "add" and fds:
        raise RemoteProtocolError(f"{len(fds)} descriptors with a ZDS {kind or 'empty'} message")
    if kind == "add":
        add = request.add
        if not add.HasField("workload_info"):
            raise RemoteProtocolError("ZDS add has no workload_info")
        info = add.workload_info
        if len(fds) != 1:
            raise RemoteProtocolError(f"ZDS add carries {len(fds)} descriptors instead of one")
        return Add(
            _uid(add.uid),
            _name(info.name, "name"),
            _name(info.namespace, "namespace"),
            _name(info.service_account, "service_account"),
            tuple(fds),
        )
    if kind == "keep":
        return Keep(_uid(request.keep.uid))
    if kind == "del":
        return Del(_uid(getattr(request, "del").uid))
    if kind == "snapshot_sent":
        return SnapshotSent()
    raise RemoteProtocolError("ZDS message of an unknown kind")


def encode_ack(error: str = "") -> bytes:
    """The proxy's answer; an empty error is consent. Long errors are cut to fit a packet."""
    response = zds_pb2.WorkloadResponse()
    response.ack.SetInParent()
    response.ack.error = error.encode("utf-8", "replace")[:_ERROR_BYTES].decode("utf-8", "ignore")
    return bytes(response.SerializeToString())


def decode_ack(data: bytes) -> str:
    """The error in the proxy's answer, empty for consent. Raises RemoteProtocolError."""
    response = zds_pb2.WorkloadResponse()
    _parse(response, data, "response")
    if response.WhichOneof("payload") != "ack":
        raise RemoteProtocolError("ZDS response is no ack")
    return str(response.ack.error)


def _parse(
    into: zds_pb2.ZdsHello | zds_pb2.WorkloadRequest | zds_pb2.WorkloadResponse,
    data: bytes,
    what: str,
) -> None:
    try:
        into.ParseFromString(data)
    except DecodeError as exc:
        raise RemoteProtocolError(f"ZDS {what} is not readable: {exc}") from exc


def _uid(uid: str) -> str:
    if not 0 < len(uid) <= _MAX_UID:
        raise RemoteProtocolError(f"ZDS message with a uid of {len(uid)} characters")
    return uid


def _name(text: str, what: str) -> str:
    if not 0 < len(text) <= _MAX_NAME:
        raise RemoteProtocolError(f"ZDS add with a {what} of {len(text)} characters")
    return text


def close_all(fds: Sequence[int]) -> None:
    """Close descriptors; one that is closed already is passed over."""
    for fd in fds:
        with contextlib.suppress(OSError):
            os.close(fd)
