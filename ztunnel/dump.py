"""`/config_dump`: what this proxy knows and does, in the shape of upstream's ztunnel.

Keys and spellings are a contract with tools that read them; what upstream leaves out when
it is not set is left out here too. Values in, JSON values out; keys and tokens never.
"""

from __future__ import annotations

import base64
import dataclasses
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from typing import Any

from mesh.errors import IdentityError
from mesh.model.authorization import Authorization, Match, StringKind, StringMatch
from mesh.model.service import HealthPolicy, IpFamilies, Mode, Service
from mesh.model.store import Endpoint, Store
from mesh.model.workload import (
    GatewayAddress,
    Locality,
    NetworkMode,
    TunnelProtocol,
    Workload,
    WorkloadStatus,
)
from mesh.runtime import config as settings
from mesh.secrets import SecretEntry
from mesh.tls.certificate import summarize
from ztunnel.config import ZtunnelConfig
from ztunnel.connections import Tracked
from ztunnel.workloads import Pod

_MODES = {Mode.UNSPECIFIED: "Standard"}
_IP_FAMILIES = {
    IpFamilies.IPV4_ONLY: "IPv4",
    IpFamilies.IPV6_ONLY: "IPv6",
    IpFamilies.DUAL: "Dual",
}


def dump_store(store: Store) -> dict[str, Any]:
    """workloads, services, policies and stagedServices."""
    return {
        "workloads": [dump_workload(each) for each in store.workloads()],
        "services": [dump_service(each, store.endpoints(each.key)) for each in store.services()],
        "policies": [dump_policy(each) for each in store.policies()],
        "stagedServices": {name: list(uids) for name, uids in store.staged_endpoints().items()},
    }


def dump_workload(workload: Workload) -> dict[str, Any]:
    """One workload."""
    dump: dict[str, Any] = {
        "uid": workload.uid,
        "name": workload.name,
        "namespace": workload.namespace,
        "workloadIps": list(workload.addresses),
        "protocol": "HBONE" if workload.tunnel_protocol is TunnelProtocol.HBONE else "TCP",
        "networkMode": (
            "HostNetwork" if workload.network_mode is NetworkMode.HOST_NETWORK else "Standard"
        ),
        "status": "Healthy" if workload.status is WorkloadStatus.HEALTHY else "Unhealthy",
        "clusterId": workload.cluster_id,
        "capacity": workload.capacity,
    }
    tunnel = workload.application_tunnel
    dump |= _set(
        serviceAccount=workload.service_account,
        trustDomain=workload.trust_domain,
        network=workload.network,
        waypoint=_gateway(workload.waypoint),
        networkGateway=_gateway(workload.network_gateway),
        workloadName=workload.workload_name,
        workloadType=workload.workload_type.name.lower(),
        canonicalName=workload.canonical_name,
        canonicalRevision=workload.canonical_revision,
        hostname=workload.hostname,
        node=workload.node,
        nativeTunnel=workload.native_tunnel,
        applicationTunnel={"protocol": tunnel.protocol, "port": tunnel.port} if tunnel else None,
        authorizationPolicies=list(workload.authorization_policies),
        locality=(
            dataclasses.asdict(workload.locality) if workload.locality != Locality() else None
        ),
        services={name: _ports(ports) for name, ports in workload.services.items()},
    )
    return dump


def dump_service(service: Service, endpoints: Iterable[Endpoint]) -> dict[str, Any]:
    """One service and its endpoints."""
    dump: dict[str, Any] = {
        "name": service.name,
        "namespace": service.namespace,
        "hostname": service.hostname,
        "vips": [str(each) for each in service.addresses],
        "ports": {str(port): each.target_port for port, each in service.ports.items()},
        "endpoints": {
            each.workload.uid: {
                "workloadUid": each.workload.uid,
                "port": _ports(each.ports),
                "status": (
                    "Healthy" if each.workload.status is WorkloadStatus.HEALTHY else "Unhealthy"
                ),
            }
            for each in endpoints
        },
        "subjectAltNames": list(service.subject_alt_names),
        "canonical": service.canonical,
        "visibility": service.visibility.name.title(),
    }
    balancing = service.load_balancing
    is_plain = balancing.mode is Mode.UNSPECIFIED and not balancing.routing_preference
    dump |= _set(
        cidrVips=[
            {"network": each.network, "cidr": each.prefix} for each in service.cidr_addresses
        ],
        waypoint=_gateway(service.waypoint),
        weightedWaypoints=[
            {"destination": _gateway(each.destination), "weight": each.weight}
            for each in service.weighted_waypoints
        ],
        loadBalancer=None
        if is_plain and balancing.health_policy is HealthPolicy.ONLY_HEALTHY
        else {
            "routingPreferences": [each.name.title() for each in balancing.routing_preference],
            "mode": "Standard"
            if balancing.mode is Mode.UNSPECIFIED
            else balancing.mode.name.title(),
            "healthPolicy": (
                "AllowAll" if balancing.health_policy is HealthPolicy.ALLOW_ALL else "OnlyHealthy"
            ),
        },
        ipFamilies=_IP_FAMILIES.get(service.ip_families),
    )
    return dump


