"""The filter as the proxy calls it: heads and bodies, both directions."""

from __future__ import annotations

import gzip
import json

import brotli
import pytest
import zstandard

from mesh.model.l7_policy import (
    RedactionAction,
    RedactionPolicy,
    RedactionRule,
    RequestCondition,
)
from waypoint.filters.chain import Blocked, Headers, Request, Respond, Response
from waypoint.filters.redact.filter import RedactionFilter, redact_trailers

EMAIL = RedactionRule(name="mail", detector="email")


def make(*rules: RedactionRule, **more: object) -> RedactionFilter:
    policy = RedactionPolicy(namespace="shop", name="pii", rules=rules, **more)  # type: ignore[arg-type]
    return RedactionFilter([policy], lambda path: b"k" * 32)


def ask(**more: object) -> Request:
    found = {"method": b"POST", "scheme": b"http", "authority": b"shop", "path": b"/buy"} | more
    return Request(**found)  # type: ignore[arg-type]


def through(
    each: RedactionFilter, body: bytes, *fields: tuple[bytes, bytes], step: int = 7
) -> bytes:
    request = ask(headers=Headers(list(fields)))
    assert each.on_request(request) is None
    found = each.open_request_body(request)
    assert found is not None
    parts = [found.feed(body[i : i + step]) for i in range(0, len(body), step)]
    return b"".join(parts) + found.finish()


JSON = (b"content-type", b"application/json; charset=utf-8")
BODY = json.dumps({"to": "alice@example.com", "n": 1.10}).encode()
CLEAN = BODY.replace(b"alice@example.com", b"*" * 17)


def test_bodies_plain_and_packed() -> None:
    each = make(EMAIL)
    assert through(each, BODY, JSON) == CLEAN
    packed = through(each, gzip.compress(BODY), JSON, (b"content-encoding", b"gzip"))
    assert gzip.decompress(packed) == CLEAN
    packed = through(each, brotli.compress(BODY), JSON, (b"content-encoding", b"br"))
    assert brotli.decompress(packed) == CLEAN
    packed = through(each, zstandard.compress(BODY), JSON, (b"content-encoding", b"zstd"))
    assert zstandard.ZstdDecompressor().decompressobj().decompress(packed) == CLEAN
    form = (b"content-type", b"application/x-www-form-urlencoded")
    assert through(each, b"a=1&m=alice%2540example.com", form) == b"a=1&m=" + b"*" * 17


@pytest.mark.parametrize("coding", [b"gzip", b"br", b"zstd"])
def test_bombs_are_blocked(coding: bytes) -> None:
    bomb = b" " * (80 << 20)
    pack = {b"gzip": gzip.compress, b"br": lambda data: brotli.compress(data, quality=1),
            b"zstd": zstandard.compress}[coding]  # fmt: skip
    with pytest.raises(Blocked):
        through(make(EMAIL), pack(bomb), JSON, (b"content-encoding", coding), step=4096)


@pytest.mark.parametrize(
    "fields",
    [
        [(b"content-type", b"application/octet-stream")],
        [],
        [JSON, (b"content-encoding", b"lz4")],
        [JSON, (b"content-encoding", b"gzip")],
        [(b"content-type", b"text/plain; charset=utf-7")],
    ],
)
def test_what_cannot_be_inspected_is_blocked_or_passed_as_said(
    fields: list[tuple[bytes, bytes]],
) -> None:
    with pytest.raises(Blocked) as caught:
        through(make(EMAIL), BODY, *fields)
    assert caught.value.respond.policy == "shop/pii"
    each, request = make(EMAIL, on_uninspectable="Pass"), ask(headers=Headers(fields))
    each.on_request(request)
    body = each.open_request_body(request)
    assert body is not None
    assert body.feed(BODY) + body.finish() == BODY
    assert list(each.report(request).uninspected.values()) == [1]


