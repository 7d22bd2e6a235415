"""grpcio servers that play the services which a waypoint asks."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import grpc

from mesh.model.workload import TunnelProtocol, Workload
from mesh.proto import ext_authz_pb2, rate_limit_pb2

AUTHORIZATION = ("envoy.service.auth.v3.Authorization", "Check", ext_authz_pb2.CheckRequest)

RATE_LIMIT = (
    "envoy.service.ratelimit.v3.RateLimitService",
    "ShouldRateLimit",
    rate_limit_pb2.RateLimitRequest,
)


@dataclass
class GrpcServer:
    """What it was asked, and what it answers: `answer` takes the request and the context."""

    port: int = 0
    answer: Callable[[Any, grpc.ServicerContext], Any] = lambda _request, _context: None
    asked: list[Any] = field(default_factory=list)

    def workload(self, name: str, service: str, host: str, *, in_mesh: bool = True) -> Workload:
        """It as a workload of namespace shop, behind port 80 of `service`."""
        return Workload(
            uid=f"Kubernetes//Pod/shop/{name}",
            name=name,
            namespace="shop",
            addresses=(host,),
            tunnel_protocol=TunnelProtocol.HBONE if in_mesh else TunnelProtocol.NONE,
            service_account="web",
            services={service: {80: self.port}},
        )


@contextlib.contextmanager
def grpc_server(kind: tuple[str, str, Any], address: str, port: int = 0) -> Iterator[GrpcServer]:
    """One service with one method, served by grpcio."""
    service, method, message = kind
    told = GrpcServer()

    def handle(request: Any, context: grpc.ServicerContext) -> Any:
        told.asked.append(request)
        return told.answer(request, context)

    handler = grpc.unary_unary_rpc_method_handler(
        handle,
        request_deserializer=message.FromString,
        response_serializer=lambda answer: answer.SerializeToString(),
    )
    with ThreadPoolExecutor(4) as threads:
        server = grpc.server(threads, options=[("grpc.so_reuseport", 0)])
        server.add_generic_rpc_handlers(
            [grpc.method_handlers_generic_handler(service, {method: handler})]
        )
        told.port = server.add_insecure_port(f"{address}:{port}")
        server.start()
        try:
            yield told
        finally:
            server.stop(None).wait()
