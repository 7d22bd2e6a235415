"""Spans through a real collector: over OTLP/HTTP by the SDK, over OTLP/gRPC by our client."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio
from prometheus_client import CollectorRegistry

from mesh.runtime.tracing import TracingSettings, open_tracer
from tests.support.otlp import Receiver, running_rotel

pytestmark = [pytest.mark.interop, pytest.mark.timeout(90)]
TRACE = "0af7651916cd43dd8448eb211c80319c"
PARENT = f"00-{TRACE}-b7ad6b7169203331-01"


@pytest.mark.parametrize("protocol", ["http/protobuf", "grpc"])
async def test_a_span_arrives_whole(protocol: str, tmp_path: Path) -> None:
    registry = CollectorRegistry()
    with Receiver() as receiver, running_rotel(receiver.url, tmp_path) as collector:
        settings = TracingSettings(
            otlp_endpoint=collector.grpc if protocol == "grpc" else collector.http,
            otlp_protocol=protocol,
            otel_resource_attributes="deployment.environment=te%20st",
            span_delay_ms=10,
        )
        tracer = open_tracer(settings, "ztunnel", {"k8s.node.name": "node1"}, registry)
        assert tracer is not None
        async with trio.open_nursery() as nursery:
            nursery.start_soon(tracer.run)
            began = trio.current_time()
            span = tracer.start("ztunnel inbound", "server", began, TRACE, PARENT)
            assert span is not None
            span.links = (f"00-{'1' * 32}-{'2' * 16}-01",)
            span.event("established", began + 0.25, answer=42)
            span.end(began + 1.5, {"ambit.policy": "shop/p", "bytes": 7, "cut": True}, "denied")
            with trio.fail_after(30):
                while not receiver.spans:
                    await trio.sleep(0.02)
            nursery.cancel_scope.cancel()
    (seen,) = receiver.spans
    assert (seen.trace_id, seen.parent_id, seen.span_id) == (TRACE, PARENT[36:52], span.span_id)
    assert (seen.name, seen.kind) == ("ztunnel inbound", 2)
    assert seen.attributes == {"ambit.policy": "shop/p", "bytes": 7, "cut": True}
    assert (seen.error, seen.events, seen.links) == ("denied", ["established"], ["2" * 16])
    assert seen.end_ns - seen.start_ns == 1_500_000_000
    assert seen.resource == {
        "service.name": "ztunnel",
        "k8s.node.name": "node1",
        "deployment.environment": "te st",
    }
    assert registry.get_sample_value("ambit_trace_spans_total", {"outcome": "exported"}) == 1
