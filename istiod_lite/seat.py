"""What depends on where the controller sits: on a Kubernetes API server, or on a directory.

           Kubernetes                              directory
keys       in a Secret (CA_SECRET), or CA_DIR      in CA_DIR
tokens     TokenReview, or TOKEN_ISSUER_KEYS       TOKEN_ISSUER_KEYS
writing    by the holder of a Lease                by the one controller there is

The public keys of the API server's tokens are read while it answers, for when it does not.
"""

from __future__ import annotations

import random
import secrets
from collections.abc import Awaitable, Callable
from typing import Protocol, runtime_checkable

import trio

from istiod_lite.authenticate import (
    MAX_KEYS_BYTES,
    Authenticator,
    SignedTokenReviewer,
    TokenReviewer,
    parse_keys,
    read_keys,
)
from istiod_lite.authority import Authority, open_authority
from istiod_lite.authority_secret import open_shared_authority
from istiod_lite.config import IstiodConfig
from istiod_lite.leader import Leader, Timing
from istiod_lite.saved_state import TokenKeys
from istiod_lite.token_review import Known, KubernetesTokenReviewer
from mesh.cluster.api import Cluster, Ref, VersionedCluster
from mesh.errors import ConfigError, Unavailable
from mesh.runtime import log

LEASE = "istiod-leader"
_KEYS_SECONDS = 600.0
_RETRY_SECONDS = 5.0
_log = log.get(__name__)


@runtime_checkable
class KeySource(Protocol):
    """What publishes the keys of tokens: an API server."""

    async def token_keys(self) -> tuple[str, bytes]:
        """See `KubernetesCluster.token_keys`."""
        ...


class Seat:
    """See the module. `clock` gives seconds since the epoch."""

    def __init__(self, config: IstiodConfig, cluster: Cluster, clock: Callable[[], float]) -> None:
        self._config = config
        self._cluster = cluster
        self._api = cluster if isinstance(cluster, VersionedCluster) else None
        self._clock = clock

    async def authority(self) -> Authority:
        """The certificate authority. Raises ConfigError, Unavailable."""
        config = self._config
        if not config.ca_secret:
            return open_authority(config.ca_dir, config.trust_domain, self._clock())
        ref = Ref("Secret", config.root_namespace, config.ca_secret)
        return await open_shared_authority(
            self._need_api("ca_secret"), ref, config.ca_dir, config.trust_domain, self._clock()
        )

    def authenticator(self, known: Callable[[], Known]) -> Authenticator:
        """Who judges callers, by what is `known` if nobody can be asked.

        Raises ConfigError when no key or API server could.
        """
        config = self._config
        reviewer: TokenReviewer
        if config.token_issuer_keys is not None:
            read_keys(config.token_issuer_keys)  # say now what would refuse every caller later
            reviewer = SignedTokenReviewer(
                config.token_issuer_keys,
                audiences=config.token_audiences,
                issuers=config.token_issuers,
                clock=self._clock,
            )
        else:
            api = self._need_api("token_issuer_keys")
            reviewer = KubernetesTokenReviewer(api, config.token_audiences, known, self._clock)
        return Authenticator(reviewer, config.cluster_id)

    async def follow_keys(self, known: Known) -> None:
        """Keep `known.keys` as the API server publishes them, for ever."""
        if self._config.token_issuer_keys is not None or not isinstance(self._cluster, KeySource):
            return
        while True:
            wait = _KEYS_SECONDS
            try:
                issuer, jwks = await self._cluster.token_keys()
                parse_keys(jwks)
                if len(jwks) <= MAX_KEYS_BYTES:
                    known.keys = TokenKeys(issuer, jwks)
            except Unavailable:
                wait = _RETRY_SECONDS
            except ConfigError as exc:
                _log.warning("token_keys_not_read", reason=str(exc), hint=exc.hint)
            await trio.sleep(wait)

    async def write(
        self, work: Callable[[], Awaitable[None]], on_standby: Callable[[], None]
    ) -> None:
        """Do `work`, which writes, while it is ours to do; `on_standby` when it is another's."""
        config = self._config
        if self._api is None or not config.pod_name:
            await work()
            return
        # A container that was restarted in the same pod is another candidate than before.
        identity = f"{config.pod_name}_{secrets.token_hex(4)}"
        rng = random.Random()  # noqa: S311 - spreads retries, guards nothing
        ref = Ref("Lease", config.root_namespace, LEASE)
        timing = Timing.of(config.lease_seconds)
        await Leader(self._api, ref, identity, rng, timing).run(work, on_standby)

    def _need_api(self, field: str) -> VersionedCluster:
        if self._api is None:
            raise ConfigError("needs a Kubernetes API server", field=field)
        return self._api
