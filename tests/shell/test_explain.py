"""`explain`, from the proxies' pages to the text: it says what the deciding functions decide."""

from __future__ import annotations

import json
import random
import urllib.parse
from collections.abc import Mapping
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st

from mesh.cli import ways
from mesh.errors import Refusal
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
from mesh.model.l7_policy import (
    L7Authorization,
    L7Operation,
    L7Rule,
    RateLimitPolicy,
    RateLimitRule,
    TrafficConfig,
)
from mesh.model.route import Backend, Fault, Route, RouteFilter, RouteRule
from mesh.model.service import Service, ServicePort, WeightedWaypoint
from mesh.model.store import Store
from mesh.model.workload import (
    GatewayAddress,
    NamespacedHostname,
    NetworkAddress,
    TunnelProtocol,
    Workload,
    WorkloadStatus,
)
from mesh.runtime.admin import AdminApp, Request
from mesh.secrets import SecretManager
from mesh.sockets import SocketAddress
from waypoint.assemble import Assembly
from waypoint.explain import Explainer as RequestExplainer
from waypoint.proxy import Proxy
from waypoint.target import Own
from waypoint.traffic import TrafficStore
from ztunnel.config import ZtunnelConfig
from ztunnel.connections import Judges
from ztunnel.dns_plan import Names
from ztunnel.explain import EveryChoice, Explainer
from ztunnel.node import Node
from ztunnel.plan import plan_outbound
from ztunnel.workloads import Pod

VIP = NetworkAddress("", "10.96.0.1")
HOST = "web.shop.svc.cluster.local"
KEY = NamespacedHostname("shop", HOST)


def pod(name: str, ip: str, node: str = "n1", **more: Any) -> Workload:
    made = Workload(f"uid-{name}", name, "shop", (ip,), node=node, service_account=name)
    return replace(made, **{"tunnel_protocol": TunnelProtocol.HBONE} | more)


CURL = pod("curl", "10.0.0.1")
ENDPOINT = {f"shop/{HOST}": {80: 8080}}
WEB_1 = pod("web-1", "10.0.0.2", services=ENDPOINT)
WEB_2 = pod("web-2", "10.0.0.3", "n2", services=ENDPOINT)
PLAIN = pod("plain", "10.0.0.9", tunnel_protocol=TunnelProtocol.NONE)
WEB = Service("web", "shop", HOST, (VIP,), ports={80: ServicePort(8080)})
ONLY_CURL = Authorization(
    "only-curl",
    "shop",
    PolicyScope.NAMESPACE,
    Action.ALLOW,
    (
        Rule(
            (
                Clause(
                    (Match(principals=(StringMatch(StringKind.EXACT, CURL.identity.principal),)),)
                ),
            )
        ),
    ),
)

WAYPOINT_KEY = NamespacedHostname("shop", "waypoint.shop.svc.cluster.local")
WAYPOINT = pod("waypoint", "10.0.0.5", services={str(WAYPOINT_KEY): {15008: 15008}})
BEHIND = (
    replace(WEB, waypoint=GatewayAddress(WAYPOINT_KEY, 15008)),
    Service("waypoint", "shop", WAYPOINT_KEY.hostname, ports={15008: ServicePort(15008)}),
)


class Mesh:
    """Two nodes' pages over one Store; `captured` are names of pods that the proxies serve."""

    def __init__(self, *workloads: Workload, services: tuple[Service, ...] = (WEB,)) -> None:
        self.store = Store()
        self.store.apply_addresses([*workloads, *services], [])
        self.captured = {
            each.name for each in workloads if each.tunnel_protocol is TunnelProtocol.HBONE
        }
        self.apps = {name: self._app(name) for name in ("n1", "n2")}

    def _app(self, name: str) -> AdminApp:
        async def nobody(_: object) -> Any:
            raise AssertionError

        node = cast(
            "Node",
            SimpleNamespace(
                config=ZtunnelConfig(node_name=name),
                store=self.store,
                secrets=SecretManager(nobody),
                judges=Judges(self.store),
                names=Names(),
            ),
        )

        def pods() -> Any:
            for each in self.store.workloads():
                if each.node == name and each.name in self.captured:
                    yield (
                        Pod(each.uid, each.name, each.namespace, each.service_account),
                        "Up",
                        "",
                    )

        app = AdminApp()
        Explainer(node, pods).add_to(app)
        return app

    def ask(self, node: str, path: str, query: Mapping[str, str]) -> Any:
        # As it goes over the wire.
        sent = dict(urllib.parse.parse_qsl(urllib.parse.urlencode(query)))

        async def handle() -> Any:
            return await self.apps[node].handle(Request("GET", path, sent, {}, b"", True))

        response = trio.run(handle)
        assert response.status == 200, response.body
        return json.loads(response.body)

    def explain(
        self, source: Workload, request: Mapping[str, str] | None = None, **target: str
    ) -> Any:
        row = {"uid": source.uid, "node": source.node}
        return ways.explain(self.ask, row, target, frozenset({"n1", "n2"}), request)

    def add_waypoint(self, *configs: TrafficConfig) -> None:
        """Its page, over what this Store has, and `configs`."""
        assembly = Assembly(lambda: 0.0, random.Random(1))
        store = TrafficStore("shop/waypoint", assembly.make_filters, assembly.make_route_filter)
        store.apply_addresses([*self.store.workloads(), *self.store.services()], [])
        store.apply_traffic(configs, [])
        proxy = SimpleNamespace(
            config=SimpleNamespace(gateway="shop/waypoint"),
            identity=WAYPOINT.identity,
            store=store,
            traffic=store,
            now=lambda: 1.0,
            own_workload=lambda: WAYPOINT,
        )
        app = self.apps["shop/waypoint"] = AdminApp()
        own = Own(WAYPOINT_KEY, "", "10.0.0.5", store.has_config)
        RequestExplainer(cast("Proxy", proxy), own).add_to(app)

    def text(self, source: Workload, **target: str) -> str:
        return "\n".join(ways.lines(self.explain(source, **target), lambda *_: ["web.yaml:7"]))


