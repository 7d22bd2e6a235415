"""Checks of CUSTOM policies and of the external authorizers that MeshConfig names. Pure.

Part of `mesh.cluster.validate`; a remark is an object, a field, a message and a hint.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeAlias

from mesh.cluster.api import Ref
from mesh.cluster.inventory import Inventory
from mesh.cluster.mesh_config import ConfigMap, mesh_config_ref
from mesh.cluster.objects import Service
from mesh.cluster.policies import AuthorizationPolicy

Remark: TypeAlias = tuple[Ref, str, str, str]


def odd_authorizers(inventory: Inventory, root_namespace: str) -> Iterator[Remark]:
    """Providers that do not exist or that nobody serves, and fields without effect."""
    ref = mesh_config_ref(root_namespace)
    config = inventory.get(ConfigMap, ref.namespace, ref.name)
    known = config.providers if config is not None else {}
    for policy in inventory.all(AuthorizationPolicy):
        if policy.action == "CUSTOM" and policy.provider not in known:
            message = (
                f'{ref} has no external authorizer "{policy.provider}": what matches is denied'
            )
            hint = f"name one of: {', '.join(sorted(known))}" if known else "write it there"
            yield policy.ref, "spec.provider.name", message, hint
    if config is None:
        return
    for field in config.ignored:
        yield ref, field, "it has no effect here: routes are chosen once", ""
    for each in known.values():
        home, _, host = each.service.rpartition("/")
        name, _, rest = host.partition(".")
        namespace = rest.partition(".")[0]
        if home not in ("", namespace) or rest.count(".") == 0 or rest.split(".")[1] != "svc":
            continue  # no Service of the cluster's
        service = inventory.get(Service, namespace, name)
        field = "data.mesh"
        if service is None:
            message = f'"{each.name}" is at a Service {namespace}/{name} that there is not'
            yield ref, field, message, "write the object, or correct the name"
        elif not any(port.number == each.port for port in service.ports):
            message = f'"{each.name}": Service {namespace}/{name} has no port {each.port}'
            yield ref, field, message, "it is the Service's port, not the pod's"
