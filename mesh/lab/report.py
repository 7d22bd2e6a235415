"""The lab's status as data: what `ambit lab status -o json` shows."""

from __future__ import annotations

import os
from typing import Any

import trio

from mesh.cluster.api import Source
from mesh.cluster.validate import Finding, Severity, finding_of
from mesh.lab import addresses
from mesh.lab.checks import without
from mesh.lab.kubelet import PodRunner
from mesh.lab.routing import routes_of
from mesh.lab.state import LabState
from mesh.lab.topology import NodePlan

REDIRECTION = "ambient.istio.io/redirection"


def status_of(state: LabState) -> dict[str, Any]:
    """The lab as data; `LabClient.status` describes it."""
    faults = [*state.file_faults(), *state.plan.faults]
    found = without(faults, state.findings())
    return {
        "name": state.settings.name,
        "directory": str(state.settings.directory),
        "phase": state.phase,
        "run_directory": str(state.run_directory),
        "pid": os.getpid(),
        "uptime_seconds": round(trio.current_time() - state.began, 3),
        "nodes": [_node(state, node) for node in state.plan.nodes],
        "control_plane": {
            "ip": addresses.CONTROL_PLANE_IPS[0],
            "daemons": {n: d.summary() for n, d in state.daemons.items() if "@" not in n},
        },
        "pods": [_pod(state, runner) for _, runner in sorted(state.runners.items())],
        "services": [
            {
                "namespace": service.namespace,
                "name": service.name,
                "cluster_ips": list(service.cluster_ips),
                "ports": [f"{port}/{protocol}" for _, protocol, port, _ in service.ports],
                "endpoints": [ip for each in endpoints if each.is_ready for ip in each.ips],
            }
            for service, endpoints in routes_of(state)
        ],
        "faults": [
            *(_complaint(finding_of(fault)) for fault in faults),
            *(_complaint(each) for each in found if each.severity is Severity.ERROR),
        ],
        "warnings": [_complaint(each) for each in found if each.severity is Severity.WARNING],
        "notes": sorted({*state.plan.notes, *state.live.notes}),
    }


def _complaint(finding: Finding) -> dict[str, Any]:
    place = finding.source.at(finding.field) if finding.source else Source("")
    return {
        "file": place.file,
        "line": place.line,
        "column": place.column,
        "object": str(finding.ref or ""),
        "field": finding.field,
        "message": finding.message,
        "hint": finding.hint,
    }


def _node(state: LabState, node: NodePlan) -> dict[str, Any]:
    suffix = f"@{node.name}"
    return {
        "name": node.name,
        "ips": list(node.ips),
        "pod_cidrs": list(addresses.pod_networks(node.index)),
        "daemons": {
            name.removesuffix(suffix): daemon.summary()
            for name, daemon in state.daemons.items()
            if name.endswith(suffix)
        },
    }


def _pod(state: LabState, runner: PodRunner) -> dict[str, Any]:
    live = state.live.find("Pod", *runner.pod.key)
    annotations = (live or {}).get("metadata", {}).get("annotations") or {}
    return {**runner.summary(), "enrolled": annotations.get(REDIRECTION) == "enabled"}
