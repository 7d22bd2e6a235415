"""Trace contexts: the cases of the W3C harness by its names, B3, and what is passed on."""

from __future__ import annotations

import pytest

from mesh.http.trace_context import TraceContext, read_context, with_context

TRACE, SPAN = b"12345678901234567890123456789012", b"1234567890123456"
OK = b"00-" + TRACE + b"-" + SPAN + b"-01"


@pytest.mark.parametrize(
    ("name", "values", "is_valid"),
    [
        ("traceparent_header_name_valid_casing", [OK], True),
        ("traceparent_duplicated", [OK, OK.replace(b"12", b"34")], False),
        ("traceparent_version_0x00", [OK + b"."], False),
        ("traceparent_version_0x00 more", [OK + b"-what-the-future"], False),
        ("traceparent_version_0xcc", [OK.replace(b"00-", b"cc-", 1)], True),
        ("traceparent_version_0xcc more", [b"cc" + OK[2:] + b"-what-the-future-will-be"], True),
        ("traceparent_version_0xcc glued", [b"cc" + OK[2:] + b".what-the-future"], False),
        ("traceparent_version_0xff", [b"ff" + OK[2:]], False),
        ("traceparent_version_illegal_characters", [b".0" + OK[2:]], False),
        ("traceparent_version_too_long", [b"000" + OK[2:]], False),
        ("traceparent_version_too_short", [b"0" + OK[2:]], False),
        ("traceparent_trace_id_all_zero", [OK.replace(TRACE, b"0" * 32)], False),
        ("traceparent_trace_id_illegal_characters", [OK.replace(b"5", b".")], False),
        ("traceparent_trace_id_too_long", [OK.replace(TRACE, TRACE + b"3")], False),
        ("traceparent_trace_id_too_short", [OK.replace(TRACE, TRACE[1:])], False),
        ("traceparent_parent_id_all_zero", [OK.replace(b"-" + SPAN, b"-" + b"0" * 16)], False),
        ("traceparent_parent_id_too_long", [OK.replace(SPAN + b"-", SPAN + b"7-")], False),
        ("traceparent_trace_flags_illegal_characters", [OK[:-2] + b".0"], False),
        ("traceparent_trace_flags_too_long", [OK + b"1"], False),
        ("traceparent_trace_flags_too_short", [OK[:-1]], False),
        ("traceparent_ows_handling", [b" \t" + OK + b"\t "], True),
        ("traceparent upper case", [OK[:-2].replace(b"12", b"AB", 1) + b"01"], False),
    ],
)
def test_traceparent(name: str, values: list[bytes], is_valid: bool) -> None:
    found = read_context([*((b"traceparent", each) for each in values), (b"tracestate", b"a=1")])
    assert (found is not None) is is_valid, name
    if found is not None:
        assert (found.trace_id, found.span_id) == (TRACE.decode(), SPAN.decode())
        assert found.state == b"a=1"


@pytest.mark.parametrize(
    ("name", "values", "state"),
    [
        ("tracestate_included", [b"foo=1", b"bar=2"], b"foo=1,bar=2"),
        ("tracestate_empty_header", [b"foo=1", b""], b"foo=1"),
        ("tracestate_multiple_headers_different_keys", [b"foo=1,bar=2", b"baz=3"],
         b"foo=1,bar=2,baz=3"),
        ("tracestate_duplicated_keys", [b"foo=1,foo=1"], b""),
        ("tracestate_all_allowed_characters", [b"a_*/-0@b=a b!~"], b"a_*/-0@b=a b!~"),
        ("tracestate_ows_handling", [b"foo=1 \t , \t bar=2, \t baz=3"], b"foo=1,bar=2,baz=3"),
        ("tracestate_key_illegal_characters", [b"foo =1"], b""),
        ("tracestate_key_illegal_characters upper", [b"FOO=1"], b""),
        ("tracestate_key_illegal_vendor_format", [b"foo@=1,bar=2"], b""),
        ("tracestate_key_length_limit", [b"z" * 257 + b"=1"], b""),
        ("tracestate_member_count_limit", [b",".join(b"k%d=1" % n for n in range(33))], b""),
        ("tracestate_member_count_limit kept", [b",".join(b"k%d=1" % n for n in range(32))],
         b",".join(b"k%d=1" % n for n in range(32))),
        ("tracestate_value_illegal_characters", [b"foo=bar=baz"], b""),
        ("tracestate too long", [b",".join(b"k%d=%s" % (n, b"x" * 200) for n in range(20))],
         b""),
    ],
)  # fmt: skip
def test_tracestate(name: str, values: list[bytes], state: bytes) -> None:
    fields = [(b"traceparent", OK), *((b"tracestate", each) for each in values)]
    found = read_context(fields)
    assert found is not None, name
    assert found.state == state, name


