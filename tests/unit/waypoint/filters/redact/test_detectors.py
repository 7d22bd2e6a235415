"""What each detector takes for a value, and what it must leave alone."""

from __future__ import annotations

import base64
import json

import pytest

from mesh.errors import ConfigError
from mesh.model.l7_policy import DetectorKind, RedactionRule
from waypoint.filters.redact.detectors import BUILT_IN
from waypoint.filters.redact.scanner import Scanner


def found(kind: DetectorKind, text: str, **more: str) -> list[str]:
    scanner = Scanner([(0, RedactionRule(name=kind, detector=kind, **more))])  # type: ignore[arg-type]
    view = text.encode()
    return [view[hit.start : hit.end].decode() for hit in scanner.find(view)]


def token(header: object) -> str:
    def part(value: object) -> str:
        return base64.urlsafe_b64encode(json.dumps(value).encode()).decode().rstrip("=")

    return f"{part(header)}.{part({'sub': '1'})}.c2lnbmF0dXJl"


OLD_GITHUB = "gh" + "a1B2" * 9 + "c3"
GOOGLE = "AIza" + "Sy0123456789" * 2 + "abcdefghijk"
TAKEN: list[tuple[DetectorKind, str, str]] = [
    ("email", "mail <Bob.Smith+tag@Mail.Example.co.uk>, ok", "Bob.Smith+tag@Mail.Example.co.uk"),
    ("email", "to o'neil_x@a-b.io.", "o'neil_x@a-b.io"),
    ("email", "?next=user%40example.org&x=1", "user%40example.org"),
    ("email", "j\u00fcrgen@m\u00fcller.de!", "j\u00fcrgen@m\u00fcller.de"),
    ("phone", "call +1 (212) 555-0187 now", "+1 (212) 555-0187"),
    ("phone", "+442079460958", "+442079460958"),
    ("phone", "tel 212-555-0187.", "212-555-0187"),
    ("phone", "(212) 555 0187", "(212) 555 0187"),
    ("phone", "020 7946 0958", "020 7946 0958"),
    ("phone", "01 23 45 67 89", "01 23 45 67 89"),
    ("phone", '"phone": 2125550187', "2125550187"),
    ("phone", "0049 30 1234567", "0049 30 1234567"),
    ("payment-card", "paid 4111111111111111 ok", "4111111111111111"),
    ("payment-card", "5555-5555-5555-4444", "5555-5555-5555-4444"),
    ("payment-card", "3782 822463 10005", "3782 822463 10005"),
    ("payment-card", "4111 1111 1111 1111 123", "4111 1111 1111 1111"),
    ("payment-card", "4111 1111 1111 1111 12 29", "4111 1111 1111 1111"),
    ("iban", "to DE89370400440532013000.", "DE89370400440532013000"),
    ("iban", "GB82 WEST 1234 5698 7654 32 then", "GB82 WEST 1234 5698 7654 32"),
    ("iban", "gb82west12345698765432", "gb82west12345698765432"),
    ("national-id", "SSN 123-45-6789", "123-45-6789"),
    ("national-id", '"ssn":"123456789"', "123456789"),
    ("national-id", "NI AB123456C", "AB123456C"),
    ("national-id", "dni 12345678Z", "12345678Z"),
    ("national-id", "RSSMRA85T10A562S", "RSSMRA85T10A562S"),
    ("national-id", "390.533.447-05", "390.533.447-05"),
    *(("national-id", text, text) for text in (
        "880320-0016", "131052-308T", "710319/2745", "1630615123457", "X2482300W",
        "295109912611193", "2 95 10 99 126 111 93", "RCCMNL83S18D969H", "36 574 261 809",
        "756.9217.0769.85", "00000000 0 ZZ4", "6433435F", "123-456-782", "2341 2341 2346",
        "ACUPA7085R", "971013-9019902", "1-2345-45678-78-1", "770305-02-1234", "S1234567D",
        "34201-0891231-8", "470513-1765172", "7503305044089", "112-233-445 95",
        "12.531.909-2", "20-05536168-2",
        "BOXW310820HNERXN09", "44051401359", "10000000146", "15108695088", "85.07.30-033.28",
    )),
    *(("national-id", f"{name} {text}", text) for name, text in (
        ("BSN:", "111222333"), ("CPR", "211062-5629"), ("egn", "7523169263"),
        ("Steuer-ID", "36574261809"), ("nhs number", "943 476 5870"), ("TFN", "123 456 782"),
        ("aadhaar:", "234123412346"), ("personnummer", "8803200016"), ("vnr person", "1237010180"),
    )),
    ("national-id", '{"bsns": ["111222333"]}'.replace('"', "\n"), "111222333"),
    *(("phone", text, text) for text in (
        "(11) 91234-5678", "138 1234 5678", "98765 43210", "8 (912) 345-67-89", "0412 345 678",
        "090-1234-5678", "06-12345678", "+33 1 23 45 67 89", "+44 (0)20 7946 0958",
        "001-555-123-4567x123", "(555)123-4567 ext. 12", "+81-3-1234-5678", "+1.555.123.4567",
    )),
    ("phone", "phone: 512 345 678", "512 345 678"),
    ("phone", "contact 555-0187", "555-0187"),
    ("ip", "from 10.20.30.40:8080", "10.20.30.40"),
    ("ip", "[2001:db8::1]:80", "2001:db8::1"),
    ("ip", "::ffff:10.0.0.1", "::ffff:10.0.0.1"),
    ("jwt", "Bearer " + token({"alg": "HS256"}), token({"alg": "HS256"})),
    ("cloud-key", "id=AKIA" + "IOSFODNN7EXAMPLE", "AKIA" + "IOSFODNN7EXAMPLE"),
    ("cloud-key", "aws_secret: wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY",
     "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY"),
    *(("cloud-key", f"secret_access_key={text}\n", text) for text in (
        "/jCY1rbNvIWWdB/eChw1CS+8Nh74vRMPjjqS35E/", "+fb7+q3hTUi9Mxf4K4ie3EuKeMiupWVcyAAzKgq1",
        "gFWilj1o47Lrwy+PI8RJ7PJCc0ZjcVe8CKeF+zQ+",
    )),
    ("cloud-key", f"{OLD_GITHUB}, {OLD_GITHUB[2:]}", OLD_GITHUB),
    ("cloud-key", f"k={GOOGLE}&", GOOGLE),
    ("cloud-key", "xoxb-" + "123456789012-abcdef", "xoxb-" + "123456789012-abcdef"),
]  # fmt: skip
LEFT: list[tuple[DetectorKind, str]] = [
    ("email", "logo@2x.png and user@localhost, a@b"),
    ("email", "git@github.com:org/repo.git"),
    ("email", "pkg@1.2.3"),
    ("phone", "2026-11-23T07:48:00Z 01/02/2026 10:30"),
    ("phone", '"id": 2125550187'),
    ("phone", "3.14159265358979 1700000000"),
    ("phone", "550e8400-e29b-41d4-a716-446655440000"),
    ("payment-card", "4111111111111112 and 1234567812345670"),
    ("payment-card", "0.4111111111111111"),
    ("payment-card", "411 1111 1111 1111 11"),
    ("iban", "DE89370400440532013001 XX89370400440532013000"),
    ("national-id", "000-12-3456 666-12-3456 123-00-4567"),
    ("national-id", '"order": 123456789'),
    ("national-id", "dni 12345678A"),
    ("national-id", "order 44051401359, invoice_no: 10000000146, #15108695088"),
    ("national-id", "1763884080000 1763884080 4111 1111 1111 1112"),
    ("payment-card", "id 4222222222222 and 30569309025904"),
    ("phone", "0012-3456-78 0-306-40615-2 978-0-306-40615-7 1763884080000"),
    ("ip", "1.2.3 999.1.1.1 1.2.3.4.5 07:48:00 std::cout v1.2.3.4"),
    ("jwt", "eyJub3QiOiJhIGp3dCJ9.eyJzdWIiOiIxIn0.abc"),
    ("cloud-key", "commit da39a3ee5e6b4b0d3255bfef95601890afd80709 secret"),
    ("cloud-key", "aws secret: wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEYwJalrXUtnFEMI/K7M"),
    ("private-key", "-----BEGIN PUBLIC KEY-----\nMIIB\n-----END PUBLIC KEY-----"),
]


