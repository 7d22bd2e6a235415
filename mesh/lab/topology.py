"""Kubernetes objects -> a Plan of nodes, pods, addresses and Services; and what changed.

Pure. `plan` does at once what scheduler, controllers and address management do in a cluster:
it keeps what the previous plan gave to pods that live on, and gives the rest. An object that
cannot be read becomes a fault, and what it had asked for before stays in force.
`diff` says which pods to start and stop on the way from one plan to the next.
"""

from __future__ import annotations

import copy
import uuid
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

from mesh.cluster.api import Ref, Source, located, ref_of, source_of
from mesh.cluster.fields import Reader
from mesh.errors import ConfigError
from mesh.lab import addresses, workloads
from mesh.lab.podspec import PodSpec, parse_pod_spec
from mesh.lab.services import ClusterIps, Key, ServicePlan, plan_service

HOSTNAME_LABEL = "kubernetes.io/hostname"
REGION_LABEL = "topology.kubernetes.io/region"
ZONE_LABEL = "topology.kubernetes.io/zone"
DEFAULT_NODES = 2
MAX_NODES = 64
_UIDS = uuid.UUID("8f0f31f2-4f3f-5b60-9f0e-6d1f2b6c4a11")


@dataclass(frozen=True, slots=True)
class NodePlan:
    """A node; `index` (1-based) decides all its addresses."""

    name: str
    index: int
    labels: Mapping[str, str] = field(default_factory=dict)

    @property
    def ips(self) -> tuple[str, str]:
        """IPv4 and IPv6 of its `eth0`."""
        return addresses.fabric_ips(self.index)

    @property
    def gateway_ips(self) -> tuple[str, str]:
        """IPv4 and IPv6 of its bridge."""
        return addresses.gateway_ips(self.index)


@dataclass(frozen=True, slots=True)
class PodPlan:
    """A pod to run. `object` is its whole manifest but for the status.

    `owner` is `Kind/namespace/name`, empty for a pod that stands for itself. A change of
    `revision` means another pod, even under the same name.
    """

    namespace: str
    name: str
    uid: str
    node: str
    ips: tuple[str, ...]
    revision: str
    spec: PodSpec = field(compare=False)
    object: Mapping[str, Any] = field(compare=False, repr=False)
    owner: str = ""

    @property
    def key(self) -> Key:
        """Namespace and name."""
        return self.namespace, self.name

    @property
    def labels(self) -> Mapping[str, str]:
        """The labels of its manifest."""
        return dict(self.object["metadata"].get("labels") or {})


@dataclass(frozen=True, slots=True)
class Plan:
    """What should run. `serial` and `cursors` keep names and addresses from being reused soon."""

    nodes: tuple[NodePlan, ...] = ()
    pods: Mapping[Key, PodPlan] = field(default_factory=dict)
    services: Mapping[Key, ServicePlan] = field(default_factory=dict)
    faults: tuple[ConfigError, ...] = ()
    notes: tuple[str, ...] = ()
    serial: int = 0
    cursors: Mapping[str, int] = field(default_factory=dict)
    service_start: int = addresses.FIRST_SERVICE

    def node(self, name: str) -> NodePlan:
        """The node called so. Raises KeyError."""
        for node in self.nodes:
            if node.name == name:
                return node
        raise KeyError(name)


@dataclass(frozen=True, slots=True)
class Stop:
    """A pod to stop, once all pods of `after` are ready (a rolling update)."""

    pod: PodPlan
    after: tuple[Key, ...] = ()


@dataclass(frozen=True, slots=True)
class Changes:
    """The way from one plan to the next. A pod replaced under its own name is in both lists:
    the old one must be gone before the new one starts. `relabel` live on with other metadata."""

    start: tuple[PodPlan, ...] = ()
    stop: tuple[Stop, ...] = ()
    relabel: tuple[PodPlan, ...] = ()