def test_heads_both_ways() -> None:
    each = make(
        EMAIL,
        RedactionRule(name="places", headers=("x-user",), cookies=("sid",), query_params=("tok",)),
        RedactionRule(name="gone", headers=("x-debug",), action=RedactionAction("drop")),
    )
    fields = [(b"x-user", b"bob"), (b"x-debug", b"1"), (b"cookie", b"a=1; sid=abc"),
              (b"referer", b"http://x/?m=alice@example.com")]  # fmt: skip
    request = ask(headers=Headers(list(fields)), query=b"a=1&%74ok=zz&m=alice%40example.com")
    assert each.on_request(request) is None
    assert request.headers.pairs == [
        (b"x-user", b"***"), (b"cookie", b"a=1; sid=***"),
        (b"referer", b"http://x/?m=" + b"*" * 17),
    ]  # fmt: skip
    assert request.query == b"a=1&%74ok=**&m=" + b"*" * 17
    response = Response(status=200, headers=Headers([(b"set-cookie", b"sid=abc; Path=/")]))
    assert each.on_response(request, response) is None
    assert response.headers.pairs == [(b"set-cookie", b"sid=***; Path=/")]
    assert each.redact_texts(request, [b"GET /?m=alice@example.com"]) == [b"GET /?m=" + b"*" * 17]


def test_block_and_dry_run_and_condition() -> None:
    block = RedactionRule(name="mail", detector="email", action=RedactionAction("block"))
    said = make(block).on_request(ask(query=b"m=alice@example.com"))
    assert isinstance(said, Respond)
    assert (said.status, said.policy, said.rule) == (403, "shop/pii", "mail")
    assert b"alice" not in said.body + said.reason.encode()
    request = ask(query=b"m=alice@example.com")
    dry = make(block, is_dry_run=True)
    assert dry.on_request(request) is None
    assert request.query == b"m=alice@example.com"
    assert sum(dry.report(request).counts.values()) == 1
    other = make(block, condition=RequestCondition(methods=("GET",)))
    assert other.on_request(ask(query=b"m=alice@example.com")) is None


@pytest.mark.parametrize(
    ("rule", "more"),
    [
        (EMAIL, {"problem": "unknown field"}),
        (RedactionRule(name="a", detector="email", action=RedactionAction("hash")), {}),
        (RedactionRule(name="a", detector="custom", pattern="("), {}),
        (RedactionRule(name="a", json_paths=("$.a[-1]",)), {}),
        (RedactionRule(name="a", grpc_fields=("$.a",)), {}),
        (EMAIL, {"descriptors": "bm9uZQ=="}),
    ],
)
def test_a_policy_that_cannot_be_carried_out_fails_closed(
    rule: RedactionRule, more: dict[str, object]
) -> None:
    said = make(rule, **more).on_request(ask())
    assert isinstance(said, Respond)
    assert said.status == 500


def test_what_logs_are_told() -> None:
    each = make(EMAIL, direction="Response")
    request = ask()
    each.on_request(request)
    assert each.redact_texts(request, [b"/alice@example.com"]) == [b"/" + b"*" * 17]
    assert each.redact_texts(request, [b"/shop"]) == [b"/shop"]
    broken = make(EMAIL, problem="unknown field")
    assert broken.redact_texts(request, [b"/alice"]) == [b"[redacted]"]


def test_trailers_are_heads() -> None:
    each, request = make(EMAIL), ask()
    each.on_request(request)
    pairs = [(b"grpc-status", b"3"), (b"grpc-message", b"no user alice%40example.com")]
    found = redact_trailers([each], request, pairs, is_request=False)
    assert found == [pairs[0], (b"grpc-message", b"no user " + b"*" * 17)]
    ((key, where),) = each.report(request).counts
    assert (key.policy, key.rule, where) == (
        "shop/pii", "mail", "response trailer header grpc-message",
    )  # fmt: skip


def test_chains_of_codings_and_parts() -> None:
    packed = brotli.compress(gzip.compress(BODY))
    out = through(make(EMAIL), packed, JSON, (b"content-encoding", b"gzip, br"))
    assert gzip.decompress(brotli.decompress(out)) == CLEAN
    for fields in ([JSON, (b"content-encoding", b"gzip, lz4")], [JSON, (b"content-range", b"x")]):
        with pytest.raises(Blocked):
            through(make(EMAIL), BODY, *fields)
    with pytest.raises(Blocked):
        through(make(EMAIL, max_body_bytes=10), BODY, JSON)
    with pytest.raises(Blocked):
        through(make(EMAIL), b'{"a":"\xff\xfe"}', JSON)
    passed = through(make(EMAIL, max_body_bytes=10, on_uninspectable="Pass"), BODY, JSON, step=50)
    assert passed == BODY
