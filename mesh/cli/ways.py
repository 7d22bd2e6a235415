"""From the proxies' answers to one explanation: every way a connection may take, hop by hop.

Nothing is decided here: the source node's proxy says how it would carry the connection, the
destination node's whether it would let it in (`ztunnel.explain`). Here it is asked in the right
order, put together, and written out for a person.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeAlias

from mesh.cli import ways_l7

#: Asks a node's proxy: (node, path, query) -> its answer.
Ask: TypeAlias = Callable[[str, str, Mapping[str, str]], Mapping[str, Any]]
Hop: TypeAlias = dict[str, Any]
Way: TypeAlias = dict[str, Any]
Answer: TypeAlias = Mapping[str, Any]

#: Results with which the connection gets to where it wanted to go.
CARRIED = frozenset({"allowed", "answered", "passthrough", "depends"})
_MARKS = {"passthrough": "PASSED THROUGH"}


def explain(
    ask: Ask,
    source: Answer,
    target: Mapping[str, str],
    nodes: frozenset[str],
    request: Mapping[str, str] | None = None,
) -> Answer:
    """The whole answer. `source` is a workload (uid, node, name, namespace); `target` has `port`
    and `ip` or `host`; `nodes` have a proxy that can be asked. `request` (method, path, host,
    headers) is what a waypoint on the way is asked about. Raises MeshError.
    """
    answer = ask(str(source["node"]), "/explain/outbound", {"workload": source["uid"], **target})
    first: list[Hop] = []
    names = answer.get("names")
    if names is not None:
        first.append(
            {
                "kind": "dns",
                "node": answer["node"],
                "host": names["host"],
                "addresses": names["addresses"],
            }
        )
    ways = [
        {"result": result, "reason": reason, "hops": [*first, *hops]}
        for result, reason, hops in _Asker(ask, answer, nodes, request).ways()
    ]
    results = {each["result"] for each in ways}
    told = {(each["result"], each["reason"]) for each in ways}
    return {
        "source": answer["workload"],
        "sourceEnrolled": answer["captured"],
        "destination": {**target, **(answer.get("destination") or {})},
        "result": results.pop() if len(results) == 1 else "mixed",
        "reason": told.pop()[1] if len(told) == 1 else "it depends on the endpoint",
        "ways": ways,
        "truncated": bool(answer.get("truncated")),
    }


_Result: TypeAlias = tuple[str, str, list[Hop]]


class _Asker:
    def __init__(
        self,
        ask: Ask,
        answer: Answer,
        nodes: frozenset[str],
        request: Mapping[str, str] | None,
    ) -> None:
        self._request = request
        self._ask = ask
        self._answer = answer
        self._source = answer["workload"]
        self._nodes = nodes

    def ways(self) -> Iterator[_Result]:
        names = self._answer.get("names")
        if names is not None and not names["addresses"]:
            host = names["host"]
            if names["addresses"] is None:
                reason = f"the mesh has no {host}: other DNS servers answer for it"
                yield "passthrough", reason, []
            else:
                yield "refused", f"{host} has no address", []
            return
        if not self._answer["captured"]:
            yield from self._without_proxy()
            return
        for plan in self._answer["ways"]:
            yield from self._along(plan)

    # -- the source is not in the mesh

    def _without_proxy(self) -> Iterator[_Result]:
        destination = self._answer["destination"]
        hop = {
            "kind": "outbound",
            "node": self._answer["node"],
            "captured": False,
            "protocol": "TCP",
            "nextHop": destination["address"],
            "service": destination["service"],
        }
        ready = [each for each in destination["endpoints"] if each["workload"]["healthy"]]
        if destination["service"] is not None and destination["workload"] is None and not ready:
            yield "refused", f"no ready endpoint for {destination['address']}", [hop]
        elif not ready:
            yield "passthrough", "neither end is in the mesh", [hop]
        for each in ready:
            yield self._plain(each["workload"], each["port"], [hop])

    # -- it is: one of the plans of its proxy

    def _along(self, plan: Answer) -> Iterator[_Result]:
        destination = self._answer["destination"]
        endpoints = destination["endpoints"]
        hop = {
            "kind": "outbound",
            "node": self._answer["node"],
            "captured": True,
            "identity": self._source["identity"],
            "certificate": self._answer["certificate"],
            "service": plan.get("service") or destination["service"],
            "endpoints": {
                "healthy": sum(each["workload"]["healthy"] for each in endpoints),
                "total": len(endpoints),
                "unready": sorted(
                    _pod(each["workload"]) for each in endpoints if not each["workload"]["healthy"]
                ),
            },
            **{key: value for key, value in plan.items() if key != "service"},
        }
        if not plan["allowed"]:
            yield "refused", plan["reason"], [hop]
            return
        workload = plan["workload"]
        if plan["viaWaypoint"]:
            yield from self._behind_waypoint(workload, plan, [hop])
        elif workload is None:
            yield "passthrough", "the destination is not in the mesh", [hop]
        elif plan["protocol"] == "HBONE":
            yield self._tunnel(self._source, workload, plan, [hop])
        else:
            port = int(plan["nextHop"].rpartition(":")[2])
            yield self._plain(workload, port, [hop])

    def _behind_waypoint(
        self, waypoint: Answer, plan: Answer, hops: list[Hop]
    ) -> Iterator[_Result]:
        """The waypoint is asked what it does with the request; what follows it is asked too."""
        destination = self._answer["destination"]
        service = destination["service"]
        host = service["hostname"] if service is not None else ""
        if self._request is not None:
            authority = plan["authority"]
            said = ways_l7.ask_waypoint(self._ask, waypoint, self._source, authority, self._request)
            for way in said["ways"]:
                here = [*hops, ways_l7.make_hop(waypoint, way)]
                end = ways_l7.ended(way)
                if end is not None:
                    yield *end, here
                    continue
                to = way["backend"]["service"].partition("/")[2] or host
                for result, reason, told in self._go_on(waypoint, way["endpoints"], to, here):
                    if result == "allowed":
                        result = "allowed" if way["outcome"] == "forward" else "depends"
                        reason = ways_l7.reason_of(way)
                    yield result, reason, told
            return
        here = [*hops, ways_l7.make_hop(waypoint)]
        ready = [each for each in destination["endpoints"] if each["workload"]["healthy"]]
        if not ready:
            yield "refused", "no ready endpoint behind the waypoint", here
        for result, reason, told in self._go_on(waypoint, ready, host, here):
            if result in CARRIED:
                result, reason = "depends", "the waypoint decides, by what the request says"
            yield result, reason, told

    def _go_on(
        self, waypoint: Answer, endpoints: list[Answer], host: str, hops: list[Hop]
    ) -> Iterator[_Result]:
        """From a waypoint to endpoints of the service `host`."""
        for each in endpoints:
            workload, port = each["workload"], each["port"]
            if workload["protocol"] == "HBONE":
                ip = _same_family(workload["addresses"], hops[0]["nextHopIp"])
                plan = {
                    "nextHopIp": ip,
                    "authority": f"[{ip}]:{port}" if ":" in ip else f"{ip}:{port}",
                    "expected": [workload["identity"]],
                }
                yield self._tunnel(waypoint, workload, plan, hops, host=host)
            else:
                yield self._plain(workload, port, hops, source=waypoint)

    # -- the destination

    def _tunnel(
        self,
        source: Answer,
        workload: Answer,
        plan: Answer,
        hops: list[Hop],
        *,
        host: str = "",
    ) -> _Result:
        ip = plan["nextHopIp"]
        query = {
            "workload": workload["uid"],
            "peer": source["identity"],
            "source": _same_family(source["addresses"], ip),
            "ip": ip,
            "authority": plan["authority"],
        }
        service = self._answer["destination"]["service"]
        if host or service is not None:
            query["host"] = host or service["hostname"]
        answer = self._inbound(workload, query)
        if answer is None or not answer["captured"]:
            hop = _destination(workload, answer, "HBONE")
            reason = f"no proxy serves {workload['namespace']}/{workload['name']} at port 15008 yet"
            return "refused", reason, [*hops, hop]
        hop = {
            **_destination(workload, answer, "HBONE"),
            "expects": source["identity"],
            "presents": answer["workload"]["identity"],
        }
        if hop["presents"] not in plan["expected"]:
            reason = f"it presents {hop['presents']}, not {' or '.join(plan['expected'])}"
            return "refused", reason, [*hops, hop]
        return _judged(answer, hop, hops)

    def _plain(
        self, workload: Answer, port: int, hops: list[Hop], *, source: Answer | None = None
    ) -> _Result:
        wanted = self._answer["destination"]["address"]
        ip = _same_family(workload["addresses"], wanted)
        query = {
            "workload": workload["uid"],
            "source": _same_family((source or self._source)["addresses"], ip),
            "ip": ip,
            "port": str(port),
        }
        answer = self._inbound(workload, query) if ip else None
        hop = _destination(workload, answer, "TCP")
        if answer is None or not answer["captured"]:
            return "allowed", "the destination is not in the mesh: nothing is checked", [*hops, hop]
        return _judged(answer, hop, hops)

    def _inbound(self, workload: Answer, query: Mapping[str, str]) -> Answer | None:
        node = str(workload["node"])
        return self._ask(node, "/explain/inbound", query) if node in self._nodes else None


def _destination(workload: Answer, answer: Answer | None, protocol: str) -> Hop:
    return {
        "kind": "inbound",
        "node": workload["node"],
        "captured": bool(answer and answer["captured"]),
        "protocol": protocol,
        "workload": workload,
    }


def _judged(answer: Answer, hop: Hop, hops: list[Hop]) -> _Result:
    verdict = answer["verdict"]
    hop = {
        **hop,
        "verdict": verdict,
        "policies": answer.get("policies", []),
        "upstream": (answer.get("plan") or {}).get("upstream"),
    }
    if answer.get("dryRun"):
        hop["dryRun"] = answer["dryRun"]
    if verdict["allowed"]:
        return "allowed", verdict["reason"], [*hops, hop]
    return "denied" if verdict["flag"] == "DENY" else "refused", verdict["reason"], [*hops, hop]


def _same_family(addresses: list[str], like: str) -> str:
    wants_v6 = like.count(":") > 1
    return next((each for each in addresses if (":" in each) == wants_v6), (addresses or [""])[0])


# -- for a person


def lines(report: Answer, places: Callable[[Answer, Hop], list[str]]) -> Iterator[str]:
    """The report as text; `places` says where a hop's deciding policy is written."""
    destination = report["destination"]
    asked = destination.get("host") or destination.get("ip") or ""
    yield f"{_pod(report['source'])} to {asked}:{destination['port']}"
    ways = report["ways"]
    names = [hop for hop in ways[0]["hops"] if hop["kind"] == "dns"]
    if names:
        # The same for all ways, because it comes before them.
        yield from ("", f"  {next(_hop(report, names[0]))}")
    before: list[Hop] = []
    for number, way in enumerate(ways, 1):
        hops = [hop for hop in way["hops"] if hop["kind"] != "dns"]
        pairs = zip(hops, before, strict=False)
        shared = len(list(itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)))
        before = hops
        if len(ways) > 1:
            yield from (
                "",
                f"way {number} of {len(ways)}{' or more' if report['truncated'] else ''}",
            )
        elif hops and not names:
            yield ""
        if shared:
            yield f"  as way {number - 1} through {hops[shared - 1]['kind']}, then"
        for hop in hops[shared:]:
            said = list(_hop(report, hop))
            if "verdict" in hop:
                said += [f"at {place}" for place in places(report, hop)]
            yield f"  {said[0]}"
            yield from (f"            {each}" for each in said[1:])
        if len(ways) > 1:
            yield f"  {_mark(way['result'])}: {way['reason']}"
    yield ""
    yield f"{_mark(report['result'])}: {report['reason']}"


