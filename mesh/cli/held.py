"""What the node proxies hold, as rows: their `/config_dump` pages, merged over nodes. Pure.

The shape of the dumps is upstream's, so a node whose proxy is another program is read just the
same. Rows keep what is compared between nodes and printed; `held_by` names the nodes that
hold exactly this row. Where nodes differ about one thing, each of its versions is a row, and
`disagreements` says it in words.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, TypeAlias

from mesh.errors import IdentityError, Unavailable
from mesh.identity import SpiffeId

#: A row of output; its keys are the contract of `-o json`.
Row: TypeAlias = dict[str, Any]
#: Parsed dumps by node.
Dumps: TypeAlias = Mapping[str, Mapping[str, Any]]

_LISTS = ("workloads", "services", "policies", "certificates")
_SHORT = 60


@dataclass(frozen=True, slots=True)
class Told:
    """Rows, and where the nodes do not agree."""

    rows: list[Row]
    disagreements: Sequence[str] = ()


def checked_dump(node: str, value: object) -> Mapping[str, Any]:
    """A dump that has the shape the rest relies on. Raises Unavailable."""
    if isinstance(value, dict):
        lists = [value.get(name) or [] for name in _LISTS]
        states = value.get("workloadState") or {}
        are_lists = all(isinstance(each, list) for each in lists)
        if are_lists and isinstance(states, dict):
            items = [item for each in (*lists, states.values()) for item in each]
            if all(isinstance(item, dict) for item in items):
                return value
    raise Unavailable(f"{node}: what the proxy dumped is not in a known form")


# -- what all nodes should agree about ---------------------------------------------------


def workloads(dumps: Dumps, namespace: str | None = None) -> Told:
    """One row for each workload."""
    return _merged(dumps, "workloads", _workload, lambda row: row["uid"], namespace)


def services(dumps: Dumps, namespace: str | None = None) -> Told:
    """One row for each service."""
    return _merged(dumps, "services", _service, lambda row: row["hostname"], namespace)


def policies(dumps: Dumps, namespace: str | None = None) -> Told:
    """One row for each policy."""
    return _merged(dumps, "policies", _policy, lambda row: row["name"], namespace)


def _workload(item: Mapping[str, Any]) -> Row:
    return {
        "namespace": item.get("namespace", ""),
        "name": item.get("name", ""),
        "uid": item.get("uid", ""),
        "addresses": list(item.get("workloadIps") or []),
        "hostname": item.get("hostname", ""),
        "node": item.get("node", ""),
        "waypoint": _destination(item),
        "protocol": item.get("protocol", ""),
        "status": item.get("status", ""),
        "service_account": item.get("serviceAccount", ""),
        "network": item.get("network", ""),
        "network_mode": item.get("networkMode", ""),
        "policies": list(item.get("authorizationPolicies") or []),
    }


def _service(item: Mapping[str, Any]) -> Row:
    members = [
        {"workload": uid, "status": each.get("status", ""), "ports": each.get("port") or {}}
        for uid, each in sorted((item.get("endpoints") or {}).items())
    ]
    return {
        "namespace": item.get("namespace", ""),
        "name": item.get("name", ""),
        "hostname": item.get("hostname", ""),
        # `network/address`; the network has no name unless there are several.
        "vips": [each.removeprefix("/") for each in item.get("vips") or []],
        "ports": item.get("ports") or {},
        "waypoint": _destination(item),
        "endpoints": {
            "healthy": sum(each["status"] == "Healthy" for each in members),
            "total": len(members),
            "members": members,
        },
    }


def _policy(item: Mapping[str, Any]) -> Row:
    return {
        "namespace": item.get("namespace", ""),
        "name": item.get("name", ""),
        "action": item.get("action", ""),
        "scope": item.get("scope", ""),
        "dry_run": bool(item.get("dryRun")),
        "rules": item.get("rules") or [],
    }


def _destination(item: Mapping[str, Any]) -> str | None:
    waypoint = item.get("waypoint")
    return str(waypoint.get("destination", "")) if isinstance(waypoint, Mapping) else None


def _merged(
    dumps: Dumps,
    section: str,
    read: Callable[[Mapping[str, Any]], Row],
    key: Callable[[Row], str],
    namespace: str | None,
) -> Told:
    versions: dict[tuple[str, str], list[tuple[Row, list[str]]]] = {}
    for node, dump in dumps.items():
        for item in dump.get(section) or []:
            row = read(item)
            if namespace not in (None, row["namespace"]):
                continue
            known = versions.setdefault((row["namespace"], key(row)), [])
            for found, nodes in known:
                if found == row:
                    nodes.append(node)
                    break
            else:
                known.append((row, [node]))
    rows: list[Row] = []
    disagreements: list[str] = []
    for _, known in sorted(versions.items()):
        rows += [{**row, "held_by": nodes} for row, nodes in known]
        disagreements += _disagreements(section, known, dumps)
    return Told(rows, disagreements)


def _disagreements(
    section: str, known: Sequence[tuple[Row, list[str]]], dumps: Iterable[str]
) -> list[str]:
    first, _ = known[0]
    kind = {"policies": "policy"}.get(section, section.removesuffix("s"))
    what = f"{kind} {first['namespace']}/{first['name']}"
    said = []
    holders = [node for _, nodes in known for node in nodes]
    without = [node for node in dumps if node not in holders]
    if without:
        said.append(f"{what} is on {', '.join(holders)} but not on {', '.join(without)}")
    if len(known) > 1:
        for field in first:
            if any(row[field] != first[field] for row, _ in known):
                each = [f"{_shown(row[field])} on {', '.join(nodes)}" for row, nodes in known]
                said.append(f"{what}: {field} is {', but '.join(each)}")
    return said


def _shown(value: Any) -> str:
    if isinstance(value, dict) and "total" in value:
        states = [f"{each['workload']} {each['status']}" for each in value["members"]]
        value = f"{value['healthy']}/{value['total']} ({', '.join(states)})"
    elif isinstance(value, list):
        value = ", ".join(str(each) for each in value) or "none"
    text = "none" if value in (None, "") else str(value)
    return text if len(text) <= _SHORT else f"{text[:_SHORT]}…"


# -- what each node has for itself -------------------------------------------------------


def certificates(dumps: Dumps, now: datetime, namespace: str | None = None) -> Told:
    """One row for each certificate of each identity's chain and roots; `now` with a time zone."""
    rows = []
    for node, dump in dumps.items():
        for entry in dump.get("certificates") or []:
            identity = str(entry.get("identity", ""))
            if namespace not in (None, _namespace_of(identity)):
                continue
            about = {
                "identity": identity,
                "state": str(entry.get("state", "")),
                "error": str(entry.get("error", "")),
                "node": node,
            }
            chain = [
                ("Leaf" if index == 0 else "Intermediate", each)
                for index, each in enumerate(entry.get("certChain") or [])
            ]
            chain += [("Root", each) for each in entry.get("rootCerts") or []]
            rows += [{**_certificate(kind, each, now), **about} for kind, each in chain]
            if not chain:
                rows.append({**_certificate("", {}, now), **about})
    rows.sort(key=lambda row: (row["identity"], row["node"]))
    return Told(rows)


