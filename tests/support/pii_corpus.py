"""A corpus of what detectors must find and leave, made anew from a seed for each run: nothing that
looks like somebody's secret is written down here.
"""

from __future__ import annotations

import base64
import datetime
import json
import random
import string
import uuid
from collections.abc import Iterator

from mesh.model.l7_policy import DetectorKind

Sample = tuple[DetectorKind, str, str]
"""Kind, text, and the value in it."""

_LETTERS = string.ascii_letters + string.digits
_CAPITALS = string.ascii_uppercase + string.digits
_SMALL = string.ascii_lowercase + string.digits
_HEX = "0123456789abcdef"
_BASE64 = _LETTERS + "+/"
_URL = _LETTERS + "-_"
_PHONES = (
    "+1 (415) 555-2671|+1-415-555-2671|+1 415.555.2671|(415) 555-2671|415-555-2671|415.555.2671|"
    "1-800-555-0199|+14155552671|+44 20 7183 8750|020 7183 8750|+44 7911 123456|07911 123456|"
    "07911123456|(020) 7183 8750|01632 960983|+49 30 901820|+49 (0)30 901820|0170 1234567|"
    "+49 170 1234567|0171/1234567|030/12345678|+33 1 42 68 53 00|01 42 68 53 00|01.42.68.53.00|"
    "06 12 34 56 78|+33612345678|+39 06 6982 3456|06 6982 3456|+39 347 123 4567|+34 912 345 678|"
    "+34612345678|+31 20 794 0800|020-7940800|06-12345678|+32 2 555 12 12|02 555 12 12|"
    "0475 12 34 56|+41 44 668 18 00|044 668 18 00|079 123 45 67|+43 1 58858 0|0664 1234567|"
    "+46 8 123 456 78|08-123 456 78|070-123 45 67|+47 22 12 34 56|+45 32 12 34 56|"
    "+358 9 1234567|09 1234 567|040 123 4567|+48 22 123 45 67|+420 212 345 678|+36 1 234 5678|"
    "+30 21 0123 4567|+351 21 123 4567|+353 1 234 5678|(01) 234 5678|087 123 4567|"
    "+7 495 123-45-67|8 (495) 123-45-67|8-495-123-45-67|+380 44 123 4567|044 123-45-67|"
    "+90 212 123 45 67|0212 123 45 67|+972 3-123-4567|03-123-4567|050-123-4567|+971 4 123 4567|"
    "04 123 4567|+91 98765 43210|098765 43210|+91-11-2345-6789|011-23456789|+86 138 0013 8000|"
    "138-0013-8000|+86 10 1234 5678|010-12345678|+81 3-1234-5678|03-1234-5678|090-1234-5678|"
    "+82 2-312-3456|02-312-3456|010-1234-5678|+65 6123 4567|+60 3-2161 2345|03-2161 2345|"
    "+62 21 1234 5678|021-1234567|0812-3456-7890|+63 2 8123 4567|0917 123 4567|+66 2 123 4567|"
    "02-123-4567|081-234-5678|+84 24 1234 5678|024 1234 5678|+61 2 9374 4000|(02) 9374 4000|"
    "0412 345 678|+64 9 123 4567|09 123 4567|021 123 4567|+55 11 98765-4321|(11) 98765-4321|"
    "+52 55 1234 5678|+54 11 1234-5678|011 4123-4567|+54 9 11 1234-5678|+56 2 2123 4567|"
    "+57 1 123 4567|+57 300 1234567|+51 1 123 4567|+27 11 123 4567|011 123 4567|082 123 4567|"
    "+234 1 123 4567|0803 123 4567|+254 20 123 4567|0712 345678|+20 2 12345678|+212 522 123456|"
    "0522 123456|+1(415)5552671|+44(0)2071838750|00442071838750|0044 20 7183 8750|"
    "011 44 20 7183 8750|+1 415 555 2671 ext 12|415-555-2671 x123|415-555-2671 ext. 99"
)
_CALLED_PHONES = (
    "347 123 4567|912 345 678|612 34 56 78|22 12 34 56|22 123 45 67|13800138000|11 98765-4321|"
    "55 1234 5678|1300 975 707|0612345678|501-234-567|030 901820|01 588580|06 1 234 5678"
)
_TOKENS = (
    "AKIA{c16} ASIA{c16} github_pat_{a22}_{a59} ghp_{a36} gho_{a36} ghu_{a36} ghs_{a36} "
    "ghr_{a76} glpat-{u20} glpat-{u27}.01.{s9} gldt-{u20} glrt-{u20} glcbt-64_{u20} "
    "glptt-{h40} glft-{u20} glagent-{u50} gloas-{h64} glsoat-{u20} GR1348941{u20} "
    "xoxb-{d12}-{d13}-{a24} xoxp-{d12}-{d12}-{d12}-{h32} xapp-1-A{c10}-{d13}-{h64} "
    "xoxe-1-{a140} xoxe.xoxp-1-{a140} sk_live_{a24} sk_live_51{a97} sk_test_{a24} "
    "rk_live_{a24} whsec_{a32} whsec_{b31}= npm_{a36} pypi-AgEIcHlwaS5vcmc{u150} "
    "pypi-AgENdGVzdC5weXBpLm9yZw{u150} AIza{u35} ya29.{u120} GOCSPX-{u28} 1//0{u60} "
    "{a3}8Q~{u34} sk-{a48} sk-proj-{u74}T3BlbkFJ{u74} sk-svcacct-{u60}T3BlbkFJ{u60} "
    "sk-admin-{u60} sk-ant-api03-{u93}AA sk-ant-admin01-{u93}AA sk-or-v1-{h64} hf_{l34} "
    "api_org_{l34} r8_{a37} gsk_{a52} xai-{a80} pplx-{a48} csk-{s48} tgp_v1_{u43} "
    "lsv2_pt_{h32}_{h10} nvapi-{u64} pcsk_{a6}_{a63} AC{h32} SK{h32} SG.{u22}.{u43} key-{h32} "
    "{h32}-us12 xkeysib-{h64}-{a16} PMAK-{h24}-{h34} re_{a8}_{a24} dop_v1_{h64} hvs.{u90} "
    "hvb.{u140} {a14}.atlasv1.{u67} shpat_{h32} dapi{h32} dapi{h32}-2 dp.pt.{a43} "
    "lin_api_{a40} secret_{a43} ntn_{a46} figd_{u40} pat{a14}.{h64} ATATT3xFfGF0{u176}={x8} "
    "ATBB{a32} NRAK-{c27} NRII-{u32} glsa_{a32}_{h8} glc_{b80}== dt0c01.{c24}.{c64} "
    "sntrys_{u100}_{u43} sntryu_{h64} sbp_{h40} sb_secret_{u31} pscale_tkn_{u43} "
    "rubygems_{h48} cio{a32} dckr_pat_{u27} oy2{s43} EAAAE{u59} sq0atp-{u22} {n10}:AA{u33} "
    "MT{a24}.{u6}.{u38} EZAK{a54} aio_{a28} LTAI{a20} AKID{a32} CLOJARS_{s60} bkua_{h40} "
    "CCIPAT_{a22}_{h40} pul-{h40} pnu_{a36} rdme_{s70} sgp_{h16}_{h40} ops_eyJ{b250} "
    "tskey-auth-{a12}CNTRL-{a32} v1.0-{h24}-{h146} EAACEdEose0cBA{a80} EAA{a150} HRKU-AA{u58} "
    "AKC{a69} cmVmd{a59} FLWSECK_TEST-{h32}-X sk_live_{h40} rzp_live_{a14} "
    "access-production-{h8}-{h4}-{h4}-{h4}-{h12} duffel_live_{u43} shippo_live_{h40} tfp_{u59} "
    "CFPAT-{u43} AQVN{u36} s-s4t2ud-{h64} zpka_{a32}_{h8}"
)

