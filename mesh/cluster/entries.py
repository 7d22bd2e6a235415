"""Typed, frozen views of ServiceEntry and WorkloadEntry (`networking.istio.io/v1`). Pure.

What names services and endpoints that Kubernetes does not know. Hosts with wildcards are
refused: nothing here could serve one. `exportTo` is read over, as Istio does in ambient.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from mesh.cluster.api import Object
from mesh.cluster.fields import Reader, shown
from mesh.cluster.objects import Metadata, read_metadata

RESOLUTIONS = ("NONE", "STATIC", "DNS", "DNS_ROUND_ROBIN")
MAX_HOSTS = 256
MAX_WEIGHT = 1 << 31
_HOST = re.compile(r"[a-z0-9_](?:[a-z0-9._-]{0,251}[a-z0-9])?")


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where something answers: an IP address, or a name to be resolved. `ports` are by name."""

    address: str
    is_name: bool = False
    ports: Mapping[str, int] = field(default_factory=dict)
    labels: Mapping[str, str] = field(default_factory=dict)
    network: str = ""
    locality: str = ""
    weight: int = 1
    service_account: str = ""


@dataclass(frozen=True, slots=True)
class EntryPort:
    """A port of a ServiceEntry; `target` 0 is the same number."""

    number: int
    name: str
    protocol: str
    target: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceEntry(Metadata):
    """Services by host name. `selector` None: the endpoints are listed. `assigned` are addresses
    that were allocated, by host; `conditions` the types of those that its status has.
    """

    hosts: tuple[str, ...]
    addresses: tuple[str, ...] = ()
    assigned: tuple[tuple[str, str], ...] = ()
    ports: tuple[EntryPort, ...] = ()
    resolution: str = "NONE"
    endpoints: tuple[Endpoint, ...] = ()
    selector: Mapping[str, str] | None = None
    subject_alt_names: tuple[str, ...] = ()
    conditions: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkloadEntry(Metadata):
    """A workload that is no pod. `all_labels` are its own and those of its spec."""

    endpoint: Endpoint

    @property
    def all_labels(self) -> Mapping[str, str]:
        """What selectors look at."""
        return {**self.labels, **self.endpoint.labels}


def parse_service_entry(obj: Object) -> ServiceEntry:
    """Read a ServiceEntry. Raises ConfigError naming the field."""
    spec = Reader(obj).get("spec")
    hosts = spec.get("hosts").texts()
    if not 0 < len(hosts) <= MAX_HOSTS:
        spec.get("hosts").fail(f"not from 1 to {MAX_HOSTS}")
    for each in spec.get("hosts").items():
        if not _HOST.fullmatch(each.text().lower()):
            each.fail(f"not a host name: {shown(each.value)}")
    addresses = [_network(each) for each in spec.get("addresses").items()]
    assigned = []
    if not addresses:
        # Whoever allocates addresses writes them here.
        for each in Reader(obj).at("status", "addresses").items():
            host = each.get("host").text() or (hosts[0] if len(hosts) == 1 else "")
            assigned.append((host.lower(), _address(each.get("value"))))
    selector = spec.get("workloadSelector")
    endpoints = tuple(_endpoint(each) for each in spec.get("endpoints").items())
    resolution = spec.get("resolution").choice(RESOLUTIONS, "NONE")
    if selector.exists and endpoints:
        spec.get("endpoints").fail("beside a workloadSelector: say one")
    if resolution in ("NONE", "STATIC") and any(each.is_name for each in endpoints):
        spec.get("endpoints").fail(f"a name is not resolved with resolution {resolution}")
    return ServiceEntry(
        **read_metadata(obj),
        hosts=tuple(each.lower() for each in hosts),
        addresses=tuple(addresses),
        assigned=tuple(assigned),
        ports=tuple(_port(each) for each in spec.get("ports").items()),
        resolution=resolution,
        endpoints=endpoints,
        selector=selector.get("labels").labels() if selector.exists else None,
        subject_alt_names=spec.get("subjectAltNames").texts(),
        conditions=tuple(
            each.get("type").text() for each in Reader(obj).at("status", "conditions").items()
        ),
    )


def parse_workload_entry(obj: Object) -> WorkloadEntry:
    """Read a WorkloadEntry. Raises ConfigError naming the field."""
    return WorkloadEntry(**read_metadata(obj), endpoint=_endpoint(Reader(obj).get("spec")))


def _network(address: Reader) -> str:
    """An address, or a range of them, in canonical text."""
    text = address.name()
    try:
        if "/" in text:
            return str(ipaddress.ip_network(text, strict=False))
        return str(ipaddress.ip_address(text))
    except ValueError:
        address.fail(f"not an address or a CIDR block: {shown(text)}")


def _address(address: Reader) -> str:
    text = address.name()
    try:
        return str(ipaddress.ip_address(text))
    except ValueError:
        address.fail(f"not an address: {shown(text)}")


def _port(port: Reader) -> EntryPort:
    target = port.get("targetPort")
    return EntryPort(
        port.get("number").port(),
        port.get("name").text(),
        port.get("protocol").text(),
        target.port() if target.value else 0,
    )


def _is_nowhere(ip: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    """Loopback would be whichever proxy dials it, whose own ports trust who is there."""
    inner = (ip.ipv4_mapped if ip.version == 6 else None) or ip
    return inner.is_loopback or inner.is_unspecified or inner.is_multicast


def _endpoint(endpoint: Reader) -> Endpoint:
    address = endpoint.get("address")
    text = address.text()
    is_name = False
    if text:
        try:
            ip = ipaddress.ip_address(text)
            text = str(ip)
            if _is_nowhere(ip):
                address.fail(f"{text} is no address of another host")
        except ValueError:
            is_name = True
            if not _HOST.fullmatch(text.lower()):
                address.fail(f"neither an address nor a name: {shown(text)}")
    elif not endpoint.get("network").text():
        address.fail("missing")
    weight = endpoint.get("weight").integer(1)
    if not 0 <= weight < MAX_WEIGHT:
        endpoint.get("weight").fail("no weight")
    return Endpoint(
        address=text,
        is_name=is_name,
        ports={name: each.port() for name, each in endpoint.get("ports").entries()},
        labels=endpoint.get("labels").labels(),
        network=endpoint.get("network").text(),
        locality=endpoint.get("locality").text(),
        weight=weight or 1,
        service_account=endpoint.get("serviceAccount").text(),
    )
