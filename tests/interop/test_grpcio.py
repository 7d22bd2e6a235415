"""gRPC both ways against grpcio: our server with its client, our client with its server."""

from __future__ import annotations

import concurrent.futures as futures
import contextlib
import queue
import ssl
from collections.abc import AsyncIterator, Iterator
from functools import partial
from typing import Any

import grpc
import pytest
import trio
import trustme
from google.protobuf import any_pb2

from mesh.errors import IdentityError, Unavailable
from mesh.grpc.client import open_channel
from mesh.grpc.codec import Code, GrpcError, Method
from mesh.grpc.server import Call, serve_grpc
from mesh.proto.discovery_pb2 import (
    DeltaDiscoveryRequest,
    DeltaDiscoveryResponse,
    Resource,
)
from mesh.sockets import SocketAddress, open_listener

pytestmark = pytest.mark.interop

DELTA: Method[DeltaDiscoveryRequest, DeltaDiscoveryResponse] = Method(
    "/envoy.service.discovery.v3.AggregatedDiscoveryService/DeltaAggregatedResources",
    DeltaDiscoveryRequest,
    DeltaDiscoveryResponse,
    "stream",
)
ECHO: Method[DeltaDiscoveryRequest, DeltaDiscoveryResponse] = Method(
    "/test.Echo/Echo", DeltaDiscoveryRequest, DeltaDiscoveryResponse, "unary"
)
UNKNOWN: Method[DeltaDiscoveryRequest, DeltaDiscoveryResponse] = Method(
    "/test.Echo/Nothing", DeltaDiscoveryRequest, DeltaDiscoveryResponse, "unary"
)
TEXT = "nein: é 100% ☂\nzwei "
BATCH = 50


def respond(index: int, type_url: str) -> DeltaDiscoveryResponse:
    return DeltaDiscoveryResponse(
        nonce=str(index),
        type_url=type_url,
        resources=[Resource(name=f"r{index}", resource=any_pb2.Any(value=b"x" * 2000))],
    )


class Handlers:
    """Our server's side. `cancelled` counts handlers that were cancelled."""

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self.cancelled = 0

    async def echo(self, request: DeltaDiscoveryRequest, call: Call) -> DeltaDiscoveryResponse:
        self.calls.append(call)
        if request.type_url == "fail":
            raise GrpcError(Code.PERMISSION_DENIED, TEXT)
        if request.type_url == "slow":
            try:
                await trio.sleep(30)
            except trio.Cancelled:
                self.cancelled += 1
                raise
        return DeltaDiscoveryResponse(system_version_info=request.type_url)

    async def delta(self, requests: AsyncIterator[DeltaDiscoveryRequest], send: Any, call: Call):
        self.calls.append(call)
        if call.metadata.get("authorization") == "Bearer wrong":
            raise GrpcError(Code.UNAUTHENTICATED, "who are you")
        try:
            async for request in requests:
                if request.response_nonce:
                    continue
                for index in range(BATCH):
                    await send(respond(index, request.type_url))
        except trio.Cancelled:
            self.cancelled += 1
            raise


@contextlib.asynccontextmanager
async def our_server(
    context: ssl.SSLContext | None = None, drain: trio.Event | None = None, **kwargs: Any
) -> AsyncIterator[tuple[SocketAddress, Handlers]]:
    handlers = Handlers()
    methods = {ECHO: handlers.echo, DELTA: handlers.delta}
    listener = open_listener(0, host="127.0.0.1")
    async with trio.open_nursery() as nursery:
        serve = partial(serve_grpc, listener, context, methods, drain=drain, **kwargs)
        yield await nursery.start(serve), handlers
        if drain is None:
            nursery.cancel_scope.cancel()


def unary(channel: grpc.Channel, method: Method[Any, Any]) -> Any:
    return channel.unary_unary(
        method.path,
        request_serializer=method.request.SerializeToString,
        response_deserializer=method.response.FromString,
    )


def bidi(channel: grpc.Channel) -> Any:
    return channel.stream_stream(
        DELTA.path,
        request_serializer=DELTA.request.SerializeToString,
        response_deserializer=DELTA.response.FromString,
    )


async def in_thread(function: Any, *args: Any) -> Any:
    with trio.fail_after(20):
        return await trio.to_thread.run_sync(function, *args, abandon_on_cancel=True)


def failure(function: Any, *args: Any, **kwargs: Any) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.RpcError) as caught:
        function(*args, **kwargs)
    return caught.value.code(), caught.value.details()


# ---- our server


