"""SecretManager: one certificate per SPIFFE ID, fetched once, renewed at half-life.

Callers of `get` for the same identity join one fetch. At most eight fetches run at once,
the most urgent first. A failed identity backs off alone (1 s, doubling, up to 150 s)
while the certificate it still has keeps serving until it expires. `run` does all the
fetching; nothing is fetched before it runs.

The authority is reached through `fetch`, normally `fetch_certificate` bound to a channel:
CreateCertificate with `ImpersonatedIdentity`, so that one node proxy can hold the
certificates of all the workloads of its node.
"""

from __future__ import annotations

import enum
import random
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from datetime import UTC, datetime

import trio

from mesh.errors import IdentityError, MeshError, Unavailable
from mesh.grpc.client import Channel
from mesh.grpc.codec import Method
from mesh.identity import SpiffeId
from mesh.proto.ca_pb2 import IstioCertificateRequest, IstioCertificateResponse
from mesh.retry import Backoff, Random
from mesh.tls.certificate import Certificate, issued_certificate, new_request

MAX_FETCHES = 8
DEFAULT_TTL_SECONDS = 24 * 3600
FETCH_TIMEOUT_SECONDS = 10.0
_BACKOFF_BASE_SECONDS = 1.0
_BACKOFF_CAP_SECONDS = 150.0
# The wall clock may jump where the clock that we sleep on does not: look again this often.
_RECHECK_SECONDS = 60.0

CREATE_CERTIFICATE = Method(
    path="/istio.v1.auth.IstioCertificateService/CreateCertificate",
    request=IstioCertificateRequest,
    response=IstioCertificateResponse,
    kind="unary",
)


class Priority(enum.IntEnum):
    """How urgent a fetch is; the highest runs first."""

    BACKGROUND = 0
    WARMUP = 1
    REALTIME = 2


@dataclass(frozen=True, slots=True)
class SecretEntry:
    """One line of a listing: the identity, its certificate if any, and the last failure."""

    identity: SpiffeId
    certificate: Certificate | None
    state: str
    error: str


@dataclass(slots=True)
class _Secret:
    identity: SpiffeId
    priority: Priority
    backoff: Backoff
    due: float
    certificate: Certificate | None = None
    # Wall-clock moment of renewal; `due` is on trio's clock and only wakes us up.
    renew_at: float = 0.0
    error: MeshError | None = None
    fetching: trio.CancelScope | None = None
    is_forgotten: bool = False
    changed: trio.Event = field(default_factory=trio.Event)


def renewal_time(not_after: float, now: float, rng: Random) -> float:
    """When to renew a certificate received at `now`: half of what is left, spread by ±10 %.

    All times are seconds since the epoch. Counted from receipt rather than NotBefore, which
    authorities backdate: a short certificate would otherwise be due at once, for ever.
    """
    return now + max(0.0, not_after - now) * rng.uniform(0.45, 0.55)


def wall_clock() -> float:
    """Seconds since the epoch, to compare with certificates."""
    return datetime.now(UTC).timestamp()


