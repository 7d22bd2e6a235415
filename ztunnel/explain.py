"""`/explain/outbound` and `/explain/inbound` on the admin port: what this proxy would do with a
connection, answered by the very functions that decide (`ztunnel.plan`, `mesh.authz`,
`ztunnel.dns_plan`) over the very state it holds. Nothing is opened, and nothing decided anew.

Where a decision takes a chance (one of several endpoints, a weighted waypoint) every
possible outcome is told, by a source of randomness that takes each choice in turn.
The command line asks the proxies of both nodes and puts the answers together.
"""

from __future__ import annotations

import ipaddress
import random
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from mesh.authz import Permit
from mesh.errors import ConfigError, Refusal, RemoteProtocolError
from mesh.hbone.head import parse_authority
from mesh.identity import SpiffeId
from mesh.model.balancing import target_port
from mesh.model.shown import show_endpoint, show_service, show_workload
from mesh.model.workload import NetworkAddress, Workload
from mesh.runtime.admin import AdminApp, Request, Response
from mesh.sockets import SocketAddress
from ztunnel.dns_plan import CLASS_IN, TYPE_A, TYPE_AAAA, Question, plan_answer
from ztunnel.node import Node
from ztunnel.plan import (
    InboundConnection,
    InboundPlan,
    OutboundPlan,
    plan_inbound,
    plan_outbound,
    plan_plaintext,
)
from ztunnel.workloads import Pod

MAX_WAYS = 16


class EveryChoice:
    """A `Random` that chooses everything in turn: call `next_way` until it says no."""

    def __init__(self) -> None:
        self._path: list[int] = []
        self._widths: list[int] = []
        self._depth = 0

    def choices(self, population: Sequence[int], *, cum_weights: Sequence[int]) -> list[int]:
        """The next one that chance could choose, as a list of one."""
        before = (0, *cum_weights[:-1])
        possible = [
            each
            for each, low, high in zip(population, before, cum_weights, strict=True)
            if high > low
        ]
        if self._depth == len(self._path):
            self._path.append(0)
            self._widths.append(len(possible))
        chosen = possible[self._path[self._depth]]
        self._depth += 1
        return [chosen]

    def next_way(self) -> bool:
        """Go on to the next combination; False when there was none."""
        self._depth = 0
        while self._path:
            if self._path[-1] + 1 < self._widths[-1]:
                self._path[-1] += 1
                return True
            self._path.pop()
            self._widths.pop()
        return False


