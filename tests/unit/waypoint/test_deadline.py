"""grpc-timeout and what tries are told."""

from __future__ import annotations

import pytest

from waypoint.deadline import (
    format_grpc_timeout,
    parse_grpc_timeout,
    request_seconds,
    shortest,
    tell,
)
from waypoint.filters.chain import Headers, Request


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        (b"1S", 1.0), (b"250m", 0.25), (b"5u", 5e-6), (b"7n", 7e-9), (b"2M", 120.0),
        (b"1H", 3600.0),
        (b"99999999H", 99_999_999 * 3600.0), (b"0m", 0.0),
        (b"", None), (b"S", None), (b"100000000S", None), (b"1s", None), (b"-1S", None),
        (b"1.5S", None), (b" 1S", None), (b"1S\n", None), (b"1S,2S", None),
    ],
)  # fmt: skip
def test_what_callers_of_grpc_say(text: bytes, seconds: float | None) -> None:
    found = parse_grpc_timeout(text)
    assert found == (pytest.approx(seconds) if seconds is not None else None)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.0, b"1m"), (0.2504, b"250m"), (90.0, b"90000m"), (200_000.0, b"200000S"),
     (6e9, b"1666666H"), (1e13, b"99999999H")],
)  # fmt: skip
def test_it_is_written_with_at_most_eight_digits(seconds: float, text: bytes) -> None:
    assert format_grpc_timeout(seconds) == text
    assert parse_grpc_timeout(text) is not None


def _request(timeout: bytes | None, *, is_grpc: bool = True) -> Request:
    pairs = [(b"grpc-timeout", timeout)] if timeout is not None else []
    return Request(method=b"POST", scheme=b"http", authority=b"a", path=b"/s/m",
                   headers=Headers(pairs), is_grpc=is_grpc)  # fmt: skip


def test_the_shorter_holds_and_only_grpc_is_asked() -> None:
    assert request_seconds(None, _request(None)) is None
    assert request_seconds(None, _request(b"2S")) == 2.0
    assert request_seconds(1.0, _request(b"2S")) == 1.0
    assert request_seconds(3.0, _request(b"2S")) == 2.0
    assert request_seconds(3.0, _request(b"nonsense")) == 3.0
    assert request_seconds(None, _request(b"2S", is_grpc=False)) is None
    assert (shortest(None, None), shortest(1.0, None), shortest(None, 2.0)) == (None, 1.0, 2.0)
    assert shortest(1.0, 2.0) == shortest(2.0, 1.0) == 1.0


def test_tries_are_told_what_is_left() -> None:
    headers = Headers([(b"grpc-timeout", b"9S"), (b"x-envoy-expected-rq-timeout-ms", b"1")])
    tell(headers, 1.5, is_grpc=True)
    told = [(b"grpc-timeout", b"1500m"), (b"x-envoy-expected-rq-timeout-ms", b"1500")]
    assert headers.pairs == told
    plain = Headers()
    tell(plain, 0.0, is_grpc=False)
    assert plain.pairs == [(b"x-envoy-expected-rq-timeout-ms", b"1")]
