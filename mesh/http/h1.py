"""FAST PATH: HTTP/1.1 for the data plane, sans-IO and strict (RFC 9112).

One regular expression with possessive quantifiers (linear time) judges a whole head: bare LF,
obsolete folding, blanks before a colon, control bytes and every version but 1.0 and 1.1 are
refused. What two parsers could read differently is refused, not repaired: content-length beside
transfer-encoding, a repeated length or one with leading zeros, any coding but one `chunked`, two
hosts, a host of anything but letters, digits, dots and dashes. Bodies are taken out
of their framing here and framed anew by whoever sends them on, so that no framing of a peer is
ever forwarded. llhttp and h11 give second opinions in the tests.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from http import HTTPStatus
from typing import Final

from mesh.errors import RemoteProtocolError
from mesh.http import h1_lines
from mesh.http.h1_heads import Pair, RequestHead, ResponseHead
from mesh.http.trailers import safe_trailers

MAX_HEAD: Final = 64 << 10
MAX_FIELDS: Final = 128
MAX_TRAILERS: Final = 8 << 10
_MAX_CHUNK_LINE: Final = 256

_TOKEN = rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]"
_FIELDS = rb"((?:" + _TOKEN + rb"++:[\t \x21-\x7e\x80-\xff]*+\r\n)*+)\r\n"
_REQUEST = re.compile(rb"(" + _TOKEN + rb"{1,32}+) ([\x21-\x7e]++) HTTP/1\.([01])\r\n" + _FIELDS)
_RESPONSE = re.compile(
    rb"HTTP/1\.([01]) ([1-9][0-9][0-9])(?: [\t \x21-\x7e\x80-\xff]*+)?\r\n" + _FIELDS
)
_FIELDS_ONLY = re.compile(_FIELDS)
_HOST = re.compile(rb"[A-Za-z0-9._~\-]*+(?::[0-9]{0,5})?|\[[0-9A-Fa-f:.]+\](?::[0-9]{0,5})?")
_MOST_HOSTS: Final = 1024
_LONGEST_HOST: Final = 128
_good_hosts: Final[set[bytes]] = set()
"""That were judged good before. Bounded: it is filled once, with the first that come."""
_LENGTH = re.compile(rb"0|[1-9][0-9]{0,17}")
# What would let HTTP go on under another framing, out of sight (h2c, HTTP/3, TLS/1.0).
_NOT_UPGRADED_TO = (b"h2", b"h3", b"http", b"tls")
_CHUNK_LINE = re.compile(rb"([0-9A-Fa-f]{1,15}+)[\t ]*+(?:;[\t \x21-\x7e\x80-\xff]*+)?\r\n")
_ABSOLUTE = re.compile(rb"(https?)://([^/?#]+)([/?].*)?", re.IGNORECASE)

# A peer may not use Connection to take away what is judged or what frames the message.
_PROTECTED: Final = frozenset({b"host", b"content-length", b"authorization", b"cookie"})
_STATUS_LINES: Final = {
    status.value: b"HTTP/1.1 %d %b\r\n" % (status.value, status.phrase.encode())
    for status in HTTPStatus
}


def parse_request(data: bytes) -> tuple[RequestHead, int] | None:
    """The head at the start of `data` and where it ends; None when it is not complete.

    Raises RemoteProtocolError with the status to answer.
    """
    start = 2 if data[:2] == b"\r\n" else 0
    match = _REQUEST.match(data, start)
    if match is None:
        _refuse_or_wait(data, start, 431)
        return None
    method, target, minor, block = match.groups()
    if match.end() - start > MAX_HEAD:
        raise RemoteProtocolError("the head is too long", http_status=431)
    is_http10 = minor == b"0"
    pairs, lines, special, has_length = _split(block)
    codings: list[bytes] = []
    connection: set[bytes] = set()
    upgrade = b""
    expects = trailers = False
    if len(special) == 1 and special[0][0] == b"host":
        hosts = [special[0][1]]
        lengths = _values(pairs, b"content-length") if has_length else []
    elif special:
        read = _read_special(pairs, lines, special, 400)
        hosts, lengths, codings, connection, upgrade, expects, trailers = read
    else:
        hosts, lengths = [], _values(pairs, b"content-length")
    if len(hosts) != 1 and (hosts or not is_http10):
        raise RemoteProtocolError(f"a request has one host, not {len(hosts)}")
    host = hosts[0] if hosts else b""
    if not is_host(host):
        raise RemoteProtocolError("the host is malformed")
    path, query, authority, scheme = _read_target(method, target, host)
    length = _request_length(lengths, codings, is_http10=is_http10)
    keeps = _keeps_alive(connection, is_http10=is_http10)
    if upgrade and (b"upgrade" not in connection or is_http10 or not _may_upgrade(upgrade)):
        upgrade = b""
    return RequestHead(
        method, path, query, authority, scheme, pairs, length, keeps, is_http10, upgrade,
        expects and not is_http10, trailers, lines,
    ), match.end()  # fmt: skip


def parse_response(data: bytes, *, method: bytes) -> tuple[ResponseHead, int] | None:
    """The same for a response to a request of `method`. Raises RemoteProtocolError (502)."""
    match = _RESPONSE.match(data)
    if match is None:
        _refuse_or_wait(data, 0, 502)
        return None
    minor, digits, block = match.groups()
    if match.end() > MAX_HEAD:
        raise RemoteProtocolError("the response's head is too long", http_status=502)
    status = int(digits)
    pairs, lines, special, has_length = _split(block, http_status=502)
    lengths: list[bytes]
    codings: list[bytes] = []
    connection: set[bytes] = set()
    upgrade = b""
    if special:
        read = _read_special(pairs, lines, special, 502)
        _, lengths, codings, connection, upgrade, _, _ = read
    else:
        lengths = _values(pairs, b"content-length") if has_length else []
    if (lengths and codings) or (codings and minor == b"0"):
        raise RemoteProtocolError("a response with two framings", http_status=502)
    length: int | None
    if codings:
        if codings != [b"chunked"]:
            raise RemoteProtocolError("a coding that is not chunked", http_status=502)
        length = None
    elif lengths:
        length = _one_length(lengths, 502)
    else:
        length = -1
    if status < 200 or status in {204, 304} or method == b"HEAD":
        length = 0
    elif method == b"CONNECT" and status < 300:
        length = -1
    if status < 200 or status == 204:
        # They have none (RFC 9110 section 8.6); a caller that believes it would wait.
        _drop(pairs, lines, {b"content-length"})
    keeps = _keeps_alive(connection, is_http10=minor == b"0")
    return ResponseHead(status, pairs, length, keeps and length != -1, upgrade, lines), match.end()


def _keeps_alive(connection: set[bytes], *, is_http10: bool) -> bool:
    if b"close" in connection:
        return False
    return not is_http10 or b"keep-alive" in connection


def _may_upgrade(protocols: bytes) -> bool:
    """Whether what follows is nothing that we would have to read. Of a list, all must be so: who
    chooses among them is the other side.
    """
    return not any(
        part.strip(b" \t").lower().startswith(_NOT_UPGRADED_TO) for part in protocols.split(b",")
    )


def is_host(authority: bytes) -> bool:
    """Whether this is a host, perhaps with a port, that nobody can read in two ways."""
    if authority in _good_hosts:
        return True
    if _HOST.fullmatch(authority) is None:
        return False
    if len(_good_hosts) < _MOST_HOSTS and len(authority) <= _LONGEST_HOST:
        _good_hosts.add(authority)
    return True


_Special = tuple[list[bytes], list[bytes], list[bytes], set[bytes], bytes, bool, bool]


def _split(
    block: bytes, http_status: int = 400
) -> tuple[list[Pair], list[bytes], list[Pair], bool]:
    """The fields of a block without host and hop-by-hop ones, and how they are sent on; those
    others, which are read here; and whether a content-length is among the first.
    """
    pairs: list[Pair] = []
    lines: list[bytes] = []
    special: list[Pair] = []
    has_length = False
    get, read = h1_lines.known.get, h1_lines.read
    found = block.split(b"\r\n")
    found.pop()  # the empty end
    if len(found) > MAX_FIELDS:
        raise RemoteProtocolError(
            "too many fields", http_status=431 if http_status == 400 else http_status
        )
    for line in found:
        pair, wire, mark = get(line) or read(line)
        if mark:
            if mark & h1_lines.SPECIAL:
                special.append(pair)
                continue
            has_length = True
        pairs.append(pair)
        lines.append(wire)
    return pairs, lines, special, has_length


def _values(pairs: Iterable[Pair], wanted: bytes) -> list[bytes]:
    return [value for name, value in pairs if name == wanted]


def _drop(pairs: list[Pair], lines: list[bytes], names: set[bytes]) -> None:
    """Take fields out of both."""
    lines[:] = [line for pair, line in zip(pairs, lines, strict=True) if pair[0] not in names]
    pairs[:] = [pair for pair in pairs if pair[0] not in names]


def _read_special(
    pairs: list[Pair], lines: list[bytes], special: list[Pair], http_status: int
) -> _Special:
    hosts: list[bytes] = []
    codings: list[bytes] = []
    connection: set[bytes] = set()
    upgrade = b""
    expects = trailers = False
    for name, value in special:
        if name == b"host":
            hosts.append(value)
        elif name == b"connection":
            connection.update(part.strip(b" \t") for part in value.lower().split(b","))
        elif name == b"transfer-encoding":
            codings.append(value.lower())
        elif name == b"upgrade":
            upgrade = upgrade + b", " + value if upgrade else value
        elif name == b"te":
            trailers = trailers or b"trailers" in value.lower()
        elif name == b"expect":
            if value.lower() != b"100-continue":
                raise RemoteProtocolError("an unknown expectation", http_status=417)
            expects = True
        elif name in h1_lines.DISGUISED:
            raise RemoteProtocolError("a framing field in disguise", http_status=http_status)
    named = connection - {b"close", b"keep-alive", b"upgrade", b"te", b""}
    if named:
        if named & _PROTECTED:
            raise RemoteProtocolError("Connection names a field that must stay",
                                      http_status=http_status)  # fmt: skip
        _drop(pairs, lines, named)
    lengths = _values(pairs, b"content-length")
    return hosts, lengths, codings, connection, upgrade, expects, trailers


def _refuse_or_wait(data: bytes, start: int, too_long: int) -> None:
    """Raise unless `data` may be the beginning of a head."""
    status = 502 if too_long == 502 else 400
    if len(data) - start > MAX_HEAD or data.count(b"\n", start) > MAX_FIELDS + 2:
        raise RemoteProtocolError("the head is too long", http_status=too_long)
    end = data.find(b"\n", start)
    while end >= 0:
        if data[end - 1 : end] != b"\r" or end == 0:
            raise RemoteProtocolError("a line ends without CR", http_status=status)
        if data[end + 1 : end + 3] == b"\r\n":
            raise RemoteProtocolError("a malformed head", http_status=status)
        if data[end + 1 : end + 2] in {b" ", b"\t"}:
            raise RemoteProtocolError("an obsolete line folding", http_status=status)
        end = data.find(b"\n", end + 1)
    if b"\0" in data[start : start + MAX_HEAD]:
        raise RemoteProtocolError("a zero byte in the head", http_status=status)


def _read_target(
    method: bytes, target: bytes, host: bytes
) -> tuple[bytes, bytes | None, bytes, bytes]:
    """Path, query, authority, scheme. Raises RemoteProtocolError."""
    scheme = b"http"
    if method == b"CONNECT":
        raise RemoteProtocolError("CONNECT is not served here", http_status=405)
    if target[:1] != b"/":
        absolute = _ABSOLUTE.fullmatch(target)
        if absolute is not None:
            if absolute[2].lower() != host.lower():
                raise RemoteProtocolError("target and host name different authorities")
            scheme = absolute[1].lower()
            target = absolute[3] or b"/"
            if target[:1] == b"?":
                target = b"/" + target
        elif target != b"*" or method != b"OPTIONS":
            raise RemoteProtocolError("a malformed target")
    if target.find(b"#") >= 0:  # `in` makes and drops an exception first, as it looks for a number
        raise RemoteProtocolError("a fragment in the target")
    path, found, query = target.partition(b"?")
    return path, query if found else None, host, scheme


def _request_length(
    lengths: Sequence[bytes], codings: Sequence[bytes], *, is_http10: bool
) -> int | None:
    if codings:
        if lengths or is_http10 or list(codings) != [b"chunked"]:
            raise RemoteProtocolError("an ambiguous or unknown framing")
        return None
    return _one_length(lengths, 400) if lengths else 0


def _one_length(lengths: Sequence[bytes], http_status: int) -> int:
    text = lengths[0]
    if len(lengths) > 1 or not _LENGTH.fullmatch(text):
        raise RemoteProtocolError("a malformed content-length", http_status=http_status)
    return int(text)


def encode_request(
    method: bytes, target: bytes, authority: bytes, pairs: Iterable[Pair], extra: bytes = b""
) -> bytes:
    """The bytes of a request head; `extra` are whole lines (framing, upgrade)."""
    lines = b"".join([b"%b: %b\r\n" % pair for pair in pairs])
    return request_head(method, target, authority, lines, extra)


def request_head(
    method: bytes, target: bytes, authority: bytes, lines: bytes, extra: bytes = b""
) -> bytes:
    """The same of fields that are lines already."""
    return b"%b %b HTTP/1.1\r\nhost: %b\r\n%b%b\r\n" % (method, target, authority, lines, extra)


def encode_response(status: int, pairs: Iterable[Pair], extra: bytes = b"") -> bytes:
    """The bytes of a response head."""
    lines = b"".join([b"%b: %b\r\n" % pair for pair in pairs])
    return response_head(status, lines, extra)


def response_head(status: int, lines: bytes, extra: bytes = b"") -> bytes:
    """The same of fields that are lines already."""
    first = _STATUS_LINES.get(status) or b"HTTP/1.1 %d \r\n" % status
    return b"%b%b%b\r\n" % (first, lines, extra)


def encode_chunk(data: bytes | bytearray | memoryview) -> bytes:
    """One chunk around bytes that are not empty."""
    return b"".join((b"%x\r\n" % len(data), data, b"\r\n"))


def encode_last_chunk(trailers: Iterable[Pair] = ()) -> bytes:
    """The end of a chunked body."""
    return b"".join((b"0\r\n", *(b"%b: %b\r\n" % pair for pair in trailers), b"\r\n"))


class ChunkReader:
    """Takes a chunked body out of its framing. Extensions are dropped, trailers kept."""

    __slots__ = ("_left", "_line", "_state", "_total_lines", "is_done", "trailers")

    def __init__(self) -> None:
        self._left = 0
        self._line = b""
        self._state = 0  # 0 size line, 1 payload, 2 the CRLF after it, 3 trailers
        self.is_done = False
        self.trailers: list[Pair] = []

    def feed(self, data: memoryview) -> tuple[list[memoryview], int]:
        """Payload in `data`, and how many bytes of it were used (all, unless `is_done`).

        Raises RemoteProtocolError.
        """
        found: list[memoryview] = []
        offset, size = 0, len(data)
        while offset < size and not self.is_done:
            if self._state == 1:
                piece = data[offset : offset + self._left]
                found.append(piece)
                offset += len(piece)
                self._left -= len(piece)
                if not self._left:
                    self._state = 2
            elif self._state == 3:
                offset = self._trailers(data, offset)
            else:
                offset = self._short_line(data, offset)
        return found, offset

    def _short_line(self, data: memoryview, offset: int) -> int:
        """A size line, or the end of a chunk."""
        before = len(self._line)
        line = self._line + bytes(data[offset : offset + _MAX_CHUNK_LINE - before])
        end = line.find(b"\n")
        if end < 0:
            if len(line) >= _MAX_CHUNK_LINE or (self._state == 2 and line not in {b"", b"\r"}):
                raise RemoteProtocolError("a malformed chunk")
            self._line = line
            return len(data)
        self._line = b""
        line = line[: end + 1]
        if self._state == 2:
            if line != b"\r\n":
                raise RemoteProtocolError("a chunk does not end where it should")
            self._state = 0
        else:
            match = _CHUNK_LINE.fullmatch(line)
            if match is None:
                raise RemoteProtocolError("a malformed chunk size")
            self._left = int(match[1], 16)
            self._state = 1 if self._left else 3
        return offset + end + 1 - before

    def _trailers(self, data: memoryview, offset: int) -> int:
        before = len(self._line)
        block = self._line + bytes(data[offset : offset + MAX_TRAILERS - before])
        match = _FIELDS_ONLY.match(block)
        if match is None:
            _refuse_or_wait(b"\r\n" + block, 0, 400)
            if len(block) >= MAX_TRAILERS or block[:1] == b"\n":
                raise RemoteProtocolError("trailers are too long", http_status=431)
            self._line = block
            return len(data)
        pairs, lines, special, _ = _split(match[1])
        if special:
            _read_special(pairs, lines, special, 400)  # judged, and dropped
        self.trailers = safe_trailers(pairs)
        self._line = b""
        self.is_done = True
        return offset + match.end() - before
