"""Fields judged before are not judged again; what is remembered never lets anything pass."""

from __future__ import annotations

import pytest

from mesh.http import hpack_table
from mesh.http.hpack_decoder import FieldDecoder
from mesh.http.hpack_table import encode_block, find_problem

GOOD = ((b":method", b"GET"), (b"accept", b"*/*"), (b"x-user", b"u1"))


def test_a_known_field_keeps_its_place_in_the_order() -> None:
    assert not find_problem(GOOD)
    assert not find_problem(GOOD)
    assert find_problem(((b"x-user", b"u1"), (b":method", b"GET")))


@pytest.mark.parametrize(
    "pair", [(b"Upper", b"a"), (b"a", b"x\r\ny"), (b"connection", b"close"), (b"te", b"gzip")]
)
def test_a_bad_field_is_refused_each_time(pair: tuple[bytes, bytes]) -> None:
    assert all(find_problem([pair]) for _ in range(3))
    assert pair not in hpack_table._judged


def test_pseudo_headers_secrets_and_ids_are_not_remembered() -> None:
    pairs = [(b":path", b"/once"), (b"authorization", b"once"), (b"x-request-id", b"once")]
    assert not find_problem(pairs)
    assert not {*pairs} & hpack_table._judged.keys()


def test_known_fields_are_encoded_as_unknown_ones() -> None:
    fresh = [(b"x-fresh", b"1"), (b"accept-encoding", b"gzip, deflate"), (b"accept", b"a")]
    before = encode_block(fresh)
    assert not find_problem(fresh)
    assert {*fresh} <= hpack_table._judged.keys()
    assert encode_block(fresh) == before
    assert FieldDecoder(4096).decode(before) == tuple(fresh)


def test_what_is_remembered_is_bounded() -> None:
    for number in range(5000):
        find_problem([(b"x-n", b"%d" % number)])
    find_problem([(b"x-long", b"y" * 1000)])
    assert len(hpack_table._judged) <= 2048
    assert all(len(name) + len(value) <= 160 for name, value in hpack_table._judged)