def dump_policy(policy: Authorization) -> dict[str, Any]:
    """One policy; rules, clauses and matches as nested lists."""
    return {
        "name": policy.name,
        "namespace": policy.namespace,
        "scope": policy.scope.name.title().replace("_", ""),
        "action": policy.action.name.title(),
        "dryRun": policy.dry_run,
        "rules": [
            [[_match(match) for match in clause.matches] for clause in rule.clauses]
            for rule in policy.rules
        ],
    }


def dump_certificates(entries: Iterable[SecretEntry]) -> list[dict[str, Any]]:
    """The certificates, without keys."""
    dumps = []
    for entry in entries:
        certificate = entry.certificate
        dump: dict[str, Any] = {"identity": str(entry.identity), "state": entry.state}
        if certificate is not None:
            dump["certChain"] = _chain(certificate.chain_pem)
            dump["rootCerts"] = _chain(certificate.roots_pem)
        if entry.error:
            dump["error"] = entry.error
        dumps.append(dump)
    return dumps


def dump_pods(
    pods: Iterable[tuple[Pod, str, str]], connections: Iterable[Tracked]
) -> dict[str, Any]:
    """The captured pods and their open connections, by pod UID."""
    by_pod: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for tracked in connections:
        listed = by_pod.setdefault(tracked.pod_uid, {"inbound": [], "outbound": []})
        record = tracked.record
        listed[record.direction].append(
            {
                "src": record.source_address,
                "originalDst": record.original_destination or None,
                "actualDst": record.hbone_address or record.destination_address,
                "protocol": record.protocol,
                "id": record.connection_id or record.id,
                "srcIdentity": str(record.source_identity or "") or None,
                "policy": record.policy or None,
            }
        )
    return {
        pod.uid: {
            "state": state,
            "connections": by_pod.get(pod.uid, {"inbound": [], "outbound": []}),
            "info": {
                "name": pod.name,
                "namespace": pod.namespace,
                "serviceAccount": pod.service_account,
            },
            **({"error": error} if error else {}),
        }
        for pod, state, error in pods
    }


def dump_config(config: ZtunnelConfig) -> dict[str, Any]:
    """The settings in force; tokens are named by file, and headers only said to be set."""
    return {_camel(name): value for name, value in settings.shown(config).items()}


def _set(**fields: Any) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value}


def _ports(ports: Mapping[int, int]) -> dict[str, int]:
    return {str(port): target for port, target in ports.items()}


def _gateway(gateway: GatewayAddress | None) -> dict[str, Any] | None:
    if gateway is None:
        return None
    return {"destination": str(gateway.destination), "hboneMtlsPort": gateway.hbone_mtls_port}


def _match(match: Match) -> dict[str, Any]:
    dump: dict[str, Any] = {}
    for field in dataclasses.fields(match):
        values = getattr(match, field.name)
        if values:
            dump[_camel(field.name)] = [_value(each) for each in values]
    return dump


def _value(value: Any) -> Any:
    if isinstance(value, StringMatch):
        text: Any = [] if value.kind is StringKind.PRESENCE else value.value
        return {value.kind.value: text}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {_camel(name): each for name, each in dataclasses.asdict(value).items()}
    return value


def _camel(name: str) -> str:
    first, *rest = name.split("_")
    return first + "".join(each.title() for each in rest)


def _chain(pem: bytes) -> list[dict[str, Any]]:
    try:
        summaries = summarize(pem)
    except IdentityError:
        return []
    marker = b"-----BEGIN"
    blocks = [marker + each for each in pem.split(marker)[1:]]
    return [
        {
            "pem": base64.b64encode(block).decode(),
            "serialNumber": each.serial,
            "validFrom": _time(each.not_before),
            "expirationTime": _time(each.not_after),
        }
        for block, each in zip(blocks, summaries, strict=False)
    ]


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, tz=UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
