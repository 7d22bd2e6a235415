"""Lines of heads are read once, and sent on as what was judged."""

from __future__ import annotations

import pytest

from mesh.http import h1, h1_lines
from waypoint.filters.chain import Headers


@pytest.mark.parametrize("line", [b"X-A:b", b"x-a: \t b\t ", b"x-a: b"])
def test_a_line_is_sent_on_as_it_was_judged(line: bytes) -> None:
    for _ in range(2):  # read, then remembered
        parsed = h1.parse_request(b"GET / HTTP/1.1\r\nHost: a\r\n" + line + b"\r\n\r\n")
        assert parsed is not None
        assert (parsed[0].pairs, parsed[0].lines) == ([(b"x-a", b"b")], [b"x-a: b\r\n"])


@pytest.mark.parametrize("name", [b"Authorization", b"COOKIE", b"set-cookie", b"X-Request-Id"])
def test_secrets_and_ids_are_not_remembered(name: bytes) -> None:
    line = name + b": only-once-0815"
    h1_lines.read(line)
    assert line not in h1_lines.known


def test_what_is_remembered_is_bounded() -> None:
    for number in range(5000):
        h1_lines.read(b"x-n: %d" % number)
    h1_lines.read(b"x-long: " + b"y" * 1000)
    assert len(h1_lines.known) <= 2048
    assert all(len(line) <= 160 for line in h1_lines.known)


def test_changed_headers_are_encoded_as_they_are_now() -> None:
    pairs = [(b"a", b"1"), (b"b", b"2"), (b"c", b"3")]

    def made() -> Headers:
        return Headers(list(pairs), [h1_lines.encode(pair) for pair in pairs])

    assert made().encode() == b"a: 1\r\nb: 2\r\nc: 3\r\n"
    added, removed, changed = made(), made(), made()
    added.add(b"d", b"4")
    removed.remove(b"b")
    changed.pairs[0] = (b"a", b"9")
    assert added.encode() == b"a: 1\r\nb: 2\r\nc: 3\r\nd: 4\r\n"
    assert removed.encode() == b"a: 1\r\nc: 3\r\n"
    assert changed.encode() == b"a: 9\r\nb: 2\r\nc: 3\r\n"
    replaced = made()
    replaced.pairs = [*replaced.pairs[1:], (b"d", b"4")]
    assert replaced.encode() == b"b: 2\r\nc: 3\r\nd: 4\r\n"


def test_a_field_that_connection_names_is_in_neither_form() -> None:
    parsed = h1.parse_request(
        b"GET / HTTP/1.1\r\nHost: a\r\nConnection: x-b\r\nX-B: c\r\nD: e\r\n\r\n"
    )
    assert parsed is not None
    assert (parsed[0].pairs, parsed[0].lines) == ([(b"d", b"e")], [b"d: e\r\n"])
