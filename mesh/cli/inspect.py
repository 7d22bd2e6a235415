"""`ambit workloads`, `services`, `policies`, `certificates`, `connections`: what the node
proxies hold, read from their own admin pages and never from what was written for them.

Columns are istioctl's (`ztunnel-config`). Without --node every node is asked, and where nodes
disagree about the same thing it is said on stderr: a push is under way, or something is wrong.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Any, TypeVar

import click

from mesh.cli import held
from mesh.cli.choose import MeshClient, Where, mesh_client, where_options
from mesh.cli.output import UNREACHABLE, NotFound, emit, errors, output_option, say
from mesh.errors import MeshError, Unavailable

F = TypeVar("F", bound=Callable[..., Any])
Columns = Sequence[tuple[str, str]]

_HELD_BY = ("HELD BY", "held_by")
_node_option = click.option("--node", metavar="NODE", help="Ask this node's proxy only.")
_namespace_option = click.option("-n", "--namespace", help="Only what belongs to this namespace.")


def _asking(function: F) -> F:
    """The options that all of these verbs have."""
    for option in (output_option, _namespace_option, where_options, _node_option):
        function = option(function)
    return function


@click.command()
@_asking
def workloads(node: str | None, where: Where, namespace: str | None, form: str) -> None:
    """Show the workloads that the node proxies know.

    PROTOCOL is HBONE for those that are reached through the mesh's tunnel.

    \b
    Examples:
      ambit workloads
      ambit workloads -n shop --node node1
      ambit workloads -o json
    """
    with errors():
        dumps, missing = _dumps(where, node)
        told = held.workloads(dumps, namespace)
    columns = [("NAMESPACE", "namespace"), ("POD NAME", "name"), ("ADDRESS", "address")]
    columns += [("NODE", "node"), ("WAYPOINT", "waypoint"), ("PROTOCOL", "protocol")]
    wide = [("STATUS", "status"), ("SERVICE ACCOUNT", "service_account"), _HELD_BY]
    rows = []
    for row in told.rows:
        addresses = row["addresses"] or [row["hostname"]]
        shown = addresses if form == "wide" else addresses[:1]
        rows.append({**row, "address": shown, "waypoint": held.waypoint_name(row["waypoint"])})
    _print(told, form, columns, wide, rows)
    _leave(missing)


@click.command()
@_asking
def services(node: str | None, where: Where, namespace: str | None, form: str) -> None:
    """Show the services that the node proxies know, and how many endpoints are healthy.

    \b
    Examples:
      ambit services
      ambit services -n shop -o wide
      ambit services --node node2 -o json
    """
    with errors():
        dumps, missing = _dumps(where, node)
        told = held.services(dumps, namespace)
    columns = [("NAMESPACE", "namespace"), ("SERVICE NAME", "name"), ("SERVICE VIP", "vip")]
    columns += [("WAYPOINT", "waypoint"), ("ENDPOINTS", "healthy")]
    wide = [("PORTS", "ports"), ("HOSTNAME", "hostname"), _HELD_BY]
    rows = [
        {
            **row,
            "vip": row["vips"] if form == "wide" else row["vips"][:1],
            "ports": list(row["ports"]),
            "waypoint": held.waypoint_name(row["waypoint"]),
            "healthy": f"{row['endpoints']['healthy']}/{row['endpoints']['total']}",
        }
        for row in told.rows
    ]
    _print(told, form, columns, wide, rows)
    _leave(missing)


@click.command()
@_asking
def policies(node: str | None, where: Where, namespace: str | None, form: str) -> None:
    """Show the authorization policies that the node proxies enforce.

    \b
    Examples:
      ambit policies
      ambit policies -n shop
      ambit policies -o yaml             with their rules
    """
    with errors():
        dumps, missing = _dumps(where, node)
        told = held.policies(dumps, namespace)
    columns = [("NAMESPACE", "namespace"), ("POLICY NAME", "name"), ("ACTION", "action")]
    columns.append(("SCOPE", "scope"))
    wide = [("RULES", "rules"), ("DRY RUN", "dry_run"), _HELD_BY]
    rows = [{**row, "rules": len(row["rules"])} for row in told.rows]
    _print(told, form, columns, wide, rows)
    _leave(missing)


@click.command()
@_asking
def certificates(node: str | None, where: Where, namespace: str | None, form: str) -> None:
    """Show the certificates that the node proxies hold, without keys.

    -n chooses by the namespace of the identity.

    \b
    Examples:
      ambit certificates
      ambit certificates --node node1 -o wide
      ambit certificates -n shop -o json
    """
    with errors():
        dumps, missing = _dumps(where, node)
        told = held.certificates(dumps, datetime.now(UTC), namespace)
    columns = [("CERTIFICATE NAME", "identity"), ("TYPE", "type"), ("STATUS", "state")]
    columns += [("VALID CERT", "valid"), ("SERIAL NUMBER", "serial_number")]
    columns += [("NOT AFTER", "not_after"), ("NOT BEFORE", "not_before")]
    valid = {True: "true", False: "false", None: ""}
    rows = [{**row, "valid": valid[row["valid"]]} for row in told.rows]
    wide = [("NODE", "node")]
    if any(row["error"] for row in rows):
        wide.append(("ERROR", "error"))
    _print(told, form, columns, wide, rows)
    _leave(missing)


@click.command()
@_asking
@click.option("--direction", type=click.Choice(["inbound", "outbound"]), help="Only one side.")
@click.option("--raw", is_flag=True, help="Print addresses, not the names they belong to.")
def connections(
    node: str | None,
    where: Where,
    namespace: str | None,
    form: str,
    direction: str | None,
    *,
    raw: bool,
) -> None:
    """Show the connections that are open through the node proxies.

    One between two captured pods is there twice: outbound at its source, inbound at its
    destination. REMOTE TARGET is what the application asked for. -o json has addresses only.

    \b
    Examples:
      ambit connections
      ambit connections -n shop --direction inbound -o wide
      ambit connections --raw
    """
    with errors():
        dumps, missing = _dumps(where, node)
        told = held.connections(dumps, namespace, direction)
    columns = [("WORKLOAD", "workload"), ("DIRECTION", "direction"), ("LOCAL", "local")]
    columns += [("REMOTE", "remote"), ("REMOTE TARGET", "remote_target"), ("PROTOCOL", "protocol")]
    wide = [("NODE", "node"), ("POLICY", "policy"), ("SOURCE IDENTITY", "source_identity")]
    names = {} if raw else held.names_of(dumps)
    rows = [
        {
            **row,
            "workload": f"{row['workload']}.{row['namespace']}",
            **{key: held.named(row[key], names) for key in ("local", "remote", "remote_target")},
        }
        for row in told.rows
    ]
    _print(told, form, columns, wide, rows)
    _leave(missing)


def _print(
    told: held.Told, form: str, columns: Columns, wide: Columns, rows: Sequence[held.Row]
) -> None:
    shown = [*columns, *(wide if form == "wide" else ())]
    emit(told.rows, form, columns=shown, rows=rows)
    for text in told.disagreements:
        say(text)
    if told.disagreements:
        say("hint: a change may be on its way; if it stays: ambit lab logs ztunnel@NODE")


def _dumps(where: Where, node: str | None) -> tuple[dict[str, Any], list[MeshError]]:
    """The dumps of the chosen nodes, and why others could not be had.

    Raises NotFound for a node that does not exist, Unavailable when no proxy answers.
    """
    client = mesh_client(where)
    there = [each["name"] for each in client.status()["nodes"]]
    if node is not None and node not in there:
        raise NotFound(f"no node {node!r} in {client.where}", hint=f"nodes: {', '.join(there)}")
    dumps: dict[str, Any] = {}
    missing: list[MeshError] = []
    for each in there if node is None else [node]:
        try:
            dumps[each] = read_dump(client, each)
        except Unavailable as error:
            missing.append(error)
    if missing and not dumps:
        raise missing[0]
    return dumps, missing


def read_dump(client: MeshClient, node: str) -> Any:
    """What a node's proxy says it holds. Raises Unavailable."""
    hint = "how are the daemons? ambit status"
    try:
        status, body = client.http_get(node, "/config_dump")
    except Unavailable as error:
        raise Unavailable(f"{node}: its proxy does not answer: {error}", hint=hint) from error
    if status != 200:
        raise Unavailable(f"{node}: its proxy answered {status} to /config_dump", hint=hint)
    try:
        value = json.loads(body)
    except ValueError as error:
        raise Unavailable(f"{node}: what the proxy dumped is not JSON", hint=hint) from error
    return held.checked_dump(node, value)


def _leave(missing: Sequence[MeshError]) -> None:
    """What was printed is not everything: say so, also to scripts."""
    for error in missing:
        say(str(error))
    if missing:
        say(f"hint: {missing[0].hint}")
        sys.exit(UNREACHABLE)
