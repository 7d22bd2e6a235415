"""`ambit explain`: what the mesh does with a connection, asked of the proxies that would do it."""

from __future__ import annotations

import json
import sys
import urllib.parse
from collections.abc import Mapping
from typing import Any

import click

from mesh.cli import meant, ways, written
from mesh.cli.choose import MeshClient, Where, mesh_client, where_options
from mesh.cli.inspect import read_dump
from mesh.cli.output import FAILED, emit, errors, output_option, say
from mesh.errors import Unavailable


@click.command()
@where_options
@output_option
@click.argument("source", metavar="SRC")
@click.argument("destination", metavar="DST[:PORT]")
def explain(where: Where, form: str, source: str, destination: str) -> None:
    """Say what happens to a connection from SRC to DST, hop by hop, and which rule decides.

    SRC is pod/NAME.NAMESPACE, NAMESPACE/NAME or a pod's address; DST one of these,
    svc/NAME.NAMESPACE, any address, or a host name. The node proxies answer, by what they hold now;
    nothing is sent.
    Exit 0 if the connection is carried, 1 if it is not.

    \b
    Examples:
      ambit explain shop/reader svc/web.shop:80
      ambit explain pod/reader.shop 10.96.1.4:443 -o json
      ambit explain outside/prober web.shop:9000
    """
    with errors():
        client = mesh_client(where)
        report = _report(client, source, destination)
        _add_places(client, report)
    if form in ("json", "yaml"):
        emit(report, form)
    else:
        for line in ways.lines(report, lambda _, hop: hop["verdict"].get("places", [])):
            click.echo(line)
    sys.exit(0 if report["result"] in ways.CARRIED else FAILED)


def _report(client: MeshClient, source: str, destination: str) -> dict[str, Any]:
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
    return dict(ways.explain(ask, row, target, frozenset(dumps)))


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
