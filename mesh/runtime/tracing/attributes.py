"""What spans of every proxy share: their maker, and Istio's words for workloads. Pure."""

from __future__ import annotations

from typing import TypeAlias

from mesh.model.workload import Workload

Attribute: TypeAlias = str | int | float | bool


def resource(
    *, version: str, pod: str, namespace: str, node: str, cluster: str, **more: str
) -> dict[str, str]:
    """A proxy as a resource of OpenTelemetry; what is not known is left out."""
    facts = {
        "service.version": version,
        "service.instance.id": pod,
        "k8s.pod.name": pod,
        "k8s.namespace.name": namespace,
        "k8s.node.name": node,
        "k8s.cluster.name": cluster,
        **more,
    }
    return {name: value for name, value in facts.items() if value}


def party(side: str, workload: Workload | None, identity: str) -> dict[str, Attribute]:
    """One side (`source`, `destination`) of a connection or request."""
    found: dict[str, Attribute] = {f"istio.{side}_principal": identity}
    if workload is not None:
        found |= {
            f"istio.{side}_workload": workload.workload_name or workload.name,
            f"istio.{side}_pod": workload.name,
            f"istio.{side}_namespace": workload.namespace,
            f"istio.{side}_canonical_service": workload.canonical_name,
            f"istio.{side}_canonical_revision": workload.canonical_revision,
            f"istio.{side}_cluster": workload.cluster_id,
            f"istio.{side}_node": workload.node,
        }
    return found
