"""The filter interface: what a filter sees of a request and what it may say.

Filters decide on heads and transform bodies; they do no I/O of their own. One that must ask
somebody (a key server, Redis, an external authorizer) returns a `Wait`, and only then does the
request cost a task. Most requests cost none. A filter that does not name a body is never shown
one: its bytes pass untouched.

Header names are lower case, values as received; both are bytes, checked by the codec. One
instance of a filter serves all requests that its configuration concerns, so what it notes for
one request goes into `Request.notes`.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

from mypy_extensions import mypyc_attr

from mesh.identity import SpiffeId

Pair = tuple[bytes, bytes]

FRAMING = frozenset(
    {b"content-length", b"transfer-encoding", b"connection", b"keep-alive", b"proxy-connection",
     b"te", b"upgrade", b"host"}
)  # fmt: skip
"""Names that configuration never sets: they say where a message ends, or who is asked for it."""


LOGGED: Final = "log.fields"
OWN_ID: Final = "request id"
"""The note under which filters leave fields for the access log: a dict of text by name. Nothing
that a caller says is written there.
"""


class Headers:
    """Header fields in order. `pairs` may be read; change through the methods."""

    __slots__ = ("_lines", "_read", "pairs")

    def __init__(self, pairs: list[Pair] | None = None, lines: list[bytes] | None = None) -> None:
        self.pairs: list[Pair] = pairs if pairs is not None else []
        # How the first of them are sent over HTTP/1.1, as long as they stay as they were read.
        self._lines = lines
        self._read = self.pairs.copy() if lines else None

    def encode(self) -> bytes:
        """The lines of HTTP/1.1. What was not changed since it was read is not made again."""
        pairs, read, lines = self.pairs, self._read, self._lines
        if read is not None and lines is not None:
            count = len(read)
            if len(pairs) == count:
                if pairs == read:
                    return b"".join(lines)
            elif pairs[:count] == read:
                return b"".join([*lines, *[b"%b: %b\r\n" % pair for pair in pairs[count:]]])
        return b"".join([b"%b: %b\r\n" % pair for pair in pairs])

    def has(self, name: bytes) -> bool:
        """Whether there is a field of that name."""
        for key, _ in self.pairs:  # noqa: SIM110 - a generator would cost as much as the search
            if key == name:
                return True
        return False

    def get(self, name: bytes) -> bytes | None:
        """The values of `name` joined by a comma (RFC 9110 section 5.3); None if there is none."""
        found = [value for key, value in self.pairs if key == name]
        if not found:
            return None
        return found[0] if len(found) == 1 else b",".join(found)

    def get_all(self, name: bytes) -> list[bytes]:
        """Each value of `name`, in order."""
        return [value for key, value in self.pairs if key == name]

    def set(self, name: bytes, value: bytes) -> None:
        """Replace every field of that name by one."""
        self.remove(name)
        self.pairs.append((name, value))

    def add(self, name: bytes, value: bytes) -> None:
        """One more field."""
        self.pairs.append((name, value))

    def remove(self, name: bytes) -> None:
        """No field of that name any more."""
        if self.has(name):
            self.pairs = [pair for pair in self.pairs if pair[0] != name]

    def remove_all(self, names: frozenset[bytes]) -> None:
        """No field of any of those names any more."""
        kept = [pair for pair in self.pairs if pair[0] not in names]
        if len(kept) < len(self.pairs):
            self.pairs = kept


@dataclass(slots=True, init=False)
class Request:
    """A request as filters see it, changeable until it is sent on. `path` has no query; `query` has
    no question mark. `source` is who the tunnel's certificate says, None outside the mesh.
    """

    method: bytes
    scheme: bytes
    authority: bytes
    path: bytes
    query: bytes
    upgrade: bytes
    """The protocols that it asks to switch to, empty for none."""
    headers: Headers
    source: SpiffeId | None
    source_ip: str
    remote_ip: str
    destination_ip: str
    destination_port: int
    service: str
    """`namespace/hostname` of the Service called."""
    route: str
    """`namespace/name` of the route, empty without one."""
    rule: str
    """The rule's name, or its index."""
    is_grpc: bool
    claims: dict[str, Any] | None
    """Of the token that was accepted; None without one."""
    principal: str
    """`iss/sub` of that token."""
    now: float
    """Monotonic seconds at which the head was complete."""
    notes: dict[str, Any]

    # Written out: one that dataclasses make is not compiled, and this is made for each request.
    def __init__(
        self,
        *,
        method: bytes,
        scheme: bytes,
        authority: bytes,
        path: bytes,
        query: bytes = b"",
        upgrade: bytes = b"",
        headers: Headers | None = None,
        source: SpiffeId | None = None,
        source_ip: str = "",
        remote_ip: str = "",
        destination_ip: str = "",
        destination_port: int = 0,
        service: str = "",
        route: str = "",
        rule: str = "",
        is_grpc: bool = False,
        claims: dict[str, Any] | None = None,
        principal: str = "",
        now: float = 0.0,
        notes: dict[str, Any] | None = None,
    ) -> None:
        self.method = method
        self.scheme = scheme
        self.authority = authority
        self.path = path
        self.query = query
        self.upgrade = upgrade
        self.headers = headers if headers is not None else Headers()
        self.source = source
        self.source_ip = source_ip
        self.remote_ip = remote_ip
        self.destination_ip = destination_ip
        self.destination_port = destination_port
        self.service = service
        self.route = route
        self.rule = rule
        self.is_grpc = is_grpc
        self.claims = claims
        self.principal = principal
        self.now = now
        self.notes = notes if notes is not None else {}


