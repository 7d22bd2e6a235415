"""The admin endpoints under curl, and the metrics under Prometheus' own checker."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import trio

from mesh.runtime import admin, metrics
from mesh.runtime.admin import AdminApp, Request, Response
from mesh.runtime.tcp_metrics import TcpLabels, TcpMetrics

pytestmark = [pytest.mark.interop, pytest.mark.usefixtures("no_fd_leak")]


def program(name: str) -> str:
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found


async def serving(app: AdminApp, path: Path, client: Callable[[], bytes]) -> bytes:
    async with trio.open_nursery() as nursery:
        await nursery.start(app.serve, [admin.open_unix_listener(path)])
        answer = await trio.to_thread.run_sync(client)
        nursery.cancel_scope.cancel()
    return answer


def curl(path: Path, *arguments: str) -> bytes:
    command = [program("curl"), "-sS", "-i", "--max-time", "10", "--unix-socket", str(path)]
    done = subprocess.run([*command, *arguments], check=True, capture_output=True)
    return done.stdout + done.stderr


async def test_curl_reuses_the_connection_and_posts_a_large_body(tmp_path: Path) -> None:
    app = AdminApp()

    async def size(request: Request) -> Response:
        return Response.text(f"{request.method} {len(request.body)}")

    app.route("/size", size, methods=("GET", "POST"))
    body = tmp_path / "body"
    body.write_bytes(b"x" * 1_000_000)
    path = tmp_path / "s"
    # curl waits for `100 Continue` before a body of this size.
    post = ["-H", "Expect: 100-continue", "--data-binary", f"@{body}", "http://x/size"]
    answer = await serving(app, path, partial(curl, path, *post))
    assert b"HTTP/1.1 100 Continue" in answer
    assert b"POST 1000000" in answer
    answer = await serving(app, path, partial(curl, path, "-v", "http://x/size", "http://x/size"))
    assert answer.count(b"GET 0") == 2
    assert b"Re-using existing connection" in answer
    answer = await serving(app, path, partial(curl, path, "-I", "http://x/size"))
    assert b"content-length: 7" in answer
    answer = await serving(app, path, partial(curl, path, "-T", str(body), "http://x/size"))
    assert b"405 Method Not Allowed" in answer


async def test_curl_sees_the_refusal_of_a_body_that_is_too_large(tmp_path: Path) -> None:
    app = AdminApp()
    body = tmp_path / "body"
    body.write_bytes(b"x" * 3_000_000)
    path = tmp_path / "s"
    request = ["-H", "Expect:", "--data-binary", f"@{body}", "http://x/"]
    assert b"413" in await serving(app, path, partial(curl, path, *request))


def test_prometheus_accepts_the_metrics() -> None:
    registry = metrics.new_registry("ztunnel", "1")
    tcp = TcpMetrics(registry)
    for reporter in ("source", "destination"):
        labels = TcpLabels(reporter=reporter, source_workload='odd "name"\\\n')  # type: ignore[arg-type]
        tcp.opened(labels)
        tcp.bytes(labels, 1, 2)
    metrics.XdsMetrics(registry).message("type.googleapis.com/istio.workload.Address", 1)
    dns = metrics.DnsMetrics(registry)
    dns.upstream(metrics.DnsLabels("A", "udp"), 0.1)
    metrics.WorkloadManagerMetrics(registry)
    body, _ = metrics.render(registry)
    checked = subprocess.run(
        [program("promtool"), "check", "metrics"], input=body, capture_output=True, check=False
    )
    complaints = checked.stderr.decode().splitlines() + checked.stdout.decode().splitlines()
    # Istio's names, which Prometheus' style guide would spell otherwise.
    assert not [line for line in complaints if not line.startswith("workload_manager_")]
