"""Objects that the lab itself writes: its nodes, and the mesh's own pods and Service. Pure."""

from __future__ import annotations

import uuid
from typing import Any

from mesh.lab import addresses
from mesh.lab.topology import NodePlan

XDS_PORT = 15012
CONTROLLER_MONITORING_PORT = 15014


def node_object(node: NodePlan) -> dict[str, Any]:
    """A Node."""
    networks = addresses.pod_networks(node.index)
    return {
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {"name": node.name, "labels": dict(node.labels)},
        "spec": {"podCIDR": networks[0], "podCIDRs": list(networks)},
        "status": {
            "addresses": [{"type": "InternalIP", "address": ip} for ip in node.ips],
            "conditions": [{"type": "Ready", "status": "True"}],
        },
    }


def daemon_pod(
    namespace: str, name: str, account: str, node: str, ips: tuple[str, ...]
) -> dict[str, Any]:
    """The Pod of one of the mesh's own daemons, which the lab runs outside any pod."""
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "name": name,
            "namespace": namespace,
            "uid": str(uuid.uuid5(uuid.NAMESPACE_DNS, f"{name}.{namespace}")),
            "labels": {"app": account},
        },
        "spec": {
            "nodeName": node,
            "hostNetwork": True,
            "serviceAccountName": account,
            "containers": [{"name": account}],
        },
        "status": {
            "phase": "Running",
            "podIP": ips[0],
            "podIPs": [{"ip": ip} for ip in ips],
            "hostIP": ips[0],
            "conditions": [{"type": "Ready", "status": "True"}],
        },
    }


def controller_service(namespace: str) -> dict[str, Any]:
    """The Service `istiod`."""
    ports = {"https-dns": XDS_PORT, "http-monitoring": CONTROLLER_MONITORING_PORT}
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": "istiod", "namespace": namespace, "labels": {"app": "istiod"}},
        "spec": {
            "selector": {"app": "istiod"},
            "ports": [{"name": n, "port": p, "protocol": "TCP"} for n, p in ports.items()],
        },
    }
