"""Session persistence (GEP-1619): requests of one session meet one endpoint, by a cookie or a
header that the first response gives. Pure.

What the client keeps names the backend and the endpoint by hashes, salted with the rule, so that
it tells nothing of pods, sessions of different rules are never mixed, and every replica of the
waypoint can read it. It is an address and no secret: whoever makes one up reaches an endpoint that
the rule may reach anyway. A session whose endpoint is gone is replaced by a new one.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
from typing import Final

from mesh.model.route import SessionPersistence
from waypoint.filters.chain import Pair, Request

AFFINITY: Final = "affinity"
"""The note of a request that holds the field which its response gets."""
_BACKEND, _ENDPOINT, _TIME = 6, 12, 6
_MAX_VALUE: Final = 64


def cookie(request: Request, name: bytes) -> bytes | None:
    """The first cookie of that name (RFC 6265 section 5.4), without quotes; None without one."""
    for field, value in request.headers.pairs:
        if field != b"cookie":
            continue
        for part in value.split(b";"):
            key, found, content = part.partition(b"=")
            if found and key.strip() == name:
                return content.strip().strip(b'"')
    return None


def set_cookie(name: bytes, value: bytes, path: str, seconds: float | None) -> Pair:
    """A Set-Cookie field; without seconds, or with 0, it ends with the client's session."""
    text = name + b"=" + value + b"; Path=" + path.encode("latin-1", "replace") + b"; HttpOnly"
    return (b"set-cookie", text + (b"; Max-Age=%d" % int(seconds) if seconds else b""))


class Session:
    """The sessions of one rule, or of one service; `scope` is which."""

    __slots__ = ("_is_header", "_kept", "_name", "_salt", "settings")

    def __init__(self, settings: SessionPersistence, scope: str) -> None:
        self.settings = settings
        self._salt = hashlib.blake2b(scope.encode(), digest_size=16).digest()
        self._is_header = settings.kind == "Header"
        plain = settings.name or f"ambit-session-{self._salt[:4].hex()}"
        self._name = (plain.lower() if self._is_header else plain).encode("latin-1", "replace")
        self._kept = None if settings.is_permanent else settings.absolute_seconds

    @property
    def name(self) -> str:
        """Of the cookie or header."""
        return self._name.decode("latin-1")

    def backend_token(self, service: str, port: int) -> bytes:
        """Stands for a backend."""
        text = f"{service}|{port}".encode()
        return hashlib.blake2b(text, digest_size=_BACKEND, key=self._salt).digest()

    def endpoint_token(self, uid: str, port: int) -> bytes:
        """Stands for an endpoint."""
        text = f"{uid}|{port}".encode()
        return hashlib.blake2b(text, digest_size=_ENDPOINT, key=self._salt).digest()

    def read(self, request: Request, now: float | None = None) -> tuple[bytes, bytes] | None:
        """The tokens of backend and endpoint that a request brings; None: no session that lives.
        `now` is seconds since the epoch; without it, its age is not looked at.
        """
        name = self._name
        value = request.headers.get(name) if self._is_header else cookie(request, name)
        if value is None or len(value) > _MAX_VALUE:
            return None
        try:
            raw = base64.b64decode(value, altchars=b"-_", validate=True)
        except binascii.Error:
            return None
        if len(raw) != _BACKEND + _ENDPOINT + _TIME:
            return None
        begun = int.from_bytes(raw[-_TIME:], "big")
        if (
            now is not None
            and self._kept is not None
            and not begun <= now + 1 <= begun + self._kept + 1
        ):
            return None
        return raw[:_BACKEND], raw[_BACKEND:-_TIME]

    def begin(self, backend: bytes, endpoint: bytes, now: float) -> Pair:
        """The response's field that begins a session."""
        raw = backend + endpoint + int(now).to_bytes(_TIME, "big")
        value = base64.urlsafe_b64encode(raw)
        if self._is_header:
            return (self._name, value)
        settings = self.settings
        seconds = settings.absolute_seconds if settings.is_permanent else None
        return set_cookie(self._name, value, settings.path, seconds)
