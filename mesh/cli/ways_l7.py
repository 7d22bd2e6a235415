"""The hop through a waypoint in an explanation: asked with the request, and written out. Pure.

Nothing is decided here: the waypoint's own page says what it would do (`waypoint.explain`). Without
a request there is nothing to ask it, and what it does depends.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeAlias

Answer: TypeAlias = Mapping[str, Any]
Hop: TypeAlias = dict[str, Any]

#: Response flags of refusals that a policy asked for.
_DENIALS = frozenset({"DENY", "RL", "REDACT", "UAEX"})


def ask_waypoint(
    ask: Callable[[str, str, Mapping[str, str]], Answer],
    waypoint: Answer,
    source: Answer,
    authority: str,
    request: Mapping[str, str],
) -> Answer:
    """The waypoint's answer about `request` (method, path, host, headers) of `source`."""
    like_v6 = authority.startswith("[")
    addresses = [each for each in source["addresses"] if (":" in each) == like_v6]
    query = {
        "identity": source["identity"],
        "source": (addresses or source["addresses"] or [""])[0],
        "authority": authority,
        **request,
    }
    return ask(f"{waypoint['namespace']}/{waypoint['name']}", "/explain/request", query)


def make_hop(waypoint: Answer, way: Answer | None = None) -> Hop:
    """The hop, with what was answered; without an answer, only where it is."""
    hop: Hop = {"kind": "waypoint", "node": waypoint["node"], "workload": waypoint}
    return hop | {key: value for key, value in (way or {}).items() if key != "endpoints"}


def ended(way: Answer) -> tuple[str, str] | None:
    """Result and reason of a way that goes no further than the waypoint; None: it goes on."""
    decision = way["decision"]
    if way["outcome"] == "forward" or (way["outcome"] == "depends" and way.get("endpoints")):
        return None
    said = decision["reason"] or "the waypoint answers"
    if "status" not in decision or way["outcome"] == "depends":
        return "depends", said
    if decision["policy"] or decision["flag"] in _DENIALS:
        return "denied", f"{said} ({decision['status']})"
    if decision["status"] < 400:
        return "answered", f"{said} ({decision['status']})"
    return "refused", f"{said} ({decision['status']}, {decision['flag']})"


def reason_of(way: Answer) -> str:
    """Why a request goes on."""
    route, backend = way["route"], way["backend"]
    to = _backend(backend)
    return f"{_route(route)} leads to {to}" if route else f"no route: it goes to {to}"


def lines(hop: Hop) -> Iterator[str]:
    """The hop as text; the first line is its head."""
    workload = hop["workload"]
    head = f"waypoint  {workload['namespace']}/{workload['name']} on {hop['node']}: "
    if "outcome" not in hop:
        yield f"{head}HTTP routes and policies"
        yield f"goes on as {workload['identity']}"
        return
    route = hop["route"]
    share = f", {100 * hop['share']:.3g} % of requests" if hop["share"] < 1 else ""
    yield f"{head}{_route(route) if route else 'no route'}{share}"
    yield from (f"at {place}" for place in hop.get("places", ()))
    for step in hop["steps"]:
        yield from _step(step)
    decision = hop["decision"]
    if "backend" not in hop:
        if not any(each["outcome"] == "answers" for each in hop["steps"]):
            status = decision.get("status", "")
            yield f"answers {status}: {decision['reason']}" if status else decision["reason"]
        return
    yield f"to {_backend(hop['backend'])}: {_sent(hop)}"
    if hop["mirrors"]:
        yield f"copied to {', '.join(hop['mirrors'])}"
    yield f"goes on as {workload['identity']}"


def _sent(hop: Hop) -> str:
    sends, told = hop["sends"], []
    told.append(f"{sends['method']} {sends['path']}, host {sends['host']}")
    if hop["attempts"] > 1:
        told.append(f"up to {hop['attempts']} tries")
    told += [
        f"{name} timeout {seconds:g} s" for name, seconds in hop["timeouts"].items() if seconds
    ]
    return "; ".join(told)


def _step(step: Answer) -> Iterator[str]:
    by = f", by {step['policy']}" if step["policy"] else ""
    by += f" rule {step['rule']}" if step["policy"] and step["rule"] else ""
    yield f"{step['filter']}: {step['outcome']}, {step['reason']}{by}".replace(", ,", ",")
    yield from (f"  at {place}" for place in step.get("places", ()))
    yield from (f"  noted only: {each}" for each in step.get("noted", ()))
    for each in step.get("limits", ()):
        left = f"{each['remaining']} of {each['requests']} left in {each['windowSeconds']:g} s"
        shadow = " (shadow)" if each["shadow"] else ""
        yield f"  {each['policy']} {each['rule']}{shadow}: {left}{_for(each['key'])}"
    for each in step.get("found", ()):
        yield f"  {_redaction(each)}: {each['count']} found in {each['location']}"
    for each in step.get("rules", ()):
        yield f"  {_redaction(each)}: {', '.join(each['looksFor'])} ({each['direction'].lower()})"


def _redaction(each: Answer) -> str:
    dry = ", dry run" if each["dryRun"] else ""
    return f"{each['policy']} {each['rule']} ({each['action']}{dry})"


def _for(key: list[str]) -> str:
    return f" for {' '.join(key)}" if key else ""


def _route(route: Answer) -> str:
    return f"{route['kind']} {route['name']}, rule {route['rule']}"


def _backend(backend: Answer) -> str:
    return f"{backend['service'] or 'the workload itself'}:{backend['port']}"
