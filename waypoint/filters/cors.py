"""The CORS filter of HTTPRoute (Gateway API), after the Fetch standard. Pure.

A preflight is answered here, allowed or not. Another request always goes on; only an allowed
origin gets the headers that let a page read the response. With credentials `*` is never
answered: what was asked for is echoed instead.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Final

from mesh.model.route import Cors
from waypoint.filters.chain import Pair, PassingFilter, Request, Respond, Response, Verdict

_SAFELISTED: Final = (b"GET", b"HEAD", b"POST")
_PORTS: Final = {"http": "80", "https": "443"}
_ORIGIN = re.compile(r"(https?)://([^/:]+|\[[0-9a-f:.]+\])(?::([0-9]{1,5}))?", re.IGNORECASE)
_OURS: Final = b"access-control-"


class CorsFilter(PassingFilter):
    """One CORS filter."""

    name = "CORS"

    def __init__(self, cors: Cors) -> None:
        self._cors = cors
        self._any_origin = "*" in cors.allow_origins
        self._origins = _origins(cors.allow_origins)
        methods = [each.encode() for each in cors.allow_methods]
        self._any_method = b"*" in methods
        self._methods = tuple(dict.fromkeys((*_SAFELISTED, *methods)))
        self._any_header = "*" in cors.allow_headers
        self._headers = ", ".join(cors.allow_headers).encode()

    def allows(self, origin: bytes) -> bool:
        """Whether pages of `origin` may read."""
        if self._any_origin:
            return True
        found = _ORIGIN.fullmatch(origin.decode("latin-1"))
        if found is None:
            return False
        scheme = found[1].lower()
        return self._origins.fullmatch(_origin(scheme, found[2], found[3])) is not None

    def on_request(self, request: Request) -> Verdict:
        """Answer a preflight."""
        origin = request.headers.get(b"origin")
        if origin is None:
            return None
        asked = request.headers.get(b"access-control-request-method")
        if request.method == b"OPTIONS" and asked is not None:
            if not self.allows(origin):
                return Respond(204, headers=((b"vary", b"origin"),))
            return Respond(204, headers=tuple(self._preflight(request, origin, asked)))
        if self.allows(origin):
            request.notes["cors.origin"] = origin
        return None

    def on_response(self, request: Request, response: Response) -> Respond | None:
        """Let an allowed origin read it; what the endpoint says of CORS does not count."""
        headers = response.headers
        headers.pairs = [pair for pair in headers.pairs if not pair[0].startswith(_OURS)]
        origin = request.notes.get("cors.origin")
        if origin is not None:
            headers.pairs += self._common(origin)
            exposed = [each for each in self._cors.expose_headers if self._may_wildcard(each)]
            if exposed:
                headers.add(b"access-control-expose-headers", ", ".join(exposed).encode())
        if not self._any_origin or self._cors.allow_credentials:
            headers.add(b"vary", b"origin")
        return None

    def _may_wildcard(self, value: str) -> bool:
        return value != "*" or not self._cors.allow_credentials

    def _common(self, origin: bytes) -> list[Pair]:
        if self._any_origin and not self._cors.allow_credentials:
            return [(b"access-control-allow-origin", b"*")]
        found = [(b"access-control-allow-origin", origin)]
        if self._cors.allow_credentials:
            found.append((b"access-control-allow-credentials", b"true"))
        return found

    def _preflight(self, request: Request, origin: bytes, asked: bytes) -> list[Pair]:
        found = self._common(origin)
        if self._any_method:
            methods = asked if self._cors.allow_credentials else b"*"
        else:
            methods = b", ".join(self._methods)
        found.append((b"access-control-allow-methods", methods))
        wanted = request.headers.get(b"access-control-request-headers")
        if not self._any_header:
            headers = self._headers
        elif self._cors.allow_credentials:
            headers = wanted or b""
        else:
            headers = b"*"
        if headers:
            found.append((b"access-control-allow-headers", headers))
        found.append((b"access-control-max-age", b"%d" % self._cors.max_age_seconds))
        found.append((b"vary", b"origin"))
        return found


def _origin(scheme: str, host: str, port: str | None) -> str:
    return f"{scheme}://{host.lower()}:{port or _PORTS[scheme]}"


def _origins(values: Iterable[str]) -> re.Pattern[str]:
    """All allowed origins as one expression; `*` in a host takes any labels."""
    parts = []
    for value in values:
        found = _ORIGIN.fullmatch(value)
        if found is None:
            continue  # the lone `*`, or one that the controller would have refused
        text = _origin(found[1].lower(), found[2], found[3])
        parts.append(re.escape(text).replace(r"\*", "[^/:]+"))
    return re.compile("|".join(parts) or r"(?!)")