@pytest.mark.parametrize(("kind", "text", "value"), TAKEN)
def test_taken(kind: DetectorKind, text: str, value: str) -> None:
    assert found(kind, text) == [value]


@pytest.mark.parametrize(("kind", "text"), LEFT)
def test_left(kind: DetectorKind, text: str) -> None:
    assert found(kind, text) == []


@pytest.mark.parametrize("ending", ["-----END RSA PRIVATE KEY-----", ""])
def test_private_keys_to_their_end(ending: str) -> None:
    key = "-----BEGIN RSA PRIVATE KEY-----\nMIIEow==\nAbC\n" + ending
    assert found("private-key", "a " + key + "\n! b") == [key.rstrip()]


def test_custom_with_validators() -> None:
    assert found("custom", "a c-18 b c-79927398713", pattern=r"\d+", validator="luhn") == [
        "18",
        "79927398713",
    ]
    assert found("custom", "GB82WEST12345698765432", pattern=r"\w+", validator="mod97")
    assert not found("custom", "GB82WEST12345698765433", pattern=r"\w+", validator="mod97")


@pytest.mark.parametrize("pattern", ["(", "", "x*", r"(?=a)b", "a" * 5000])
def test_custom_patterns_that_are_refused(pattern: str) -> None:
    with pytest.raises(ConfigError):
        found("custom", "x", pattern=pattern)


def test_all_kinds_together_find_each() -> None:
    scanner = Scanner(
        [(i, RedactionRule(name=kind, detector=kind)) for i, kind in enumerate(BUILT_IN)]
    )
    for kind, text, value in TAKEN:
        view = b"a " + text.encode()
        hits = [(hit.kind, view[hit.start : hit.end].decode()) for hit in scanner.find(view)]
        assert hits == [(kind, value)], text