async def test_unary_statuses_and_deadline():
    def client(port: int) -> None:
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            echo = unary(channel, ECHO)
            assert echo(DeltaDiscoveryRequest(type_url="ok")).system_version_info == "ok"
            assert failure(echo, DeltaDiscoveryRequest(type_url="fail")) == (
                grpc.StatusCode.PERMISSION_DENIED,
                TEXT,
            )
            code, _ = failure(echo, DeltaDiscoveryRequest(type_url="slow"), timeout=0.3)
            assert code is grpc.StatusCode.DEADLINE_EXCEEDED
            code, text = failure(unary(channel, UNKNOWN), DeltaDiscoveryRequest())
            assert code is grpc.StatusCode.UNIMPLEMENTED
            assert "unknown method" in text

    async with our_server() as (address, handlers):
        await in_thread(client, address.port)
        with trio.fail_after(30):
            while not handlers.cancelled:
                await trio.sleep(0.01)
        assert handlers.calls[0].peer.ip == "127.0.0.1"


async def test_big_messages_and_metadata():
    size = 1_500_000

    def client(port: int) -> None:
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            request = DeltaDiscoveryRequest(type_url="z" * size)
            metadata = [("authorization", "Bearer t"), ("clusterid", "Kubernetes")]
            answer = unary(channel, ECHO)(request, metadata=metadata)
            assert len(answer.system_version_info) == size

    async with our_server() as (address, handlers):
        await in_thread(client, address.port)
        assert handlers.calls[0].metadata["authorization"] == "Bearer t"
        assert handlers.calls[0].metadata["clusterid"] == "Kubernetes"


async def test_message_over_the_limit():
    def client(port: int) -> None:
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            request = DeltaDiscoveryRequest(type_url="z" * 100_000)
            assert failure(unary(channel, ECHO), request)[0] is (grpc.StatusCode.RESOURCE_EXHAUSTED)

    async with our_server(max_message=50_000) as (address, _):
        await in_thread(client, address.port)


async def test_compressed_requests_are_refused():
    def client(port: int) -> None:
        with grpc.insecure_channel(
            f"127.0.0.1:{port}", compression=grpc.Compression.Gzip
        ) as channel:
            code, text = failure(unary(channel, ECHO), DeltaDiscoveryRequest(type_url="z" * 9999))
            assert code is grpc.StatusCode.UNIMPLEMENTED
            assert "gzip" in text

    async with our_server() as (address, _):
        await in_thread(client, address.port)


async def test_delta_stream():
    def client(port: int) -> None:
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            outgoing: queue.Queue[DeltaDiscoveryRequest | None] = queue.Queue()
            outgoing.put(DeltaDiscoveryRequest(type_url="a"))
            call = bidi(channel)(iter(outgoing.get, None))
            count = 0
            for response in call:
                count += 1
                outgoing.put(DeltaDiscoveryRequest(type_url="a", response_nonce=response.nonce))
                if count == BATCH:
                    outgoing.put(DeltaDiscoveryRequest(type_url="b"))
                if count == 2 * BATCH:
                    outgoing.put(None)
            assert count == 2 * BATCH
            assert call.code() is grpc.StatusCode.OK

    async with our_server() as (address, _):
        await in_thread(client, address.port)


async def test_stream_refused_at_once():
    def client(port: int) -> None:
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            never: queue.Queue[None] = queue.Queue()
            call = bidi(channel)(
                iter(never.get, None), metadata=[("authorization", "Bearer wrong")]
            )
            assert failure(next, call) == (grpc.StatusCode.UNAUTHENTICATED, "who are you")
            never.put(None)

    async with our_server() as (address, _):
        await in_thread(client, address.port)


async def test_client_cancel_reaches_the_handler():
    def client(port: int) -> None:
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            outgoing: queue.Queue[DeltaDiscoveryRequest | None] = queue.Queue()
            outgoing.put(DeltaDiscoveryRequest(type_url="a"))
            call = bidi(channel)(iter(outgoing.get, None))
            next(call)
            call.cancel()
            outgoing.put(None)
            assert unary(channel, ECHO)(DeltaDiscoveryRequest(type_url="x"))

    async with our_server() as (address, handlers):
        await in_thread(client, address.port)
        with trio.fail_after(30):
            while not handlers.cancelled:
                await trio.sleep(0.01)


async def test_many_calls_at_once():
    def client(port: int) -> None:
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            echo = unary(channel, ECHO)
            calls = [echo.future(DeltaDiscoveryRequest(type_url=str(i))) for i in range(400)]
            answers = [call.result().system_version_info for call in calls]
            assert answers == [str(i) for i in range(400)]

    async with our_server() as (address, _):
        await in_thread(client, address.port)