class SecretManager:
    """The certificates of this process. One task calls `run`; any task may call the rest."""

    def __init__(
        self,
        fetch: Callable[[SpiffeId], Awaitable[Certificate]],
        *,
        clock: Callable[[], float] = wall_clock,
        rng: Random | None = None,
        max_fetches: int = MAX_FETCHES,
    ) -> None:
        self._fetch = fetch
        self._clock = clock
        self._rng = rng if rng is not None else random.Random()  # noqa: S311
        self._max_fetches = max_fetches
        self._secrets: dict[SpiffeId, _Secret] = {}
        self._wake = trio.Event()

    async def get(self, identity: SpiffeId) -> Certificate:
        """The certificate of `identity`, at once if we hold a valid one.

        Otherwise waits for the fetch, across failures, as long as the caller's cancel scope
        allows; when the next attempt lies beyond that, fails right away. Raises
        IdentityError with the last failure. If cancelled: the fetch goes on for others.
        """
        secret = self._want(identity, Priority.REALTIME)
        while True:
            certificate = secret.certificate
            if certificate is not None and certificate.is_valid_at(self._clock()):
                return certificate
            if secret.is_forgotten:
                raise IdentityError(f"the workloads of {identity} left while it was fetched")
            if (
                secret.error is not None
                and secret.fetching is None
                and secret.due > trio.current_effective_deadline()
            ):
                raise IdentityError(
                    f"no certificate for {identity}: {secret.error}", hint=secret.error.hint
                ) from secret.error
            await secret.changed.wait()

    def prefetch(self, identity: SpiffeId) -> None:
        """Fetch ahead of need; nothing happens when it is held or under way."""
        self._want(identity, Priority.WARMUP)

    def forget(self, identity: SpiffeId) -> None:
        """Drop the certificate and stop renewing it; waiters get IdentityError."""
        secret = self._secrets.pop(identity, None)
        if secret is None:
            return
        secret.is_forgotten = True
        if secret.fetching is not None:
            secret.fetching.cancel()
        self._announce(secret)

    def last_error(self, identity: SpiffeId) -> MeshError | None:
        """Why the latest fetch of `identity` failed; None after a success."""
        secret = self._secrets.get(identity)
        return secret.error if secret is not None else None

    def entries(self) -> list[SecretEntry]:
        """Every identity, for listings; sorted."""
        now = self._clock()
        return [
            SecretEntry(
                identity=identity,
                certificate=secret.certificate,
                state=_state(secret, now),
                error=str(secret.error) if secret.error is not None else "",
            )
            for identity, secret in sorted(self._secrets.items())
        ]

    async def run(self) -> None:
        """Fetch what is wanted and renew what is held, for ever.

        If cancelled: fetches in flight stop; certificates already held remain usable.
        """
        async with trio.open_nursery() as nursery:
            while True:
                self._wake = trio.Event()
                for secret in self._startable():
                    secret.fetching = trio.CancelScope()
                    nursery.start_soon(self._fetch_one, secret)
                with trio.move_on_at(self._next_due()):
                    await self._wake.wait()

    def _want(self, identity: SpiffeId, priority: Priority) -> _Secret:
        secret = self._secrets.get(identity)
        if secret is None:
            backoff = Backoff(self._rng, base=_BACKOFF_BASE_SECONDS, cap=_BACKOFF_CAP_SECONDS)
            secret = _Secret(identity, priority, backoff, due=trio.current_time())
            self._secrets[identity] = secret
            self._wake.set()
            return secret
        certificate = secret.certificate
        if certificate is None or not certificate.is_valid_at(self._clock()):
            secret.priority = max(secret.priority, priority)
            if secret.error is None and secret.fetching is None:
                # Expired although no renewal failed: the wall clock jumped.
                secret.due = trio.current_time()
                self._wake.set()
        return secret

    def _startable(self) -> list[_Secret]:
        now = trio.current_time()
        running = sum(secret.fetching is not None for secret in self._secrets.values())
        due = [s for s in self._secrets.values() if s.fetching is None and self._is_due(s, now)]
        due.sort(key=lambda secret: (-secret.priority, secret.due))
        return due[: self._max_fetches - running]

    def _is_due(self, secret: _Secret, now: float) -> bool:
        if secret.due > now:
            return False
        if secret.certificate is not None and secret.error is None:
            remaining = secret.renew_at - self._clock()
            if remaining > 0:
                secret.due = now + min(remaining, _RECHECK_SECONDS)
                return False
        return True

    def _next_due(self) -> float:
        waiting = [s.due for s in self._secrets.values() if s.fetching is None]
        running = len(self._secrets) - len(waiting)
        if running >= self._max_fetches or not waiting:
            return float("inf")
        return min(waiting)

    async def _fetch_one(self, secret: _Secret) -> None:
        scope = secret.fetching
        assert scope is not None  # noqa: S101 - set by run() just before
        try:
            with scope:
                certificate = await self._fetch(secret.identity)
                now = self._clock()
                if not certificate.is_valid_at(now):
                    raise IdentityError(
                        f"the certificate issued for {secret.identity} has already expired",
                        hint="compare the clocks of this node and of the control plane",
                    )
                secret.certificate = certificate
                secret.error = None
                secret.backoff.reset()
                secret.renew_at = renewal_time(certificate.not_after, now, self._rng)
                secret.due = trio.current_time() + min(secret.renew_at - now, _RECHECK_SECONDS)
                secret.priority = Priority.BACKGROUND
        except MeshError as exc:
            secret.error = exc
            secret.due = trio.current_time() + secret.backoff.next()
        finally:
            secret.fetching = None
        # Not after a bug or a cancellation: nothing is to be started then.
        self._announce(secret)

    def _announce(self, secret: _Secret) -> None:
        event, secret.changed = secret.changed, trio.Event()
        event.set()
        self._wake.set()


async def fetch_certificate(
    channel_factory: Callable[[], AbstractAsyncContextManager[Channel]],
    identity: SpiffeId,
    ttl_seconds: int = DEFAULT_TTL_SECONDS,
    *,
    impersonate: bool = True,
    timeout: float = FETCH_TIMEOUT_SECONDS,
) -> Certificate:
    """Ask the authority for a certificate of `identity`, on a channel of its own.

    With `impersonate` the request names the identity (a node proxy asks for its workloads);
    without, the authority issues the caller's own. Raises IdentityError when what comes back
    is not what was asked, Unavailable or GrpcError when nothing does.
    If cancelled: the channel is closed.
    """
    key_pem, csr_pem = new_request(identity)
    request = IstioCertificateRequest(csr=csr_pem.decode(), validity_duration=ttl_seconds)
    if impersonate:
        request.metadata["ImpersonatedIdentity"] = str(identity)
    with trio.move_on_after(timeout):
        async with channel_factory() as channel:
            response = await channel.unary(CREATE_CERTIFICATE, request, timeout=timeout)
        return issued_certificate(list(response.cert_chain), key_pem, identity)
    raise Unavailable(f"the authority did not answer for {identity} within {timeout:g} s")


def _state(secret: _Secret, now: float) -> str:
    if secret.certificate is None:
        return "Unavailable" if secret.error is not None else "Initializing"
    return "Available" if secret.certificate.is_valid_at(now) else "Expired"