def plan(
    objects: Iterable[Mapping[str, Any]],
    previous: Plan,
    *,
    node_count: int | None = None,
    busy: frozenset[str] = frozenset(),
    deleted: frozenset[str] = frozenset(),
    sources: Mapping[Ref, Source] = MappingProxyType({}),
) -> Plan:
    """The plan for `objects` (Pods among them stand for themselves; they have no owner here).

    `node_count`: at least so many nodes; None means the Node objects, else two. Nodes never
    change once they are there. `busy`: IPv4 addresses of pods that are still stopping.
    `deleted`: uids of pods that somebody deleted, to be replaced if they have an owner.
    `sources`: where objects are written, more closely than their annotation says.
    """
    listed = list(objects)
    nodes = previous.nodes or _nodes(listed, node_count)
    scheduler = _Scheduler(nodes, previous, busy)
    scheduler.sources = sources
    notes: set[str] = set()
    kept = {key: pod for key, pod in previous.pods.items() if pod.uid not in deleted}
    ips = ClusterIps(_held_ips(listed, previous), previous.service_start)
    for obj in sorted(listed, key=_order):
        kind = ref_of(dict(obj)).kind
        try:
            if kind in workloads.KINDS and str(obj["apiVersion"]).startswith("apps/"):
                scheduler.run_workload(obj, kept)
            elif kind == "Pod":
                scheduler.run_pod(obj, kept)
            elif kind == "Service":
                ips = scheduler.run_service(obj, previous, ips)
            elif kind == "Node":
                Reader(obj).at("metadata", "labels").labels()
            elif kind in workloads.NOT_RUN:
                notes.add(f"{ref_of(dict(obj))} is carried along; the lab does not run it")
        except ConfigError as error:
            scheduler.refuse(obj, error, previous, kept)
    if any("image" in c for pod in scheduler.pods.values() for c in _containers(pod.object)):
        notes.add("images are ignored: containers run their command from this machine")
    return Plan(
        nodes=nodes,
        pods=scheduler.pods,
        services=scheduler.services,
        faults=tuple(scheduler.faults),
        notes=tuple(sorted(notes)),
        serial=scheduler.serial,
        cursors=scheduler.cursors,
        service_start=ips.start,
    )


def diff(old: Plan, new: Plan) -> Changes:
    """Which pods to start and stop. A rolling workload's old pods wait for its new ones."""
    start = []
    stop = []
    relabel = []
    for key, pod in new.pods.items():
        if key not in old.pods or old.pods[key].uid != pod.uid:
            start.append(pod)
        elif old.pods[key].object != pod.object:
            relabel.append(pod)
    fresh: dict[str, list[Key]] = {}
    for pod in start:
        if pod.owner and pod.key not in old.pods:
            fresh.setdefault(pod.owner, []).append(pod.key)
    for key, pod in old.pods.items():
        if key not in new.pods:
            stop.append(Stop(pod, tuple(fresh.get(pod.owner, ())) if pod.owner else ()))
        elif new.pods[key].uid != pod.uid:
            stop.append(Stop(pod))
    return Changes(tuple(start), tuple(stop), tuple(relabel))


def _order(obj: Mapping[str, Any]) -> tuple[bool, str, str, str]:
    """Explicit cluster IPs first, so that nobody is given one that another object asks for."""
    metadata = obj.get("metadata")
    names = metadata if isinstance(metadata, Mapping) else {}
    spec = obj.get("spec")
    explicit = isinstance(spec, Mapping) and (spec.get("clusterIP") or spec.get("clusterIPs"))
    return (
        not explicit,
        str(obj.get("kind")),
        str(names.get("namespace")),
        str(names.get("name")),
    )


def _held_ips(objects: Sequence[Mapping[str, Any]], previous: Plan) -> dict[str, Key]:
    """Cluster IPs of Services that are still there."""
    there = {
        (ref.namespace, ref.name)
        for ref in (ref_of(dict(obj)) for obj in objects)
        if ref.kind == "Service"
    }
    return {ip: key for key, s in previous.services.items() if key in there for ip in s.cluster_ips}


def _containers(obj: Mapping[str, Any]) -> Iterable[Mapping[str, Any]]:
    found = obj.get("spec", {}).get("containers")
    return found if isinstance(found, list) else ()


