"""Workloads and services as the admin pages that explain decisions show them. Pure.

Both proxies answer in this form, so that `ambit explain` can put their answers together.
"""

from __future__ import annotations

from typing import Any

from mesh.model.service import Service
from mesh.model.workload import TunnelProtocol, Workload, WorkloadStatus


def show_workload(workload: Workload) -> dict[str, Any]:
    """What a person wants to know of it."""
    return {
        "uid": workload.uid,
        "name": workload.name,
        "namespace": workload.namespace,
        "node": workload.node,
        "addresses": list(workload.addresses),
        "identity": str(workload.identity),
        "protocol": "HBONE" if workload.tunnel_protocol is TunnelProtocol.HBONE else "TCP",
        "healthy": workload.status is WorkloadStatus.HEALTHY,
    }


def show_service(service: Service | None) -> dict[str, Any] | None:
    """Its names."""
    if service is None:
        return None
    return {"name": service.name, "namespace": service.namespace, "hostname": service.hostname}


def show_endpoint(workload: Workload, port: int | None) -> dict[str, Any]:
    """A workload and the port that would be dialled."""
    return {"workload": show_workload(workload), "port": port}