@dataclass(slots=True, init=False)
class Response:
    """A response as filters see it, changeable until it is sent on."""

    status: int
    headers: Headers

    def __init__(self, *, status: int, headers: Headers | None = None) -> None:
        self.status = status
        self.headers = headers if headers is not None else Headers()


@dataclass(frozen=True, slots=True)
class Respond:
    """Answer instead of going on. `flag` is the access log's response flag; `policy` is
    `namespace/name`, `reason` a sentence for the log. gRPC callers get `grpc_status`.
    """

    status: int
    body: bytes = b""
    headers: tuple[Pair, ...] = ()
    flag: str = "-"
    policy: str = ""
    rule: str = ""
    reason: str = ""
    grpc_status: int | None = None


@dataclass(frozen=True, slots=True)
class Answer:
    """What somebody who was asked answered."""

    response: Response
    body: bytes = b""
    trailers: Sequence[Pair] = ()


@dataclass(frozen=True, slots=True)
class Wait:
    """The decision needs somebody's answer. `ask` bounds its own time; None is "go on"."""

    ask: Callable[[], Awaitable[Respond | None]]


Verdict = Respond | Wait | None
"""None is "go on"."""


class BodyFilter(Protocol):
    """A transformation of one body, as it streams. What it holds back is bounded by itself."""

    def feed(self, data: bytes) -> bytes:
        """Take some bytes, give some. Raises `Blocked`."""
        ...

    def finish(self) -> bytes:
        """The end has come: what is left. Raises `Blocked`."""
        ...


@mypyc_attr(native_class=False)
class Blocked(Exception):
    """A body filter says that this body must not pass; `args[0]` is the `Respond` instead of it.
    When a part has passed already the exchange is cut, visibly.
    """

    @property
    def respond(self) -> Respond:
        """What is answered, if nothing has been yet."""
        found = self.args[0]
        assert isinstance(found, Respond)  # noqa: S101
        return found


class Filter(Protocol):
    """One filter, made from configuration when that changes."""

    name: str

    def on_request(self, request: Request) -> Verdict:
        """Decide on the head; may change it."""
        ...

    def on_response(self, request: Request, response: Response) -> Respond | None:
        """Look at the response's head; may change it, or answer something else."""
        ...

    def open_request_body(self, request: Request) -> BodyFilter | None:
        """What transforms the body; None: it is not looked at. With one, the length may change:
        content-length becomes chunked.
        """
        ...

    def open_response_body(self, request: Request, response: Response) -> BodyFilter | None:
        """The same for the response."""
        ...


@mypyc_attr(allow_interpreted_subclasses=True)
class PassingFilter:
    """Every method of `Filter`, doing nothing: for filters that need only some."""

    name = ""

    def on_request(self, request: Request) -> Verdict:
        """Go on."""
        del request
        return None

    def on_response(self, request: Request, response: Response) -> Respond | None:
        """Go on."""
        del request, response
        return None

    def open_request_body(self, request: Request) -> BodyFilter | None:
        """Not looked at."""
        del request
        return None

    def open_response_body(self, request: Request, response: Response) -> BodyFilter | None:
        """Not looked at."""
        del request, response
        return None


def add_to_log(request: Request, field: str, text: str) -> None:
    """Text in a field of the access log; after what is there already."""
    logged = request.notes.setdefault(LOGGED, {})
    logged[field] = f"{logged[field]}, {text}" if field in logged else text