def _certificate(kind: str, item: Mapping[str, Any], now: datetime) -> Row:
    begins, ends = item.get("validFrom"), item.get("expirationTime")
    return {
        "identity": "",
        "type": kind,
        "state": "",
        "valid": _is_valid(begins, ends, now),
        "serial_number": str(item.get("serialNumber", "")),
        "not_after": ends,
        "not_before": begins,
    }


def _is_valid(begins: object, ends: object, now: datetime) -> bool | None:
    """None when it cannot be told."""
    try:
        return datetime.fromisoformat(str(begins)) <= now < datetime.fromisoformat(str(ends))
    except (ValueError, TypeError):
        return None


def _namespace_of(identity: str) -> str:
    try:
        return SpiffeId.parse(identity).namespace
    except IdentityError:
        return ""


def connections(dumps: Dumps, namespace: str | None = None, direction: str | None = None) -> Told:
    """One row for each open connection of each captured pod, with addresses as they are."""
    rows = []
    for node, dump in dumps.items():
        for uid, state in (dump.get("workloadState") or {}).items():
            info, open_now = state.get("info") or {}, state.get("connections") or {}
            if namespace not in (None, info.get("namespace", "")):
                continue
            for side in ("inbound", "outbound"):
                if direction not in (None, side):
                    continue
                rows += [
                    {
                        "namespace": info.get("namespace", ""),
                        "workload": info.get("name", uid),
                        **_connection(side, each),
                        "node": node,
                    }
                    for each in open_now.get(side) or []
                ]
    rows.sort(key=lambda row: (row["namespace"], row["workload"], row["direction"]))
    return Told(rows)


def _connection(side: str, item: Mapping[str, Any]) -> Row:
    source, actual = item.get("src"), item.get("actualDst")
    is_inbound = side == "inbound"
    return {
        "direction": side.title(),
        "local": actual if is_inbound else source,
        "remote": source if is_inbound else actual,
        "remote_target": item.get("originalDst"),
        "protocol": item.get("protocol", ""),
        "source_identity": item.get("srcIdentity"),
        "policy": item.get("policy"),
        "id": item.get("id"),
    }


def names_of(dumps: Dumps) -> dict[str, str]:
    """Addresses and what people call them: `pod.namespace`, or a service's host name."""
    names: dict[str, str] = {}
    for dump in dumps.values():
        for item in dump.get("workloads") or []:
            # A node's address belongs to every host-network pod there, so to none.
            if item.get("networkMode") != "HostNetwork":
                called = f"{item.get('name')}.{item.get('namespace')}"
                names.update(dict.fromkeys(item.get("workloadIps") or [], called))
        for item in dump.get("services") or []:
            vips = [each.rpartition("/")[2] for each in item.get("vips") or []]
            names.update(dict.fromkeys(vips, item.get("hostname", "")))
    return names


def named(address: str | None, names: Mapping[str, str]) -> str | None:
    """`10.244.1.10:80` as `web.shop:80`, where the address has a name."""
    ip, colon, port = (address or "").rpartition(":")
    called = names.get(ip.strip("[]"))
    return f"{called}:{port}" if called and colon else address


def waypoint_name(destination: str | None) -> str:
    """`shop/waypoint.shop.svc.cluster.local` as `waypoint`; `None` in istioctl's word for none."""
    if destination is None:
        return "None"
    host = destination.partition("/")[2]
    return host.partition(".")[0] if ".svc." in host else destination
