"""What a head of HTTP/1.1 says, as `mesh.http.h1` reads it.

Constructors are written out: those that dataclasses make are not compiled, and one of these is made
for each message.
"""

from __future__ import annotations

from dataclasses import dataclass

Pair = tuple[bytes, bytes]


@dataclass(slots=True, init=False)
class RequestHead:
    """A request head. Names are lower case; hop-by-hop fields are gone from `pairs`, `host` too.

    `length` is the body's, None when it is chunked. `upgrade` is the protocol asked for.
    """

    method: bytes
    path: bytes
    query: bytes | None
    authority: bytes
    scheme: bytes
    pairs: list[Pair]
    length: int | None
    keeps_alive: bool
    is_http10: bool
    upgrade: bytes
    expects_continue: bool
    takes_trailers: bool
    lines: list[bytes]
    """`pairs` as they are sent on, one line each."""

    def __init__(
        self,
        method: bytes,
        path: bytes,
        query: bytes | None,
        authority: bytes,
        scheme: bytes,
        pairs: list[Pair],
        length: int | None,
        keeps_alive: bool,
        is_http10: bool,
        upgrade: bytes,
        expects_continue: bool,
        takes_trailers: bool,
        lines: list[bytes],
    ) -> None:
        self.method = method
        self.path = path
        self.query = query
        self.authority = authority
        self.scheme = scheme
        self.pairs = pairs
        self.length = length
        self.keeps_alive = keeps_alive
        self.is_http10 = is_http10
        self.upgrade = upgrade
        self.expects_continue = expects_continue
        self.takes_trailers = takes_trailers
        self.lines = lines

    @property
    def has_body(self) -> bool:
        """Whether anything follows the head."""
        return self.length != 0


@dataclass(slots=True, init=False)
class ResponseHead:
    """A response head, as `RequestHead`. `length` -1: until the connection ends."""

    status: int
    pairs: list[Pair]
    length: int | None
    keeps_alive: bool
    upgrade: bytes
    lines: list[bytes]

    def __init__(
        self,
        status: int,
        pairs: list[Pair],
        length: int | None,
        keeps_alive: bool,
        upgrade: bytes,
        lines: list[bytes] | None = None,
    ) -> None:
        self.status = status
        self.pairs = pairs
        self.length = length
        self.keeps_alive = keeps_alive
        self.upgrade = upgrade
        self.lines = lines if lines is not None else []
