"""L7 policy is not passed by: a service's pods take traffic from its waypoint alone. Pure.

A waypoint can only judge what comes through it. So where L7 policy is attached to a service,
its pods refuse, at the ports behind the service, everybody but the service's waypoint; if it
has none that may serve it, everybody. That is an ordinary DENY of `istio.security`, which the
pods name, so any ztunnel enforces it. `ambit.dev/waypoint-required: "false"` on the Service
opts out.

A pod that is not in the mesh has no ztunnel to refuse anything; the status says so.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeAlias

from istiod_lite.bindings import Binding, identity_of
from istiod_lite.workloads import Mesh, is_published, target_port, tcp_ports
from mesh.cluster.gateways import is_waypoint_part
from mesh.cluster.objects import Pod, Service
from mesh.model.authorization import (
    Action,
    Authorization,
    Clause,
    Match,
    PolicyScope,
    Rule,
    StringKind,
    StringMatch,
)

OPT_OUT = "ambit.dev/waypoint-required"
#: With an underscore, so that no object of a user can have the name.
PREFIX = "ambit_waypoint_only_"

#: The ports of pods behind a service, in order.
Ports: TypeAlias = tuple[int, ...]


def is_opted_out(service: Service) -> bool:
    """Whether the service's owner takes traffic past the waypoint."""
    return service.annotations.get(OPT_OUT, "").lower() == "false"


def is_wanted(service: Service) -> bool:
    """Whether a service with L7 policy is guarded at all."""
    return is_published(service) and not is_waypoint_part(service) and not is_opted_out(service)


def depends_on_pods(service: Service) -> bool:
    """Whether the ports behind a service are each pod's to say."""
    return any(isinstance(port.target, str) for port in tcp_ports(service))


def ports_of(service: Service, pods: Iterable[Pod]) -> set[Ports]:
    """The sets of ports behind a service, one for each way its pods name them."""
    ports = tcp_ports(service)
    if not depends_on_pods(service):
        found = {tuple(sorted({port.target for port in ports if isinstance(port.target, int)}))}
    else:
        resolved = ([target_port(port, pod) for port in ports] for pod in pods)
        found = {tuple(sorted({number for number in each if number})) for each in resolved}
    return found - {()}


def guard(mesh: Mesh, service: Service, ports: Ports, binding: Binding) -> Authorization:
    """The policy for the pods of `service` that serve it at `ports`."""
    clauses = [Clause((Match(destination_ports=ports),))]
    if binding.is_served and binding.gateway is not None:
        waypoint = identity_of(mesh, binding.gateway).principal
        only = StringMatch(StringKind.EXACT, waypoint)
        clauses.append(Clause((Match(not_principals=(only,)),)))
    numbers = "-".join(map(str, ports))
    return Authorization(
        name=f"{PREFIX}{service.name}_{numbers}",
        namespace=service.namespace,
        scope=PolicyScope.WORKLOAD_SELECTOR,
        action=Action.DENY,
        rules=(Rule(tuple(clauses)),),
    )
