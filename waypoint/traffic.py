"""What this waypoint holds of routes and policies, compiled for each service when it changes.

`TrafficStore` takes the TrafficConfigs as they come and compiles lazily: a service's own
configuration and the one for everything, together. What cannot be carried out is not left out: a
policy without a filter that knows it answers 500.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mesh.model.l7_policy import TrafficConfig
from mesh.model.route import DEFAULT_BACKEND, BackendSettings, RouteFilter
from mesh.model.store import Changed, Store
from waypoint.filters.chain import Filter
from waypoint.paths import normalizer
from waypoint.plan import Routes

MakeFilters = Callable[[TrafficConfig, TrafficConfig], Sequence[Filter]]
"""The filters of a service, in order: (what holds for everything, its own)."""
MakeRouteFilter = Callable[[RouteFilter], Filter | None]


@dataclass(frozen=True, slots=True)
class Traffic:
    """What is done for one service."""

    routes: Routes
    filters: Sequence[Filter]
    normalize: Callable[[bytes], bytes | None]
    backend: BackendSettings
    config: TrafficConfig


class TrafficStore(Store):
    """The Store of a waypoint: workloads and services, and TrafficConfigs."""

    def __init__(
        self, gateway: str, make_filters: MakeFilters, make_route_filter: MakeRouteFilter
    ) -> None:
        super().__init__()
        self.version = 0
        self._gateway = gateway
        self._make_filters = make_filters
        self._make_route_filter = make_route_filter
        self._configs: dict[str, TrafficConfig] = {}
        self._compiled: dict[str, Traffic] = {}
        self._backends: dict[str, BackendSettings] = {}

    def apply_traffic(self, updated: Sequence[TrafficConfig], removed: Sequence[str]) -> Changed:
        """Insert or replace, then remove by name. Those of other gateways are ignored."""
        for config in updated:
            if config.gateway == self._gateway:
                self._configs[config.key] = config
                self._forget(config.service)
        for name in removed:
            gone = self._configs.pop(name, None)
            if gone is not None:
                self._forget(gone.service)
        self._backends = {
            service: settings
            for config in self._configs.values()
            for service, settings in config.backends
        }
        self.version += 1
        return Changed()

    def _forget(self, service: str) -> None:
        if service:
            self._compiled.pop(service, None)
        else:
            self._compiled.clear()

    def configs(self) -> Sequence[TrafficConfig]:
        """All that is held, for the admin listing."""
        return tuple(self._configs.values())

    def has_config(self, service: str) -> bool:
        """Whether the controller gave us anything for `namespace/hostname`."""
        return f"{self._gateway}/{service}" in self._configs

    def traffic(self, service: str) -> Traffic:
        """What is done for `namespace/hostname`; empty: a workload that was called itself."""
        found = self._compiled.get(service)
        if found is None:
            found = self._compiled[service] = self._compile(service)
        return found

    def settings(self, service: str, port: int) -> BackendSettings:
        """What holds for calls to a service's port, one of ours or not."""
        config = self._configs.get(f"{self._gateway}/{service}")
        if config is not None:
            return config.backend.of(port)
        return self._backends.get(service, DEFAULT_BACKEND).of(port)

    def _compile(self, service: str) -> Traffic:
        nothing = TrafficConfig(self._gateway)
        everywhere = self._configs.get(self._gateway, nothing)
        own = nothing
        if service:
            own = self._configs.get(f"{self._gateway}/{service}", nothing)
        deciding = own if own is not nothing else everywhere
        return Traffic(
            routes=Routes(service, own.routes, self._make_route_filter),
            filters=self._make_filters(everywhere, own),
            normalize=normalizer(deciding.path_normalization),
            backend=own.backend,
            config=deciding,
        )
