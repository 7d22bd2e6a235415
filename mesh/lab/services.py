"""Services: their cluster IPs and address families as Kubernetes gives them, and their endpoints.

Pure. Defaults follow the API server: SingleStack IPv4, unless ipFamilyPolicy, ipFamilies or an
explicit clusterIP say otherwise; a headless Service without selector defaults to both families.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mesh.cluster.fields import Reader
from mesh.cluster.objects import EndpointSlice, Service, is_selected, parse_service
from mesh.errors import ConfigError
from mesh.lab import addresses
from mesh.lab.podspec import PodSpec

FAMILIES = ("IPv4", "IPv6")
POLICIES = ("SingleStack", "PreferDualStack", "RequireDualStack")
Key = tuple[str, str]
"""Namespace and name."""


@dataclass(frozen=True, slots=True)
class ServicePlan:
    """A Service as the lab runs it. `cluster_ips` is empty for headless and external ones.

    `ports` is one entry per port: (name, protocol, port, target port or its name).
    """

    namespace: str
    name: str
    families: tuple[str, ...]
    cluster_ips: tuple[str, ...]
    ports: tuple[tuple[str, str, int, int | str], ...]
    selector: tuple[tuple[str, str], ...] = ()
    is_headless: bool = False
    external_name: str = ""
    publish_not_ready: bool = False
    policy: str = "SingleStack"
    is_local: bool = False
    """Whether clients reach endpoints of their own node only."""

    @property
    def key(self) -> Key:
        """Namespace and name."""
        return self.namespace, self.name

    def spec_patch(self) -> dict[str, Any]:
        """What the API server would have filled in, as a merge patch of `spec`."""
        if self.external_name:
            return {}
        ips = ["None"] if self.is_headless else list(self.cluster_ips)
        return {
            "clusterIP": ips[0],
            "clusterIPs": ips,
            "ipFamilies": list(self.families),
            "ipFamilyPolicy": self.policy,
        }


@dataclass(frozen=True, slots=True)
class Backend:
    """A running pod, as Services see it."""

    namespace: str
    name: str
    labels: Mapping[str, str]
    ips: tuple[str, ...]
    spec: PodSpec
    is_ready: bool
    is_terminating: bool = False
    node: str = ""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One pod behind a Service, or one endpoint written down in an EndpointSlice (then `pod` names
    the slice). `ports` maps the Service's port numbers to the endpoint's."""

    pod: Key
    ips: tuple[str, ...]
    ports: Mapping[int, int]
    is_ready: bool
    hostname: str = ""
    subdomain: str = ""
    node: str = ""


@dataclass(frozen=True, slots=True)
class ClusterIps:
    """Who holds which cluster IP. `start` is where the search for a free number begins."""

    holders: Mapping[str, Key]
    start: int = addresses.FIRST_SERVICE


def plan_service(
    obj: Mapping[str, Any], earlier: ServicePlan | None, held: ClusterIps
) -> tuple[ServicePlan, ClusterIps]:
    """A Service with its addresses, and the holders with it.

    `earlier` is the plan of the same Service before, whose addresses it keeps where it may.
    Raises ConfigError with the field.
    """
    parsed = parse_service(dict(obj))
    spec = Reader(obj).get("spec")
    plan = ServicePlan(
        parsed.ref.namespace,
        parsed.ref.name,
        (),
        (),
        tuple((p.name, p.protocol, p.number, p.target) for p in parsed.ports),
        selector=tuple(sorted(parsed.selector.items())),
        is_headless=parsed.is_headless,
        publish_not_ready=parsed.publish_not_ready_addresses,
        is_local=parsed.internal_traffic_policy == "Local",
    )
    if parsed.type == "ExternalName":
        return replace(plan, external_name=spec.get("externalName").name()), held
    families, policy = _families(spec, parsed)
    plan = replace(plan, families=families, policy=policy)
    if plan.is_headless:
        return plan, held
    if not plan.ports:
        spec.get("ports").fail("missing")
    kept = earlier.cluster_ips if earlier is not None else ()
    ips, held = _cluster_ips(spec, plan, (parsed.cluster_ips, kept), held)
    return replace(plan, cluster_ips=ips), held


