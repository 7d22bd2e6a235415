"""NetworkPolicies, as far as the mesh must know them: whom they isolate, and for which ports. Pure.

The tunnels of enrolled pods end at port 15008 of the pod, and begin in it: to a NetworkPolicy a
connection of the mesh is one to TCP port 15008, whatever port the application asked for.
After networking.k8s.io/v1: policies add up, and a pod that none selects is open.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Final, Literal, TypeAlias

from mesh.cluster.api import Object, Ref
from mesh.cluster.fields import Reader
from mesh.cluster.objects import Metadata, Pod, read_metadata

HBONE_PORT: Final = 15008
Direction: TypeAlias = Literal["Ingress", "Egress"]
DIRECTIONS: Final[tuple[Direction, ...]] = ("Ingress", "Egress")
_OPERATORS = ("In", "NotIn", "Exists", "DoesNotExist")


@dataclass(frozen=True, slots=True)
class Requirement:
    """One of `matchExpressions`."""

    key: str
    operator: str
    values: tuple[str, ...] = ()

    def admits(self, labels: Mapping[str, str]) -> bool:
        """Whether labels fulfil it."""
        match self.operator:
            case "In":
                return labels.get(self.key) in self.values
            case "NotIn":
                return labels.get(self.key) not in self.values
            case "Exists":
                return self.key in labels
            case _:
                return self.key not in labels


@dataclass(frozen=True, slots=True)
class NetworkPolicy(Metadata):
    """Whom a policy isolates, and whether one of its rules admits tunnels, by direction."""

    selector: tuple[Requirement, ...] = ()
    admits_tunnels: Mapping[Direction, bool] | None = None

    def isolates(self, pod: Pod, direction: Direction) -> bool:
        """Whether the pod is closed in this direction but for what policies admit."""
        return direction in (self.admits_tunnels or {}) and all(
            each.admits(pod.labels) for each in self.selector
        )


def parse_network_policy(obj: Object) -> NetworkPolicy:
    """Read a NetworkPolicy. Raises ConfigError naming the field."""
    spec = Reader(obj).get("spec")
    named = spec.get("policyTypes").texts()
    # Without policyTypes: Ingress always, Egress if it has rules.
    kinds = named or (("Ingress", "Egress") if spec.get("egress").exists else ("Ingress",))
    admits = {
        direction: any(_admits_tunnels(rule) for rule in spec.get(direction.lower()).items())
        for direction in DIRECTIONS
        if direction in kinds
    }
    selector = tuple(_requirements(spec.get("podSelector")))
    return NetworkPolicy(**read_metadata(obj), selector=selector, admits_tunnels=admits)


def _requirements(selector: Reader) -> Iterator[Requirement]:
    for key, value in selector.get("matchLabels").labels().items():
        yield Requirement(key, "In", (value,))
    for each in selector.get("matchExpressions").items():
        operator = each.get("operator").choice(_OPERATORS)
        yield Requirement(each.get("key").name(), operator, each.get("values").texts())


def _admits_tunnels(rule: Reader) -> bool:
    """Whether a rule takes TCP to 15008, from or to anybody at all."""
    ports = list(rule.get("ports").items())
    return not ports or any(_is_tunnel(each) for each in ports)


def _is_tunnel(port: Reader) -> bool:
    if port.get("protocol").text("TCP") != "TCP":
        return False
    first = port.get("port")
    if isinstance(first.value, str):
        return False  # a container's port by name, which the mesh's is not
    if not first.exists:
        return True
    number = first.port()
    last = port.get("endPort").port() if port.get("endPort").exists else number
    return number <= HBONE_PORT <= last


def blocking(
    policies: Iterable[NetworkPolicy], pods: Iterable[tuple[Ref, Pod]]
) -> Iterator[tuple[NetworkPolicy, Direction, Ref]]:
    """Policies that keep the mesh's tunnels from or to enrolled pods, each with such a pod.

    A pod is cut off if policies isolate it and none of them admits port 15008.
    """
    listed = list(policies)
    told: set[tuple[Ref, Direction]] = set()
    for ref, pod in pods:
        for direction in DIRECTIONS:
            over = [
                each
                for each in listed
                if each.namespace == ref.namespace and each.isolates(pod, direction)
            ]
            if any((each.admits_tunnels or {})[direction] for each in over):
                continue
            for each in over:
                if (each.ref, direction) not in told:
                    told.add((each.ref, direction))
                    yield each, direction, ref
