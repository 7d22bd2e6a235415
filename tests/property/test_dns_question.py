"""Hostile DNS: any bytes are a question or refused; what dnslib writes, we read the same."""

from __future__ import annotations

import contextlib
import random

from dnslib import DNSRecord
from hypothesis import given
from hypothesis import strategies as st

from mesh.errors import RemoteProtocolError
from mesh.model.store import Store
from mesh.model.workload import Workload
from ztunnel.dns_plan import (
    Answer,
    Names,
    encode_answer,
    encode_failure,
    encode_format_error,
    is_answer_to,
    parse_question,
    plan_answer,
    read_addresses,
)

CLIENT = Workload("u", "curl", "shop")
LABEL = st.text("abcdefghijklmnopqrstuvwxyzABC0123456789-_", min_size=1, max_size=20)
NAME = st.lists(LABEL, min_size=1, max_size=6).map(".".join)


@given(st.binary(max_size=600))
def test_any_bytes(data: bytes) -> None:
    encode_format_error(data)
    with contextlib.suppress(RemoteProtocolError):
        read_addresses(data)
    try:
        question = parse_question(data)
    except RemoteProtocolError:
        return
    plan_answer(question, CLIENT, Store(), Names(), random.Random(1))
    assert encode_failure(question, 2)[:2] == data[:2]


@given(NAME, st.sampled_from(["A", "AAAA", "TXT", "SRV"]))
def test_reads_what_dnslib_writes(name: str, kind: str) -> None:
    query = bytes(DNSRecord.question(name, kind).pack())
    question = parse_question(query)
    assert question.name == name.lower()
    assert question.end == len(query)
    assert is_answer_to(encode_failure(question, 0), query, question)


@given(NAME, st.lists(st.ip_addresses(v=4).map(str), max_size=40), st.integers(512, 4096))
def test_dnslib_reads_what_we_write(name: str, addresses: list[str], limit: int) -> None:
    question = parse_question(bytes(DNSRecord.question(name).pack()))
    data = encode_answer(question, Answer(tuple(addresses)), limit=limit)
    record = DNSRecord.parse(data)
    found = [str(each.rdata) for each in record.rr]
    assert found == addresses[: len(found)]
    assert record.header.tc == (len(found) < len(addresses))
    assert len(data) <= limit


@given(NAME)
def test_candidates_are_few_and_begin_with_the_name(name: str) -> None:
    candidates = list(Names().candidates(name, "shop"))
    assert candidates[0] == (name, "")
    assert len(candidates) <= 12