def test_a_service_by_name_is_explained_for_each_endpoint() -> None:
    mesh = Mesh(CURL, WEB_1, WEB_2)
    mesh.store.apply_policies([ONLY_CURL], [])
    report = mesh.explain(CURL, host="web", port="80")
    assert (report["result"], len(report["ways"])) == ("allowed", 2)
    first = report["ways"][0]
    assert [hop["kind"] for hop in first["hops"]] == ["dns", "outbound", "inbound"]
    dns, out, into = first["hops"]
    assert dns["addresses"] == ["10.96.0.1"]
    assert (out["nextHop"], out["authority"]) == ("10.0.0.2:15008", "10.0.0.2:8080")
    assert out["expected"] == [into["presents"]] == [str(WEB_1.identity)]
    assert (into["verdict"]["policy"], into["verdict"]["rule"]) == ("shop/only-curl", 0)
    assert {each["hops"][2]["node"] for each in report["ways"]} == {"n1", "n2"}
    said = mesh.text(CURL, host="web", port="80")
    assert "ALLOWED: allowed by policy shop/only-curl, rule 0" in said
    assert "at web.yaml:7" in said
    assert "way 2 of 2" in said


def test_a_denial_says_what_would_let_it_in() -> None:
    mesh = Mesh(CURL, WEB_1)
    mesh.store.apply_policies([ONLY_CURL], [])
    other = replace(pod("other", "10.0.0.4"), node="n2")
    mesh.store.apply_addresses([other], [])
    mesh.captured.add("other")
    report = mesh.explain(other, ip="10.0.0.2", port="8080")
    assert report["result"] == "denied"
    said = mesh.text(other, ip="10.0.0.2", port="8080")
    assert "refuses (DENY): no ALLOW policy matched (shop/only-curl)" in said
    assert f"an ALLOW for principal {other.identity.principal} at port 8080 would let it in" in said


def test_a_source_that_is_not_enrolled_arrives_in_plain_text() -> None:
    mesh = Mesh(PLAIN, WEB_1)
    assert mesh.explain(PLAIN, host="web.shop", port="80")["result"] == "allowed"
    mesh.store.apply_policies([ONLY_CURL], [])
    report = mesh.explain(PLAIN, host="web.shop", port="80")
    assert report["result"] == "denied"
    assert report["ways"][0]["hops"][-1]["protocol"] == "TCP"
    said = mesh.text(PLAIN, host="web.shop", port="80")
    assert "is not enrolled: plain TCP to 10.96.0.1:80" in said
    assert "an ALLOW for port 8080 without principals or namespaces would let it in" in said


def test_a_destination_that_is_not_enrolled() -> None:
    report = Mesh(CURL, PLAIN).explain(CURL, ip="10.0.0.9", port="80")
    assert report["result"] == "allowed"
    assert not report["ways"][0]["hops"][-1]["captured"]


def test_beyond_the_mesh() -> None:
    mesh = Mesh(CURL)
    assert mesh.explain(CURL, ip="1.2.3.4", port="80")["result"] == "passthrough"
    report = mesh.explain(CURL, host="example.com", port="80")
    assert report["result"] == "passthrough"
    assert "example.com is asked elsewhere" in mesh.text(CURL, host="example.com", port="80")
    plain = Mesh(PLAIN)
    assert plain.explain(PLAIN, ip="1.2.3.4", port="80")["result"] == "passthrough"


