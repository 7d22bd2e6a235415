"""However a body is cut, what comes out is the same, and no value is left in it."""

from __future__ import annotations

import itertools
import json

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mesh.model.l7_policy import RedactionPolicy, RedactionRule
from waypoint.filters.redact import text_body, views
from waypoint.filters.redact.detectors import BUILT_IN
from waypoint.filters.redact.rules import Plan, Report
from waypoint.filters.redact.scanner import Scanner

VALUES = [
    "alice.smith@example.com",
    "4111 1111 1111 1111",
    "378282246310005",
    "GB82 WEST 1234 5698 7654 32",
    "DE89370400440532013000",
    "123-45-6789",
    "AB 12 34 56 C",
    "+44 20 7946 0958",
    "(555) 123-4567",
    "192.168.17.4",
    "2001:db8::8a2e:370:7334",
    "eyJhbGciOiJIUzI1NiJ9." + "eyJzdWIiOiIxMjM0NTY3ODkwIn0.dozjgNryP4J3jVmNHl0w5N_XgL0n3I9P",
    "AKIA" + "IOSFODNN7EXAMPLE",
    "ghp_" + "a1B2c3D4e5" * 4,
    "-----BEGIN PRIVATE KEY-----\nMIIEvQIBADANBgkqhkiG9w0\n-----END PRIVATE KEY-----",
]
RULES = tuple(RedactionRule(name=kind, detector=kind) for kind in BUILT_IN)
CUSTOM = RedactionRule(name="own", detector="custom", pattern=r"cust-[0-9]+")
PLAIN = Plan([(RedactionPolicy(namespace="shop", name="all", rules=RULES), None)])
OWN = Plan([(RedactionPolicy(namespace="shop", name="all", rules=(*RULES, CUSTOM)), None)])


def redact(plan: Plan, syntax: views.Syntax, parts: list[bytes]) -> bytes:
    body = text_body.TextRedactor(plan, Report(), syntax)
    return b"".join([*(body.feed(part) for part in parts), body.finish()])


def cut(text: bytes, places: list[int]) -> list[bytes]:
    ends = sorted({min(place, len(text)) for place in places} | {0, len(text)})
    return [text[a:b] for a, b in itertools.pairwise(ends)]


NOISE = st.text(st.sampled_from(list('ab1 2-.,:@+"\\/{}[]\n\u00e9%&=<;u0')), max_size=30)
PIECES = st.lists(st.one_of(NOISE, st.sampled_from(VALUES)), max_size=8).map("".join)


@pytest.mark.parametrize("plan", [PLAIN, OWN], ids=["built-in", "custom"])
@pytest.mark.parametrize(
    "syntax", [views.JSON, views.TEXT, views.FORM, views.XML], ids=lambda syntax: syntax.name
)
@settings(max_examples=120, deadline=None)
@given(text=PIECES, places=st.lists(st.integers(0, 400), max_size=12))
@example(text="123-45-6789" + VALUES[-1] * 2, places=[39])
def test_any_cut_gives_what_the_whole_gives(
    plan: Plan, syntax: views.Syntax, text: str, places: list[int]
) -> None:
    raw = text.encode()
    assert redact(plan, syntax, cut(raw, places)) == redact(plan, syntax, [raw])


EACH = [Scanner([(0, rule)]) for rule in RULES]


@settings(max_examples=300, deadline=None)
@given(pieces=st.lists(st.one_of(NOISE, st.sampled_from([*VALUES, '"', '":"'])), max_size=8))
def test_what_a_view_has_shows_without_it(pieces: list[str]) -> None:
    raw = "".join(pieces).replace("\\", "").encode()
    view = views.JSON.look(raw).text
    for each in EACH:
        assert each.may_find(raw) or not list(each.find(view))


@settings(max_examples=60, deadline=None)
@given(text=PIECES, places=st.lists(st.integers(0, 900), max_size=12))
def test_small_windows_are_cut_alike(text: str, places: list[int]) -> None:
    raw = (text * 3).encode()
    sizes = text_body.MAX_UNIT, text_body.OVERLAP
    text_body.MAX_UNIT, text_body.OVERLAP = 160, 100
    try:
        assert redact(PLAIN, views.TEXT, cut(raw, places)) == redact(PLAIN, views.TEXT, [raw])
    finally:
        text_body.MAX_UNIT, text_body.OVERLAP = sizes


@pytest.mark.parametrize("value", VALUES)
def test_split_at_every_byte(value: str) -> None:
    raw = json.dumps({"before": "x", "it": f"see {value} there", "n": [1, 2]}).encode()
    whole = redact(PLAIN, views.JSON, [raw])
    assert json.dumps(value)[1:-1].encode() not in whole
    assert json.loads(whole)["n"] == [1, 2]
    for place in range(len(raw)):
        assert redact(PLAIN, views.JSON, [raw[:place], raw[place:]]) == whole
    assert redact(PLAIN, views.JSON, [raw[i : i + 1] for i in range(len(raw))]) == whole


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_escaped_and_nested_in_json_strings(value: str, depth: int) -> None:
    text = "".join(f"\\u{ord(char):04X}" for char in value)
    raw = b'{"v":"' + text.encode() + b'"}'
    for _ in range(depth - 1):
        raw = json.dumps({"v": raw.decode()}).encode()
    out = redact(PLAIN, views.JSON, [raw])
    assert out != raw
    for _ in range(depth):
        out = json.loads(out)["v"].encode()
    assert set(out) == set(b"*")


@settings(max_examples=80, deadline=None)
@given(
    st.recursive(
        st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), PIECES),
        lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(PIECES, inner)),
        max_leaves=12,
    )
)
def test_json_stays_json(document: object) -> None:
    json.loads(redact(PLAIN, views.JSON, [json.dumps(document).encode()]))
    json.loads(redact(OWN, views.JSON, [json.dumps(document, ensure_ascii=False).encode()]))


def test_numbers_become_strings() -> None:
    out = redact(PLAIN, views.JSON, [b'{"card": 4111111111111111, "n": 12.5}'])
    assert out == b'{"card": "****************", "n": 12.5}'


def test_memory_is_bounded_and_time_linear() -> None:
    body = text_body.TextRedactor(PLAIN, Report(), views.TEXT)
    for _ in range(64):
        body.feed(b"a" * 65536)
        assert len(body._held) <= text_body.MAX_UNIT + 65536


def test_a_private_key_without_an_end_does_not_wait_for_ever() -> None:
    raw = b"-----BEGIN " + b"PRIVATE KEY-----\n" + b"QUJD\n" * 20000
    out = redact(PLAIN, views.TEXT, cut(raw, list(range(0, len(raw), 4096))))
    assert out == redact(PLAIN, views.TEXT, [raw])
    assert out.startswith(b"*" * 16000)
