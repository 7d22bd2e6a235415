"""gRPC by field: paths and full names, nested, repeated, maps, compressed, and what is unknown."""

from __future__ import annotations

import base64
import gzip

import pytest
from google.protobuf import descriptor_pb2

from mesh.errors import ConfigError
from mesh.model.l7_policy import RedactionAction, RedactionPolicy, RedactionRule
from waypoint.filters.chain import Blocked, Headers, Request
from waypoint.filters.redact.bodies import open_body
from waypoint.filters.redact.descriptors import Descriptors, DescriptorSets
from waypoint.filters.redact.filter import RedactionFilter
from waypoint.filters.redact.rules import Plan, Report

FIELD = descriptor_pb2.FieldDescriptorProto


def descriptor_set() -> bytes:
    """service Shop { rpc Buy(Order) returns (User); }, as protoc would describe it."""
    file = descriptor_pb2.FileDescriptorProto(name="shop.proto", package="shop.v1", syntax="proto3")
    user = file.message_type.add(name="User")
    user.field.add(name="email", number=1, type=FIELD.TYPE_STRING, label=1, json_name="email")
    user.field.add(name="age", number=2, type=FIELD.TYPE_INT32, label=1, json_name="age")
    order = file.message_type.add(name="Order")
    order.field.add(
        name="buyer", number=1, type=FIELD.TYPE_MESSAGE, type_name=".shop.v1.User", label=1
    )
    order.field.add(
        name="others", number=2, type=FIELD.TYPE_MESSAGE, type_name=".shop.v1.User", label=3
    )
    order.field.add(name="card_number", number=3, type=FIELD.TYPE_STRING, label=1)
    order.field[-1].json_name = "cardNumber"
    order.field.add(name="tags", number=4, type=FIELD.TYPE_STRING, label=3)
    service = file.service.add(name="Shop")
    service.method.add(name="Buy", input_type=".shop.v1.Order", output_type=".shop.v1.User")
    return descriptor_pb2.FileDescriptorSet(file=[file]).SerializeToString()


KNOWN = Descriptors(descriptor_set())
ORDER = KNOWN.message("shop.v1.Order")


def order() -> bytes:
    found = ORDER(card_number="4111", tags=["x", "mail bob@example.com"])
    found.buyer.email, found.buyer.age = "a@b.io", 41
    found.others.add(email="c@d.io", age=1)
    return bytes(found.SerializeToString())


def frame(message: bytes, flag: int = 0) -> bytes:
    return bytes((flag,)) + len(message).to_bytes(4, "big") + message


def redact(raw: bytes, *, path: bytes = b"/shop.v1.Shop/Buy", coding: bytes = b"gzip",
           mode: str = "Block", report: Report | None = None, **rule: object) -> bytes:  # fmt: skip
    made = RedactionRule("r", **rule)  # type: ignore[arg-type]
    policy = RedactionPolicy("shop", "p", rules=(made,), on_uninspectable=mode)  # type: ignore[arg-type]
    headers = Headers([(b"content-type", b"application/grpc"), (b"grpc-encoding", coding)])
    request = Request(method=b"POST", scheme=b"http", authority=b"a", path=path, headers=headers)
    wholes = []
    for step in (len(raw), 1, 3):
        plan = Plan([(policy, None)], DescriptorSets([KNOWN]))
        body = open_body(plan, report or Report(), request, headers, is_request=True)
        assert body is not None
        pieces = [body.feed(raw[i : i + step]) for i in range(0, len(raw), step)]
        wholes.append(b"".join(pieces) + body.finish())
    assert len(set(wholes)) == 1
    return wholes[0]


def read(raw: bytes) -> object:
    return ORDER.FromString(raw[5:])


@pytest.mark.parametrize(
    ("names", "change"),
    [
        (("shop.v1.User.email",), {"email": "******"}),
        (("$..email",), {"email": "******"}),
        (("$.buyer.email", "$.others[*].email"), {"email": "******"}),
        (("$.buyer", "$.others[0]"), {"email": "******", "age": 0}),
        (("shop.v1.User.age",), {"age": 0}),
    ],
)
def test_fields(names: tuple[str, ...], change: dict[str, object]) -> None:
    found = read(redact(frame(order()), grpc_fields=names))
    wanted = ORDER.FromString(order())
    for user in (wanted.buyer, *wanted.others):
        for name, value in change.items():
            setattr(user, name, value)
    assert found == wanted


def test_either_name_of_a_field_drop_and_packed_messages() -> None:
    drop = RedactionAction("drop")
    raw = frame(gzip.compress(order()), 1) + frame(order())
    out = redact(raw, grpc_fields=("$.cardNumber",), action=drop)
    size = int.from_bytes(out[1:5], "big")
    first = ORDER.FromString(gzip.decompress(out[5 : 5 + size]))
    assert out[0] == 1
    assert first == read(out[5 + size :])
    assert not first.card_number
    assert first.buyer.age == 41


def test_detectors_look_at_text_fields() -> None:
    found = read(redact(frame(order()), detector="email"))
    assert list(found.tags) == ["x", "mail " + "*" * 15]  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("raw", "more"),
    [
        (frame(order()), {"path": b"/shop.v1.Shop/Sell"}),
        (frame(b"\xff\xff\xff"), {}),
        (frame(order() + b"\xf8\x01\x07"), {}),  # a field that the descriptor does not know
        (frame(order())[:-1], {}),
        (frame(b"not gzip", 1), {}),
        (frame(order(), 1), {"coding": b"snappy"}),
        (b"\x00\x7f\xff\xff\xff" + bytes(100), {}),
    ],
)
def test_what_cannot_be_inspected(raw: bytes, more: dict[str, bytes]) -> None:
    with pytest.raises(Blocked):
        redact(raw, grpc_fields=("$.card_number",), **more)  # type: ignore[arg-type]
    report = Report()
    passed = redact(raw, mode="Pass", report=report, grpc_fields=("$..nothing",), **more)  # type: ignore[arg-type]
    assert passed == raw
    assert report.uninspected


@pytest.mark.parametrize("raw", [b"", b"\xff", b"x" * (5 << 20)])
def test_descriptors_that_are_none(raw: bytes) -> None:
    with pytest.raises(ConfigError):
        Descriptors(raw)


def test_policies_may_bring_a_set_each() -> None:
    file = descriptor_pb2.FileDescriptorProto(name="v2.proto", package="shop.v2", syntax="proto3")
    note = file.message_type.add(name="Note")
    note.field.add(name="text", number=1, type=FIELD.TYPE_STRING, label=1)
    other = descriptor_pb2.FileDescriptorSet(file=[file]).SerializeToString()

    def policy(name: str, field: str, known: bytes) -> RedactionPolicy:
        rule = RedactionRule("r", grpc_fields=(field,), action=RedactionAction("drop"))
        sets = base64.b64encode(known).decode()
        return RedactionPolicy("shop", name, "Request", rules=(rule,), descriptors=sets)

    policies = [
        policy("notes", "shop.v2.Note.text", other),
        policy("mails", "shop.v1.User.email", descriptor_set()),
    ]
    raw = frame(order())
    for each in (policies, policies[::-1]):
        redaction = RedactionFilter(each, lambda _name: b"")
        headers = Headers([(b"content-type", b"application/grpc")])
        request = Request(method=b"POST", scheme=b"http", authority=b"a", path=b"/shop.v1.Shop/Buy",
                          headers=headers)  # fmt: skip
        assert redaction.on_request(request) is None
        body = redaction.open_request_body(request)
        assert body is not None
        assert read(body.feed(raw) + body.finish()).buyer.email == ""  # type: ignore[attr-defined]
