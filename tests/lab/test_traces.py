"""Traces of a whole mesh through a real collector: both node proxies' spans make one tree."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.labs import TestLab, eventually, running_lab
from tests.support.otlp import ROTEL, Received, Receiver, decode, running_rotel
from tests.support.tree import ROOT

pytestmark = [pytest.mark.lab, pytest.mark.interop, pytest.mark.timeout(180)]

DATA = ROOT / "tests" / "lab" / "data"
ASK = """
import socket
with socket.create_connection(("echo", 7), timeout=10) as c:
    c.sendall(b"twelve bytes")
    c.shutdown(socket.SHUT_WR)
    with c.makefile("rb") as f:
        print(len(f.read()))
"""
DENY = {
    "apiVersion": "security.istio.io/v1",
    "kind": "AuthorizationPolicy",
    "metadata": {"name": "nobody", "namespace": "echo"},
    "spec": {"action": "DENY", "rules": [{}]},
}


def collector_objects() -> list[dict[str, Any]]:
    text = (DATA / "traces" / "collector.yaml").read_text().replace("ROTEL", str(ROTEL))
    return list(yaml.safe_load_all(text))


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestLab]:
    directory = tmp_path_factory.mktemp("traces")
    shutil.copy(DATA / "echo" / "echo.yaml", directory)
    shutil.copy(DATA / "traces" / "web.yaml", directory)
    (directory / "collector.yaml").write_text(yaml.safe_dump_all(collector_objects()))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OTEL_BSP_SCHEDULE_DELAY", "100")
        endpoint = "http://collector.observability.svc.cluster.local:4318"
        with running_lab(Path(directory), "--otlp", endpoint, name="test-traces") as lab:
            yield lab


def spans(lab: TestLab) -> list[Received]:
    chunks = lab.client.logs(pod=("observability", "collector"), container="receiver")
    lines = b"".join(chunks).splitlines()
    return [span for line in lines for span in decode(base64.b64decode(line))]


def records(lab: TestLab, node: str) -> list[dict[str, object]]:
    lines = b"".join(lab.client.logs(daemon=f"ztunnel@{node}")).splitlines()
    return [json.loads(line) for line in lines if b'"scope":"access"' in line]


def pair(lab: TestLab, flag: str) -> tuple[Received, Received]:
    """The two spans of one connection that ended with `flag` at its destination."""
    seen = spans(lab)
    inbound = [
        each
        for each in seen
        if each.name == "ztunnel inbound"
        and each.attributes["response_flags"] == flag
        and each.attributes["istio.destination_workload"] == "echo"
    ]
    assert inbound
    outbound = [each for each in seen if each.span_id == inbound[-1].parent_id]
    assert len(outbound) == 1
    return outbound[0], inbound[-1]


def test_one_tree_for_a_connection_through_two_nodes(lab: TestLab) -> None:
    # The first may still be on its way to being enrolled, and go untunnelled.
    def asked() -> tuple[Received, Received]:
        assert lab.python("echo/caller", ASK) == "12"
        return eventually(lambda: pair(lab, "-"), seconds=5)

    outbound, inbound = eventually(asked, seconds=60)
    assert (outbound.name, outbound.kind, outbound.parent_id) == ("ztunnel outbound", 3, "")
    assert inbound.kind == 2
    assert outbound.trace_id == inbound.trace_id
    assert outbound.resource["k8s.node.name"] == "node1"
    assert inbound.resource["k8s.node.name"] == "node2"
    assert outbound.resource["service.name"] == "ztunnel"
    for span in (outbound, inbound):
        told = span.attributes
        assert told["istio.source_workload"] == "caller"
        assert told["istio.source_namespace"] == "echo"
        assert told["istio.destination_workload"] == "echo"
        assert told["istio.destination_service"] == "echo.echo.svc.cluster.local"
        assert told["istio.source_principal"] == "spiffe://cluster.local/ns/echo/sa/default"
        assert (told["istio.tcp_received_bytes"], told["istio.tcp_sent_bytes"]) == (12, 12)
        assert told["ambit.connection.id"] == outbound.trace_id
        assert "established" in span.events
    assert outbound.attributes["ambit.pool.wait_seconds"] >= 0
    assert inbound.attributes["ambit.dial_seconds"] >= 0
    # The same id in both access logs.
    for node in ("node1", "node2"):
        assert outbound.trace_id in {each["connection.id"] for each in records(lab, node)}


@pytest.fixture
def denied(lab: TestLab) -> Iterator[None]:
    lab.client.apply(DENY)
    yield
    lab.client.delete("AuthorizationPolicy", "echo", "nobody")


@pytest.mark.usefixtures("denied")
def test_a_denied_connection_names_its_policy_at_the_end_that_denied(lab: TestLab) -> None:
    def asked() -> tuple[Received, Received]:
        lab.client.run("echo", "caller", ["python3", "-c", ASK])
        outbound, inbound = eventually(lambda: pair(lab, "DENY"), seconds=5)
        # One that was open when the policy came was cut, not refused: its caller had its 200.
        assert "closed due to policy change" not in inbound.error
        return outbound, inbound

    outbound, inbound = eventually(asked, seconds=60)
    assert (inbound.attributes["ambit.policy"], inbound.attributes["ambit.policy.rule"]) == (
        "echo/nobody",
        0,
    )
    assert "denied by policy echo/nobody, rule 0" in inbound.error
    assert outbound.attributes["response_flags"] == "DENY"
    assert outbound.error


GET = """
import json, sys, urllib.request
request = urllib.request.Request("http://web/of/bob", headers=json.loads(sys.argv[1]))
print(urllib.request.urlopen(request, timeout=10).read().decode())
"""


def test_requests_through_a_waypoint_are_in_the_tree(lab: TestLab) -> None:
    command = [sys.executable, "-m", "mesh.cli", "waypoint", "apply", "-n", "echo", "--wait"]
    command += ["--lab", lab.client.address.name]
    done = subprocess.run(command, capture_output=True, text=True, timeout=150, check=False)
    assert done.returncode == 0, done.stderr

    def asked(**headers: str) -> list[Received]:
        """The four spans, from the outermost to the innermost."""
        seen = json.loads(lab.python("echo/caller", GET, json.dumps(headers)))
        assert "traceparent" in seen
        _, trace, parent, _ = seen["traceparent"].split("-")

        def arrived() -> list[Received]:
            known = {each.span_id: each for each in spans(lab) if each.trace_id == trace}
            assert parent in known
            path = [known[parent]]
            while path[0].parent_id in known:
                path.insert(0, known[path[0].parent_id])
            below = [each for each in known.values() if each.parent_id == parent]
            assert len(path) >= 2
            return [*path, *below]

        return eventually(arrived, seconds=10)

    def whole() -> list[Received]:
        # The first ones may have gone past the waypoint.
        found = asked()
        assert [each.name for each in found] == [
            "ztunnel outbound", "GET echo/web.echo.svc.cluster.local",
            "GET echo/web.echo.svc.cluster.local", "ztunnel inbound",
        ]  # fmt: skip
        return found

    outer, server, tried, inner = eventually(whole, seconds=60)
    assert [each.kind for each in (outer, server, tried, inner)] == [3, 2, 3, 2]
    assert server.resource["service.name"] == tried.resource["service.name"] == "waypoint"
    assert (outer.resource["k8s.node.name"], inner.resource["k8s.node.name"]) == ("node1", "node2")
    assert server.attributes["url.path"] == "/of/bob"
    assert server.attributes["http.response.status_code"] == 200
    assert server.attributes["istio.source_workload"] == "caller"
    assert tried.attributes["istio.destination_workload"] == "web"

    # Who brings a context of its own stays in it.
    trace, span = "12" * 16, "34" * 8
    server, tried, *_ = asked(traceparent=f"00-{trace}-{span}-01", tracestate="a=b")
    assert (server.trace_id, server.parent_id) == (trace, span)
    assert tried.parent_id == server.span_id


@pytest.fixture
def no_collector(lab: TestLab) -> Iterator[None]:
    manifest = next(each for each in collector_objects() if each["kind"] == "Pod")
    lab.client.delete("Pod", "observability", "collector")
    yield
    lab.client.apply(manifest)

    def serves() -> None:
        pods = lab.client.get("Pod", "observability", "collector")
        conditions = [each for pod in pods for each in pod["status"].get("conditions", ())]
        assert "True" in [each["status"] for each in conditions if each["type"] == "Ready"]

    eventually(serves, seconds=60)


@pytest.mark.usefixtures("no_collector")
def test_traffic_goes_on_when_the_collector_dies(lab: TestLab) -> None:
    def served() -> None:
        assert lab.python("echo/caller", ASK) == "12"

    eventually(served, seconds=60)
    for _ in range(20):
        served()

    def counted() -> None:
        status, body = lab.client.http_get("node1", "/metrics", port=15020)
        assert status == 200
        assert b'ambit_trace_spans_total{outcome="failed"}' in body
        failed = [line for line in body.splitlines() if b'outcome="failed"' in line]
        assert float(failed[0].split()[-1]) > 0

    eventually(counted, seconds=60)


def test_a_collector_of_this_machine_over_grpc(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Receiver() as receiver, running_rotel(receiver.url, tmp_path) as collector:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.grpc)
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc")
        monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "100")
        with running_lab(DATA / "echo", name="test-traces-out") as lab:

            def traced() -> None:
                assert lab.python("echo/caller", ASK) == "12"
                nodes = {each.resource["k8s.node.name"] for each in receiver.spans}
                assert nodes == {"node1", "node2"}

            eventually(traced, seconds=60)
    by_id = {each.span_id: each for each in receiver.spans}
    joined = [each for each in receiver.spans if each.parent_id in by_id]
    assert joined
    assert all(each.name == "ztunnel inbound" for each in joined)