def test_tracestate_included_traceparent_missing() -> None:
    assert read_context([(b"tracestate", b"foo=1")]) is None


@pytest.mark.parametrize(
    ("fields", "is_sampled"),
    [
        ({b"b3": TRACE + b"-" + SPAN + b"-1"}, True),
        ({b"b3": TRACE + b"-" + SPAN + b"-d-" + SPAN}, True),
        ({b"b3": TRACE + b"-" + SPAN + b"-0"}, False),
        ({b"b3": TRACE + b"-" + SPAN}, True),
        ({b"x-b3-traceid": TRACE, b"x-b3-spanid": SPAN, b"x-b3-sampled": b"1"}, True),
        ({b"x-b3-traceid": TRACE, b"x-b3-spanid": SPAN, b"x-b3-sampled": b"0"}, False),
        ({b"x-b3-traceid": TRACE, b"x-b3-spanid": SPAN, b"x-b3-flags": b"1"}, True),
    ],
)
def test_b3(fields: dict[bytes, bytes], is_sampled: bool) -> None:
    found = read_context(list(fields.items()))
    assert found == TraceContext(TRACE.decode(), SPAN.decode(), is_sampled)


@pytest.mark.parametrize(
    "fields",
    [
        {b"b3": b"0"},
        {b"b3": b"0" * 32 + b"-" + SPAN},
        {b"b3": TRACE},
        {b"x-b3-traceid": TRACE},
        {b"x-b3-traceid": b"xyz", b"x-b3-spanid": SPAN},
        {b"traceparent": b"nonsense", b"b3": TRACE + b"-" + SPAN + b"-1"},
    ],
)
def test_no_context(fields: dict[bytes, bytes]) -> None:
    assert read_context(list(fields.items())) is None


def test_short_trace_ids_of_b3_are_padded() -> None:
    found = read_context([(b"b3", SPAN + b"-" + SPAN + b"-1")])
    assert found == TraceContext("0" * 16 + SPAN.decode(), SPAN.decode(), True)


def test_what_is_passed_on_replaces_all_there_was() -> None:
    context = TraceContext("ab" * 16, "cd" * 8, True, b"k=v")
    sent = [
        (b"traceparent", OK), (b"a", b"1"), (b"traceparent", OK), (b"tracestate", b"x=1"),
        (b"b3", TRACE + b"-" + SPAN), (b"x-b3-traceid", TRACE), (b"x-b3-spanid", SPAN),
    ]  # fmt: skip
    assert with_context(sent, context) == [
        (b"a", b"1"),
        (b"b3", b"ab" * 16 + b"-" + b"cd" * 8 + b"-1"),
        (b"x-b3-traceid", b"ab" * 16), (b"x-b3-spanid", b"cd" * 8), (b"x-b3-sampled", b"1"),
        (b"traceparent", b"00-" + b"ab" * 16 + b"-" + b"cd" * 8 + b"-01"),
        (b"tracestate", b"k=v"),
    ]  # fmt: skip
