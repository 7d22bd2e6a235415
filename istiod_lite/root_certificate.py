"""The root certificate, given to every namespace as a ConfigMap, as istiod does.

Workloads and node proxies mount `istio-ca-root-cert` to know whom to trust. What is missing
or different is written again; a cluster that takes no writes is told of once and left.
"""

from __future__ import annotations

from collections.abc import Callable

import trio

from mesh.cluster.api import Cluster, Object, Ref
from mesh.errors import ConfigError, Unavailable
from mesh.runtime import log

NAME = "istio-ca-root-cert"
KEY = "root-cert.pem"
CHECK_SECONDS = 30.0
_RETRY_SECONDS = 1.0

_log = log.get(__name__)


class RootCertificate:
    """Keeps the ConfigMap in the root namespace and all that `namespaces` names."""

    def __init__(
        self, root_pem: bytes, root_namespace: str, namespaces: Callable[[], list[str]]
    ) -> None:
        self._pem = root_pem.decode("ascii")
        self._root_namespace = root_namespace
        self._namespaces = namespaces
        self._written: set[str] = set()
        self._look = trio.Event()

    def look(self) -> None:
        """There may be a new namespace."""
        self._look.set()

    async def run(self, cluster: Cluster, on_published: Callable[[], None]) -> None:
        """Write for ever; `on_published` is called whenever all namespaces have it.

        Ends if the cluster takes no writes. If cancelled: what is written stays.
        """
        checked_at = trio.current_time()
        while True:
            self._look = trio.Event()
            if trio.current_time() - checked_at >= CHECK_SECONDS:
                self._written.clear()
                checked_at = trio.current_time()
            wait = CHECK_SECONDS
            try:
                await self._write_missing(cluster)
                on_published()
            except Unavailable as exc:
                _log.warning("root_certificate_delayed", reason=str(exc))
                wait = _RETRY_SECONDS
            except ConfigError as exc:
                _log.error("root_certificate_not_published", reason=str(exc), hint=exc.hint)
                on_published()  # somebody else has to; that is no reason not to serve
                return
            with trio.move_on_after(wait):
                await self._look.wait()

    async def _write_missing(self, cluster: Cluster) -> None:
        wanted = {self._root_namespace, *self._namespaces()}
        self._written &= wanted
        for namespace in sorted(wanted - self._written):
            found = await cluster.get(Ref("ConfigMap", namespace, NAME))
            data = found.get("data") if found else None
            if not isinstance(data, dict) or data.get(KEY) != self._pem:
                await cluster.apply(self._object(namespace))
                _log.info("root_certificate_published", namespace=namespace)
            self._written.add(namespace)

    def _object(self, namespace: str) -> Object:
        labels = {"istio.io/config": "true"}
        return {
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": {"name": NAME, "namespace": namespace, "labels": labels},
            "data": {KEY: self._pem},
        }
