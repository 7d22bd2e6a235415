"""CreateCertificate: the RPC around the authority and the node rule.

Callers learn only that they are refused; the reason goes to the log. The SAN is the
identity that was authorised, whatever the request's CSR says.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

from istiod_lite.authenticate import Authenticator, Caller, PodIndex, may_request
from istiod_lite.authority import MAX_REQUEST_BYTES, Authority
from mesh.errors import ConfigError, IdentityError, RemoteProtocolError
from mesh.grpc.codec import Code, GrpcError
from mesh.grpc.server import Call
from mesh.identity import SpiffeId
from mesh.proto.ca_pb2 import IstioCertificateRequest, IstioCertificateResponse
from mesh.runtime import log

_IMPERSONATED = "ImpersonatedIdentity"
_log = log.get(__name__)


class CertificateService:
    """Handles `mesh.secrets.CREATE_CERTIFICATE`. `clock` gives seconds since the epoch."""

    def __init__(
        self,
        authority: Authority,
        authenticator: Authenticator,
        pods: PodIndex,
        *,
        trusted_accounts: Collection[str],
        clock: Callable[[], float],
    ) -> None:
        self._authority = authority
        self._authenticator = authenticator
        self._pods = pods
        self._trusted = frozenset(trusted_accounts)
        self._clock = clock

    async def create(
        self, request: IstioCertificateRequest, call: Call
    ) -> IstioCertificateResponse:
        """Raises GrpcError: UNAUTHENTICATED, INVALID_ARGUMENT."""
        try:
            caller = await self._authenticator.caller(call.metadata)
        except (IdentityError, ConfigError) as exc:
            _log.warning("certificate_refused", peer=str(call.peer), reason=str(exc))
            raise GrpcError(Code.UNAUTHENTICATED, "request authenticate failure") from exc
        identity = self._authorised(request, caller)
        if len(request.csr) > MAX_REQUEST_BYTES:
            raise GrpcError(Code.INVALID_ARGUMENT, "the certificate request is too large")
        try:
            chain = self._authority.sign(
                request.csr.encode(), identity, float(request.validity_duration), self._clock()
            )
        except RemoteProtocolError as exc:
            raise GrpcError(Code.INVALID_ARGUMENT, str(exc)) from exc
        _log.info("certificate_issued", identity=str(identity), caller=caller.account)
        return IstioCertificateResponse(cert_chain=chain)

    def _authorised(self, request: IstioCertificateRequest, caller: Caller) -> SpiffeId:
        """The identity to certify. Raises GrpcError(UNAUTHENTICATED)."""
        reason = ""
        wanted = ""
        own = self._authority.trust_domain
        try:
            if _IMPERSONATED not in request.metadata:
                return SpiffeId(own, caller.namespace, caller.service_account)
            field = request.metadata.fields[_IMPERSONATED]
            if field.WhichOneof("kind") != "string_value":
                raise ConfigError(f"{_IMPERSONATED} is not a string")
            wanted = field.string_value
            identity = SpiffeId.parse(wanted)
            refusal = may_request(caller, identity, self._pods, trusted_accounts=self._trusted)
            if refusal is not None:
                reason = refusal.reason
            elif identity.trust_domain != own:
                # Stricter than Istio: peers would trust our root for another's names.
                reason = f"trust domain {identity.trust_domain} is not ours ({own})"
            else:
                return identity
        except ConfigError as exc:
            reason = str(exc)
        _log.warning(
            "certificate_refused", caller=caller.account, identity=wanted[:300], reason=reason
        )
        raise GrpcError(Code.UNAUTHENTICATED, "request impersonation authentication failure")
