"""By place: JSON paths against a naive evaluator, and every format alike however it is cut."""

from __future__ import annotations

import copy
import gzip
import itertools
import json
import zlib
from collections.abc import Iterator
from typing import Any

import brotli
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from mesh.model.json_path import Segment, parse_json_path
from mesh.model.l7_policy import RedactionAction, RedactionPolicy, RedactionRule
from waypoint.filters.chain import BodyFilter, Headers, Request
from waypoint.filters.redact.bodies import open_body
from waypoint.filters.redact.rules import Plan, Report

NAMES = ["a", "b", "ab", "c d", 'q"', "é"]
PATHS = ["$.a", "$..a", "$.*", "$..b.a", "$[*].a", "$.a[0]", "$..[1]", "$['c d','b'].a", "$..*.b",
         "$.a..b", "$..['q\"']", "$[0,2]", "$..a[*].b", "$.\u00e9"]  # fmt: skip
DOCUMENTS = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(), st.sampled_from(["x", "", 'y"\\\n', "\u00e9"])
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(st.sampled_from(NAMES), inner, max_size=4)
    ),
    max_leaves=14,
)


def plan_of(action: str = "mask", **places: tuple[str, ...]) -> Plan:
    rule = RedactionRule("r", action=RedactionAction(action, mask="[x]"), **places)  # type: ignore[arg-type]
    if action == "drop":
        rule = RedactionRule("r", action=RedactionAction("drop"), **places)  # type: ignore[arg-type]
    return Plan([(RedactionPolicy("shop", "p", rules=(rule,)), None)])


def body_of(plan: Plan, kind: bytes, coding: bytes = b"") -> BodyFilter:
    fields = [(b"content-type", kind)] + ([(b"content-encoding", coding)] if coding else [])
    headers = Headers(fields)
    request = Request(method=b"POST", scheme=b"http", authority=b"a", path=b"/", headers=headers)
    found = open_body(plan, Report(), request, headers, is_request=True)
    assert found is not None
    return found


def through(body: BodyFilter, parts: list[bytes]) -> bytes:
    return b"".join([*(body.feed(part) for part in parts), body.finish()])


def cut(text: bytes, places: list[int]) -> list[bytes]:
    ends = sorted({min(place, len(text)) for place in places} | {0, len(text)})
    return [text[a:b] for a, b in itertools.pairwise(ends)]


def select(value: Any, segments: tuple[Segment, ...], here: tuple[Any, ...] = ()) -> Iterator[Any]:
    """Where the values are that a path selects, by RFC 9535's own words."""
    if not segments:
        yield here
        return
    segment, rest = segments[0], segments[1:]
    children: list[tuple[Any, Any]] = []
    if isinstance(value, dict):
        children = list(value.items())
    elif isinstance(value, list):
        children = list(enumerate(value))
    for key, child in children:
        named = key in segment.names if isinstance(value, dict) else key in segment.indexes
        if segment.is_any or named:
            yield from select(child, rest, (*here, key))
        if segment.descends:
            yield from select(child, segments, (*here, key))


def masked(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: masked(each) for key, each in value.items()}
    if isinstance(value, list):
        return [masked(each) for each in value]
    return None if value is None else "[x]"


def expected(document: Any, path: str, action: str) -> Any:
    found = copy.deepcopy(document)
    for where in sorted(set(select(document, parse_json_path(path))), key=repr, reverse=True):
        holder = found
        for step in where[:-1]:
            holder = holder[step] if not isinstance(holder, str | None) else holder
        if action == "mask" and isinstance(holder, dict | list):
            holder[where[-1]] = masked(holder[where[-1]])
        elif action == "drop":
            holder[where[-1]] = GONE
    return cleaned(found)


GONE = object()


def cleaned(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: cleaned(each) for key, each in value.items() if each is not GONE}
    if isinstance(value, list):
        return [cleaned(each) for each in value if each is not GONE]
    return value