def _nodes(objects: Sequence[Mapping[str, Any]], count: int | None) -> tuple[NodePlan, ...]:
    nodes: list[NodePlan] = []
    for obj in objects:
        if obj.get("kind") == "Node":
            metadata = Reader(obj).get("metadata")
            try:
                labels = metadata.get("labels").labels()
            except ConfigError:
                labels = {}  # told as a fault when the objects are gone through
            nodes.append(_node(metadata.get("name").name(), len(nodes) + 1, labels))
    wanted = count or (len(nodes) or DEFAULT_NODES)
    names = {node.name for node in nodes}
    while len(nodes) < min(wanted, MAX_NODES):
        number = len(nodes) + 1
        while f"node{number}" in names:
            number += 1
        names.add(f"node{number}")
        nodes.append(_node(f"node{number}", len(nodes) + 1, {}))
    return tuple(nodes[:MAX_NODES])


def _node(name: str, index: int, labels: Mapping[str, str]) -> NodePlan:
    standard = {
        HOSTNAME_LABEL: name,
        "kubernetes.io/os": "linux",
        REGION_LABEL: "lab",
        ZONE_LABEL: f"lab-{index}",
    }
    return NodePlan(name, index, {**standard, **labels})


class _Scheduler:
    """The work of one `plan`: collects pods and Services."""

    def __init__(self, nodes: tuple[NodePlan, ...], previous: Plan, busy: frozenset[str]) -> None:
        self.nodes = nodes
        self.pods: dict[Key, PodPlan] = {}
        self.services: dict[Key, ServicePlan] = {}
        self.faults: list[ConfigError] = []
        self.sources: Mapping[Ref, Source] = {}
        self.serial = previous.serial
        self.cursors = dict(previous.cursors)
        # Also of pods that this plan will drop: they run until they have been stopped.
        self._taken = {pod.ips[0] for pod in previous.pods.values() if pod.ips} | busy
        self._load = Counter(pod.node for pod in previous.pods.values())

    def run_workload(self, obj: Mapping[str, Any], kept: Mapping[Key, PodPlan]) -> None:
        """Keep or make the pods of a controller object. Raises ConfigError."""
        workload = workloads.parse_workload(obj)
        mine = [
            pod
            for pod in kept.values()
            if pod.owner == workload.owner and pod.revision == workload.revision
        ]
        match workload.kind:
            case "StatefulSet":
                there = {pod.name: pod for pod in mine}
                for ordinal in range(workload.replicas):
                    name = workloads.pod_name(workload, ordinal)
                    self._keep_or_make(workload, there.get(name), ordinal, obj)
            case "DaemonSet":
                on = {pod.node: pod for pod in mine}
                for node in self._fitting(workload.spec):
                    self._keep_or_make(workload, on.get(node.name), 0, obj, node)
            case _:
                # The oldest stay: what has served longest is the last to go.
                for number in range(workload.replicas):
                    pod = mine[number] if number < len(mine) else None
                    self._keep_or_make(workload, pod, number, obj)

    def run_pod(self, obj: Mapping[str, Any], kept: Mapping[Key, PodPlan]) -> None:
        """Keep or make a pod that stands for itself. Raises ConfigError."""
        ref = ref_of(dict(obj))
        key = (ref.namespace, ref.name)
        if key in self.pods:
            raise ConfigError(f"a pod of {self.pods[key].owner} has the same name")
        metadata = Reader(obj).get("metadata")
        for table in ("labels", "annotations"):
            metadata.get(table).labels()
        spec = parse_pod_spec(Reader(obj).get("spec"))
        revision = workloads.revision_of({"spec": obj["spec"]})
        pod = kept.get(key)
        if pod is not None and not pod.owner and pod.revision == revision:
            self.pods[key] = replace(pod, object=_carry(obj, pod))
            return
        body = copy.deepcopy(dict(obj))
        body["metadata"]["namespace"] = ref.namespace
        self._place(body, spec, revision, "", None)

    def run_service(self, obj: Mapping[str, Any], previous: Plan, held: ClusterIps) -> ClusterIps:
        """Give a Service its addresses. Raises ConfigError."""
        ref = ref_of(dict(obj))
        earlier = previous.services.get((ref.namespace, ref.name))
        service, held = plan_service(obj, earlier, held)
        self.services[service.key] = service
        return held

    def refuse(
        self,
        obj: Mapping[str, Any],
        error: ConfigError,
        previous: Plan,
        kept: Mapping[Key, PodPlan],
    ) -> None:
        """Note the fault; what the object had asked for before stays."""
        ref = ref_of(dict(obj))
        key = (ref.namespace, ref.name)
        source = self.sources.get(ref) or source_of(obj, Source(str(ref)))
        self.faults.append(located(error, source))
        if ref.kind == "Service" and key in previous.services:
            self.services[key] = previous.services[key]
        owner = "" if ref.kind == "Pod" else f"{ref.kind}/{ref.namespace}/{ref.name}"
        for pod in kept.values():
            if pod.owner == owner and (owner or pod.key == key):
                self.pods.setdefault(pod.key, pod)

    def _keep_or_make(
        self,
        workload: workloads.Workload,
        pod: PodPlan | None,
        ordinal: int,
        obj: Mapping[str, Any],
        node: NodePlan | None = None,
    ) -> None:
        if pod is not None:
            self.pods[pod.key] = pod
            return
        self.serial += 1
        is_ordinal = workload.kind == "StatefulSet"
        name = workloads.pod_name(workload, ordinal if is_ordinal else self.serial)
        uid = str(obj["metadata"].get("uid") or uuid.uuid5(_UIDS, workload.owner))
        body = workloads.pod_object(workload, name, ordinal, uid)
        spec = parse_pod_spec(Reader(body).get("spec")) if is_ordinal else workload.spec
        self._place(body, spec, workload.revision, workload.owner, node)

    def _place(
        self,
        body: dict[str, Any],
        spec: PodSpec,
        revision: str,
        owner: str,
        node: NodePlan | None,
    ) -> None:
        """Choose a node and addresses. Raises ConfigError when no node fits."""
        if node is None:
            node = self._choose(spec, owner)
        self.serial += 1
        namespace, name = body["metadata"]["namespace"], body["metadata"]["name"]
        if spec.host_network:
            ips: tuple[str, ...] = node.ips
        else:
            prefix = addresses.pod_ips(node.index, 0)[0][:-1]
            numbers = {addresses.pod_number(ip) for ip in self._taken if ip.startswith(prefix)}
            cursor = self.cursors.get(node.name, addresses.FIRST_POD)
            number = addresses.next_pod_number(numbers, cursor)
            self.cursors[node.name] = number + 1
            ips = addresses.pod_ips(node.index, number)
            self._taken.add(ips[0])
        self._load[node.name] += 1
        uid = str(uuid.uuid5(_UIDS, f"{namespace}/{name}/{self.serial}"))
        body["metadata"]["uid"] = uid
        body["spec"]["nodeName"] = node.name
        body["spec"].setdefault("serviceAccountName", spec.service_account)
        self.pods[namespace, name] = PodPlan(
            namespace, name, uid, node.name, ips, revision, spec, body, owner
        )

    def _fitting(self, spec: PodSpec) -> list[NodePlan]:
        return [
            node
            for node in self.nodes
            if (not spec.node_name or node.name == spec.node_name)
            and all(node.labels.get(key) == value for key, value in spec.node_selector)
        ]

    def _choose(self, spec: PodSpec, owner: str) -> NodePlan:
        """The node with fewest pods of the same owner, then fewest pods at all."""
        fitting = self._fitting(spec)
        if not fitting:
            names = ", ".join(node.name for node in self.nodes)
            raise ConfigError(
                "no node fits",
                field="spec.nodeName" if spec.node_name else "spec.nodeSelector",
                hint=f"nodes: {names}",
            )
        siblings = Counter(pod.node for pod in self.pods.values() if owner and pod.owner == owner)
        return min(
            fitting, key=lambda node: (siblings[node.name], self._load[node.name], node.index)
        )


def _carry(obj: Mapping[str, Any], pod: PodPlan) -> dict[str, Any]:
    """A bare pod's manifest as it is written now, with what was given to the pod."""
    body = copy.deepcopy(dict(obj))
    body["metadata"]["namespace"] = pod.namespace
    body["metadata"]["uid"] = pod.uid
    body["spec"]["nodeName"] = pod.node
    body["spec"].setdefault("serviceAccountName", pod.spec.service_account)
    return body
