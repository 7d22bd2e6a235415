"""`ambit explain`: what the mesh does with a connection, asked of the proxies that would do it."""

from __future__ import annotations

import json
import sys
import urllib.parse
from collections.abc import Mapping, Sequence
from typing import Any

import click

from mesh.cli import meant, ways, written
from mesh.cli.choose import MeshClient, Where, mesh_client, where_options
from mesh.cli.inspect import read_dump
from mesh.cli.output import FAILED, emit, errors, output_option, say
from mesh.errors import ConfigError, Unavailable

#: Objects behind the filters of a waypoint.
_KINDS = {
    "AuthorizationPolicy": "AuthorizationPolicy",
    "RequestAuthentication": "RequestAuthentication",
    "RateLimitPolicy": "RateLimitPolicy",
    "redaction": "RedactionPolicy",
}


@click.command()
@where_options
@output_option
@click.option("--method", metavar="METHOD", help="Of a request; GET if only others are given.")
@click.option("--path", metavar="PATH", help="Of a request, with its query; / if not given.")
@click.option("-H", "--header", "headers", multiple=True, metavar="'NAME: VALUE'",
              help="A header of a request; may be given several times.")  # fmt: skip
@click.argument("source", metavar="SRC")
@click.argument("destination", metavar="DST[:PORT]")
def explain(
    where: Where,
    form: str,
    method: str | None,
    path: str | None,
    headers: tuple[str, ...],
    source: str,
    destination: str,
) -> None:
    """Say what happens to a connection from SRC to DST, hop by hop, and which rule decides.

    With --method, --path or --header it says what happens to that HTTP request: a waypoint on the
    way tells its route and rule, every policy, limit and redaction, and the backend.

    SRC is pod/NAME.NAMESPACE, NAMESPACE/NAME or a pod's address; DST one of these,
    svc/NAME.NAMESPACE, any address, or a host name. The proxies answer, by what they hold now;
    nothing is sent.
    Exit 0 if the connection is carried, 1 if it is not.

    \b
    Examples:
      ambit explain shop/reader svc/web.shop:80
      ambit explain pod/reader.shop 10.96.1.4:443 -o json
      ambit explain outside/prober web.shop:9000
      ambit explain shop/reader web.shop --method POST --path /orders -H 'x-user: ann'
    """
    with errors():
        client = mesh_client(where)
        is_request = method is not None or path is not None or bool(headers)
        request = read_request(method, path, headers) if is_request else None
        report = _report(client, source, destination, request)
        _add_places(client, report)
        is_seen = any(hop["kind"] == "waypoint" for way in report["ways"] for hop in way["hops"])
        if request is not None and not is_seen:
            say("no waypoint is on the way: nobody looks at the request, only at the connection")
    if form in ("json", "yaml"):
        emit(report, form)
    else:
        for line in ways.lines(report, lambda _, hop: hop["verdict"].get("places", [])):
            click.echo(line)
    sys.exit(0 if report["result"] in ways.CARRIED else FAILED)


def read_request(method: str | None, path: str | None, headers: Sequence[str]) -> dict[str, str]:
    """What a waypoint is asked about; `host` is empty if no header gives it. Raises ConfigError."""
    host, lines = "", []
    for each in headers:
        name, colon, value = (part.strip() for part in each.partition(":"))
        if not colon or not name or not each.isprintable():
            raise ConfigError(f"not a header: {each[:80]!r}", hint="write 'name: value'")
        if name.lower() == "host":
            host = value
        else:
            lines.append(f"{name}: {value}")
    told = {"method": method or "GET", "path": path or "/", "host": host}
    if any(not text.isprintable() or " " in text for text in told.values()):
        raise ConfigError("not a request: a space or a control character", field="path")
    return told | {"headers": "\n".join(lines)}