def test_unready_endpoints_are_named() -> None:
    sick = replace(WEB_2, status=WorkloadStatus.UNHEALTHY)
    mesh = Mesh(CURL, WEB_1, sick)
    report = mesh.explain(CURL, host="web", port="80")
    assert [each["hops"][1]["endpoints"]["unready"] for each in report["ways"]] == [["shop/web-2"]]
    mesh.store.apply_addresses([replace(WEB_1, status=WorkloadStatus.UNHEALTHY)], [])
    report = mesh.explain(CURL, host="web", port="80")
    assert report["result"] == "refused"
    assert "no healthy endpoint for" in report["reason"]
    assert "not ready: shop/web-1, shop/web-2" in mesh.text(CURL, host="web", port="80")
    assert Mesh(PLAIN, sick).explain(PLAIN, host="web.shop", port="80")["result"] == "refused"


def test_a_pod_that_its_proxy_does_not_serve_yet() -> None:
    mesh = Mesh(CURL, WEB_1)
    mesh.captured.discard("web-1")
    report = mesh.explain(CURL, ip="10.0.0.2", port="80")
    assert (report["result"], report["reason"]) == (
        "refused",
        "no proxy serves shop/web-1 at port 15008 yet",
    )


def test_ports_of_the_proxy_itself_are_refused_at_the_source() -> None:
    report = Mesh(CURL).explain(CURL, ip="10.0.0.1", port="15008")
    assert report["result"] == "refused"
    assert "is a port of this proxy" in report["reason"]


def test_behind_a_waypoint() -> None:
    mesh = Mesh(CURL, WEB_1, WAYPOINT, services=BEHIND)
    mesh.captured.discard("waypoint")
    report = mesh.explain(CURL, host="web", port="80")
    assert report["result"] == "depends"
    assert [hop["kind"] for hop in report["ways"][0]["hops"]] == [
        "dns",
        "outbound",
        "waypoint",
        "inbound",
    ]
    # The destination sees the waypoint, not the caller.
    mesh.store.apply_policies([ONLY_CURL], [])
    assert mesh.explain(CURL, host="web", port="80")["result"] == "denied"
    assert "goes on as spiffe://" in mesh.text(CURL, host="web", port="80")


def asked(path: str, **more: str) -> dict[str, str]:
    return {"method": "GET", "path": path, "host": "web", "headers": ""} | more


NO_PUT = L7Authorization(
    "shop", "no-put", "DENY", (L7Rule(operations=(L7Operation(methods=("PUT",)),)),)
)
SPLIT = Route(
    "HTTPRoute",
    "shop",
    "split",
    (
        RouteRule(
            "half",
            backends=(Backend(f"shop/{HOST}", 80, 1), Backend("shop/gone.shop", 80, 1)),
        ),
    ),
)
SLOW = Route(
    "HTTPRoute",
    "shop",
    "slow",
    (
        RouteRule(
            filters=(RouteFilter(fault=Fault(abort_status=500, abort_percent=50.0)),),
            backends=(Backend(f"shop/{HOST}", 80),),
        ),
    ),
)


def test_a_request_behind_a_waypoint() -> None:
    mesh = Mesh(CURL, WEB_1, WAYPOINT, services=BEHIND)
    mesh.captured.discard("waypoint")
    everything = RateLimitPolicy("shop", "calm", (RateLimitRule("all", 3, 60.0),))
    about: dict[str, Any] = {"authorizations": (NO_PUT,), "rate_limits": (everything,)}
    mesh.add_waypoint(TrafficConfig("shop/waypoint", f"shop/{HOST}", **about))

    report = mesh.explain(CURL, asked("/"), host="web", port="80")
    assert (report["result"], report["reason"]) == (
        "allowed",
        f"no route: it goes to shop/{HOST}:80",
    )
    kinds = [hop["kind"] for hop in report["ways"][0]["hops"]]
    assert kinds == ["dns", "outbound", "waypoint", "inbound"]
    text = "\n".join(ways.lines(report, lambda *_: []))
    assert "shop/calm all: 2 of 3 left in 60 s" in text
    assert "AuthorizationPolicy: passes, no policy restricts it" in text

    report = mesh.explain(CURL, asked("/", method="PUT"), host="web", port="80")
    assert (report["result"], report["reason"]) == ("denied", "a DENY rule matches (403)")
    text = "\n".join(ways.lines(report, lambda *_: []))
    assert "AuthorizationPolicy: answers, a DENY rule matches, by shop/no-put rule 0" in text

    # The endpoint's own proxy has its say about the waypoint.
    mesh.store.apply_policies([ONLY_CURL], [])
    assert mesh.explain(CURL, asked("/"), host="web", port="80")["result"] == "denied"


