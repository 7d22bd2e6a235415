from __future__ import annotations

import pytest

from mesh.hbone.head import Baggage, ConnectHead, Forwarded, encode_request, traceparent_of
from mesh.hbone.head_template import HeadTemplate
from mesh.http.hpack_table import encode_block

TRACE = traceparent_of("4bf92f3577b34da6a3ce929d0e0e4736", 0xF067AA0BA902B7)
LONG = Baggage("Kubernetes", "shop" * 40, "deployment", "reviews", "reviews", "v3", "r", "z")


@pytest.mark.parametrize("baggage", [LONG, Baggage(namespace="shop"), Baggage()])
@pytest.mark.parametrize("host", ["", "reviews.shop.svc.cluster.local"])
@pytest.mark.parametrize("caller", ["10.244.1.7:45678", "[fd00:10:244::7]:45678"])
def test_a_block_is_what_the_head_would_be_encoded_to(
    baggage: Baggage, host: str, caller: str
) -> None:
    template = HeadTemplate("10.0.0.9:8080", baggage, host)
    for number in ("4bf92f3577b34da6a3ce929d0e0e4736", "a", "x-9" * 21):
        head = ConnectHead(
            "10.0.0.9:8080",
            baggage=baggage,
            forwarded=Forwarded(caller, host),
            traceparent=TRACE,
            connection_id=number,
        )
        assert template.block(number, caller, TRACE) == encode_block(encode_request(head))


def test_a_traceparent_is_padded() -> None:
    assert TRACE == "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-00"
