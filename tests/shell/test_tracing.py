"""Spans: sampling is decided first, queues are bounded, and a bad collector harms nobody."""

from __future__ import annotations

import random
import socket
import subprocess
import sys
from collections.abc import Sequence

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.sdk.trace.sampling import Decision, TraceIdRatioBased
from prometheus_client import CollectorRegistry

from mesh.errors import ConfigError, MeshError, Unavailable
from mesh.runtime.config import load, resolve, shown
from mesh.runtime.tracing import Sampler, Span, Tracer, TracingSettings, open_tracer
from tests.support.otlp import Receiver
from tests.support.tree import ROOT

TRACE = "0af7651916cd43dd8448eb211c80319c"
SAMPLED, UNSAMPLED = (f"00-{TRACE}-b7ad6b7169203331-0{flag}" for flag in "10")


def sampler(name: str, argument: str = "") -> Sampler:
    return Sampler.of(TracingSettings(traces_sampler=name, traces_sampler_arg=argument))


@pytest.mark.parametrize(
    ("name", "root", "with_sampled", "with_unsampled"),
    [
        ("", True, True, False),
        ("always_on", True, True, True),
        ("always_off", False, False, False),
        ("parentbased_always_on", True, True, False),
        ("parentbased_always_off", False, True, False),
    ],
)
def test_samplers(name: str, root: bool, with_sampled: bool, with_unsampled: bool) -> None:
    chosen = sampler(name)
    assert chosen.is_sampled(TRACE) is root
    assert chosen.is_sampled(TRACE, SAMPLED) is with_sampled
    assert chosen.is_sampled(TRACE, UNSAMPLED) is with_unsampled


@given(st.integers(1, (1 << 128) - 1), st.floats(0, 1).map(lambda ratio: round(ratio, 6)))
def test_the_ratio_decides_as_the_sdk_does(trace_id: int, ratio: float) -> None:
    theirs = TraceIdRatioBased(ratio).should_sample(None, trace_id, "x").decision
    ours = sampler("traceidratio", f"{ratio:.6f}").is_sampled(f"{trace_id:032x}")
    assert ours == (theirs is Decision.RECORD_AND_SAMPLE)


@pytest.mark.parametrize(
    ("variable", "value", "said"),
    [
        ("OTEL_TRACES_SAMPLER", "often", "'often' is not one of always_on, always_off"),
        ("OTEL_TRACES_SAMPLER_ARG", "1.5", "'1.5' is not a ratio from 0 to 1"),
        ("OTEL_EXPORTER_OTLP_PROTOCOL", "http/json", "'http/json' is not one of http/protobuf"),
        ("OTEL_EXPORTER_OTLP_ENDPOINT", "collector:4317", "not a URL: 'collector:4317'"),
        ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "http://[::", "not a URL"),
        ("OTEL_BSP_MAX_QUEUE_SIZE", "0", "0 is not 1 or more"),
        ("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "5000", "do not fit into a queue of 2048"),
        ("OTEL_RESOURCE_ATTRIBUTES", "just words", "is not a list of key=value"),
        ("OTEL_SDK_DISABLED", "perhaps", "not a boolean"),
    ],
)
def test_a_wrong_variable_is_named(variable: str, value: str, said: str) -> None:
    environ = {
        "OTEL_TRACES_SAMPLER": "traceidratio",
        "OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4318",
        variable: value,
    }
    with pytest.raises(ConfigError) as caught:
        load(TracingSettings, [], environ)
    assert str(caught.value).startswith(f"{variable}: ")
    assert said in str(caught.value)


