"""The ways in which an endpoint may read what policy judges. Pure.

HTTP leaves more than one reading of a path, a host or a field that is sent twice, and what stands
behind us takes whichever it likes: a servlet container drops `;x` from `/admin;x`, another server
decodes `%2f` or merges slashes, CGI joins fields by commas. Whatever closes a door has to match any
reading; whatever opens one has to match the request as it is sent on.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from urllib.parse import unquote_to_bytes

from waypoint.paths import MOST_DECODINGS, decode_lax

_PLAIN = re.compile(rb"(?:(?!//)[^%;\\])*")
_PARAMETERS = re.compile(rb";[^/]*")
_SLASHES = re.compile(rb"//+")


def path_readings(path: bytes) -> Sequence[bytes]:
    """`path` first; nearly always that is all."""
    if _PLAIN.fullmatch(path):
        return (path,)
    found = {path: None}
    bare = _PARAMETERS.sub(b"", path)
    for each in (bare, *_decodings(path), *_decodings(bare)):
        found[each] = None
        found[_SLASHES.sub(b"/", _PARAMETERS.sub(b"", each.replace(b"\\", b"/"))) or b"/"] = None
    found[_SLASHES.sub(b"/", path)] = None
    return tuple(found)


def _decodings(path: bytes) -> Sequence[bytes]:
    """Decoded once, and again as by every proxy on the way that decodes for the next."""
    found = []
    for _ in range(MOST_DECODINGS):
        decoded = decode_lax(path)
        if decoded == path:
            break
        found += [decoded, unquote_to_bytes(path)]
        path = decoded
    return found


def host_readings(authority: bytes) -> Sequence[bytes]:
    """An authority in lower case: with its port, without it, without dots at its end."""
    authority = authority.lower()
    bare = authority if authority.endswith(b"]") else authority.rpartition(b":")[0] or authority
    return authority, bare, bare.rstrip(b".")


def field_readings(values: Sequence[bytes]) -> Sequence[bytes]:
    """The values of one field: all of them joined, each alone, each member of a list."""
    if not values or (len(values) == 1 and b"," not in values[0]):
        return values
    members = [part.strip(b" \t") for value in values for part in value.split(b",")]
    return b",".join(values), *values, *members