async def test_drain_lets_a_call_end_and_refuses_new_ones():
    drain = trio.Event()
    going = trio.Event()
    finish = trio.Event()

    async def wait(request: DeltaDiscoveryRequest, call: Call) -> DeltaDiscoveryResponse:
        going.set()
        await finish.wait()
        assert call.draining.is_set()
        return DeltaDiscoveryResponse(system_version_info="late")

    def client(port: int) -> str:
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            return unary(channel, ECHO)(DeltaDiscoveryRequest()).system_version_info

    listener = open_listener(0, host="127.0.0.1")
    answers: list[str] = []
    async with trio.open_nursery() as nursery:
        address = await nursery.start(
            partial(serve_grpc, listener, None, {ECHO: wait}, drain=drain)
        )

        async def call() -> None:
            answers.append(await in_thread(client, address.port))

        nursery.start_soon(call)
        await going.wait()
        drain.set()
        await trio.sleep(0.2)
        with pytest.raises(Unavailable):
            async with open_channel("127.0.0.1", address.port, None):
                pass
        finish.set()
    assert answers == ["late"]


async def test_drain_ends_endless_streams_with_unavailable():
    def client(port: int, drain: Any) -> tuple[grpc.StatusCode, str]:
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            outgoing: queue.Queue[DeltaDiscoveryRequest | None] = queue.Queue()
            outgoing.put(DeltaDiscoveryRequest(type_url="a"))
            call = bidi(channel)(iter(outgoing.get, None))
            for _ in range(BATCH):
                next(call)
            drain()
            result = failure(next, call)
            outgoing.put(None)
            return result

    drain = trio.Event()
    token = trio.lowlevel.current_trio_token()
    async with our_server(drain=drain, grace_seconds=0.2) as (address, _):
        code, text = await in_thread(client, address.port, partial(token.run_sync_soon, drain.set))
    assert code is grpc.StatusCode.UNAVAILABLE
    assert "shutting down" in text


# ---- TLS


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


def server_tls(authority: trustme.CA, *, mutual: bool = False) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("localhost", "istiod.istio-system.svc").configure_cert(context)
    context.set_alpn_protocols(["h2"])
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    if mutual:
        authority.configure_trust(context)
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def client_tls(authority: trustme.CA) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    authority.configure_trust(context)
    context.set_alpn_protocols(["h2"])
    return context


async def test_mutual_tls(authority):
    mine = authority.issue_cert("client.example")
    foreign = trustme.CA().issue_cert("client.example")

    def client(port: int, leaf: trustme.LeafCert) -> str | grpc.StatusCode:
        credentials = grpc.ssl_channel_credentials(
            authority.cert_pem.bytes(),
            leaf.private_key_pem.bytes(),
            leaf.cert_chain_pems[0].bytes(),
        )
        with grpc.secure_channel(f"localhost:{port}", credentials) as channel:
            try:
                answer = unary(channel, ECHO)(DeltaDiscoveryRequest(type_url="ok"), timeout=3)
            except grpc.RpcError as exc:
                return exc.code()
            return answer.system_version_info

    failures: list[Exception] = []
    async with our_server(
        server_tls(authority, mutual=True), on_failure=lambda peer, exc: failures.append(exc)
    ) as (address, handlers):
        assert await in_thread(client, address.port, mine) == "ok"
        assert handlers.calls[0].peer_certificate is not None
        assert await in_thread(client, address.port, foreign) is grpc.StatusCode.UNAVAILABLE
        assert await in_thread(client, address.port, mine) == "ok"
    assert any(isinstance(exc, IdentityError) for exc in failures)


async def test_our_client_judges_the_server(authority):
    async with our_server(server_tls(authority)) as (address, _):
        name = "istiod.istio-system.svc"
        where = (address.ip, address.port)
        async with open_channel(*where, client_tls(authority), name) as channel:
            answer = await channel.unary(ECHO, DeltaDiscoveryRequest(type_url="ok"))
            assert answer.system_version_info == "ok"
        with pytest.raises(IdentityError, match="certificate"):
            async with open_channel(*where, client_tls(trustme.CA()), name):
                pass
        with pytest.raises(IdentityError, match=r"wrong\.example"):
            async with open_channel(*where, client_tls(authority), "wrong.example"):
                pass


# ---- our client


class GrpcioHandlers(grpc.GenericRpcHandler):
    def __init__(self) -> None:
        self.metadata: dict[str, str] = {}
        self.remaining: float | None = None
        self.cancelled = queue.Queue[bool]()

    def echo(self, request: DeltaDiscoveryRequest, context: grpc.ServicerContext):
        self.metadata = dict(context.invocation_metadata())
        self.remaining = context.time_remaining()
        if request.type_url == "fail":
            # grpcio does not encode a space at the end, which HTTP/2 forbids there.
            context.abort(grpc.StatusCode.PERMISSION_DENIED, TEXT.rstrip())
        if request.type_url == "slow":
            context.add_callback(lambda: self.cancelled.put(True))
            self.cancelled.get(timeout=10)
            self.cancelled.put(True)
        return DeltaDiscoveryResponse(system_version_info=request.type_url)

    def delta(self, requests: Any, context: grpc.ServicerContext):
        for request in requests:
            if request.type_url == "fail":
                context.abort(grpc.StatusCode.UNAUTHENTICATED, "who are you")
            for index in range(BATCH):
                yield respond(index, request.type_url)

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler | None:
        codecs = {
            "request_deserializer": DeltaDiscoveryRequest.FromString,
            "response_serializer": DeltaDiscoveryResponse.SerializeToString,
        }
        if details.method == ECHO.path:
            return grpc.unary_unary_rpc_method_handler(self.echo, **codecs)
        if details.method == DELTA.path:
            return grpc.stream_stream_rpc_method_handler(self.delta, **codecs)
        return None