@pytest.mark.parametrize("action", ["mask", "drop"])
@settings(max_examples=250, deadline=None)
@given(
    document=DOCUMENTS,
    path=st.sampled_from(PATHS),
    places=st.lists(st.integers(0, 200), max_size=8),
    style=st.sampled_from([None, 1]),
    is_ascii=st.booleans(),
)
def test_json_paths(
    action: str, document: Any, path: str, places: list[int], style: int | None, is_ascii: bool
) -> None:
    raw = json.dumps(document, indent=style, ensure_ascii=is_ascii).encode()
    plan = plan_of(action, json_paths=(path,))
    out = through(body_of(plan, b"application/json"), cut(raw, places))
    try:
        wanted = expected(document, path, action)
    except TypeError:
        return  # a place inside one that is gone
    assert json.loads(out) == wanted
    if wanted == document:
        assert out == raw


JSON = json.dumps(
    [{"a": "secret-0", "n": 1.50, "b": {"a": ["secret-1", {"x": "y" * 50}]}}, {"c": 'e"\\'}] * 3
).encode()
FORM = b"x=1&a=secret-0&b=%73&%61=secret%2D1&z"
MULTI = (
    b"--XX\r\ncontent-disposition: form-data; name=\"a\"\r\n\r\nsecret-0\r\n"
    b"--XX\r\nContent-Disposition: form-data; name=b; filename=\"f.json\"\r\n"
    b"Content-Type: application/json\r\n\r\n{\"a\":\"secret-1\"}\r\n"
    b"--XX\r\ncontent-disposition: form-data; name=\"t\"\r\n\r\nplain \r\n--X text\r\n--XX--\r\n"
)  # fmt: skip
EVENTS = (
    b'event: m\ndata: {"a":"secret-0"}\n\n: hi\r\ndata:{"b":[{"a":"secret-1"}]}\r\n\r\ndata: [DONE'
)
EVENTS = EVENTS.replace(b"data: [DONE", b"data: DONE")
LINES = b'{"a":"secret-0"}\n{"b":{"a":"secret-1"}}\n\x1e{"c":1}\n12 "x" true\n'
FORMATS = {
    b"application/json": JSON,
    b"application/x-www-form-urlencoded": FORM,
    b"multipart/form-data; boundary=XX": MULTI,
    b"text/event-stream": EVENTS,
    b"application/x-ndjson": LINES,
    b"text/plain": JSON,
}
CODINGS = {
    b"": (bytes, bytes),
    b"gzip": (gzip.compress, gzip.decompress),
    b"deflate": (zlib.compress, zlib.decompress),
    b"br": (brotli.compress, brotli.decompress),
    b"zstd": (
        zstandard.compress,
        lambda data: zstandard.ZstdDecompressor().decompressobj().decompress(data),
    ),
}


@pytest.mark.parametrize("action", ["mask", "drop"])
@pytest.mark.parametrize("kind", FORMATS, ids=lambda kind: kind.decode().partition(";")[0])
@pytest.mark.parametrize("coding", CODINGS, ids=lambda coding: coding.decode() or "plain")
def test_every_format_and_coding_at_every_cut(coding: bytes, kind: bytes, action: str) -> None:
    plan = plan_of(action, json_paths=("$..a",), form_fields=("a",))
    pack, unpack = CODINGS[coding]
    whole = through(body_of(plan, kind), [FORMATS[kind]])
    assert b"secret" not in whole
    assert len(whole) > len(FORMATS[kind]) // 5
    packed = pack(FORMATS[kind])
    step = 1 if not coding else 7
    for place in range(0, len(packed), step):
        parts = [packed[:place], packed[place:]]
        assert unpack(through(body_of(plan, kind, coding), parts)) == whole
    each = [packed[i : i + 1] for i in range(len(packed))]
    assert unpack(through(body_of(plan, kind, coding), each)) == whole


@settings(max_examples=150, deadline=None)
@given(
    fields=st.lists(
        st.tuples(st.sampled_from([b"a", b"%61", b"A", b"b", b""]), st.binary(max_size=6)),
        max_size=6,
    ),
    places=st.lists(st.integers(0, 60), max_size=6),
)
def test_forms(fields: list[tuple[bytes, bytes]], places: list[int]) -> None:
    pairs = [(name, value.hex().encode()) for name, value in fields]
    raw = b"&".join(b"=".join(pair) for pair in pairs)
    out = through(
        body_of(plan_of("drop", form_fields=("a",)), b"application/x-www-form-urlencoded"),
        cut(raw, places),
    )
    kept = [b"=".join(pair) for pair in pairs if pair[0] not in (b"a", b"A", b"%61")]
    assert out == b"&".join(kept)
