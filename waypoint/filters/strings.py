"""The strings of `security.istio.io/v1`: exact, `prefix*`, `*suffix`, `*`, and path templates.

A list of them becomes one function when the policy changes; asking costs a lookup and two calls.
Everything is bytes, because that is what requests are made of. Pure.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

from mesh.errors import ConfigError

Matches = Callable[[bytes], bool]

_TEMPLATE = re.compile(r"\{[^}]*\}|[^{}]+|[{}]")


def any_of(values: Iterable[str], *, folds_case: bool = False) -> Matches:
    """Whether a value is one of these. An empty value is none, not even for `*`."""
    exact: set[bytes] = set()
    prefixes: list[bytes] = []
    suffixes: list[bytes] = []
    for value in values:
        text = (value.lower() if folds_case else value).encode()
        if text == b"*":
            return bool
        if text.endswith(b"*"):
            prefixes.append(text[:-1])
        elif text.startswith(b"*"):
            suffixes.append(text[1:])
        else:
            exact.add(text)
    starts, ends = tuple(prefixes), tuple(suffixes)
    if not starts and not ends:
        return exact.__contains__

    def matches(value: bytes) -> bool:
        return value in exact or value.startswith(starts) or value.endswith(ends)

    return matches


def path_any_of(values: Iterable[str]) -> Matches:
    """The same for paths, whose strings may be templates. Raises ConfigError."""
    plain = [value for value in values if "{" not in value and "}" not in value]
    templates = [_template(value) for value in values if value not in plain]
    is_plain = any_of(plain)
    if not templates:
        return is_plain
    together = re.compile(b"|".join(templates), re.DOTALL)

    def matches(path: bytes) -> bool:
        return is_plain(path) or together.fullmatch(path) is not None

    return matches


def _template(text: str) -> bytes:
    """A path template as a regular expression: `{*}` is one segment, `{**}` the rest (once, as the
    last operator). Raises ConfigError.
    """
    parts: list[bytes] = []
    is_over = False
    for segment in text.split("/"):
        pieces = _TEMPLATE.findall(segment)
        if not {"{*}", "{**}"} & set(pieces):
            if any(character in segment for character in "*{}"):
                raise ConfigError(f"{text!r} is no path template", field="paths")
            parts.append(re.escape(segment).encode())
            continue
        if len(pieces) != 1 or is_over:
            raise ConfigError(f"{text!r} is no path template", field="paths")
        is_over = segment == "{**}"
        parts.append(b".*" if is_over else b"[^/]+")
    if not text.startswith("/"):
        raise ConfigError(f"the path template {text!r} does not start with /", field="paths")
    return b"(?:" + b"/".join(parts) + b")"
