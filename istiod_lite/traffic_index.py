"""Waypoints, and what each is told for each service; derived again only where it must be. Pure.

Beside `istiod_lite.index`, which owns the objects and the list of what is to be derived. Here
are the relations that say whom a change concerns: routes and policies their targets, routes
their backends, services and pods the Gateway that they go through.

Each service that a waypoint may serve has a `TrafficConfig`, an empty one too, and so has each
waypoint: a waypoint that has none for a service does not know its policy yet and must not serve.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

from istiod_lite import attachment, backends, bindings, guards, l7_policies, providers, routes
from istiod_lite.bindings import Binding, Waypoint
from istiod_lite.l7_policies import POLICY_KINDS, Policy
from istiod_lite.relation import Relation
from istiod_lite.workloads import Mesh
from mesh.cluster.api import Object, Ref
from mesh.cluster.entries import ServiceEntry
from mesh.cluster.gateways import (
    GATEWAY_NAME,
    Gateway,
    GatewayClass,
    ReferenceGrant,
    named_gateway,
)
from mesh.cluster.inventory import Inventory
from mesh.cluster.l7_policies import RateLimitPolicy, RedactionPolicy, RequestAuthentication
from mesh.cluster.mesh_config import ConfigMap
from mesh.cluster.objects import Metadata, Namespace, Pod, Service
from mesh.cluster.policies import AuthorizationPolicy, TargetRef
from mesh.cluster.routes import ROUTE_KINDS, ROUTES, RouteView
from mesh.cluster.traffic_policies import DestinationRule, XBackendTrafficPolicy
from mesh.model import l7_policy as model
from mesh.model.authorization import Authorization
from mesh.model.route import Route
from mesh.model.workload import GatewayAddress

KINDS = (
    *ROUTE_KINDS,
    *POLICY_KINDS[1:],
    *backends.KINDS,
    "Gateway",
    "GatewayClass",
    "XMesh",
    "ReferenceGrant",
)
SHOWS_IDENTITY = "ambient.istio.io/xfcc-include-client-identity"
EXPLAINS = "ambit.dev/explain-denials"


class TrafficIndex:
    """See the module. Mappings may be read, not changed."""

    def __init__(self, mesh: Mesh, inventory: Inventory) -> None:
        self.configs: dict[str, model.TrafficConfig] = {}
        self.waypoints: dict[Ref, Waypoint] = {}
        self.bindings: dict[Ref, Binding] = {}
        self.outcomes: dict[Ref, routes.Outcome] = {}
        self.with_policy: set[Ref] = set()
        self.guards: dict[Ref, dict[guards.Ports, Authorization]] = {}
        self._mesh = mesh
        self._inventory = inventory
        self._users = Relation()
        self._parents = Relation()
        self._backends = Relation()
        self._targets = Relation()
        self._broken: dict[Ref, str] = {}
        self._keys: dict[Ref, str] = {}
        self._entry_keys: dict[Ref, tuple[str, ...]] = {}
        self._changed = False

    def config_key(self, service: Ref) -> str:
        """The name of the service's TrafficConfig, empty without one."""
        return self._keys.get(service, "")

    def config_keys(self, ref: Ref) -> tuple[str, ...]:
        """The names of the TrafficConfigs of a Service, or of each host of a ServiceEntry."""
        key = self._keys.get(ref, "")
        return (key,) if key else self._entry_keys.get(ref, ())

    def users(self, gateway: Ref) -> tuple[Ref, ...]:
        """The services and pods that name a Gateway."""
        return self._users.to(gateway)

    def parents_of(self, route: Ref) -> tuple[Ref, ...]:
        """The Services that a route names as parents."""
        return self._parents.of(route)

    def parents_by_backend(self, service: Ref) -> list[Ref]:
        """The Services whose routes lead to `service`."""
        return self._parents_of(self._backends.to(service))

    def targets(self, policy: Ref) -> tuple[Ref, ...]:
        """What a policy is attached to, whether it exists or not."""
        return self._targets.of(policy)

    def unreadable(self) -> Mapping[Ref, str]:
        """Policies that were never readable, and why."""
        return self._broken

    # -- what a change touches -----------------------------------------------------------

    def touched(self, ref: Ref, old: Metadata | None, new: Metadata | None) -> list[Ref]:
        """The services, pods and Gateways to derive again."""
        match new or old:
            case Gateway():
                return [ref]
            case GatewayClass():
                return [each.ref for each in self._inventory.all(Gateway)]
            case ReferenceGrant():
                return self._parents_of(self._backends.to(Ref("Namespace", "", ref.namespace)))
            case Namespace():
                if (old.labels if old else {}) != (new.labels if new else {}):
                    return self._within(ref.name)
            case Pod():
                return [*self._gateways_of(old, new), *self._guarded_by(old, new)]
            case Service():
                return self._parents_of(self._backends.to(ref))
            case DestinationRule() | XBackendTrafficPolicy():
                states = [each for each in (old, new) if isinstance(each, _BACKENDS)]
                found = backends.touched(self._mesh, self._inventory, *states)
                return [
                    *found,
                    *(self._parents_of(route for ref in found for route in self._backends.to(ref))),
                ]
            case ConfigMap():
                asking = providers.who_asks(self._mesh, self._inventory, ref, old, new)
                return [each for policy in asking for each in self._concerned(self.targets(policy))]
            case RouteView():
                return self._set_route(ref, new if isinstance(new, RouteView) else None)
            case (
                AuthorizationPolicy(target_refs=refs)
                | RequestAuthentication(target_refs=refs)
                | RateLimitPolicy(target_refs=refs)
                | RedactionPolicy(target_refs=refs)
            ):
                self._broken.pop(ref, None)
                return self._set_targets(ref, refs if new is not None else ())
        return []

    def close(self, ref: Ref, obj: Object, problem: str) -> list[Ref] | None:
        """A policy that was never readable: what it denies. None if it is no waypoint's."""
        refs = l7_policies.targets_of_unreadable(ref, obj)
        if refs is None or ref.kind not in POLICY_KINDS:
            return None
        self._broken[ref] = problem
        return self._set_targets(ref, refs)

    def forget(self, ref: Ref) -> list[Ref]:
        """A policy that was never readable is gone."""
        return self._set_targets(ref, ()) if self._broken.pop(ref, None) is not None else []

    def _within(self, namespace: str) -> list[Ref]:
        services = [each.ref for each in self._inventory.within(Service, namespace)]
        services += [each.ref for each in self._inventory.within(ServiceEntry, namespace)]
        return [*services, *(each.ref for each in self._inventory.within(Pod, namespace))]

    def _gateways_of(self, *views: Metadata | None) -> Iterator[Ref]:
        for view in views:
            if view is not None and (name := view.labels.get(GATEWAY_NAME)):
                yield Ref("Gateway", view.namespace, name)

    def _guarded_by(self, old: Metadata | None, new: Metadata | None) -> list[Ref]:
        """Services whose guard depends on the ports of the pod's containers."""
        pods = [each for each in (old, new) if isinstance(each, Pod)]
        if len(pods) == 2 and (pods[0].labels, pods[0].ports) == (pods[1].labels, pods[1].ports):
            return []
        found = self._inventory.within(Service, pods[0].namespace)
        return [
            each.ref
            for each in found
            if each.ref in self.guards
            and guards.depends_on_pods(each)
            and any(each.selects(pod.labels) for pod in pods)
        ]

    def _set_route(self, ref: Ref, view: RouteView | None) -> list[Ref]:
        parents = self._parents.set(ref, routes.parent_services(view) if view else ())
        found: list[Ref] = []
        for each in routes.backends_of(view) if view else ():
            namespace, _, name = each.service.partition("/")
            found.append(Ref("Service", namespace, name))
            if namespace != ref.namespace:
                found.append(Ref("Namespace", "", namespace))
        self._backends.set(ref, found)
        return list(parents)

    def _parents_of(self, refs: Iterable[Ref]) -> list[Ref]:
        return [parent for ref in refs for parent in self._parents.of(ref)]

    def _set_targets(self, ref: Ref, refs: Iterable[TargetRef]) -> list[Ref]:
        targets = [target for each in refs if (target := self.target(ref, each)) is not None]
        return self._concerned(self._targets.set(ref, targets))

    def _concerned(self, targets: Iterable[Ref]) -> list[Ref]:
        found: list[Ref] = []
        for target in targets:
            match target.kind:
                case "Service" | "ServiceEntry":
                    found.append(target)
                case "Gateway":
                    found += [target, *self._users.to(target)]
                case "GatewayClass":
                    for gateway in self._inventory.all(Gateway):
                        found += [gateway.ref, *self._users.to(gateway.ref)]
                case "Namespace":
                    found += self._within(target.name)
                case _:
                    found += self._parents.of(target)
        return found

    # -- derive --------------------------------------------------------------------------

    def derive_gateway(self, ref: Ref) -> list[Ref]:
        """Derive a waypoint; its users, if it changed for them."""
        gateway = self._inventory.get(Gateway, ref.namespace, ref.name)
        if gateway is None or not gateway.is_waypoint:
            self._drop(_name(ref))
            return self._users_if(self.waypoints.pop(ref, None) is not None, ref)
        gateway_class = self._inventory.get(GatewayClass, "", gateway.class_name)
        has_ready_pod = any(
            pod.is_ready and not pod.is_terminating and not pod.is_terminal
            for pod in self._inventory.within(Pod, ref.namespace)
            if pod.labels.get(GATEWAY_NAME) == ref.name and pod.service_account == ref.name
        )
        old, before = self.waypoints.get(ref), self.configs.get(_name(ref))
        new = bindings.waypoint_of(gateway, gateway_class, has_ready_pod=has_ready_pod)
        self.waypoints[ref] = new
        config = self._config(gateway, "", self._policies_on_gateway(gateway), ())
        self._keep(config)
        return self._users_if(old != new or _manners(before) != _manners(config), ref)

    def _users_if(self, has_changed: bool, ref: Ref) -> list[Ref]:
        return list(self._users.to(ref)) if has_changed else []

    def pod_waypoint(self, pod: Pod) -> GatewayAddress | None:
        """The waypoint that a pod itself is reached through."""
        binding = self._bind(pod)
        has_policy = self._has_policy(self._gateway(binding))
        return bindings.address_for(self._mesh, binding, has_policy=has_policy)

    def service_waypoint(self, service: Service) -> tuple[GatewayAddress | None, list[Ref]]:
        """The waypoint that a service is reached through, and the pods whose guard changed."""
        ref = service.ref
        binding = self._bind(service)
        views = self._routes_on(ref)
        outcome = routes.routes_of(self._mesh, service, views, self._inventory)
        if outcome.attachments:
            self.outcomes[ref] = outcome
        else:
            self.outcomes.pop(ref, None)
        attached = self._policies_on_service(service, binding, views)
        gateway = self._gateway(binding)
        old_key = self._keys.pop(ref, "")
        if binding.is_served and gateway is not None:
            key = self._mesh.service_key(ref.namespace, ref.name)
            config = replace(
                self._config(gateway, key, attached, outcome.routes),
                backend=backends.settings_of(self._mesh, service, self._inventory),
                backends=backends.of_routes(self._mesh, outcome.routes, self._inventory),
            )
            self._keep(config)
            self._keys[ref] = config.key
        if old_key and old_key != self._keys.get(ref):
            self._drop(old_key)
        has_policy = bool(attached) or self._has_policy(gateway)
        touched = self._set_guard(service, binding, has_policy=has_policy)
        return bindings.address_for(self._mesh, binding, has_policy=has_policy), touched

    def entry_waypoint(self, entry: ServiceEntry, hosts: Iterable[str]) -> GatewayAddress | None:
        """The waypoint that the hosts of a ServiceEntry, which has no routes, go through."""
        binding = self._bind(entry)
        if entry.resolution == "NONE" and binding.is_served and not self._targets.to(entry.ref):
            # Only a policy on the entry itself closes it.
            message = "resolution NONE: a waypoint has no endpoint to send it to"
            binding = Binding(binding.gateway, "UnsupportedTrafficType", message)
            self.bindings[entry.ref] = binding
        attached = self._policies_on_service(entry, binding, ())
        gateway = self._gateway(binding)
        keys: list[str] = []
        if gateway is not None:  # and the binding is served
            for host in hosts:
                config = self._config(gateway, f"{entry.namespace}/{host}", attached, ())
                self._keep(config)
                keys.append(config.key)
        for key in self._entry_keys.pop(entry.ref, ()):
            if key not in keys:
                self._drop(key)
        if keys:
            self._entry_keys[entry.ref] = tuple(keys)
        has_policy = bool(attached) or self._has_policy(gateway)
        return bindings.address_for(self._mesh, binding, has_policy=has_policy)

    def forget_user(self, ref: Ref) -> list[Ref]:
        """A service or pod is gone; the pods whose guard changed."""
        self._users.set(ref, ())
        self.bindings.pop(ref, None)
        self.outcomes.pop(ref, None)
        self.with_policy.discard(ref)
        for key in (self._keys.pop(ref, ""), *self._entry_keys.pop(ref, ())):
            self._drop(key)
        return self._pods(ref) if self.guards.pop(ref, None) else []

    def guards_of(self, pod: Pod) -> list[str]:
        """The keys of the guards that a pod has to name."""
        found = []
        for service in self._inventory.within(Service, pod.namespace):
            mine = self.guards.get(service.ref)
            if mine and service.selects(pod.labels):
                ports = guards.ports_of(service, [pod])
                found += [mine[each].key for each in ports if each in mine]
        return sorted(found)

    def _set_guard(self, service: Service, binding: Binding, *, has_policy: bool) -> list[Ref]:
        old = self.guards.pop(service.ref, {})
        new = {}
        (self.with_policy.add if has_policy else self.with_policy.discard)(service.ref)
        if has_policy and guards.is_wanted(service):
            pods = self._inventory.within(Pod, service.namespace)
            selected = [pod for pod in pods if service.selects(pod.labels)]
            new = {
                ports: guards.guard(self._mesh, service, ports, binding)
                for ports in guards.ports_of(service, selected)
            }
            # Kept also without pods, so that the first one finds it.
            self.guards[service.ref] = new
        changed = {each.key for each in old.values()} != {each.key for each in new.values()}
        return self._pods(service.ref) if changed else []

    def _pods(self, ref: Ref) -> list[Ref]:
        return [each.ref for each in self._inventory.within(Pod, ref.namespace)]

    def _bind(self, view: Service | ServiceEntry | Pod) -> Binding:
        namespace = self._inventory.get(Namespace, "", view.namespace)
        named = named_gateway(view, namespace)
        self._users.set(view.ref, () if named is None else (named,))
        binding = bindings.bind(view, namespace, self.waypoints)
        if binding == Binding():
            self.bindings.pop(view.ref, None)
        else:
            self.bindings[view.ref] = binding
        return binding

    def _gateway(self, binding: Binding) -> Gateway | None:
        if binding.gateway is None or not binding.is_served:
            return None
        return self._inventory.get(Gateway, binding.gateway.namespace, binding.gateway.name)

    def _routes_on(self, service: Ref) -> list[RouteView]:
        found = []
        for ref in self._parents.to(service):
            view = self._inventory.get(_VIEWS[ref.kind], ref.namespace, ref.name)
            if view is not None:
                found.append(view)
        return found

    # -- policies ------------------------------------------------------------------------

    def target(self, policy: Ref, target: TargetRef) -> Ref | None:
        """As `attachment.target_of`."""
        return attachment.target_of(policy, target, self._mesh.root_namespace)

    def _has_policy(self, gateway: Gateway | None) -> bool:
        return gateway is not None and bool(self._policies_on_gateway(gateway))

    def _policies_on_gateway(self, gateway: Gateway) -> list[Policy]:
        refs = [*self._targets.to(gateway.ref), *self._targets.to(_CLASS)]
        return [self._policy(ref) for ref in self._ordered(refs)]

    def _policies_on_service(
        self, service: Service | ServiceEntry, binding: Binding, views: Iterable[RouteView]
    ) -> list[Policy]:
        found = {*self._targets.to(service.ref)}
        if binding.is_served:
            found.update(self._targets.to(Ref("Namespace", "", service.namespace)))
        policies = [self._policy(ref) for ref in self._ordered(found)]
        for view in views:
            listed = self._ordered(self._targets.to(view.ref))
            policies += [self._policy_on_route(ref, view) for ref in listed if ref not in found]
        return policies

    def _ordered(self, refs: Iterable[Ref]) -> list[Ref]:
        """Oldest first, then by name: the order of precedence."""
        return sorted(set(refs), key=self._age)

    def _age(self, ref: Ref) -> tuple[str, str, str]:
        view = self._inventory.view(ref)
        return (view.created if view else "", f"{ref.namespace}/{ref.name}", ref.kind)

    def _policy(self, ref: Ref) -> Policy:
        return attachment.translated(self._mesh, self._inventory, ref, self._broken.get(ref, ""))

    def _policy_on_route(self, ref: Ref, view: RouteView) -> Policy:
        refs = getattr(self._inventory.view(ref), "target_refs", ())
        sections = {each.section for each in refs if self.target(ref, each) == view.ref}
        return l7_policies.narrowed(self._policy(ref), view, sections or {""})

    def _config(
        self,
        gateway: Gateway,
        service: str,
        policies: Iterable[Policy],
        found: tuple[Route, ...],
    ) -> model.TrafficConfig:
        listed = list(policies)
        annotations = gateway.annotations
        return model.TrafficConfig(
            gateway=_name(gateway.ref),
            service=service,
            routes=found,
            authorizations=tuple(p for p in listed if isinstance(p, model.L7Authorization)),
            authentications=tuple(p for p in listed if isinstance(p, model.RequestAuthentication)),
            rate_limits=tuple(p for p in listed if isinstance(p, model.RateLimitPolicy)),
            redactions=tuple(p for p in listed if isinstance(p, model.RedactionPolicy)),
            shows_client_identity=annotations.get(SHOWS_IDENTITY, "").lower() == "true",
            explains_denials=annotations.get(EXPLAINS, "").lower() == "true",
        )

    def has_changed(self) -> bool:
        """Whether `configs` changed since this was asked last."""
        changed, self._changed = self._changed, False
        return changed

    def _keep(self, config: model.TrafficConfig) -> None:
        if self.configs.get(config.key) != config:
            self.configs[config.key] = config
            self._changed = True

    def _drop(self, key: str) -> None:
        if self.configs.pop(key, None) is not None:
            self._changed = True


_VIEWS: dict[str, type[RouteView]] = {each.__name__: each for each in ROUTES}
_BACKENDS = (DestinationRule, XBackendTrafficPolicy)
_CLASS = attachment.CLASS


def _name(ref: Ref) -> str:
    return f"{ref.namespace}/{ref.name}"


def _manners(config: model.TrafficConfig | None) -> tuple[bool, bool] | None:
    """What a waypoint does alike for all its services."""
    return (config.shows_client_identity, config.explains_denials) if config else None
