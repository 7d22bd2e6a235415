"""The scalars of workload xDS: addresses, prefixes, ports, enumerations; and messages as bytes.

Addresses are 4 or 16 bytes on the wire and canonical text in the model; an IPv4 address
mapped into IPv6 is the IPv4 address. Everything out of range raises ConfigError.
"""

from __future__ import annotations

import enum
import ipaddress
from typing import Any, TypeVar

from google.protobuf.message import DecodeError, Message

from mesh.errors import ConfigError

_MAX_PORT = 65535
_MAPPED_BITS = 96

_E = TypeVar("_E", bound=enum.Enum)


def ip_text(packed: bytes) -> str:
    """The canonical text of 4 or 16 bytes. Raises ConfigError."""
    if len(packed) not in {4, 16}:
        raise ConfigError(f"an IP address has {len(packed)} bytes")
    address = ipaddress.ip_address(packed)
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
        return str(address.ipv4_mapped)
    return str(address)


def ip_bytes(text: str) -> bytes:
    """The 4 or 16 bytes of an address. Raises ConfigError."""
    try:
        return ipaddress.ip_address(text).packed
    except ValueError as exc:
        raise ConfigError(f"not an IP address: {text[:100]!r}") from exc


def network_from(packed: bytes, length: int) -> str:
    """CIDR text with the host bits cleared. Raises ConfigError."""
    address = ip_text(packed)
    if len(packed) == 16 and "." in address:
        # Mapped: a prefix that leaves the mapped range would mean something else.
        if length < _MAPPED_BITS:
            raise ConfigError(f"prefix length {length} of a mapped IPv4 address")
        length -= _MAPPED_BITS
    try:
        return str(ipaddress.ip_network(f"{address}/{length}", strict=False))
    except ValueError as exc:
        raise ConfigError(f"prefix length {length} of {address}") from exc


def network_parts(prefix: str) -> tuple[bytes, int]:
    """The address bytes and prefix length of CIDR text (or of one address).

    Raises ConfigError.
    """
    try:
        network = ipaddress.ip_network(prefix, strict=False)
    except ValueError as exc:
        raise ConfigError(f"not a network: {prefix[:100]!r}") from exc
    return network.network_address.packed, network.prefixlen


def port_number(number: int) -> int:
    """The number itself. Raises ConfigError above 65535."""
    if not 0 <= number <= _MAX_PORT:
        raise ConfigError(f"not a port: {number}")
    return number


def enum_member(kind: type[_E], number: int, default: _E | None = None) -> _E:
    """The member with that number; `default` if there is none. Raises ConfigError."""
    try:
        return kind(number)
    except ValueError:
        if default is not None:
            return default
        raise ConfigError(f"unknown {kind.__name__} {number}") from None


def enum_number(member: enum.Enum) -> Any:
    """The wire number; untyped, as each generated field wants its own enumeration."""
    return member.value


def parse(message: Message, data: bytes) -> None:
    """Fill a message. Raises ConfigError."""
    try:
        message.ParseFromString(data)
    except (DecodeError, ValueError) as exc:  # ValueError: text that is not UTF-8
        raise ConfigError(f"undecodable {message.DESCRIPTOR.name}") from exc
