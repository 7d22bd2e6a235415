"""Services at work: every node's nftables and the DNS zone, kept as the ready pods have it."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping

import trio

from mesh.cluster.objects import EndpointSlice, parse_endpoint_slice
from mesh.errors import ConfigError
from mesh.lab import addresses, launch, proxy_rules
from mesh.lab.live import SYSTEM_NAMESPACE
from mesh.lab.names import build_zone
from mesh.lab.podspec import Container, PodSpec
from mesh.lab.processes import Place
from mesh.lab.services import Backend, Endpoint, ServicePlan, endpoints_of, written_endpoints
from mesh.lab.state import DOMAIN, LabState
from mesh.lab.topology import NodePlan, PodPlan

GATHER_SECONDS = 0.02


def backends_of(state: LabState) -> list[Backend]:
    """Running pods, as Services see them; the controller is one of them."""
    found = [
        Backend(
            runner.pod.namespace,
            runner.pod.name,
            _labels(state, runner.pod),
            runner.pod.ips,
            runner.pod.spec,
            runner.is_ready,
            runner.is_terminating,
            runner.pod.node,
        )
        for runner in state.runners.values()
    ]
    controller = state.daemons.get("istiod")
    if controller is not None:
        found.append(
            Backend(
                SYSTEM_NAMESPACE,
                "istiod",
                {"app": "istiod"},
                addresses.CONTROL_PLANE_IPS,
                PodSpec((Container("istiod", ()),)),
                controller.state == "ready",
            )
        )
    return found


def routes_of(state: LabState) -> list[tuple[ServicePlan, tuple[Endpoint, ...]]]:
    """Every Service and its endpoints."""
    backends = backends_of(state)
    slices = _slices(state)
    return [
        (service, (*endpoints_of(service, backends), *written_endpoints(service, slices)))
        for _, service in sorted(state.plan.services.items())
    ]


def _slices(state: LabState) -> list[EndpointSlice]:
    found = []
    for obj in state.live.of_kind("EndpointSlice"):
        # The controller reads them too and tells what is wrong with one.
        with contextlib.suppress(ConfigError):
            found.append(parse_endpoint_slice(obj))
    return found


def _labels(state: LabState, pod: PodPlan) -> Mapping[str, str]:
    live = state.live.find("Pod", *pod.key)
    labels = live["metadata"].get("labels") if live else pod.labels
    return labels if isinstance(labels, dict) else {}


class Routing:
    """Programs nodes and zone. `run` is its task."""

    def __init__(self, state: LabState) -> None:
        self._state = state
        self._nft = launch.find_program("nft") or "nft"
        self._rules: dict[str, str] = {}
        self._refusals: dict[str, str] = {}

    async def run(self) -> None:
        """Follow `reroute`. Never returns."""
        state = self._state
        while True:
            await state.reroute.wait()
            await trio.sleep(GATHER_SECONDS)
            state.reroute = trio.Event()
            routes = routes_of(state)
            namespaces = [obj["metadata"]["name"] for obj in state.live.of_kind("Namespace")]
            state.zone = build_zone(DOMAIN, namespaces, routes, backends_of(state))
            rules = proxy_rules.ruleset(routes)
            differ = any(service.is_local for service, _ in routes)
            async with trio.open_nursery() as nursery:
                for node in state.plan.nodes:
                    if differ:
                        rules = proxy_rules.ruleset(routes, node.name)
                    if self._rules.get(node.name) != rules:
                        nursery.start_soon(self._program, node, rules)
            state.is_routed = not state.reroute.is_set()
            state.notify()

    async def _program(self, node: NodePlan, rules: str) -> None:
        """Replace a node's rules in one transaction; what was there stays if nft refuses."""
        code, said = await self._state.processes.run(
            [self._nft, "-f", "-"],
            environment={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"},
            place=Place((self._state.kernel.nodes[node.name],)),
            stdin=rules.encode(),
        )
        if code == 0:
            self._rules[node.name] = rules
            self._refusals.pop(node.name, None)
            return
        first = said.decode("utf-8", "replace").strip().splitlines()[:1]
        message = f"{node.name}: nft refused the Services' rules: {' '.join(first)}"
        # Said once for as long as it lasts: every change of a pod tries again.
        if self._refusals.get(node.name) != message:
            self._refusals[node.name] = message
            self._state.speaker.say(f"{message}\nhint: the rules it had stay; try `nft --version`")