"""Shapes: `{h32}` is 32 of the alphabet h of `_ALPHABETS`."""
_IN_A_URL = (
    "DefaultEndpointsProtocol=https;AccountName=a;AccountKey=<{b86}==>;EndpointSuffix=x",
    "Endpoint=sb://x.servicebus.windows.net/;SharedAccessKeyName=R;SharedAccessKey=<{b43}=>",
    "https://a.blob.core.windows.net/c?sv=2022-11-02&se=2030-01-01T00:00:00Z&sig=<{a43}%3D>",
    "?sv=2021-06-08&sr=b&sig=<{a20}%2F{a20}%2B1%3D>&sp=r",
    "https://<hooks.slack.com/services/T{c8}/B{c10}/{a24}>",
    "authorization: FlyV1 <fm2_{b100}>",
)
_ALPHABETS = {
    "a": _LETTERS, "b": _BASE64, "c": _CAPITALS, "d": string.digits, "h": _HEX, "u": _URL,
    "l": string.ascii_letters, "n": "123456789", "s": _SMALL, "x": "0123456789ABCDEF",
}  # fmt: skip
_BANKS = (
    "DE{d18}", "GBNWBK{d14}", "FR{d10}{c11}{d2}", "NLABNA{d10}", "CH{d17}", "NO{d11}",
    "MTMALT{d5}{c18}", "ITX{d22}", "ES{d20}", "PL{d24}", "SE{d20}", "BE{d12}", "SA{d20}",
    "AE{d19}", "BR{d23}P1",
)  # fmt: skip
_CARDS = {
    "4": (4, 4, 4, 4), "51": (4, 4, 4, 4), "2223": (4, 4, 4, 4), "34": (4, 6, 5),
    "37": (4, 6, 5), "6011": (4, 4, 4, 4), "65": (4, 4, 4, 4), "3530": (4, 4, 4, 4),
    "62": (4, 4, 4, 4), "621": (6, 13), "49": (4, 4, 4, 4, 3), "2200": (4, 4, 4, 4),
    "5018": (4, 4, 4, 4), "6759": (4, 4, 4, 4),
}  # fmt: skip
_BETWEEN_CARDS = ("", " ", "-", ".", "  ", " - ", "\u00a0", "\u2009", "_", "/", "\u2011")
_BETWEEN_IBANS = ("", " ", "-", ".", "\u00a0")
_ADDRESSES = (
    "2001:0db8:85a3:0000:0000:8a2e:0370:7334|2001:db8::1|::1|2001:DB8:0:0:8:800:200C:417A|"
    "::ffff:192.0.2.128|64:ff9b::192.0.2.33|2001:db8::|fd12:3456:789a:1::1|1:2:3:4:5:6:7:8|"
    "fe80::a00:27ff:fe4e:66a1|192.168.1.1|10.0.0.255|8.8.8.8|100.64.0.1"
)
_WORDS = "the of a sk gl pul access secret re live test token pat api npm hf key"
_LABELS = (
    "RSA PRIVATE KEY", "PRIVATE KEY", "EC PRIVATE KEY", "DSA PRIVATE KEY", "OPENSSH PRIVATE KEY",
    "ENCRYPTED PRIVATE KEY", "PGP PRIVATE KEY BLOCK", "SSH2 ENCRYPTED PRIVATE KEY",
)  # fmt: skip
_WHERE = ("{}", "x: {} today", '{{"x":"{}","n":1}}', "a=1&x={}&y=2", "({})")