def test_ways_of_a_route() -> None:
    mesh = Mesh(CURL, WEB_1, WAYPOINT, services=BEHIND)
    mesh.captured.discard("waypoint")
    mesh.add_waypoint(TrafficConfig("shop/waypoint", f"shop/{HOST}", routes=(SPLIT,)))
    report = mesh.explain(CURL, asked("/"), host="web", port="80")
    assert [(each["result"], each["hops"][2]["share"]) for each in report["ways"]] == [
        ("allowed", 0.5),
        ("refused", 0.5),
    ]
    text = "\n".join(ways.lines(report, lambda *_: []))
    assert "HTTPRoute shop/split, rule half, 50 % of requests" in text
    assert "way 2 of 2\n  as way 1 through outbound, then\n  waypoint" in text
    assert "service shop/gone.shop is not known" in text
    mesh.add_waypoint(TrafficConfig("shop/waypoint", f"shop/{HOST}", routes=(SLOW,)))
    report = mesh.explain(CURL, asked("/"), host="web", port="80")
    assert report["result"] == "depends"
    text = "\n".join(ways.lines(report, lambda *_: []))
    assert "fault: may answer, 50 % are answered 500" in text


def test_dry_run_is_told_and_not_obeyed() -> None:
    mesh = Mesh(CURL, WEB_1)
    dry = replace(ONLY_CURL, action=Action.DENY, dry_run=True)
    mesh.store.apply_policies([dry], [])
    assert mesh.explain(CURL, ip="10.0.0.2", port="8080")["result"] == "allowed"
    assert "dry run: denied by policy shop/only-curl" in mesh.text(CURL, ip="10.0.0.2", port="8080")


@pytest.mark.parametrize(
    ("path", "query"),
    [
        ("outbound", {"workload": "nobody", "ip": "10.0.0.2", "port": "80"}),
        ("outbound", {"workload": "uid-curl", "ip": "ten", "port": "80"}),
        ("outbound", {"workload": "uid-curl", "ip": "10.0.0.2", "port": "0"}),
        ("inbound", {"workload": "uid-curl", "source": "x", "ip": "10.0.0.1", "port": "80"}),
        (
            "inbound",
            {"workload": "uid-curl", "source": "10.0.0.2", "ip": "10.0.0.1", "authority": "x"},
        ),
        (
            "inbound",
            {
                "workload": "uid-curl",
                "source": "10.0.0.2",
                "ip": "10.0.0.1",
                "authority": "10.0.0.1:80",
                "peer": "me",
            },
        ),
    ],
)
async def test_nonsense_is_refused(path: str, query: dict[str, str]) -> None:
    app = Mesh(CURL).apps["n1"]
    response = await app.handle(Request("GET", f"/explain/{path}", query, {}, b"", True))
    assert response.status == 400, response.body


# -- every possible outcome, and no other


@given(
    capacities=st.lists(st.integers(0, 3), min_size=1, max_size=4),
    healthy=st.lists(st.booleans(), min_size=4, max_size=4),
    weights=st.lists(st.integers(0, 2), max_size=3),
    seed=st.integers(0, 1 << 32),
)
@settings(max_examples=60, deadline=None)
def test_chance_never_does_what_was_not_explained(
    capacities: list[int], healthy: list[bool], weights: list[int], seed: int
) -> None:
    store = Store()
    endpoints = [
        pod(
            f"web-{number}",
            f"10.0.1.{number + 1}",
            services=ENDPOINT,
            capacity=capacity,
            status=WorkloadStatus.HEALTHY if healthy[number] else WorkloadStatus.UNHEALTHY,
        )
        for number, capacity in enumerate(capacities)
    ]
    gateways = tuple(
        WeightedWaypoint(GatewayAddress(NetworkAddress("", f"10.0.2.{n + 1}"), 15008), weight)
        for n, weight in enumerate(weights)
    )
    waypoints = [pod(f"wp-{n}", f"10.0.2.{n + 1}") for n in range(len(weights))]
    service = replace(WEB, weighted_waypoints=gateways)
    store.apply_addresses([CURL, *endpoints, *waypoints, service], [])
    target = SocketAddress("10.96.0.1", 80)
    every, explained = EveryChoice(), []
    while True:
        explained.append(plan_outbound(CURL, target, store, every))
        if not every.next_way():
            break
    rng = random.Random(seed)
    for _ in range(20):
        assert plan_outbound(CURL, target, store, rng) in explained
    if any(isinstance(each, Refusal) for each in explained):
        assert len(explained) == 1
    assert len({str(each) for each in explained}) == len(explained)