def _mark(result: str) -> str:
    return _MARKS.get(result, result.upper())


def _hop(report: Answer, hop: Hop) -> Iterator[str]:
    match hop["kind"]:
        case "dns":
            found = ", ".join(hop["addresses"] or ()) or "asked elsewhere"
            yield f"dns       {hop['host']} is {found} (the proxy of {hop['node']} answers)"
        case "outbound":
            yield from _outbound(report, hop)
        case "waypoint":
            yield from ways_l7.lines(hop)
        case _:
            yield from _inbound(hop)


def _outbound(report: Answer, hop: Hop) -> Iterator[str]:
    source = _pod(report["source"])
    if not hop["captured"]:
        yield f"outbound  {source} on {hop['node']} is not enrolled: plain TCP to {hop['nextHop']}"
        return
    service, counts = hop["service"], hop["endpoints"]
    about = ""
    if service is not None:
        ready = f"{counts['healthy']} of {counts['total']} endpoints ready"
        about = f"service {service['namespace']}/{service['name']}, {ready}"
        if counts["unready"]:
            about += f"; not ready: {', '.join(counts['unready'])}"
    if not hop["allowed"]:
        yield f"outbound  {hop['node']} refuses ({hop['flag']}): {hop['reason']}"
        if about:
            yield about
        if hop["hint"]:
            yield f"hint: {hop['hint']}"
        return
    yield f"outbound  {hop['node']} carries it to {hop['nextHop']} over {hop['protocol']}"
    if about:
        yield about
    if hop["workload"] is not None:
        yield f"to {_pod(hop['workload'])} on {hop['workload']['node'] or 'no node'}"
    if hop["protocol"] == "HBONE":
        yield f"as {hop['identity']}, asks for {hop['authority']}"
        yield f"expects {' or '.join(hop['expected'])}"


