"""Attributes that spans of every proxy share: Istio's words for workloads. Pure."""

from __future__ import annotations

from typing import TypeAlias

from mesh.model.workload import Workload

Attribute: TypeAlias = str | int | float | bool


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