def _report(
    client: MeshClient, source: str, destination: str, request: dict[str, str] | None
) -> dict[str, Any]:
    """Raises ConfigError, NotFound, Unavailable."""
    from_, to = meant.parse(source), meant.parse(destination)
    dumps: dict[str, Any] = {}
    missing: dict[str, Unavailable] = {}
    for node in [each["name"] for each in client.status()["nodes"]]:
        try:
            dumps[node] = read_dump(client, node)
        except Unavailable as error:
            missing[node] = error
    if not dumps:
        raise next(iter(missing.values()), Unavailable(f"{client.where} has no node"))
    workload = meant.find_workload(dumps, from_)
    node = str(workload.get("node", ""))
    if node in missing:
        raise missing[node]
    if node not in dumps:
        raise Unavailable(f"{from_} is on {node or 'no node'}, where no proxy can be asked")
    for silent in missing.values():
        say(str(silent))
    target = _target(dumps, to)

    def ask(where: str, path: str, query: Mapping[str, str]) -> Mapping[str, Any]:
        return _ask(client, where, path, query)

    row = {"uid": workload["uid"], "node": node}
    if request is not None and not request["host"]:
        host = target.get("host") or target["ip"]
        host = f"[{host}]" if ":" in host else host
        port = target["port"]
        request = request | {"host": host if port == "80" else f"{host}:{port}"}
    return dict(ways.explain(ask, row, target, frozenset(dumps), request))


def _target(dumps: meant.Dumps, to: meant.Meant) -> dict[str, str]:
    match to.kind:
        case "pod":
            found = meant.find_workload(dumps, to)
            address = (found.get("workloadIps") or [""])[0]
            return {"ip": address, "port": str(meant.choose_port(to, None))}
        case "service":
            service = meant.find_service(dumps, to)
            port = str(meant.choose_port(to, service))
            return {"host": str(service["hostname"]).lower(), "port": port}
        case "ip":
            return {"ip": to.name, "port": str(meant.choose_port(to, None))}
        case "host":
            service_or_none = meant.service_of_host(dumps, to.name)
            return {"host": to.name, "port": str(meant.choose_port(to, service_or_none))}


def _ask(client: MeshClient, node: str, path: str, query: Mapping[str, str]) -> Mapping[str, Any]:
    status, body = client.http_get(node, f"{path}?{urllib.parse.urlencode(query)}")
    if status == 404:
        raise Unavailable(
            f"{node}: its proxy explains nothing", hint="is it another program? ambit status"
        )
    if status != 200:
        raise Unavailable(f"{node}: {body.decode('utf-8', 'replace').strip()[:300]}")
    value = json.loads(body)
    if not isinstance(value, dict):
        raise Unavailable(f"{node}: its proxy answered with something else")
    return value


def _add_places(client: MeshClient, report: dict[str, Any]) -> None:
    """Say at each verdict where the policies that decided are written."""

    def get(kind: str, namespace: str, name: str) -> list[dict[str, Any]]:
        return [
            each
            for each in client.get(kind, namespace)
            if not name or each["metadata"]["name"] == name
        ]

    for way in report["ways"]:
        for hop in way["hops"]:
            if "outcome" in hop:
                _add_l7_places(get, hop)
            verdict = hop.get("verdict")
            if not verdict or not verdict.get("policy"):
                continue
            keys = [(verdict["policy"], verdict["rule"])]
            if not verdict["allowed"] and verdict["rule"] is None:
                # Nothing allowed it: then all that could have.
                keys = [
                    (each["name"], None)
                    for each in hop["policies"]
                    if each["action"] == "ALLOW" and not each["dryRun"]
                ]
            namespace = hop["workload"]["namespace"]
            verdict["places"] = [
                place for key, rule in keys for place in written.places(get, key, rule, namespace)
            ]


def _add_l7_places(get: written.Get, hop: dict[str, Any]) -> None:
    """Where a waypoint's route and deciding policies are written."""
    route = hop["route"]
    if route is not None:
        hop["places"] = written.rule_places(get, route["kind"], route["name"], route["rule"])
    for step in hop["steps"]:
        if step["policy"] and step["filter"] in _KINDS:
            kind = _KINDS[step["filter"]]
            step["places"] = written.rule_places(get, kind, step["policy"], step["rule"])