def _inbound(hop: Hop) -> Iterator[str]:
    workload = hop["workload"]
    where = f"inbound   {hop['node'] or 'no node'}, {_pod(workload)}"
    if not hop["captured"]:
        yield f"{where}: not enrolled, no proxy in front of it"
        return
    yield f"{where}: arrives over {'HBONE' if hop['protocol'] == 'HBONE' else 'plain TCP'}"
    if "presents" in hop:
        yield f"presents {hop['presents']}"
    verdict = hop.get("verdict")
    if verdict is None:
        return
    word = "allows" if verdict["allowed"] else f"refuses ({verdict['flag']})"
    yield f"{word}: {verdict['reason']}"
    if verdict.get("hint"):
        yield f"hint: {verdict['hint']}"
    if verdict.get("flag") == "DENY" and verdict["rule"] is None:
        yield _remedy(hop)
    if "dryRun" in hop:
        yield f"dry run: {hop['dryRun']['reason']}"


def _remedy(hop: Hop) -> str:
    port = (hop["upstream"] or "").rpartition(":")[2]
    if "expects" not in hop:
        return f"an ALLOW for port {port} without principals or namespaces would let it in"
    principal = hop["expects"].removeprefix("spiffe://")
    return f"an ALLOW for principal {principal} at port {port} would let it in"


def _pod(workload: Answer) -> str:
    return f"{workload['namespace']}/{workload['name']}"
