"""ZDS messages and their bytes, by `mesh/proto/zds.proto`. Pure, but for `Add.close`.

Whatever comes from the other end is bounded: a packet by its size, a name by its length, an
Add and its answer by the number of their descriptors.

Listeners are our addition (fields from 1000 on): a proxy announces in its hello that it takes
them; only then does Add say that the agent keeps them, and carry those it has; only then does
the Ack carry the pod's own. Between ends of which one does not know this, every byte and every
descriptor is as the protocol has always had it.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import TypeAlias

from google.protobuf.message import DecodeError

from mesh.errors import LocalProtocolError, RemoteProtocolError
from mesh.proto import zds_pb2

PACKET_BYTES = 1024
_ERROR_BYTES = 900
_MAX_UID = 128
_MAX_NAME = 253
MAX_LISTENERS = 16


class Listener(IntEnum):
    """What a listening socket in a pod is for. The agent keeps kinds it does not know, too."""

    OUTBOUND = zds_pb2.OUTBOUND
    INBOUND_PLAINTEXT = zds_pb2.INBOUND_PLAINTEXT
    INBOUND_HBONE = zds_pb2.INBOUND_HBONE
    DNS_UDP = zds_pb2.DNS_UDP
    DNS_TCP = zds_pb2.DNS_TCP
    DNS_UDP_V6 = zds_pb2.DNS_UDP_V6
    DNS_TCP_V6 = zds_pb2.DNS_TCP_V6


@dataclass(frozen=True, slots=True)
class Add:
    """Carry this pod's traffic; `fds[0]` is its network namespace.

    `listeners` says what the descriptors after the first are, by `Listener`; None from an
    agent that keeps no listeners, or to a proxy that takes none.
    """

    uid: str
    name: str
    namespace: str
    service_account: str
    fds: tuple[int, ...] = ()
    listeners: tuple[int, ...] | None = None

    @property
    def keeps_listeners(self) -> bool:
        """Whether the agent wants the pod's listeners with the answer, to keep them."""
        return self.listeners is not None

    def listener_fds(self) -> dict[int, int]:
        """The listening sockets that came with it, by kind."""
        return dict(zip(self.listeners or (), self.fds[1:], strict=True))

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


@dataclass(frozen=True, slots=True)
class Answer:
    """What the proxy says to a message: consent without an `error`; and a pod's listening
    sockets by kind, owned by whoever holds the answer.
    """

    error: str = ""
    listeners: Mapping[int, int] = field(default_factory=dict)


def encode_hello(*, takes_listeners: bool = False) -> bytes:
    """The proxy's first packet."""
    hello = zds_pb2.ZdsHello(version=zds_pb2.V1, takes_listeners=takes_listeners)
    return bytes(hello.SerializeToString())


def decode_hello(data: bytes) -> bool:
    """Check the proxy's first packet: whether it takes listeners. Raises RemoteProtocolError."""
    hello = zds_pb2.ZdsHello()
    _parse(hello, data, "hello")
    if hello.version != zds_pb2.V1:
        raise RemoteProtocolError(f"ZDS version {hello.version} is not spoken here, only 1")
    return bool(hello.takes_listeners)


def encode_request(message: Message) -> bytes:
    """One message of the agent, without its descriptors. Raises LocalProtocolError."""
    request = zds_pb2.WorkloadRequest()
    match message:
        case Add():
            request.add.uid = message.uid
            info = request.add.workload_info
            info.name, info.namespace = message.name, message.namespace
            info.service_account = message.service_account
            if message.listeners is not None:
                request.add.listeners.SetInParent()
                request.add.listeners.kinds.extend(message.listeners)
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
        listeners: tuple[int, ...] | None = None
        if add.HasField("listeners"):
            listeners = _kinds(add.listeners)
        wanted = 1 + len(listeners or ())
        if len(fds) != wanted:
            instead = "one" if wanted == 1 else str(wanted)
            raise RemoteProtocolError(
                f"ZDS add carries {len(fds)} descriptors instead of {instead}"
            )
        return Add(
            _uid(add.uid),
            _name(info.name, "name"),
            _name(info.namespace, "namespace"),
            _name(info.service_account, "service_account"),
            tuple(fds),
            listeners,
        )
    if kind == "keep":
        return Keep(_uid(request.keep.uid))
    if kind == "del":
        return Del(_uid(getattr(request, "del").uid))
    if kind == "snapshot_sent":
        return SnapshotSent()
    raise RemoteProtocolError("ZDS message of an unknown kind")


def encode_ack(error: str = "", listeners: Sequence[int] = ()) -> bytes:
    """The proxy's answer; an empty error is consent. Long errors are cut to fit a packet.

    `listeners` are the kinds of the descriptors that go with it.
    """
    response = zds_pb2.WorkloadResponse()
    response.ack.SetInParent()
    response.ack.error = error.encode("utf-8", "replace")[:_ERROR_BYTES].decode("utf-8", "ignore")
    if listeners:
        response.ack.listeners.kinds.extend(listeners)
    return bytes(response.SerializeToString())


def decode_ack(data: bytes, fds: Sequence[int] = ()) -> Answer:
    """The proxy's answer. Raises RemoteProtocolError; `fds` then stay the caller's."""
    response = zds_pb2.WorkloadResponse()
    _parse(response, data, "response")
    if response.WhichOneof("payload") != "ack":
        raise RemoteProtocolError("ZDS response is no ack")
    kinds = _kinds(response.ack.listeners)
    if len(kinds) != len(fds):
        raise RemoteProtocolError(f"ZDS ack carries {len(fds)} descriptors, and names {len(kinds)}")
    return Answer(str(response.ack.error), dict(zip(kinds, fds, strict=True)))


def _kinds(listeners: zds_pb2.Listeners) -> tuple[int, ...]:
    kinds = tuple(int(each) for each in listeners.kinds)
    if len(kinds) > MAX_LISTENERS or len(set(kinds)) != len(kinds):
        raise RemoteProtocolError(f"ZDS message names {len(kinds)} listeners, or one twice")
    return kinds


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