class Corpus:
    """All samples of one seed."""

    def __init__(self, seed: int) -> None:
        self._rng = random.Random(seed)

    def _draw(self, count: int, alphabet: str) -> str:
        return "".join(self._rng.choice(alphabet) for _ in range(count))

    def _fill(self, shape: str) -> str:
        out, rest = "", shape
        while "{" in rest:
            before, _, rest = rest.partition("{")
            inside, _, rest = rest.partition("}")
            out += before + self._draw(int(inside[1:]), _ALPHABETS[inside[0]])
        return out + rest

    def wanted(self) -> Iterator[Sample]:
        """What must be found."""
        yield from self._phones()
        yield from self._numbers()
        yield from self._tokens()
        yield from self._keys()
        for address in _ADDRESSES.split("|"):
            for where in (
                "{}",
                "client {} connected",
                '{{"ip":"{}"}}',
                "[{}]:443",
                "{}, 10",
                "{}/24",
            ):
                yield "ip", where.format(address), address

    def _phones(self) -> Iterator[Sample]:
        for number in _PHONES.split("|"):
            yield "phone", f"Reach me at {number} today", number
        for number in f"{_PHONES}|{_CALLED_PHONES}".split("|"):
            for where in ("phone: {}", '{{"phoneNumber": "{}", "x":1}}', "<tel>{}</tel>"):
                yield "phone", where.format(number), number

    def _numbers(self) -> Iterator[Sample]:
        for prefix, sizes in _CARDS.items():
            digits = prefix + self._draw(sum(sizes) - 1 - len(prefix), string.digits)
            digits += str(-_luhn_sum(digits + "0") % 10)
            for between in _BETWEEN_CARDS:
                parts, start = [], 0
                for size in sizes:
                    parts.append(digits[start : start + size])
                    start += size
                text = between.join(parts)
                if sizes == (6, 13) and between not in {"", " ", "-"}:
                    continue
                for where in ("card: {}", "paid with {} today", '{{"cardNumber":"{}"}}'):
                    yield "payment-card", where.format(text), text
        for shape in _BANKS:
            filled = self._fill(shape)
            country, rest = filled[:2], filled[2:]
            number = int("".join(str(int(each, 36)) for each in f"{rest}{country}00"))
            whole = f"{country}{98 - number % 97:02d}{rest}"
            for text in (whole, whole.lower()):
                groups = [text[at : at + 4] for at in range(0, len(text), 4)]
                for between in _BETWEEN_IBANS:
                    value = between.join(groups)
                    yield "iban", f"pay to {value} now", value
                    yield "iban", f'{{"iban":"{value}"}}', value

    def _tokens(self) -> Iterator[Sample]:
        for shape in _TOKENS.split():
            value = self._fill(shape)
            for where in _WHERE:
                yield "cloud-key", where.format(value), value
        for shape in _IN_A_URL:
            before, _, rest = self._fill(shape).partition("<")
            value, _, after = rest.partition(">")
            yield "cloud-key", before + value + after, value
        heads: tuple[dict[str, object], ...] = (
            {"alg": "HS256", "typ": "JWT"}, {"kid": "1", "alg": "EdDSA"},
            {"alg": "RS256", "x5c": [self._draw(1500, _BASE64)]},
        )  # fmt: skip
        for head in heads:
            value = f"{_part(head)}.{_part({'sub': 'me'})}.{self._draw(43, _URL)}"
            for where in _WHERE:
                yield "jwt", where.format(value), value
        sealed = _part({"alg": "dir", "enc": "A128CBC-HS256"})
        parts = (self._draw(count, _URL) for count in (22, 80, 22))
        value = f"{sealed}..{'.'.join(parts)}"
        yield "jwt", f"Bearer {value}", value

    def _keys(self) -> Iterator[Sample]:
        for label in _LABELS:
            before, after = ("---- ", " ----") if "SSH2" in label else ("-----", "-----")
            sealed = (
                "Proc-Type: 4,ENCRYPTED\nDEK-Info: AES-128-CBC,00FF\n\n" if "RSA" in label else ""
            )
            lines = "\n".join(self._draw(64, _BASE64) for _ in range(5))
            value = f"{before}BEGIN {label}{after}\n{sealed}{lines}\n{before}END {label}{after}"
            for text in (value, value.replace("\n", "\r\n"), value.replace("\n", " ")):
                yield "private-key", f"key: {text} end", text
        age = self._fill("AGE-SECRET-KEY-1{c58}")
        yield "private-key", f"# {age}", age

    def unwanted(self) -> Iterator[tuple[str, str]]:
        """What looks like it, by what it is."""
        rng = self._rng
        words = _WORDS.split()
        for _ in range(150):
            day = datetime.datetime.fromtimestamp(rng.randrange(10**9, 2 * 10**9), datetime.UTC)
            for name, text in (
                ("UUID", str(uuid.UUID(int=rng.getrandbits(128), version=4))),
                ("MD5", self._draw(32, _HEX)), ("SHA-1", self._draw(40, _HEX)),
                ("SHA-256", self._draw(64, _HEX)), ("object id", self._draw(24, _HEX)),
                ("seconds", str(rng.randrange(1_500_000_000, 1_900_000_000))),
                ("nanoseconds", str(rng.randrange(15 * 10**17, 19 * 10**17))),
                ("time", day.isoformat()), ("date", day.strftime("%d/%m/%Y")),
                ("dotted date", day.strftime("%d.%m.%Y")), ("packed", day.strftime("%Y%m%d%H%M%S")),
                ("version", f"{rng.randrange(20)}.{rng.randrange(99)}.{rng.randrange(999)}"),
                ("price", f"${rng.randrange(999)},{rng.randrange(100, 999)}.99"),
                ("float", repr(rng.random() * 1000)),
                ("place", f"{rng.uniform(-90, 90):.6f},{rng.uniform(-180, 180):.6f}"),
                ("number", self._draw(9, "123456789")), ("long number", self._draw(12, "789")),
                ("ISBN", self._fill("978-{n1}-{n2}-{n6}-1")),
                ("invoice", f"INV-2026-{self._draw(5, string.digits)}"),
                ("MAC", ":".join(self._draw(2, _HEX) for _ in range(6))),
                ("base64", self._draw(70, _BASE64)), ("base64url", self._draw(90, _URL)),
                ("slug", "-".join(rng.choice(words) for _ in range(9))),
                ("snake", "_".join(rng.choice(words) for _ in range(8))),
                ("traceparent", f"00-{self._draw(32, _HEX)}-{self._draw(16, _HEX)}-01"),
                ("ULID", "01" + self._draw(24, "0123456789ABCDEFGHJKMNPQRSTVWXYZ")),
                ("image", f"/img/{self._draw(8, _LETTERS)}@2x.png"),
                ("package", f"@scope/pkg@{rng.randrange(9)}.{rng.randrange(9)}.1"),
                ("C++", "std::" + rng.choice(["vector", "cout", "abs::x"])),
            ):  # fmt: skip
                yield name, rng.choice(_WHERE).format(text)


def _luhn_sum(digits: str) -> int:
    total = 0
    for index, each in enumerate(reversed(digits)):
        value = int(each) * (1 + index % 2)
        total += value - 9 * (value > 9)
    return total


def _part(value: object) -> str:
    packed = json.dumps(value, separators=(",", ":")).encode()
    return base64.urlsafe_b64encode(packed).decode().rstrip("=")
