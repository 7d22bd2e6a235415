"""What stands in a value's place."""

from __future__ import annotations

import pytest

from mesh.errors import ConfigError
from mesh.model.l7_policy import RedactionAction, RedactionRule
from waypoint.filters.redact.actions import Secret, replace
from waypoint.filters.redact.detectors import BUILT_IN
from waypoint.filters.redact.scanner import Scanner

SECRET = Secret(b"k" * 32)


@pytest.mark.parametrize(
    ("action", "value", "expected"),
    [
        (RedactionAction("mask", 4), b"4111111111111111", b"************1111"),
        (RedactionAction("mask"), "j\u00fcrg".encode(), b"****"),
        (RedactionAction("mask", 4), b"12345", b"*****"),
        (RedactionAction("mask", 2, "#"), b"12345", b"###45"),
        (RedactionAction("mask", 0, "[gone]"), b"12345", b"[gone]"),
        (RedactionAction("drop"), b"12345", b""),
    ],
)
def test_mask_and_drop(action: RedactionAction, value: bytes, expected: bytes) -> None:
    assert replace(action, "custom", value, None) == expected


def test_a_token_is_the_value_however_written() -> None:
    def token(kind: str, value: bytes, secret: Secret = SECRET) -> bytes:
        return replace(RedactionAction("tokenize"), kind, value, secret)

    assert token("payment-card", b"4111 1111") == token("payment-card", b"4111-1111")
    assert token("email", b"A@b.org") == token("email", b"a@B.org")
    assert token("email", b"A@b.org") != token("email", b"c@b.org")
    assert token("email", b"A@b.org") != token("email", b"A@b.org", Secret(b"j" * 32))
    assert token("email", b"a@b.org").startswith(b"tok_email_")


def test_hash_is_of_the_bytes() -> None:
    one = replace(RedactionAction("hash"), "email", b"A@b.org", SECRET)
    assert one != replace(RedactionAction("hash"), "email", b"a@b.org", SECRET)
    assert one == replace(RedactionAction("hash"), "phone", b"A@b.org", SECRET)
    assert len(one) == 37


def test_no_detector_takes_a_result_for_a_value() -> None:
    scanner = Scanner(
        [(i, RedactionRule(name=kind, detector=kind)) for i, kind in enumerate(BUILT_IN)]
    )
    for number in range(200):
        value = b"%d@example.com" % number
        for kind in ("hash", "tokenize", "mask"):
            out = replace(RedactionAction(kind), "email", value, SECRET)  # type: ignore[arg-type]
            assert not list(scanner.find(b"phone ssn aws secret " + out))


def test_keys_that_are_missing_or_weak() -> None:
    with pytest.raises(ConfigError):
        replace(RedactionAction("hash"), "email", b"a", None)
    with pytest.raises(ConfigError):
        Secret(b"short")
    assert "k" * 8 not in repr(SECRET)
