"""What depends on where the controller sits: on a Kubernetes API server, or on a directory.

           Kubernetes                              directory
keys       in a Secret (CA_SECRET), or CA_DIR      in CA_DIR
tokens     TokenReview, or TOKEN_ISSUER_KEYS       TOKEN_ISSUER_KEYS
writing    by the holder of a Lease                by the one controller there is
"""

from __future__ import annotations

import random
import secrets
from collections.abc import Awaitable, Callable

from istiod_lite.authenticate import Authenticator, SignedTokenReviewer, TokenReviewer, read_keys
from istiod_lite.authority import Authority, open_authority
from istiod_lite.authority_secret import open_shared_authority
from istiod_lite.config import IstiodConfig
from istiod_lite.leader import Leader
from istiod_lite.token_review import KubernetesTokenReviewer
from mesh.cluster.api import Cluster, Ref, VersionedCluster
from mesh.errors import ConfigError

LEASE = "istiod-leader"


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

    def authenticator(self) -> Authenticator:
        """Who judges callers. Raises ConfigError when no key or API server could."""
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
            reviewer = KubernetesTokenReviewer(api, config.token_audiences)
        return Authenticator(reviewer, config.cluster_id)

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
        await Leader(self._api, ref, identity, rng).run(work, on_standby)

    def _need_api(self, field: str) -> VersionedCluster:
        if self._api is None:
            raise ConfigError("needs a Kubernetes API server", field=field)
        return self._api
