"""Redaction: precision and recall per detector on generated corpora, and MB/s by content type.

Run: .venv/bin/python tests/bench/bench_redaction.py [--seed N]
Values are made anew from the seed, with python-stdnum's check digits; none is anybody's. The
corpus shares no code with the detectors, but it shares their author: judge recall accordingly.
"""

# ruff: noqa: E501 -- a generator is one line of a table
from __future__ import annotations

import argparse
import base64
import importlib
import json
import random
import time
from collections.abc import Callable

from stdnum import luhn
from stdnum.iso7064 import mod_97_10

from mesh.model.l7_policy import DetectorKind, RedactionPolicy, RedactionRule
from waypoint.filters.redact import views
from waypoint.filters.redact.detectors import BUILT_IN
from waypoint.filters.redact.rules import Plan, Report
from waypoint.filters.redact.scanner import Scanner
from waypoint.filters.redact.text_body import TextRedactor

WORDS = [
    "order",
    "shipped",
    "by",
    "the",
    "warehouse",
    "on",
    "time",
    "for",
    "review",
    "before",
    "invoice",
    "total",
    "amount",
]


def digits(rnd: random.Random, count: int) -> str:
    return "".join(rnd.choice("0123456789") for _ in range(count))


def card(rnd: random.Random) -> str:
    body = rnd.choice(["4", "51", "55", "2221", "37", "6011"])
    size = 15 if body == "37" else 16
    body += digits(rnd, size - 1 - len(body))
    whole = body + luhn.calc_check_digit(body)
    if size == 16 and rnd.random() < 0.5:
        return rnd.choice(" -").join(whole[i : i + 4] for i in range(0, 16, 4))
    return whole


def account(rnd: random.Random) -> str:
    country, bban = rnd.choice([("DE", digits(rnd, 18)), ("GB", "WEST" + digits(rnd, 14)),
                                ("FR", digits(rnd, 23)), ("NL", "ABNA" + digits(rnd, 10))])  # fmt: skip
    whole = country + mod_97_10.calc_check_digits(bban + country) + bban
    if rnd.random() < 0.5:
        return " ".join(whole[i : i + 4] for i in range(0, len(whole), 4))
    return whole


# python-stdnum's module, how it is written (9: digit, A: letter, d: birthday as yymmdd, D: as
# ddmmyy, m: as yymm, C: as yyyymmdd), and what stands before it where digits alone say too little.
IDS = [
    ("us.ssn", "999-99-9999", ""), ("es.dni", "99999999A", "DNI"), ("es.nie", "X9999999A", ""),
    ("fr.nir", "1m9999999999", ""), ("it.codicefiscale", "AAAAAA99A99A999A", ""),
    ("de.idnr", "99999999999", "Steuer-ID:"), ("pl.pesel", "d99999", "PESEL:"),
    ("br.cpf", "999.999.999-99", ""), ("se.personnummer", "d-9999", ""),
    ("in_.aadhaar", "9999 9999 9999", "aadhaar"), ("ca.sin", "999-999-999", "SIN"),
    ("nl.bsn", "999999999", "BSN"), ("ie.pps", "9999999AA", "PPS"),
    ("tr.tckimlik", "99999999999", ""), ("fi.hetu", "D-999A", ""),
    ("no.fodselsnummer", "D99999", ""), ("dk.cpr", "D-9999", "CPR"), ("kr.rrn", "d-1999999", ""),
    ("cn.ric", "110105C9999", ""), ("ch.ssn", "756.9999.9999.99", ""),
    ("za.idnr", "d9999089", "id number"), ("au.tfn", "999 999 999", "TFN"),
    ("gb.nhs", "999 999 9999", "NHS number"), ("be.nn", "d99999", "national number"),
]  # fmt: skip


