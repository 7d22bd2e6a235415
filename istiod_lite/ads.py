"""Delta ADS as an RPC: one task that listens to a client and one that answers it.

All decisions are in `istiod_lite.subscriptions`; here a stream is authenticated, its
requests are fed to its `ClientState`, and what that wants to say is sent. A client that
does not read blocks only its own `send`.
"""

from __future__ import annotations

from collections.abc import (
    AsyncGenerator,
    AsyncIterator,
    Awaitable,
    Callable,
    Collection,
    Mapping,
)
from contextlib import AbstractAsyncContextManager, aclosing, nullcontext
from dataclasses import dataclass

import trio

from istiod_lite.authenticate import Authenticator, Caller
from istiod_lite.snapshot import Delta, Snapshot, diff
from istiod_lite.subscriptions import ClientNode, ClientState, Holding, Share, TypeStatus
from mesh.errors import ConfigError, IdentityError, MeshError, RemoteProtocolError
from mesh.grpc.codec import Code, GrpcError, Serialized
from mesh.grpc.server import Call
from mesh.proto.discovery_pb2 import DeltaDiscoveryRequest, DeltaDiscoveryResponse
from mesh.runtime import log

_log = log.get(__name__)


@dataclass(frozen=True, slots=True)
class ClientStatus:
    """One connected client, for listings; times are on trio's clock."""

    node: ClientNode | None
    peer: str
    account: str
    connected_at: float
    answered_at: float
    types: Mapping[str, TypeStatus]


@dataclass(slots=True, eq=False)
class _Client:
    state: ClientState
    peer: str
    account: str
    connected_at: float
    answered_at: float
    wake: trio.Event


class AdsService:
    """Handles `mesh.xds.client.DELTA_AGGREGATED_RESOURCES`.

    Until the first `publish` streams are held without an answer. Without an `authenticator`
    everyone is served: for tests. `on_answer` is called whenever a proxy acknowledges or refuses
    something, or is gone.
    """

    def __init__(
        self, authenticator: Authenticator | None, on_answer: Callable[[], None] = lambda: None
    ) -> None:
        self._authenticator = authenticator
        self._snapshot: Snapshot | None = None
        self._clients: list[_Client] = []
        self._on_answer = on_answer

    @property
    def snapshot(self) -> Snapshot | None:
        """What was published last."""
        return self._snapshot

    def publish(self, snapshot: Snapshot, deltas: Mapping[str, Delta] | None = None) -> None:
        """Tell every client what differs from what it has. Never blocks.

        `deltas` is how it differs from what was published last, by who knows already.
        """
        if deltas is None:
            deltas = diff(self._snapshot if self._snapshot is not None else Snapshot(), snapshot)
        self._snapshot = snapshot
        for client in self._clients:
            client.state.offer(snapshot, deltas)
            if client.state.has_news:
                client.wake.set()

    def clients(self) -> list[ClientStatus]:
        """Everyone connected now, in order of arrival."""
        return [
            ClientStatus(
                node=client.state.node,
                peer=client.peer,
                account=client.account,
                connected_at=client.connected_at,
                answered_at=client.answered_at,
                types=client.state.status(),
            )
            for client in self._clients
        ]

    def share(self, type_url: str, names: Collection[str], account: str = "") -> Share:
        """How many proxies that ask for a type hold all of `names` as they are now.

        Of all, or of those of one account.
        """
        held = total = 0
        refusal = ""
        for client in self._clients:
            if account and client.account != account:
                continue
            found = {client.state.holds(type_url, name) for name in names}
            if None in found:
                continue
            total += 1
            held += found <= {Holding.HELD}
            if Holding.REFUSED in found:
                refusal = refusal or client.state.refusal(type_url)
        return Share(held, total, refusal)

    async def delta(
        self,
        requests: AsyncIterator[DeltaDiscoveryRequest],
        send: Callable[[DeltaDiscoveryResponse | Serialized], Awaitable[None]],
        call: Call,
    ) -> None:
        """One stream, until the client ends it or the connection drains.

        Raises GrpcError: UNAUTHENTICATED, PERMISSION_DENIED, INVALID_ARGUMENT.
        If cancelled: the client is forgotten; it resumes with the versions it holds.
        """
        caller = await self._authenticate(call)
        client = _Client(
            state=ClientState(self._snapshot, caller.account if caller is not None else None),
            peer=str(call.peer),
            account=caller.account if caller is not None else "",
            connected_at=trio.current_time(),
            answered_at=trio.current_time(),
            wake=trio.Event(),
        )
        self._clients.append(client)
        failures: list[MeshError] = []
        try:
            async with trio.open_nursery() as nursery:

                async def listen() -> None:
                    try:
                        async with _closing(requests):
                            await self._listen(client, caller, requests)
                    except MeshError as exc:
                        failures.append(exc)
                    nursery.cancel_scope.cancel()

                async def leave_on_drain() -> None:
                    await call.draining.wait()
                    failures.append(GrpcError(Code.UNAVAILABLE, "draining"))
                    nursery.cancel_scope.cancel()

                async def answer() -> None:
                    try:
                        await self._answer(client, send)
                    except MeshError as exc:
                        failures.append(exc)
                    nursery.cancel_scope.cancel()

                nursery.start_soon(listen)
                nursery.start_soon(leave_on_drain)
                nursery.start_soon(answer)
        finally:
            self._clients.remove(client)
            self._on_answer()
        if failures:
            raise failures[0]

    async def _authenticate(self, call: Call) -> Caller | None:
        if self._authenticator is None:
            return None
        try:
            return await self._authenticator.caller(call.metadata)
        except (IdentityError, ConfigError) as exc:
            _log.warning("xds_refused", peer=str(call.peer), reason=str(exc))
            raise GrpcError(Code.UNAUTHENTICATED, "authentication failure") from exc

    async def _listen(
        self,
        client: _Client,
        caller: Caller | None,
        requests: AsyncIterator[DeltaDiscoveryRequest],
    ) -> None:
        async for request in requests:
            is_first = client.state.node is None
            try:
                client.state.receive(request)
            except RemoteProtocolError as exc:
                raise GrpcError(Code.INVALID_ARGUMENT, str(exc)) from exc
            node = client.state.node
            if is_first and node is not None:
                _check_node(node, caller)
                _log.info("xds_connected", node=node.id, peer=client.peer)
            if request.HasField("error_detail"):
                _log.warning(
                    "xds_nack",
                    node=node.id if node is not None else "",
                    type=request.type_url[:200],
                    reason=request.error_detail.message[:1000],
                )
            client.answered_at = trio.current_time()
            if client.state.has_news:
                client.wake.set()
            self._on_answer()

    async def _answer(
        self,
        client: _Client,
        send: Callable[[DeltaDiscoveryResponse | Serialized], Awaitable[None]],
    ) -> None:
        while True:
            client.wake = trio.Event()
            for response in client.state.answers():
                await send(response)
            await client.wake.wait()


def _check_node(node: ClientNode, caller: Caller | None) -> None:
    """The node must be who its token says. Raises GrpcError(PERMISSION_DENIED)."""
    if caller is None:
        return
    claimed = node.metadata.get("SERVICE_ACCOUNT", caller.service_account)
    if node.namespace != caller.namespace or claimed != caller.service_account:
        raise GrpcError(
            Code.PERMISSION_DENIED, f"the token is of {caller.account}, not of node {node.id[:200]}"
        )


def _closing(requests: AsyncIterator[object]) -> AbstractAsyncContextManager[object]:
    """Ends a generator of requests where it is used, not when it is collected."""
    return aclosing(requests) if isinstance(requests, AsyncGenerator) else nullcontext()
