"""The cluster's names: every DNS name of `cluster.local` and what it stands for.

Pure. It follows the Kubernetes DNS specification 1.1 as CoreDNS implements it: A and AAAA of
Services, of headless Services' ready pods and of single pods by hostname, SRV for named ports,
CNAME for ExternalName, `1-2-3-4.<namespace>.pod`. A name that exists with another type, or that
has names below it, answers with no records; one that does not exist is NXDOMAIN.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from mesh.lab import addresses
from mesh.lab.services import Backend, Endpoint, ServicePlan


@dataclass(slots=True)
class Records:
    """What one name stands for. `services` holds SRV targets as (port, name)."""

    ips: list[str] = field(default_factory=list)
    services: list[tuple[int, str]] = field(default_factory=list)
    alias: str = ""


_At = Callable[[str], Records]


@dataclass(frozen=True, slots=True)
class Zone:
    """All names of a cluster, in lower case and without the final dot."""

    domain: str
    names: Mapping[str, Records] = field(default_factory=dict)

    def find(self, name: str) -> Records | None:
        """The records of a name; None when there is no such name."""
        return self.names.get(name.rstrip(".").lower())

    def covers(self, name: str) -> bool:
        """Whether the name is this zone's to answer."""
        plain = name.rstrip(".").lower()
        return plain == self.domain or plain.endswith(f".{self.domain}")


def build_zone(
    domain: str,
    namespaces: Iterable[str],
    services: Iterable[tuple[ServicePlan, Sequence[Endpoint]]],
    pods: Iterable[Backend],
) -> Zone:
    """The zone of a cluster in its present state."""
    names: dict[str, Records] = {domain: Records()}

    def at(name: str) -> Records:
        plain = name.lower()
        # Names in between exist too, without records of their own.
        parent = plain.partition(".")[2]
        while len(parent) > len(domain):
            names.setdefault(parent, Records())
            parent = parent.partition(".")[2]
        return names.setdefault(plain, Records())

    for namespace in namespaces:
        at(f"{namespace}.svc.{domain}")
        at(f"{namespace}.pod.{domain}")
    for service, endpoints in services:
        name = f"{service.name}.{service.namespace}.svc.{domain}"
        records = at(name)
        if service.external_name:
            records.alias = service.external_name.rstrip(".")
        elif service.is_headless:
            _add_headless(at, name, service, endpoints)
        else:
            records.ips.extend(service.cluster_ips)
            for port_name, protocol, port, _ in service.ports:
                if port_name:
                    srv = at(f"_{port_name}._{protocol.lower()}.{name}")
                    srv.services.append((port, name))
    for pod in pods:
        for ip in pod.ips:
            at(f"{_dashed(ip)}.{pod.namespace}.pod.{domain}").ips.append(ip)
    return Zone(domain, names)


def _add_headless(at: _At, name: str, service: ServicePlan, endpoints: Sequence[Endpoint]) -> None:
    records = at(name)
    for endpoint in endpoints:
        if not endpoint.is_ready:
            continue
        records.ips.extend(endpoint.ips)
        is_named = endpoint.hostname and endpoint.subdomain == service.name
        targets = {}
        for ip in endpoint.ips:
            own = f"{endpoint.hostname if is_named else _dashed(ip)}.{name}"
            at(own).ips.append(ip)
            targets[own] = True
        for port_name, protocol, port, _ in service.ports:
            if port_name and port in endpoint.ports:
                srv = at(f"_{port_name}._{protocol.lower()}.{name}")
                srv.services.extend((endpoint.ports[port], target) for target in targets)


def _dashed(ip: str) -> str:
    if addresses.family_of(ip) == "IPv4":
        return ip.replace(".", "-")
    # As CoreDNS: a label may not begin or end with a dash.
    text = ip.replace(":", "-")
    text = f"0{text}" if text.startswith("-") else text
    return f"{text}0" if text.endswith("-") else text
