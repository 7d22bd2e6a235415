"""`ambit status`: the whole mesh on one screen, and what needs attention.

Who is connected and in step, the waypoints, the certificates, and every finding: from the
controller's debug pages, the node proxies' own dumps, and the lab or the Kubernetes API. What does
not answer needs attention itself; it hides nothing else.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from typing import Any

import click

from mesh.cli import held
from mesh.cli.choose import MeshClient, Where, mesh_client, where_options
from mesh.cli.inspect import read_dump
from mesh.cli.output import emit, errors, output_option
from mesh.errors import MeshError

WAYPOINT_CLASS = "istio-waypoint"
CONTROLLER_PORT = 15014
SOON_SECONDS = 3600.0
Data = dict[str, Any]

_CONDITIONED = (
    "Gateway",
    "Service",
    "HTTPRoute",
    "GRPCRoute",
    "TCPRoute",
    "TLSRoute",
    "AuthorizationPolicy",
    "RequestAuthentication",
    "DestinationRule",
    "RateLimitPolicy",
    "RedactionPolicy",
)


@click.command()
@where_options
@output_option
def status(where: Where, form: str) -> None:
    """Show the whole mesh on one screen: proxies, waypoints, certificates, what needs attention.

    SYNC compares what the controller says now with what the proxy acknowledged; ANSWERED is how
    long ago it last did. -o wide shows all findings, not the first twenty.

    \b
    Examples:
      ambit status
      ambit status --context staging -o wide
      ambit status -o json | jq '.attention[].message'
    """
    with errors():
        report = gather(mesh_client(where), datetime.now(UTC))
    if form in {"json", "yaml"}:
        emit(report, form)
    else:
        _show(report, everything=form == "wide")


def gather(client: MeshClient, now: datetime) -> Data:
    """Ask everybody; the report. Raises Unavailable if there is no mesh to ask."""
    lab = client.status()
    unreachable: list[str] = []
    silent: dict[str, str] = {}

    def ask(path: str, default: Any) -> list[Any]:
        """What each replica of the controller says; in a lab there is one."""
        answers = []
        for place in lab.get("controllers", ["istiod"]):
            try:
                code, body = client.http_get(place, path, port=CONTROLLER_PORT)
                if code == 200:
                    answers.append(json.loads(body))
                else:
                    silent.setdefault(place, f"{place} answers {code} to {path}")
            except (MeshError, ValueError) as error:
                # Once for each: its other pages would say the same.
                silent.setdefault(place, f"the controller does not answer {path}: {error}")
        return answers or [default]

    dumps: Data = {}
    for node in lab.get("nodes", []):
        try:
            dumps[node["name"]] = read_dump(client, node["name"])
        except MeshError as error:
            unreachable.append(str(error))
    objects = [each for kind in _CONDITIONED for each in client.get(kind)]
    clients, versions, findings = (
        ask("/debug/syncz", []),
        ask("/debug/versionz", {}),
        ask("/debug/findings", []),
    )
    return summarize(
        {**lab, "where": client.where},
        clients=[each for answer in clients for each in answer],
        version=versions[0].get("version", ""),
        findings=findings[0],
        objects=objects,
        certificates=held.certificates(dumps, now).rows,
        unreachable=[*silent.values(), *unreachable],
        now=now,
    )


def summarize(
    lab: Mapping[str, Any],
    *,
    clients: Iterable[Mapping[str, Any]],
    version: str,
    findings: Iterable[Mapping[str, Any]],
    objects: Iterable[Mapping[str, Any]],
    certificates: Iterable[Mapping[str, Any]],
    unreachable: Iterable[str],
    now: datetime,
) -> Data:
    """The report, from what each part said. See `-o json` for its members."""
    proxies = [_proxy(each) for each in clients]
    listed = list(objects)
    waypoints = [_waypoint(each) for each in listed if _is_waypoint(each)]
    certified = _certificates(list(certificates), now)
    attention = [_note("error", "", text) for text in unreachable]
    attention += _missing(lab, proxies)
    attention += [
        _note("error", each["name"], f"refused: {each['refusal']}")
        for each in proxies
        if each["sync"] == "refused"
    ]
    attention += _old_certificates(certified)
    attention += _findings(findings)
    attention += [note for each in listed for note in _conditions(each)]
    return {
        "mesh": lab.get("where", ""),
        "lab": lab.get("name", ""),
        "phase": lab.get("phase", ""),
        "uptimeSeconds": lab.get("uptime_seconds"),
        "controllerVersion": version,
        "nodes": len(lab.get("nodes", [])),
        "pods": len(lab.get("pods", [])),
        "enrolledPods": sum(bool(each.get("enrolled")) for each in lab.get("pods", [])),
        "proxies": proxies,
        "waypoints": waypoints,
        "certificates": certified,
        "attention": attention,
    }


def _note(severity: str, about: str, message: str, hint: str = "", source: str = "") -> Data:
    return {
        "severity": severity,
        "object": about,
        "message": message,
        "hint": hint,
        "source": source,
    }


def _proxy(client: Mapping[str, Any]) -> Data:
    types: Mapping[str, Any] = client.get("types") or {}
    refused = [each for each in types.values() if each.get("refused")]
    waiting = sum(
        int(each.get("pending", 0)) + bool(each.get("inFlight")) for each in types.values()
    )
    sync = "refused" if refused else "pending" if waiting else "in step"
    parts = str(client.get("node", "")).split("~")
    return {
        "name": parts[2] if len(parts) == 4 else str(client.get("peer", "")),
        "type": client.get("proxyType", ""),
        "node": client.get("nodeName", ""),
        "version": client.get("version", ""),
        "account": client.get("account", ""),
        "connectedSeconds": client.get("connectedSeconds"),
        "sync": sync if types else "asks for nothing",
        "pending": waiting,
        "refusal": refused[0].get("lastNack", "") if refused else "",
        "answeredSeconds": client.get("answeredSeconds"),
        "resources": sum(int(each.get("resources", 0)) for each in types.values()),
    }


def _is_waypoint(obj: Mapping[str, Any]) -> bool:
    return (
        obj.get("kind") == "Gateway"
        and (obj.get("spec") or {}).get("gatewayClassName") == WAYPOINT_CLASS
    )


def _name(obj: Mapping[str, Any]) -> str:
    metadata = obj.get("metadata") or {}
    return f"{metadata.get('namespace', '')}/{metadata.get('name', '')}"


def _waypoint(obj: Mapping[str, Any]) -> Data:
    conditions = {
        each.get("type"): each for each in (obj.get("status") or {}).get("conditions") or []
    }
    programmed = conditions.get("Programmed", {})
    labels = (obj.get("metadata") or {}).get("labels") or {}
    return {
        "name": _name(obj),
        "for": labels.get("istio.io/waypoint-for", "service"),
        "programmed": programmed.get("status", "Unknown"),
        "reason": programmed.get("reason", "Pending"),
        "message": programmed.get("message", ""),
    }


def _certificates(rows: list[Mapping[str, Any]], now: datetime) -> Data:
    leaves = [each for each in rows if each.get("type") in ("Leaf", "")]
    ends = sorted(
        (moment, str(each["identity"]))
        for each in leaves
        if (moment := _seconds_until(each.get("not_after"), now)) is not None
    )
    return {
        "valid": sum(each.get("valid") is True for each in leaves),
        # Asked for and not answered yet; one that is refused, or answered too late, is not this.
        "pending": sum(_is_pending(each) for each in leaves),
        "unavailable": [
            {"identity": each.get("identity", ""), "state": each.get("state", ""),
             "error": each.get("error", "")}
            for each in leaves
            if each.get("valid") is not True and not _is_pending(each)
        ],
        "firstEndsInSeconds": round(ends[0][0]) if ends else None,
        "firstToEnd": ends[0][1] if ends else "",
    }  # fmt: skip


def _is_pending(certificate: Mapping[str, Any]) -> bool:
    return certificate.get("state") == "Initializing" and not certificate.get("error")


def _seconds_until(text: object, now: datetime) -> float | None:
    if not isinstance(text, str):
        return None
    try:
        return (datetime.fromisoformat(text) - now).total_seconds()
    except (ValueError, TypeError):
        return None


def _old_certificates(certified: Mapping[str, Any]) -> list[Data]:
    notes = [
        _note("error", each["identity"], f"no valid certificate: {each['error'] or each['state']}")
        for each in certified["unavailable"]
    ]
    first = certified["firstEndsInSeconds"]
    if first is not None and first < SOON_SECONDS:
        message = f"its certificate ends in {age(first)}"
        notes.append(_note("warning", certified["firstToEnd"], message))
    return notes


def _missing(lab: Mapping[str, Any], proxies: list[Data]) -> list[Data]:
    """Daemons that do not run, and node proxies that are not connected."""
    notes = []

    def logs(name: str, daemon: str) -> str:
        return str(lab.get("logs_hint", "ambit lab logs {name}")).format(name=name, app=daemon)

    places = [("istiod", (lab.get("control_plane") or {}).get("daemons") or {})]
    places += [(node["name"], node.get("daemons") or {}) for node in lab.get("nodes", [])]
    for place, daemons in places:
        for daemon, each in daemons.items():
            name = daemon if place == "istiod" else f"{daemon}@{place}"
            if each.get("state") not in ("ready", "running"):
                notes.append(_note("error", name, f"is {each.get('state')}", logs(name, daemon)))
            elif daemon == "ztunnel" and not any(
                proxy["type"] == "ztunnel" and proxy["node"] == place for proxy in proxies
            ):
                message = "is not connected to the controller"
                notes.append(_note("error", name, message, logs(name, daemon)))
    return notes


def _findings(findings: Iterable[Mapping[str, Any]]) -> list[Data]:
    notes = []
    for each in findings:
        parts = (each.get("field", ""), each.get("message", ""))
        message = ": ".join(part for part in parts if part)
        where = (each.get("hint", ""), each.get("source", ""))
        notes.append(_note(each.get("severity", "error"), each.get("object", ""), message, *where))
    return sorted(notes, key=lambda each: str(each["severity"]) != "error")


def _conditions(obj: Mapping[str, Any]) -> list[Data]:
    """What the conditions of an object say that is not as it should be."""
    status = obj.get("status") or {}
    listed = list(status.get("conditions") or [])
    for parent in status.get("parents") or []:
        listed += parent.get("conditions") or []
    metadata = obj.get("metadata") or {}
    source = (metadata.get("annotations") or {}).get("ambit.dev/source", "")
    return [
        _note(
            "warning",
            f"{obj.get('kind')} {_name(obj)}",
            f"{each.get('type')} {each.get('status')} ({each.get('reason')})"
            + (f": {each['message']}" if each.get("message") else ""),
            source=source,
        )
        for each in listed
        if each.get("status") != "True"
    ]


def age(seconds: object) -> str:
    """A duration as kubectl prints it: `45s`, `12m`, `5h`, `3d`."""
    if not isinstance(seconds, int | float):
        return "-"
    whole = int(seconds)
    for unit, size in (("d", 86400), ("h", 3600), ("m", 60)):
        if whole >= 2 * size:
            return f"{whole // size}{unit}"
    return f"{whole}s"


def _show(report: Data, *, everything: bool) -> None:
    enrolled = f"{report['enrolledPods']} of {report['pods']} pods in the mesh"
    version = report["controllerVersion"] or "not answering"
    up = f" for {age(report['uptimeSeconds'])}" if report["uptimeSeconds"] is not None else ""
    click.echo(
        f"{report['mesh']}: {report['phase']}{up}, "
        f"{report['nodes']} nodes, {enrolled}, controller {version}\n"
    )
    columns = [("PROXY", "name"), ("TYPE", "type"), ("VERSION", "version"), ("SYNC", "shown")]
    columns += [("RESOURCES", "resources"), ("CONNECTED", "connected"), ("ANSWERED", "answered")]
    rows = [
        {
            **each,
            "shown": f"pending {each['pending']}" if each["sync"] == "pending" else each["sync"],
            "connected": age(each["connectedSeconds"]),
            "answered": age(each["answeredSeconds"]),
        }
        for each in report["proxies"]
    ]
    emit(None, "table", columns=columns, rows=rows)
    if report["waypoints"]:
        click.echo()
        columns = [("WAYPOINT", "name"), ("FOR", "for"), ("PROGRAMMED", "programmed")]
        columns += [("REASON", "reason"), ("MESSAGE", "message")]
        emit(None, "table", columns=columns, rows=report["waypoints"])
    certified = report["certificates"]
    click.echo(f"\ncertificates: {certified['valid']} valid", nl=False)
    if certified["pending"]:
        click.echo(f", {certified['pending']} being issued", nl=False)
    if certified["firstEndsInSeconds"] is not None:
        click.echo(f", the first ends in {age(certified['firstEndsInSeconds'])}", nl=False)
    click.echo("\n")
    _show_attention(report["attention"], everything=everything)


def _show_attention(notes: list[Data], *, everything: bool) -> None:
    if not notes:
        click.echo("nothing needs attention")
        return
    click.echo("needs attention:")
    shown = notes if everything else notes[:20]
    for each in shown:
        parts = (each["source"], each["severity"], each["object"], each["message"])
        click.echo("  " + ": ".join(str(part) for part in parts if part))
        if each["hint"]:
            click.echo(f"      hint: {each['hint']}")
    if len(shown) < len(notes):
        click.echo(f"  and {len(notes) - len(shown)} more: ambit status -o wide")