def national(rnd: random.Random) -> str:
    """One of a score of countries', drawn until it is valid."""
    module, form, name = rnd.choice(IDS)
    is_valid = importlib.import_module("stdnum." + module).is_valid
    while True:
        born = [f"{rnd.randint(*each):02d}" for each in ((40, 99), (1, 12), (1, 28))]
        parts = {
            "9": rnd.choices("0123456789", k=len(form)),
            "A": rnd.choices("ABCDEFGHJKLMNPQRSTVWXYZ", k=len(form)),
            "d": ["".join(born)],
            "D": ["".join(reversed(born))],
            "m": ["".join(born[:2])],
            "C": ["19" + "".join(born)],
        }
        value = "".join(parts[each].pop() if each in parts else each for each in form)
        if is_valid(value):
            return f"{name}\0{value}" if name else value


def phone(rnd: random.Random) -> str:
    return rnd.choice([
        f"+1 {rnd.randint(201, 989)} 555 {digits(rnd, 4)}", f"+44 20 {digits(rnd, 4)} {digits(rnd, 4)}",
        f"({rnd.randint(201, 989)}) 555-{digits(rnd, 4)}", f"{rnd.randint(201, 989)}.555.{digits(rnd, 4)}",
        f"0{rnd.randint(30, 89)} {rnd.randint(1000, 9999)} {digits(rnd, 4)}", f"+49{rnd.randint(151, 179)}{digits(rnd, 8)}",
    ])  # fmt: skip


def token(rnd: random.Random) -> str:
    def part(value: object) -> str:
        return base64.urlsafe_b64encode(json.dumps(value).encode()).decode().rstrip("=")

    tail = base64.urlsafe_b64encode(rnd.randbytes(32)).decode().rstrip("=")
    return f"{part({'alg': 'RS256', 'kid': digits(rnd, 6)})}.{part({'sub': digits(rnd, 9)})}.{tail}"


def letters(rnd: random.Random, count: int) -> str:
    return "".join(rnd.choice("ABCDEFGHJKLMabcdefghjk23456789") for _ in range(count))


def key(rnd: random.Random) -> str:
    def text(count: int, alphabet: str = "ABCDEFGHJKLMabcdefghjk23456789") -> str:
        return "".join(rnd.choice(alphabet) for _ in range(count))

    secret = base64.b64encode(rnd.randbytes(30)).decode()
    # In two pieces each, so that no scanner of repositories takes the prefixes for leaks.
    return rnd.choice([
        "AKIA" + text(16).upper(), "ASIA" + text(16).upper(), f"aws_secret_access_key =\0{secret}",
        "AIza" + text(35), "ya29" + "." + text(60), "GOCSPX" + "-" + text(28),
        "AccountKey=\0" + base64.b64encode(rnd.randbytes(64)).decode(), "ghp" + "_" + text(36),
        "github_" + "pat_" + text(82), "glpat" + "-" + text(20), "sk" + "_live_" + text(24),
        "xoxb-" + digits(rnd, 12) + "-" + text(24), "SG" + "." + text(22) + "." + text(43),
        "npm" + "_" + text(36), "hf" + "_" + text(34), "dop" + "_v1_" + text(64, "0123456789abcdef"),
    ])  # fmt: skip


def pem(rnd: random.Random) -> str:
    body = base64.b64encode(rnd.randbytes(300)).decode()
    lines = "\n".join(body[i : i + 64] for i in range(0, len(body), 64))
    return "-----BEGIN " + f"PRIVATE KEY-----\n{lines}\n-----END PRIVATE KEY-----"


def mail(rnd: random.Random) -> str:
    return f"{letters(rnd, 6)}{rnd.choice('._+-')}{digits(rnd, 2)}@{rnd.choice(['example.com', 'mail.example.co.uk', 'a-b.io'])}"


def address(rnd: random.Random) -> str:
    if rnd.random() < 0.5:
        return ".".join(str(rnd.randint(1, 254)) for _ in range(4))
    return ":".join(f"{rnd.getrandbits(16):x}" for _ in range(8))


MAKERS: dict[DetectorKind, Callable[[random.Random], str]] = {
    "email": mail, "phone": phone, "payment-card": card, "iban": account, "national-id": national,
    "ip": address, "jwt": token, "cloud-key": key, "private-key": pem,
}  # fmt: skip


