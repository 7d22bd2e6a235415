"""Everything derived from the cluster's objects, and derived again only where it must be. Pure.

Waypoints and what they are told are in `istiod_lite.traffic_index`; `traffic` is that part.
`receive` takes the watch's events and notes what they touch: a pod its workload; a Service
itself and the pods it selects or selected; a policy itself and the workloads whose policies
it changes; a node the workloads on it. `settle` derives what was noted. Values that come out
equal stay the same objects, so that a snapshot shares them.

What cannot be read changes nothing and becomes a finding; a policy that cannot be read and
was never known before denies (see `istiod_lite.policies`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import TypeVar

from istiod_lite import (
    entries,
    peer_authentication,
    policies,
    traffic_index,
    workloads,
)
from istiod_lite.auto_addresses import AutoAddresses
from istiod_lite.traffic_index import TrafficIndex
from istiod_lite.workloads import Mesh
from mesh.cluster.api import Deleted, Event, Fault, Object, Put, Ref, Synced
from mesh.cluster.entries import ServiceEntry, WorkloadEntry
from mesh.cluster.fields import Reader
from mesh.cluster.inventory import Inventory
from mesh.cluster.objects import (
    EndpointSlice,
    Metadata,
    Namespace,
    Node,
    Pod,
    Service,
    is_selected,
)
from mesh.cluster.policies import AuthorizationPolicy, PeerAuthentication, read_selector
from mesh.cluster.validate import Finding, Severity, finding_of
from mesh.errors import ConfigError
from mesh.model import service as model
from mesh.model.authorization import Authorization, PolicyScope
from mesh.model.workload import Workload

KINDS = (
    "Namespace",
    "Node",
    "Pod",
    "Service",
    "EndpointSlice",
    "ServiceEntry",
    "WorkloadEntry",
    "AuthorizationPolicy",
    "PeerAuthentication",
    "ConfigMap",
    *traffic_index.KINDS,
)
# In this order what was touched is derived: each may touch what comes after it.
_ORDER = ("Gateway", "Service", "ServiceEntry", "Pod", "WorkloadEntry", "EndpointSlice")
V = TypeVar("V")
_CLOSED = "; until it is repaired, everything that it could concern is denied"


class ClusterIndex:
    """See the module. `addresses` and `policies` are keyed by resource name; do not change them."""

    def __init__(self, mesh: Mesh) -> None:
        self.mesh = mesh
        self.addresses: dict[str, Workload | model.Service] = {}
        self.policies: dict[str, Authorization] = {}
        self._inventory = Inventory()
        self.traffic = TrafficIndex(mesh, self._inventory)
        self._faults: dict[str, Finding] = {}
        self._findings: dict[Ref, tuple[Finding, ...]] = {}
        self._on_node: dict[str, dict[Ref, None]] = {}
        self._stored: dict[Ref, frozenset[str]] = {}
        self._owners: dict[str, Ref] = {}
        self._selectors: dict[str, dict[str, Mapping[str, str]]] = {}
        self._peers: dict[Ref, PeerAuthentication] = {}
        self._converted: frozenset[str] = frozenset()
        self._guards: dict[Ref, frozenset[str]] = {}
        self.allocated = AutoAddresses()
        self._dirty: dict[Ref, None] = {}
        self._changed = False
        self._touched: tuple[set[str], set[str]] = (set(), set())

    # -- what others ask -----------------------------------------------------------------

    @property
    def inventory(self) -> Inventory:
        """The objects themselves."""
        return self._inventory

    def problems(self, ref: Ref) -> tuple[Finding, ...]:
        """What is wrong or odd about one object."""
        return self._findings.get(ref, ())

    def errors(self, ref: Ref) -> str:
        """Those of them that keep it from being in force, as one text; empty if there is none."""
        errors = (each for each in self.problems(ref) if each.severity is Severity.ERROR)
        return "; ".join(
            f"{each.field}: {each.message}" if each.field else each.message for each in errors
        )

    def pod(self, namespace: str, name: str) -> Pod | None:
        """The pod of that name."""
        return self._inventory.get(Pod, namespace, name)

    def pods(self) -> Iterator[Pod]:
        """Every pod."""
        return self._inventory.all(Pod)

    def pods_on_node(self, node: str) -> Iterable[Pod]:
        """All pods of a node."""
        views = (self._inventory.view(ref) for ref in self._on_node.get(node, ()))
        return [view for view in views if isinstance(view, Pod)]

    def namespaces(self) -> list[str]:
        """The namespaces that exist."""
        return sorted(each.name for each in self._inventory.all(Namespace))

    def take_touched(self) -> tuple[set[str], set[str]]:
        """Names of `addresses` and of `policies` that may have changed since this was asked."""
        touched, self._touched = self._touched, (set(), set())
        return touched

    def findings(self) -> list[Finding]:
        """What is wrong or odd now, with the place it is written at."""
        found = list(self._faults.values())
        for ref, listed in self._findings.items():
            source = self._inventory.source(ref)
            found += [replace(each, source=each.source or source) for each in listed]
        return found

    # -- events in -----------------------------------------------------------------------

    def receive(self, event: Event) -> None:
        """Note what an event touches."""
        match event:
            case Put():
                self._put(event)
            case Deleted(ref):
                self._findings.pop(ref, None)
                old = self._inventory.delete(ref)
                if ref.kind == "AuthorizationPolicy":
                    self._set_policy(ref, None, None)
                elif ref.kind == "PeerAuthentication":
                    self._set_peer(ref, None)
                self._mark(self.traffic.forget(ref))
                if old is not None:
                    self._touch(ref, old, None)
            case Fault(error, repaired):
                if repaired:
                    self._faults.pop(str(error), None)
                else:
                    self._faults[str(error)] = finding_of(error)
            case Synced():
                pass

    def _put(self, put: Put) -> None:
        ref = put.ref
        old = self._inventory.view(ref)
        try:
            new = self._inventory.put(ref, put.object, put.source)
        except ConfigError as exc:
            finding = finding_of(exc, ref)
            if old is None and self._close(ref, put.object, exc.message):
                finding = replace(finding, message=finding.message + _CLOSED)
            self._findings[ref] = (finding,)
            return
        self._findings.pop(ref, None)
        match new:
            case AuthorizationPolicy():
                translated = policies.translate(new, self.mesh.root_namespace)
                if translated.findings:
                    self._findings[ref] = translated.findings
                self._set_policy(ref, translated.authorization, new.selector)
            case PeerAuthentication():
                self._set_peer(ref, new)
        if new is not None:
            self._touch(ref, old, new)

    def _close(self, ref: Ref, obj: Object, problem: str) -> bool:
        """Let a policy that was never readable deny; False for what is no policy."""
        touched = self.traffic.close(ref, obj, problem)
        if touched is not None:
            self._mark(touched)
            return True
        if ref.kind == "AuthorizationPolicy":
            closed = policies.closed(ref, obj, self.mesh.root_namespace)
            if closed is not None:
                self._set_policy(ref, *closed)
            return closed is not None
        if ref.kind == "PeerAuthentication":
            try:
                selector = read_selector(Reader(obj).at("spec", "selector"))
            except ConfigError:
                selector = None
            self._set_peer(ref, PeerAuthentication(ref=ref, selector=selector, mode="STRICT"))
            return True
        return False

    # -- what an object touches ----------------------------------------------------------

    def _mark(self, refs: Iterable[Ref]) -> None:
        self._dirty.update(dict.fromkeys(refs))

    def _touch(self, ref: Ref, old: Metadata | None, new: Metadata | None) -> None:
        self._mark(self.traffic.touched(ref, old, new))
        match new or old:
            case Pod() | EndpointSlice():
                self._place(ref, workloads.nodes_of(old), workloads.nodes_of(new))
                self._dirty[ref] = None
            case Service():
                self._dirty[ref] = None
                self._touch_endpoints(ref, old, new)
                self._touch_entries(ref.namespace)
            case ServiceEntry():
                self._dirty[ref] = None
                self.allocated.look()
                states = [each for each in (old, new) if isinstance(each, ServiceEntry)]
                self._mark(entries.touched(self._inventory, states))
            case WorkloadEntry():
                self._dirty[ref] = None
            case Namespace():
                if workloads.distribution_of(old) != workloads.distribution_of(new):
                    for service in self._inventory.within(Service, ref.name):
                        self._dirty[service.ref] = None
            case Node():
                before = workloads.locality_of(old if isinstance(old, Node) else None)
                after = workloads.locality_of(new if isinstance(new, Node) else None)
                if before != after:
                    self._dirty.update(self._on_node.get(ref.name, {}))

    def _touch_endpoints(self, ref: Ref, old: Metadata | None, new: Metadata | None) -> None:
        states = [each for each in (old, new) if isinstance(each, Service)]
        for pod in self._inventory.within(Pod, ref.namespace):
            if any(service.selects(pod.labels) for service in states):
                self._dirty[pod.ref] = None
        for endpoints in self._inventory.within(EndpointSlice, ref.namespace):
            if endpoints.service == ref.name:
                self._dirty[endpoints.ref] = None

    def _touch_entries(self, namespace: str) -> None:
        for entry in self._inventory.within(WorkloadEntry, namespace):
            self._dirty[entry.ref] = None

    def _place(self, ref: Ref, before: frozenset[str], after: frozenset[str]) -> None:
        for node in before - after:
            refs = self._on_node[node]
            refs.pop(ref, None)
            if not refs:
                del self._on_node[node]
        for node in after - before:
            self._on_node.setdefault(node, {})[ref] = None

    def _set_policy(
        self,
        ref: Ref,
        authorization: Authorization | None,
        selector: Mapping[str, str] | None,
    ) -> None:
        key = f"{ref.namespace}/{ref.name}"
        self._store(self.policies, key, authorization)
        named = self._selectors.setdefault(ref.namespace, {})
        old = named.pop(key, None)
        new = None
        if authorization is not None and authorization.scope is PolicyScope.WORKLOAD_SELECTOR:
            new = named[key] = selector or {}
        if not named:
            del self._selectors[ref.namespace]
        # A workload only names its policies: it is touched if it starts or stops doing so.
        everywhere = ref.namespace == self.mesh.root_namespace
        for pod in self._pods_of("" if everywhere else ref.namespace):
            if _selects(old, pod) != _selects(new, pod):
                self._dirty[pod.ref] = None

    def _set_peer(self, ref: Ref, peer: PeerAuthentication | None) -> None:
        states = [each for each in (self._peers.pop(ref, None), peer) if each is not None]
        if peer is not None:
            self._peers[ref] = peer
        root = self.mesh.root_namespace
        converted = peer_authentication.convert(self._peers.values(), root)
        for key in self._converted - converted.keys():
            self._store(self.policies, key, None)
        for key, authorization in converted.items():
            self._store(self.policies, key, authorization)
        self._converted = frozenset(converted)
        for state in states:
            namespace = peer_authentication.reaches(state, root)
            if namespace is not None:
                for pod in self._pods_of(namespace):
                    if is_selected(state.selector or {}, pod.labels):
                        self._dirty[pod.ref] = None

    def _pods_of(self, namespace: str) -> Iterator[Pod]:
        """The pods of a namespace; of all, if it is empty."""
        if namespace:
            return self._inventory.within(Pod, namespace)
        return self._inventory.all(Pod)

    # -- derive --------------------------------------------------------------------------

    def settle(self) -> bool:
        """Derive what was touched; whether `addresses` or `policies` changed since last time."""
        derive: Mapping[str, Callable[[Ref], Iterable[Ref]]] = {
            "Gateway": self._derive_gateway,
            "Service": self._derive_service,
            "ServiceEntry": self._derive_service_entry,
            "Pod": self._derive_pod,
            "WorkloadEntry": self._derive_workload_entry,
            "EndpointSlice": self._derive_slice,
        }
        self._mark(self.allocated.settle(self._inventory))
        for kind in _ORDER:
            for ref in [each for each in self._dirty if each.kind == kind]:
                del self._dirty[ref]
                self._mark(derive[kind](ref))
        changed, self._changed = self._changed, False
        return changed

    def _derive_gateway(self, ref: Ref) -> Iterable[Ref]:
        touched = self.traffic.derive_gateway(ref)
        self._changed |= self.traffic.has_changed()
        return touched

    def _derive_pod(self, ref: Ref) -> Iterable[Ref]:
        pod = self.pod(ref.namespace, ref.name)
        workload = None
        if pod is not None:
            services = self._inventory.within(Service, ref.namespace)
            node = self._node(pod.node)
            policed = self._policies_of(pod)
            workload = workloads.pod_workload(self.mesh, pod, services, node, policed)
            if workload is not None:
                listed = self._inventory.within(ServiceEntry, ref.namespace)
                chosen = entries.selected_by(listed, pod.labels, {})
                workload = replace(
                    workload,
                    waypoint=self.traffic.pod_waypoint(pod),
                    services={**workload.services, **chosen},
                )
        else:
            self.traffic.forget_user(ref)
        self._store(self.addresses, self.mesh.pod_uid(ref.namespace, ref.name), workload)
        return ()

    def _policies_of(self, pod: Pod) -> tuple[str, ...]:
        root = self.mesh.root_namespace
        named = [
            key
            for namespace in dict.fromkeys((root, pod.namespace))
            for key, selector in self._selectors.get(namespace, {}).items()
            if is_selected(selector, pod.labels)
        ]
        peers = peer_authentication.policies_for(
            self._peers.values(), pod.namespace, pod.labels, root
        )
        return (*sorted(named), *self.traffic.guards_of(pod), *peers)

    def _derive_service(self, ref: Ref) -> Iterable[Ref]:
        service = self._inventory.get(Service, ref.namespace, ref.name)
        found = None
        guards = self._guards.pop(ref, frozenset())
        if service is not None and workloads.is_published(service):
            namespace = self._inventory.get(Namespace, "", ref.namespace)
            waypoint, touched = self.traffic.service_waypoint(service)
            found = workloads.mesh_service(self.mesh, service, namespace)
            if found is not None and waypoint is not None:
                found = replace(found, waypoint=waypoint)
        else:
            touched = self.traffic.forget_user(ref)
        current = {each.key: each for each in self.traffic.guards.get(ref, {}).values()}
        for key in guards - current.keys():
            self._store(self.policies, key, None)
        for key, authorization in current.items():
            self._store(self.policies, key, authorization)
        if current:
            self._guards[ref] = frozenset(current)
        self._changed |= self.traffic.has_changed()
        self._store(self.addresses, self.mesh.service_key(ref.namespace, ref.name), found)
        return touched

    def _derive_service_entry(self, ref: Ref) -> Iterable[Ref]:
        entry = self._inventory.get(ServiceEntry, ref.namespace, ref.name)
        if entry is None:
            touched = self.traffic.forget_user(ref)
            self._changed |= self.traffic.has_changed()
            return [*touched, *self._replace(ref, {})]
        hosts = entries.hosts_of(
            self.mesh, entry, self._inventory.within(ServiceEntry, ref.namespace)
        )
        waypoint = self.traffic.entry_waypoint(entry, hosts)
        self._changed |= self.traffic.has_changed()
        found = entries.resources(self.mesh, entry, hosts, self.allocated.of(ref), waypoint)
        return self._replace(ref, found)

    def _derive_workload_entry(self, ref: Ref) -> Iterable[Ref]:
        entry = self._inventory.get(WorkloadEntry, ref.namespace, ref.name)
        found: dict[str, Workload | model.Service] = {}
        if entry is not None:
            services = self._inventory.within(Service, ref.namespace)
            listed = self._inventory.within(ServiceEntry, ref.namespace)
            workload = entries.workload_entry(self.mesh, entry, services, listed)
            found[workload.uid] = workload
        return self._replace(ref, found)

    def _derive_slice(self, ref: Ref) -> Iterable[Ref]:
        endpoints = self._inventory.get(EndpointSlice, ref.namespace, ref.name)
        found: dict[str, Workload] = {}
        if endpoints is not None:
            service = self._inventory.get(Service, ref.namespace, endpoints.service)
            found = workloads.slice_workloads(self.mesh, endpoints, service, self._node)
        return self._replace(ref, found)

    def _replace(self, ref: Ref, found: Mapping[str, Workload | model.Service]) -> Iterable[Ref]:
        """Store what one object stands for, and remove what it no longer does."""
        for name in self._stored.pop(ref, frozenset()) - found.keys():
            if self._owners.get(name) == ref:
                del self._owners[name]
                self._store(self.addresses, name, None)
        for name, value in found.items():
            self._owners[name] = ref
            self._store(self.addresses, name, value)
        if found:
            self._stored[ref] = frozenset(found)
        return ()

    def _node(self, name: str) -> Node | None:
        return self._inventory.get(Node, "", name)

    def _store(self, values: dict[str, V], key: str, value: V | None) -> None:
        if value is None:
            if values.pop(key, None) is None:
                return
        elif values.get(key) == value:
            return
        else:
            values[key] = value
        self._changed = True
        self._touched[values is self.policies].add(key)


def _selects(selector: Mapping[str, str] | None, pod: Pod) -> bool:
    return selector is not None and is_selected(selector, pod.labels)
