"""Reading untyped JSON field by field, so that every complaint names its field.

A `Reader` is a value and the path that led to it: `spec.rules[1].to[0].operation.ports[0]`.
Absent and null are the same, as in Kubernetes. Nothing is coerced: a number where text is
due is an error, not a text of digits.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NoReturn

from mesh.errors import ConfigError

_PLAIN = re.compile(r"[A-Za-z_$][A-Za-z0-9_$-]*")
_STEP = re.compile(r'\.?([A-Za-z_$][A-Za-z0-9_$-]*)|\[([0-9]{1,9})\]|\["((?:[^"\\]|\\.)*)"\]')
_LISTED = 12


def format_path(path: Sequence[str | int]) -> str:
    """`("metadata", "labels", "a/b", 0)` -> `metadata.labels["a/b"][0]`."""
    text = ""
    for step in path:
        if isinstance(step, int):
            text += f"[{step}]"
        elif _PLAIN.fullmatch(step):
            text += f".{step}" if text else step
        else:
            quoted = step.replace("\\", "\\\\").replace('"', '\\"')
            text += f'["{quoted}"]'
    return text


def split_path(text: str) -> tuple[str | int, ...]:
    """The opposite of `format_path`; what cannot be read ends the path."""
    steps: list[str | int] = []
    position = 0
    while position < len(text):
        found = _STEP.match(text, position)
        if found is None:
            break
        plain, number, quoted = found.groups()
        if number is not None:
            steps.append(int(number))
        else:
            steps.append(plain if plain is not None else re.sub(r"\\(.)", r"\1", quoted))
        position = found.end()
    return tuple(steps)


def shown(value: object) -> str:
    """A value as a message may show it: JSON-like, short."""
    if isinstance(value, str):
        return f'"{value[:80]}"'
    if isinstance(value, Mapping):
        return "a mapping"
    if isinstance(value, list):
        return "a list"
    if isinstance(value, bool):
        return "true" if value else "false"
    return str(value)[:80]


class Reader:
    """One value at one path. Raises ConfigError, with the path as its field."""

    __slots__ = ("path", "value")

    def __init__(self, value: Any, path: tuple[str | int, ...] = ()) -> None:
        self.value = value
        self.path = path

    def fail(self, message: str, *, hint: str = "") -> NoReturn:
        """Complain about this field."""
        raise ConfigError(message, field=format_path(self.path), hint=hint)

    @property
    def exists(self) -> bool:
        """Whether the field is there and not null."""
        return self.value is not None

    def get(self, key: str) -> Reader:
        """A field of this mapping; of an absent mapping, an absent field."""
        path = (*self.path, key)
        if self.value is None:
            return Reader(None, path)
        if not isinstance(self.value, dict):
            self.fail(f"expected a mapping, not {shown(self.value)}")
        return Reader(self.value.get(key), path)

    def at(self, *keys: str) -> Reader:
        """A field further down."""
        reader = self
        for key in keys:
            reader = reader.get(key)
        return reader

    def items(self) -> Iterator[Reader]:
        """The elements of this list."""
        if self.value is None:
            return
        if not isinstance(self.value, list):
            self.fail(f"expected a list, not {shown(self.value)}")
        for index, each in enumerate(self.value):
            yield Reader(each, (*self.path, index))

    def entries(self) -> Iterator[tuple[str, Reader]]:
        """The entries of this mapping."""
        if self.value is None:
            return
        if not isinstance(self.value, dict):
            self.fail(f"expected a mapping, not {shown(self.value)}")
        for key, each in self.value.items():
            yield key, Reader(each, (*self.path, key))

    def text(self, default: str = "") -> str:
        """This text."""
        if self.value is None:
            return default
        if not isinstance(self.value, str):
            self.fail(f"expected text, not {shown(self.value)}", hint="put it in quotes")
        return self.value

    def name(self) -> str:
        """This text, which must be there."""
        found = self.text()
        if not found:
            self.fail("missing" if self.value is None else "empty")
        return found

    def boolean(self, *, default: bool = False) -> bool:
        """This truth value."""
        if self.value is None:
            return default
        if not isinstance(self.value, bool):
            self.fail(f"expected true or false, not {shown(self.value)}")
        return self.value

    def integer(self, default: int = 0) -> int:
        """This whole number."""
        if self.value is None:
            return default
        if not isinstance(self.value, int) or isinstance(self.value, bool):
            self.fail(f"expected a whole number, not {shown(self.value)}")
        return self.value

    def port(self) -> int:
        """This port number, 1 to 65535, as a number."""
        number = self.value
        if not isinstance(number, int) or isinstance(number, bool) or not 0 < number < 65536:
            self.fail(f"not a port: {shown(number)}", hint="a number from 1 to 65535")
        return number

    def choice(self, known: Iterable[str], default: str = "") -> str:
        """This text, one of `known`."""
        found = self.text() or default
        names = tuple(known)
        if found != default and found not in names:
            self.fail(f"unknown value {shown(found)}", hint=f"one of: {', '.join(names)}")
        return found

    def address(self) -> str:
        """This IP address, in canonical form; an IPv4-mapped one as IPv4."""
        try:
            address = ipaddress.ip_address(self.name())
        except ValueError:
            self.fail(f"not an IP address: {shown(self.value)}")
        mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
        return str(mapped or address)

    def texts(self) -> tuple[str, ...]:
        """This list of texts, none of them empty."""
        return tuple(each.name() for each in self.items())

    def labels(self) -> Mapping[str, str]:
        """This mapping of text to text."""
        if self.value is None:
            return {}
        if not isinstance(self.value, dict):
            self.fail(f"expected a mapping, not {shown(self.value)}")
        if all(type(each) is str for each in self.value.values()):
            return dict(self.value)
        # Kubernetes takes a null label as an empty one; anything else is refused.
        return {key: each.text() for key, each in self.entries()}

    def only(self, *known: str) -> Reader:
        """Refuse fields that this mapping does not know: a misspelt policy must not load."""
        for key, each in self.entries():
            if key not in known:
                listed = ", ".join(known[:_LISTED]) + (", …" if len(known) > _LISTED else "")
                each.fail("unknown field", hint=f"known here: {listed}")
        return self