def decoy(rnd: random.Random) -> str:
    """What APIs are full of and nobody minds."""
    return rnd.choice([
        digits(rnd, rnd.choice([6, 9, 10, 13, 16])), f"{rnd.random() * 1e4}", f"2026-11-{rnd.randint(1, 28):02d}T07:48:00Z",
        f"{rnd.getrandbits(128):032x}", f"{rnd.getrandbits(160):040x}", f"v{rnd.randint(0, 9)}.{rnd.randint(0, 20)}.{rnd.randint(0, 9)}",
        f"logo@{rnd.randint(2, 3)}x.png", f"{rnd.getrandbits(32):08x}-{rnd.getrandbits(16):04x}-4{rnd.getrandbits(12):03x}-a{rnd.getrandbits(12):03x}-{rnd.getrandbits(48):012x}",
        f"{rnd.randint(1, 28):02d}/11/2026 10:30", "std::vector", f"#{digits(rnd, 5)}", f"SKU-{letters(rnd, 8)}",
    ])  # fmt: skip


def quality(seed: int, count: int = 1500) -> None:
    rnd = random.Random(seed)
    scanner = Scanner([(i, RedactionRule(name=k, detector=k)) for i, k in enumerate(BUILT_IN)])
    right: dict[str, int] = dict.fromkeys(MAKERS, 0)
    wrong: dict[str, int] = dict.fromkeys(MAKERS, 0)
    for kind, make in MAKERS.items():
        for _ in range(count):
            name, _, value = make(rnd).rpartition("\0")
            glue = "" if name.endswith("=") else " "
            text = f"{rnd.choice(WORDS)} {name}{glue}{value} {rnd.choice(WORDS)}, {decoy(rnd)}; {decoy(rnd)} ."
            view = text.encode()
            for hit in scanner.find(view):
                if hit.kind == kind and view[hit.start : hit.end].decode() == value:
                    right[kind] += 1
                else:
                    wrong[hit.kind] += 1
    print(f"seed {seed}, {count} values each, two decoys beside each")
    print("| detector | precision | recall |\n|---|---|---|")
    for kind in MAKERS:
        taken = right[kind] + wrong[kind]
        print(f"| {kind} | {right[kind] / max(taken, 1):.3f} | {right[kind] / count:.3f} |")


def record(rnd: random.Random) -> dict[str, object]:
    return {"id": rnd.randrange(10**9), "name": "Widget", "price": rnd.random() * 100,
            "at": "2026-11-23T07:48:00Z", "text": " ".join(rnd.choices(WORDS, k=9))}  # fmt: skip


def speed(seed: int) -> None:
    rnd = random.Random(seed)
    usual: list[DetectorKind] = ["email", "payment-card", "iban", "jwt"]
    plans = {
        name: Plan([(RedactionPolicy(namespace="b", name="b", rules=tuple(
            RedactionRule(name=kind, detector=kind) for kind in kinds)), None)])
        for name, kinds in (("email, card, iban, jwt", usual), ("all nine", list(BUILT_IN)))
    }  # fmt: skip
    print(
        "| content | detectors | size | clean us | 2 hits us | clean MB/s |\n|---|---|---|---|---|---|"
    )
    for size in (1_000, 10_000, 100_000):
        records: list[dict[str, object]] = []
        while len(json.dumps(records)) < size:
            records.append(record(rnd))
        clean = json.dumps(records).encode()
        records[0]["to"], records[-1]["card"] = "bob@example.com", card(rnd)
        hits = json.dumps(records).encode()
        for syntax in (views.JSON, views.TEXT, views.FORM, views.XML):
            for name, plan in plans.items():
                times = []
                for body in (clean, hits):
                    best = 1e9
                    for _ in range(7):
                        begin = time.perf_counter()
                        for _ in range(10):
                            each = TextRedactor(plan, Report(), syntax)
                            each.feed(body)
                            each.finish()
                        best = min(best, (time.perf_counter() - begin) / 10)
                    times.append(best * 1e6)
                print(
                    f"| {syntax.name} | {name} | {len(clean)} | {times[0]:.0f} | {times[1]:.0f} | {len(clean) / times[0]:.0f} |"
                )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=7)
    chosen = parser.parse_args().seed
    quality(chosen)
    speed(chosen)
