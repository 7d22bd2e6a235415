"""What one connection's decisions cost when the mesh grows. Microseconds, medians.

    python tests/bench/bench_growth.py [-o json]

Lookup and routing (`ztunnel.plan.plan_outbound` to an address and to a service that has a tenth of
the workloads as endpoints) with 10, 1 000 and 100 000 workloads; policy
(`ztunnel.connections.Judges.evaluate`, nothing matches before the last) with 10, 1 000 and 10 000
policies of the workload's namespace; at the waypoint a route (`waypoint.plan.Routes`) and L7 policy
(`waypoint.filters.authorize.Authorizer`) with 10, 1 000 and 10 000 rules, of which the last matches
or none; and the time to take 100 000 workloads over from the
controller (`mesh.model.store.Store.apply_addresses`), in seconds. Kept in .bench/growth.json.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mesh.authz import ConnectionContext
from mesh.identity import SpiffeId
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
from mesh.model.l7_policy import L7Action, L7Authorization, L7Operation, L7Rule, L7Source
from mesh.model.route import Backend, PathMatch, Route, RouteMatch, RouteRule
from mesh.model.service import Service, ServicePort
from mesh.model.store import Store
from mesh.model.workload import NetworkAddress, TunnelProtocol, Workload
from mesh.sockets import SocketAddress
from waypoint.filters.authorize import Authorizer
from waypoint.filters.chain import Request
from waypoint.plan import Forward, Routes
from ztunnel.connections import Judges
from ztunnel.plan import OutboundPlan, plan_outbound

WORKLOADS = (10, 1_000, 100_000)
POLICIES = (10, 1_000, 10_000)
L7_ACTIONS: tuple[L7Action, ...] = ("DENY", "ALLOW")
NAME = "shop/web.shop.svc.cluster.local"
RESULTS = Path(__file__).parents[2] / ".bench" / "growth.json"


@dataclass(frozen=True)
class Mesh:
    """A Store of many workloads; every tenth is an endpoint of one service."""

    store: Store
    source: Workload
    apply_seconds: float


def mesh_of(count: int) -> Mesh:
    """One with `count` workloads."""
    namespace, _, hostname = NAME.partition("/")
    service = Service(
        name="web",
        namespace=namespace,
        hostname=hostname,
        addresses=(NetworkAddress("", "10.96.0.1"),),
        ports={80: ServicePort(8080)},
    )
    workloads = [
        Workload(
            uid=f"c//Pod/shop/p{number}",
            name=f"p{number}",
            namespace="shop",
            service_account="web",
            addresses=(f"10.{number >> 16}.{number >> 8 & 255}.{number & 255}",),
            tunnel_protocol=TunnelProtocol.HBONE,
            services={} if number % 10 else {NAME: {80: 8080}},
        )
        for number in range(count)
    ]
    store = Store()
    begun = time.perf_counter()
    store.apply_addresses([service, *workloads], [])
    return Mesh(store, workloads[1], time.perf_counter() - begun)


def microseconds(call: Callable[[], object]) -> float:
    """The median of batches, once everything is warm."""
    call()
    taken = []
    for _ in range(30):
        begun = time.perf_counter()
        for _ in range(100):
            call()
        taken.append((time.perf_counter() - begun) * 1e4)
    return round(statistics.median(taken), 2)


def routing(mesh: Mesh) -> dict[str, float]:
    """To a workload's address, and to the service's."""
    rng = random.Random(1)
    last = max(mesh.store.workloads(), key=lambda each: len(each.name))
    found = {}
    for name, ip, port in (("address", last.addresses[0], 8080), ("service", "10.96.0.1", 80)):
        target = SocketAddress(ip, port)
        if not isinstance(plan_outbound(mesh.source, target, mesh.store, rng), OutboundPlan):
            raise SystemExit(f"no plan to {target}")

        def plan(target: SocketAddress = target) -> object:
            return plan_outbound(mesh.source, target, mesh.store, rng)

        found[name] = microseconds(plan)
    return found


def judging(count: int, action: Action) -> float:
    """With `count` policies, none of which concerns the caller but the last ALLOW."""
    mesh = mesh_of(10)
    policies = [
        Authorization(
            name=f"p{number}",
            namespace="shop",
            scope=PolicyScope.NAMESPACE,
            action=action,
            rules=(Rule((Clause((_callers(f"sa{number}"),)),)),),
        )
        for number in range(count)
    ]
    mesh.store.apply_policies(policies, [])
    judges = Judges(mesh.store)
    caller = SpiffeId("cluster.local", "shop", f"sa{count - 1}" if action is Action.ALLOW else "x")
    context = ConnectionContext(caller, "10.0.0.1", "10.0.0.2", 8080)
    return microseconds(lambda: judges.evaluate(mesh.source, context))


def _callers(account: str) -> Match:
    principal = f"cluster.local/ns/shop/sa/{account}"
    return Match(principals=(StringMatch(StringKind.EXACT, principal),))


def l7_request(path: str) -> Request:
    """GET `path` of `web`, by web's own service account."""
    return Request(
        method=b"GET",
        scheme=b"http",
        authority=b"web",
        path=path.encode(),
        source=SpiffeId("cluster.local", "shop", "web"),
    )