class Explainer:
    """The two pages. `pods` are those that this proxy was given."""

    def __init__(self, node: Node, pods: Callable[[], Iterable[tuple[Pod, str, str]]]) -> None:
        self._node = node
        self._pods = pods

    def add_to(self, app: AdminApp) -> None:
        """Route them."""
        app.route("/explain/outbound", self.outbound)
        app.route("/explain/inbound", self.inbound)

    async def outbound(self, request: Request) -> Response:
        """`workload` (a uid), `port`, and `ip` or `host`. Raises ConfigError."""
        source = self._workload(request)
        port = _port(request.query.get("port", ""))
        host = request.query.get("host", "").rstrip(".").lower()
        answer = self._about(source)
        addresses = [_ip(request, "ip")] if not host else []
        if host:
            found = self._resolve(source, host)
            answer["names"] = {"host": host, "addresses": found}
            addresses = found or []
        if addresses:
            target = SocketAddress(addresses[0], port)
            answer["destination"] = self._destination(source, target)
            answer["ways"], answer["truncated"] = self._ways(source, target)
        return Response.json(answer)

    async def inbound(self, request: Request) -> Response:
        """`workload`, `source` and `ip` (addresses); for a tunnel `peer` (a SPIFFE ID),
        `authority` and perhaps `host`, for plain text `port`. Raises ConfigError.
        """
        local = self._workload(request)
        source = SocketAddress(_ip(request, "source"), 0)
        ip = _ip(request, "ip")
        store = self._node.store
        answer = self._about(local)
        plan: InboundPlan | Refusal
        if "authority" in request.query:
            try:
                authority = parse_authority(request.query["authority"])
            except RemoteProtocolError as exc:
                raise ConfigError(str(exc), field="authority") from exc
            peer = SpiffeId.parse(request.query.get("peer", ""))
            arrived = InboundConnection(peer, source, SocketAddress(ip, 15008))
            plan = plan_inbound(arrived, authority, local, store, request.query.get("host", ""))
        else:
            arrived = InboundConnection(
                None, source, SocketAddress(ip, _port(request.query.get("port", "")))
            )
            plan = plan_plaintext(arrived, local, store)
        answer["policies"] = [
            {"name": each.key, "action": each.action.name, "dryRun": each.dry_run}
            for each in store.policies_for(local)
        ]
        if isinstance(plan, Refusal):
            answer["verdict"] = _refusal(plan)
            return Response.json(answer)
        verdict, rehearsal = self._node.judges.consider(local, plan.context)
        answer["verdict"] = _verdict(verdict)
        if rehearsal is not None:
            answer["dryRun"] = _refusal(rehearsal)
        answer["plan"] = {
            "upstream": str(plan.upstream),
            "service": plan.service.hostname if plan.service else None,
            "spoofedSource": plan.spoofed_source,
            "proxyProtocol": plan.sends_proxy_header,
        }
        return Response.json(answer)

    # -- what is known

    def _workload(self, request: Request) -> Workload:
        uid = request.query.get("workload", "")
        found = self._node.store.workload_by_uid(uid)
        if found is None:
            raise ConfigError(f"no workload {uid!r}", field="workload")
        return found

    def _about(self, workload: Workload) -> dict[str, Any]:
        """The workload, and whether this proxy is the one that serves its pod."""
        return {
            "node": self._node.config.node_name,
            "workload": show_workload(workload),
            "captured": self._is_captured(workload),
            "certificate": next(
                (
                    each.state
                    for each in self._node.secrets.entries()
                    if each.identity == workload.identity
                ),
                None,
            ),
        }

    def _is_captured(self, workload: Workload) -> bool:
        config, store = self._node.config, self._node.store
        return any(
            state == "Up"
            and store.workload_by_pod(
                pod.namespace, pod.name, pod.service_account, config.node_name
            )
            is workload
            for pod, state, _ in self._pods()
            if (pod.namespace, pod.name) == (workload.namespace, workload.name)
        )

    def _resolve(self, source: Workload, host: str) -> list[str] | None:
        """What our DNS answers; None when it would ask another server."""
        store, names = self._node.store, self._node.names
        labels = tuple(label.encode() for label in host.split("."))
        found: list[str] = []
        is_known = False
        for kind in (TYPE_A, TYPE_AAAA):
            question = Question(0, labels, host, kind, CLASS_IN, 0, True, 0)
            rng = random.Random(0)  # noqa: S311 - the order of an answer
            answer = plan_answer(question, source, store, names, rng)
            if answer is not None:
                is_known = True
                found += answer.addresses
        return found if is_known else None

    def _destination(self, source: Workload, target: SocketAddress) -> dict[str, Any]:
        """What has this address, and all that could answer for it, ready or not."""
        store = self._node.store
        address = NetworkAddress(source.network, target.ip)
        workload = store.workload_by_address(address)
        service = store.service_by_vip(address, source.namespace)
        found: dict[str, Any] = {
            "address": str(target),
            "workload": show_workload(workload) if workload else None,
            "service": show_service(service),
            "endpoints": [],
        }
        if workload is not None:
            found["endpoints"] = [show_endpoint(workload, target.port)]
        elif service is not None:
            found["endpoints"] = [
                show_endpoint(each.workload, target_port(service, each, target.port))
                for each in store.endpoints(service.key)
            ]
        return found

    def _ways(self, source: Workload, target: SocketAddress) -> tuple[list[dict[str, Any]], bool]:
        every = EveryChoice()
        found: list[dict[str, Any]] = []
        while len(found) < MAX_WAYS:
            plan = plan_outbound(source, target, self._node.store, every)
            told = _refusal(plan) if isinstance(plan, Refusal) else _outbound(plan)
            if told not in found:
                found.append(told)
            if not every.next_way():
                return found, False
        return found, True


# -- values


def _outbound(plan: OutboundPlan) -> dict[str, Any]:
    return {
        "allowed": True,
        "protocol": plan.carrier.value,
        "nextHop": str(plan.next_hop),
        "nextHopIp": "" if plan.next_hop.is_hostname else plan.next_hop.host,
        "authority": plan.authority,
        "expected": sorted(str(each) for each in plan.expected),
        "workload": show_workload(plan.workload) if plan.workload else None,
        "service": show_service(plan.service),
        "viaWaypoint": plan.is_via_waypoint,
    }


def _verdict(verdict: Permit | Refusal) -> dict[str, Any]:
    if isinstance(verdict, Refusal):
        return _refusal(verdict)
    reason = f"allowed by policy {verdict.policy}, rule {verdict.rule}" if verdict.policy else ""
    return {
        "allowed": True,
        "policy": verdict.policy or None,
        "rule": verdict.rule,
        "reason": reason or "no policy restricts it",
    }


def _refusal(refusal: Refusal) -> dict[str, Any]:
    return {
        "allowed": False,
        "flag": refusal.flag,
        "policy": refusal.policy or None,
        "rule": refusal.rule,
        "reason": refusal.reason,
        "hint": refusal.hint,
    }


def _ip(request: Request, name: str) -> str:
    text = request.query.get(name, "")
    try:
        return str(ipaddress.ip_address(text))
    except ValueError:
        raise ConfigError(f"not an IP address: {text[:80]!r}", field=name) from None


def _port(text: str) -> int:
    if text.isascii() and text.isdecimal() and len(text) <= 5 and 0 < int(text) < 65536:
        return int(text)
    raise ConfigError(f"not a port: {text[:80]!r}", field="port")
