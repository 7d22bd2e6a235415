"""waypoint.heads: what is gRPC, and what no configuration changes."""

from __future__ import annotations

import pytest

from mesh.model.route import HeaderChange
from waypoint import heads
from waypoint.filters.chain import Headers


@pytest.mark.parametrize(
    ("kind", "is_grpc"),
    [
        (b"application/grpc", True),
        (b"application/grpc+proto", True),
        (b"Application/gRPC; charset=utf-8", True),
        (b"application/grpc-web", False),
        (b"application/grpc-web+proto", False),
        (b"application/grpcish", False),
        (b"application/json", False),
        (b"", False),
    ],
)
def test_what_is_grpc(kind: bytes, is_grpc: bool) -> None:
    assert heads.is_grpc(kind) is is_grpc


def test_no_modifier_changes_where_a_message_ends() -> None:
    sent = [(b"content-length", b"3"), (b"x", b"1")]
    fields = Headers(list(sent))
    names = ("Content-Length", "Transfer-Encoding", "Connection", "Host", "Upgrade", "TE")
    heads.change(fields, HeaderChange(set=tuple((name, "9") for name in names)))
    heads.change(fields, HeaderChange(add=tuple((name, "9") for name in names)))
    assert fields.pairs == sent
    heads.change(fields, HeaderChange(set=(("X", "2"),), add=(("y", "3"),)))
    assert fields.pairs == [(b"content-length", b"3"), (b"x", b"2"), (b"y", b"3")]