def l7_routing(count: int) -> float:
    """One route for each of `count` prefixes; the last is asked for."""
    rules = tuple(
        RouteRule(
            f"r{number}",
            (RouteMatch(PathMatch("PathPrefix", f"/api/v{number % 7}/thing-{number}")),),
            backends=(Backend("shop/web", 80),),
        )
        for number in range(count)
    )
    routes = Routes("shop/web", (Route("HTTPRoute", "shop", "web", rules=rules),))
    request, rng = l7_request(f"/api/v{(count - 1) % 7}/thing-{count - 1}/x"), random.Random(1)
    if not isinstance(routes.plan(request, "shop", rng), Forward):
        raise SystemExit("not forwarded")
    return microseconds(lambda: routes.plan(request, "shop", rng))


def l7_judging(count: int, action: L7Action, kind: str) -> float:
    """`count` rules by principal or by path: the last ALLOW matches, no DENY does."""
    rules = tuple(
        L7Rule(sources=(L7Source(principals=(f"cluster.local/ns/shop/sa/sa{number}",)),))
        if kind == "principal"
        else L7Rule(operations=(L7Operation(paths=(f"/thing-{number}/*",)),))
        for number in range(count - 1)
    )
    matching = L7Rule(sources=(L7Source(principals=("cluster.local/ns/shop/sa/web",)),))
    if action == "ALLOW":
        rules += (matching,)
    authorizer = Authorizer([L7Authorization("shop", "p", action, rules)])
    request = l7_request("/api/things")
    if not authorizer.judge(request).is_allowed:
        raise SystemExit("denied")
    return microseconds(lambda: authorizer.judge(request))


def main() -> None:
    """Measure, print, keep."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-o", choices=["table", "json"], default="table")
    options = parser.parse_args()
    rows: dict[str, float] = {}
    for count in WORKLOADS:
        mesh = mesh_of(count)
        for name, value in routing(mesh).items():
            rows[f"plan to a {name}, {count} workloads: us"] = value
        rows[f"apply {count} workloads: s"] = round(mesh.apply_seconds, 3)
    for action in (Action.DENY, Action.ALLOW):
        for count in POLICIES:
            rows[f"judge by {count} {action.name} policies: us"] = judging(count, action)
    for count in POLICIES:
        rows[f"L7 route among {count} rules: us"] = l7_routing(count)
        for l7_action, kind in itertools.product(L7_ACTIONS, ("principal", "path")):
            label = f"L7 judge by {count} {l7_action} rules, {kind}: us"
            rows[label] = l7_judging(count, l7_action, kind)
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(rows, indent=1) + "\n")
    if options.o == "json":
        print(json.dumps(rows))
        return
    for label, value in rows.items():
        print(f"{label:<46}{value:>12}")


if __name__ == "__main__":
    main()
