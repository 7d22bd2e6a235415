"""Whom CUSTOM policies ask: MeshConfig's extensionProviders, by name. Pure.

What a policy names and cannot be asked is handed on with its `problem`, and the waypoint denies
every request that the policy's rules match.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TypedDict

from istiod_lite.workloads import Mesh
from mesh.cluster.api import Ref
from mesh.cluster.inventory import Inventory
from mesh.cluster.mesh_config import NAME, ConfigMap, mesh_config_ref
from mesh.cluster.objects import Metadata
from mesh.cluster.policies import AuthorizationPolicy
from mesh.model.l7_policy import ExternalAuthorizer
from mesh.model.service import service_key


class Scope(TypedDict):
    """See `KubernetesCluster`."""

    selectors: Mapping[str, str]
    homes: Mapping[str, str]


def scope(root_namespace: str) -> Scope:
    """Of all ConfigMaps only the one is watched."""
    ref = mesh_config_ref(root_namespace)
    return Scope(selectors={ref.kind: f"metadata.name={ref.name}"}, homes={ref.kind: ref.namespace})


def provider_of(
    mesh: Mesh, inventory: Inventory, policy: AuthorizationPolicy
) -> ExternalAuthorizer | None:
    """Whom a CUSTOM policy asks; None for other policies."""
    if policy.action != "CUSTOM":
        return None
    ref = mesh_config_ref(mesh.root_namespace)
    config = inventory.get(ConfigMap, ref.namespace, ref.name)
    return find(policy.provider, config, mesh.domain)


def who_asks(
    mesh: Mesh, inventory: Inventory, ref: Ref, old: Metadata | None, new: Metadata | None
) -> Iterator[Ref]:
    """The CUSTOM policies whose provider a change of ConfigMap `ref` concerns."""
    if ref != mesh_config_ref(mesh.root_namespace):
        return
    before = old.providers if isinstance(old, ConfigMap) else {}
    after = new.providers if isinstance(new, ConfigMap) else {}
    changed = {name for name in {*before, *after} if before.get(name) != after.get(name)}
    for policy in inventory.all(AuthorizationPolicy):
        if policy.action == "CUSTOM" and policy.provider in changed:
            yield policy.ref


def find(name: str, config: ConfigMap | None, domain: str) -> ExternalAuthorizer:
    """The provider `name`, its `service` as the waypoint knows services: `namespace/hostname`."""
    found = config.providers.get(name) if config is not None else None
    if found is None:
        known = ", ".join(sorted(config.providers)[:5]) if config is not None else ""
        said = f"known are: {known}" if known else f"ConfigMap {NAME} names none"
        named = f"the external authorizer {name}" if name else "an authorizer without a name"
        return ExternalAuthorizer(
            name, "http", "", 0, problem=f"{named} is not known here ({said})"
        )
    key = service_key(found.service, domain)
    if key is None:
        said = f"the external authorizer {name}: write namespace/{found.service} as its service"
        return replace(found, problem=said)
    return replace(found, service=key)