def _families(spec: Reader, parsed: Service) -> tuple[tuple[str, ...], str]:
    families = parsed.ip_families
    if len(families) != len(set(families)):
        spec.get("ipFamilies").fail("names a family twice")
    from_ips = tuple(addresses.family_of(ip) for ip in parsed.cluster_ips)
    if families and families[: len(from_ips)] != from_ips:
        spec.get("ipFamilies").fail(f"does not fit {', '.join(parsed.cluster_ips)}")
    families = families or from_ips
    policy = spec.get("ipFamilyPolicy").choice(POLICIES)
    if not policy:
        unselected = parsed.is_headless and not parsed.selector and not families
        policy = "RequireDualStack" if len(families) == 2 or unselected else "SingleStack"
    if policy == "SingleStack":
        if len(families) > 1:
            spec.get("ipFamilyPolicy").fail("SingleStack allows one family only")
        return families[:1] or ("IPv4",), policy
    first = families[0] if families else "IPv4"
    return (first, "IPv6" if first == "IPv4" else "IPv4"), policy


def _cluster_ips(
    spec: Reader,
    plan: ServicePlan,
    wishes: tuple[Sequence[str], Sequence[str]],
    held: ClusterIps,
) -> tuple[tuple[str, ...], ClusterIps]:
    explicit, kept = wishes
    holders = dict(held.holders)
    start = held.start
    chosen: list[str] = []

    def is_taken(number: int) -> bool:
        return any(addresses.cluster_ip(number, family) in holders for family in FAMILIES)

    for family in plan.families:
        wanted = next((ip for ip in explicit if addresses.family_of(ip) == family), None)
        ip = next((ip for ip in kept if addresses.family_of(ip) == family), None)
        if wanted is not None:
            ip = wanted
            try:
                addresses.cluster_ip_number(ip)
            except ConfigError as error:
                spec.get("clusterIP").fail(error.message)
            if ip in addresses.DNS_IPS:
                spec.get("clusterIP").fail(f"{ip} belongs to the cluster DNS")
            if (holder := holders.get(ip, plan.key)) != plan.key:
                spec.get("clusterIP").fail(f"{ip} belongs to Service {'/'.join(holder)}")
        elif ip is None or holders.get(ip, plan.key) != plan.key:
            # Both families of one Service get the same number where they can.
            number = addresses.cluster_ip_number(chosen[0]) if chosen else 0
            if not chosen or addresses.cluster_ip(number, family) in holders:
                number = addresses.next_service_number(start, is_taken)
                start = number + 1
            ip = addresses.cluster_ip(number, family)
        chosen.append(ip)
    holders.update(dict.fromkeys(chosen, plan.key))
    return tuple(chosen), ClusterIps(holders, start)


def endpoints_of(service: ServicePlan, backends: Iterable[Backend]) -> tuple[Endpoint, ...]:
    """Pods behind a Service, ready or not, in the order of their names.

    A pod whose spec lacks a named target port has the other ports only.
    """
    if not service.selector:
        return ()
    selector = dict(service.selector)
    found = []
    for backend in backends:
        if backend.namespace != service.namespace or backend.is_terminating:
            continue
        if not is_selected(selector, backend.labels):
            continue
        ips = tuple(ip for ip in backend.ips if addresses.family_of(ip) in service.families)
        if not ips:
            continue
        ports = {}
        for _, _, port, target in service.ports:
            number = backend.spec.named_port(target) if isinstance(target, str) else target
            if number is not None:
                ports[port] = number
        found.append(
            Endpoint(
                (backend.namespace, backend.name),
                ips,
                ports,
                backend.is_ready or service.publish_not_ready,
                backend.spec.hostname,
                backend.spec.subdomain,
                backend.node,
            )
        )
    return tuple(sorted(found, key=lambda endpoint: endpoint.pod))


def written_endpoints(
    service: ServicePlan, slices: Iterable[EndpointSlice]
) -> tuple[Endpoint, ...]:
    """Endpoints of a Service that EndpointSlices write down, ready or not.

    The slice's ports are found by the names of the Service's, as kube-proxy does it.
    """
    found = []
    for each in slices:
        if (each.namespace, each.service) != service.key or each.address_type == "FQDN":
            continue
        ports = {port: each.ports[name] for name, _, port, _ in service.ports if name in each.ports}
        for endpoint in each.endpoints:
            ips = tuple(
                ip for ip in endpoint.addresses[:1] if addresses.family_of(ip) in service.families
            )
            if ips:
                is_ready = endpoint.is_ready and not endpoint.is_terminating
                found.append(
                    Endpoint(
                        (each.namespace, each.name),
                        ips,
                        ports,
                        is_ready or service.publish_not_ready,
                        endpoint.hostname,
                        service.name if endpoint.hostname else "",
                        endpoint.node,
                    )
                )
    return tuple(found)