@contextlib.contextmanager
def grpcio_server() -> Iterator[tuple[int, GrpcioHandlers, grpc.Server]]:
    handlers = GrpcioHandlers()
    server = grpc.server(futures.ThreadPoolExecutor(4))
    server.add_generic_rpc_handlers((handlers,))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield port, handlers, server
    finally:
        server.stop(0).wait()


async def test_our_unary_calls():
    with grpcio_server() as (port, handlers, _), trio.fail_after(20):
        metadata = {"authorization": "Bearer t", "clusterid": "Kubernetes"}
        async with open_channel(
            "127.0.0.1", port, None, metadata_provider=lambda: metadata
        ) as channel:
            for size in (1, 1_000_000):
                request = DeltaDiscoveryRequest(type_url="z" * size)
                answer = await channel.unary(ECHO, request, timeout=10)
                assert len(answer.system_version_info) == size
            assert handlers.metadata.items() >= metadata.items()
            assert handlers.remaining == pytest.approx(10, abs=1)
            with pytest.raises(GrpcError) as caught:
                await channel.unary(ECHO, DeltaDiscoveryRequest(type_url="fail"))
            assert caught.value.code == Code.PERMISSION_DENIED
            assert caught.value.message == TEXT.rstrip()
            with pytest.raises(GrpcError) as caught:
                await channel.unary(UNKNOWN, DeltaDiscoveryRequest())
            assert caught.value.code == Code.UNIMPLEMENTED
            with pytest.raises(GrpcError) as caught:
                await channel.unary(ECHO, DeltaDiscoveryRequest(type_url="slow"), timeout=0.2)
            assert caught.value.code == Code.DEADLINE_EXCEEDED
            assert await channel.unary(ECHO, DeltaDiscoveryRequest(type_url="still"))


async def test_our_cancel_reaches_grpcio():
    with grpcio_server() as (port, handlers, _), trio.fail_after(20):
        async with open_channel("127.0.0.1", port, None) as channel:
            with trio.move_on_after(0.3):
                await channel.unary(ECHO, DeltaDiscoveryRequest(type_url="slow"))
            assert await in_thread(handlers.cancelled.get)
            handlers.cancelled.put(True)


async def test_our_delta_stream():
    with grpcio_server() as (port, _, _), trio.fail_after(20):
        async with open_channel("127.0.0.1", port, None) as channel:
            async with channel.stream(DELTA) as stream:
                await stream.send(DeltaDiscoveryRequest(type_url="a"))
                count = 0
                async for response in stream:
                    assert response.resources[0].name == f"r{count % BATCH}"
                    count += 1
                    if count == BATCH:
                        await stream.send(DeltaDiscoveryRequest(type_url="b"))
                    if count == 2 * BATCH:
                        await stream.done_sending()
                assert count == 2 * BATCH
            with pytest.raises(GrpcError, match="who are you") as caught:  # noqa: PT012
                async with channel.stream(DELTA) as stream:
                    await stream.send(DeltaDiscoveryRequest(type_url="fail"))
                    async for _ in stream:
                        pytest.fail("no message is expected")
            assert caught.value.code == Code.UNAUTHENTICATED


async def test_our_client_sees_grpcio_go():
    with grpcio_server() as (port, _, server), trio.fail_after(20):
        async with open_channel("127.0.0.1", port, None) as channel:
            async with channel.stream(DELTA) as stream:
                await stream.send(DeltaDiscoveryRequest(type_url="a"))
                async for response in stream:
                    if response.nonce == str(BATCH - 1):
                        break
                server.stop(0.2)
                with pytest.raises((GrpcError, Unavailable)):  # noqa: PT012
                    async for _ in stream:
                        pytest.fail("no message is expected")
            assert not channel.is_usable
            with pytest.raises(Unavailable):
                await channel.unary(ECHO, DeltaDiscoveryRequest())


async def test_nobody_there():
    listener = open_listener(0, host="127.0.0.1")
    port = listener.getsockname()[1]
    with pytest.raises(Unavailable, match="did not answer"):
        async with open_channel("127.0.0.1", port, None, connect_timeout=0.2):
            pass
    listener.close()
    with pytest.raises(Unavailable, match="refused"):
        async with open_channel("127.0.0.1", port, None):
            pass