def test_the_variables_of_the_specification() -> None:
    base = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4318/base/"}
    assert load(TracingSettings, [], base).url().geturl() == "http://c:4318/base/v1/traces"
    full = base | {"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "https://d/mine"}
    assert load(TracingSettings, [], full).url().geturl() == "https://d/mine"
    assert load(TracingSettings, [], base).makes_traces
    for off in ({"OTEL_SDK_DISABLED": "true"}, {"OTEL_TRACES_EXPORTER": "none"}):
        assert not load(TracingSettings, [], base | off).makes_traces
    # Set to nothing is not set.
    assert load(TracingSettings, [], base | {"OTEL_SDK_DISABLED": ""}).makes_traces
    assert not load(TracingSettings, [], {"OTEL_EXPORTER_OTLP_ENDPOINT": ""}).makes_traces


def test_headers_are_never_printed() -> None:
    environ = {"OTEL_EXPORTER_OTLP_HEADERS": "authorization=Bearer%20s3cret"}
    resolved = resolve(TracingSettings, [], environ)
    assert resolved.config.otlp_headers.endswith("s3cret")
    assert "s3cret" not in resolved.describe()
    assert shown(resolved.config)["otlp_headers"] == "[set]"


def test_without_a_collector_opentelemetry_is_not_imported() -> None:
    code = (
        "import sys, ztunnel.app; from mesh.runtime.tracing import *;"
        "assert open_tracer(TracingSettings(), 'x', {}, None) is None;"
        "print(*{each.partition('.')[0] for each in sys.modules})"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert {"opentelemetry", "requests", "urllib3"}.isdisjoint(done.stdout.split())


class Slow:
    """An exporter that waits until it is let go, or fails."""

    def __init__(self, error: MeshError | None = None) -> None:
        self.go = trio.Event()
        self.error = error
        self.batches: list[int] = []
        self.is_closed = False

    async def export(self, spans: Sequence[Span]) -> None:
        await self.go.wait()
        if self.error is not None:
            raise self.error
        self.batches.append(len(spans))

    def close(self) -> None:
        self.is_closed = True


def count(registry: CollectorRegistry, outcome: str) -> float | None:
    return registry.get_sample_value("ambit_trace_spans_total", {"outcome": outcome})


def finish(tracer: Tracer, spans: int) -> None:
    for number in range(1, spans + 1):
        span = tracer.start("x", "client", trio.current_time(), f"{number:032x}")
        assert span is not None
        span.end(trio.current_time(), {})
        span.end(trio.current_time(), {})  # a second end changes nothing


async def test_the_queue_is_bounded_and_what_is_lost_is_counted() -> None:
    registry, exporter = CollectorRegistry(), Slow()
    settings = TracingSettings(span_queue=10, span_batch=4, span_delay_ms=1)
    tracer = Tracer(settings, exporter, registry, random.Random(7))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(tracer.run)
        finish(tracer, 4)
        await trio.testing.wait_all_tasks_blocked(0.05)
        finish(tracer, 15)  # four are under way, ten fit
        assert count(registry, "dropped") == 5
        exporter.go.set()
        with trio.fail_after(10):
            while count(registry, "exported") != 14:
                await trio.sleep(0.01)
        nursery.cancel_scope.cancel()
    assert exporter.batches == [4, 4, 4, 2]
    assert exporter.is_closed


async def test_what_waits_is_delivered_at_the_end() -> None:
    registry, exporter = CollectorRegistry(), Slow()
    exporter.go.set()
    tracer = Tracer(TracingSettings(), exporter, registry)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(tracer.run)
        finish(tracer, 3)
        await trio.testing.wait_all_tasks_blocked()
        assert exporter.batches == []
        nursery.cancel_scope.cancel()
    assert exporter.batches == [3]


async def test_failed_deliveries_are_counted_and_others_follow() -> None:
    registry, exporter = CollectorRegistry(), Slow(Unavailable("gone"))
    exporter.go.set()
    tracer = Tracer(TracingSettings(span_batch=1, span_delay_ms=1), exporter, registry)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(tracer.run)
        with trio.fail_after(10):
            finish(tracer, 2)
            while count(registry, "failed") != 2:
                await trio.sleep(0.01)
            exporter.error = None
            finish(tracer, 1)
            while count(registry, "exported") != 1:
                await trio.sleep(0.01)
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("protocol", ["http/protobuf", "grpc"])
@pytest.mark.parametrize("listens", [False, True])
async def test_a_dead_collector_and_a_mute_one_stop_nothing(protocol: str, listens: bool) -> None:
    registry = CollectorRegistry()
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        if not listens:
            server.close()
        settings = TracingSettings(
            otlp_endpoint=f"http://127.0.0.1:{port}",
            otlp_protocol=protocol,
            otlp_timeout_ms=200,
            span_export_timeout_ms=400,
            span_delay_ms=1,
        )
        tracer = open_tracer(settings, "x", {}, registry)
        assert tracer is not None
        turns = 0
        async with trio.open_nursery() as nursery:
            nursery.start_soon(tracer.run)
            finish(tracer, 1)
            with trio.fail_after(30):
                while count(registry, "failed") != 1:
                    await trio.sleep(0.005)
                    turns += 1
            nursery.cancel_scope.cancel()
        # The loop went on all the time.
        assert turns > 3 or not listens


async def test_headers_and_a_refusing_collector() -> None:
    registry = CollectorRegistry()
    with Receiver() as receiver:
        receiver.status = 400
        settings = TracingSettings(
            otlp_endpoint=receiver.url, otlp_headers="authorization=Bearer%20x", span_delay_ms=1
        )
        tracer = open_tracer(settings, "x", {}, registry)
        assert tracer is not None
        async with trio.open_nursery() as nursery:
            nursery.start_soon(tracer.run)
            with trio.fail_after(30):
                finish(tracer, 1)
                while count(registry, "failed") != 1:
                    await trio.sleep(0.01)
                receiver.status = 200
                finish(tracer, 2)
                while count(registry, "exported") != 2:
                    await trio.sleep(0.01)
            nursery.cancel_scope.cancel()
    assert len(receiver.spans) == 2
    assert {each["authorization"] for each in receiver.headers} == {"Bearer x"}
    assert {each.trace_id for each in receiver.spans} == {f"{n:032x}" for n in (1, 2)}


@pytest.mark.parametrize("protocol", ["http/protobuf", "grpc"])
async def test_a_mute_collector_does_not_hold_up_the_end(protocol: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        settings = TracingSettings(
            otlp_endpoint=f"http://127.0.0.1:{server.getsockname()[1]}",
            otlp_protocol=protocol,
            otlp_timeout_ms=600_000,
            span_export_timeout_ms=600_000,
            span_delay_ms=1,
        )
        tracer = open_tracer(settings, "x", {}, CollectorRegistry())
        assert tracer is not None
        with trio.fail_after(60):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(tracer.run)
                finish(tracer, 1)
                # It is asked, and will never answer.
                heard = await trio.to_thread.run_sync(server.accept)
                finish(tracer, 3)
                nursery.cancel_scope.cancel()
        heard[0].close()
