"""A real collector (rotel) in front of a receiver that decodes what comes out of it."""

from __future__ import annotations

import contextlib
import gzip
import http.server
import socket
import subprocess
import sysconfig
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)

ROTEL = Path(sysconfig.get_paths()["purelib"]) / "rotel" / "rotel-agent"


@dataclass
class Received:
    """One span as the collector hands it on."""

    name: str
    trace_id: str
    span_id: str
    parent_id: str
    kind: int
    start_ns: int
    end_ns: int
    attributes: dict[str, Any]
    resource: dict[str, Any]
    events: list[str]
    error: str
    links: list[str] = field(default_factory=list)


def decode(body: bytes) -> list[Received]:
    """The spans of an OTLP export, compressed or not."""
    if body[:2] == b"\x1f\x8b":
        body = gzip.decompress(body)
    request = ExportTraceServiceRequest.FromString(body)
    found = []
    for resource in request.resource_spans:
        described = _values(resource.resource.attributes)
        for scope in resource.scope_spans:
            found += [
                Received(
                    span.name,
                    span.trace_id.hex(),
                    span.span_id.hex(),
                    span.parent_span_id.hex(),
                    span.kind,
                    span.start_time_unix_nano,
                    span.end_time_unix_nano,
                    _values(span.attributes),
                    described,
                    [each.name for each in span.events],
                    span.status.message if span.status.code == 2 else "",
                    [each.span_id.hex() for each in span.links],
                )
                for span in scope.spans
            ]
    return found


def _values(pairs: Any) -> dict[str, Any]:
    return {each.key: getattr(each.value, each.value.WhichOneof("value")) for each in pairs}


class Receiver:
    """An OTLP/HTTP server on loopback. `status` is what it answers; `gate` holds it back."""

    def __init__(self) -> None:
        self.spans: list[Received] = []
        self.headers: list[dict[str, str]] = []
        self.status = 200
        self.gate = threading.Event()
        self.gate.set()
        receiver = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                receiver.gate.wait(30)
                receiver.headers.append({k.lower(): v for k, v in self.headers.items()})
                if receiver.status == 200:
                    receiver.spans += decode(body)
                answer = ExportTraceServiceResponse().SerializeToString()
                with contextlib.suppress(OSError):
                    self.send_response(receiver.status)
                    self.send_header("content-type", "application/x-protobuf")
                    self.send_header("content-length", str(len(answer)))
                    self.end_headers()
                    self.wfile.write(answer)

            def log_message(self, *_: object) -> None:
                """Nothing."""

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Receiver:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.gate.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


def rotel_argv(http_address: str, grpc_address: str, onward: str, log: str) -> list[str]:
    """The collector's command line; it hands on by OTLP/HTTP to the base URL `onward`."""
    return [
        str(ROTEL),
        "start",
        f"--otlp-http-endpoint={http_address}",
        f"--otlp-grpc-endpoint={grpc_address}",
        "--exporter=otlp",
        "--otlp-exporter-protocol=http",
        f"--otlp-exporter-endpoint={onward}",
        f"--log-file={log}",
        f"--pid-file={log}.pid",
    ]


@dataclass
class Collector:
    """A collector that runs."""

    http: str
    grpc: str


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


@contextlib.contextmanager
def running_rotel(onward: str, directory: Path) -> Iterator[Collector]:
    """A collector on loopback ports of its own."""
    http_port, grpc_port = _free_port(), _free_port()
    argv = rotel_argv(
        f"127.0.0.1:{http_port}", f"127.0.0.1:{grpc_port}", onward, str(directory / "rotel.log")
    )
    with (directory / "rotel.out").open("wb") as out:
        process = subprocess.Popen(argv, stdout=out, stderr=out)
        try:
            deadline = time.monotonic() + 30
            for port in (http_port, grpc_port):
                while True:
                    assert process.poll() is None, (directory / "rotel.out").read_text()
                    with (
                        contextlib.suppress(OSError),
                        socket.create_connection(("127.0.0.1", port), timeout=1),
                    ):
                        break
                    assert time.monotonic() < deadline
                    time.sleep(0.05)
            yield Collector(f"http://127.0.0.1:{http_port}", f"http://127.0.0.1:{grpc_port}")
        finally:
            process.terminate()
            process.wait(10)
