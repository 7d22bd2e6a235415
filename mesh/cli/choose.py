"""Which lab a verb speaks to, and which pod a person meant."""

from __future__ import annotations

import os
from typing import Any

import click

from mesh.cli.output import NotFound
from mesh.errors import ConfigError, Unavailable
from mesh.lab.control import LabClient, list_labs

DEFAULT = "default"

lab_option = click.option(
    "--lab", "--name", "name", metavar="NAME", help="Which lab, when several are up."
)


def lab_client(name: str | None) -> LabClient:
    """The lab called `name`, or the only one that is up.

    Raises Unavailable when none is up and ConfigError when the choice is not clear.
    """
    if name is not None:
        return LabClient(name)
    mine = list_labs(uid=os.getuid())
    if not mine:
        raise Unavailable("no lab is up", hint="start one with: ambit lab up --dir DIRECTORY")
    if len(mine) > 1:
        names = ", ".join(lab.name for lab in mine)
        raise ConfigError(f"several labs are up: {names}", hint="choose one with --lab NAME")
    return LabClient(mine[0].name)


def choose_pod(client: LabClient, wanted: str, namespace: str | None) -> tuple[str, str]:
    """The pod that `wanted` names: `name`, `namespace/name`, `deploy/name`, or a prefix of one.

    Raises NotFound with what there is, ConfigError when several fit.
    """
    kind = ""
    head, slash, rest = wanted.partition("/")
    name = wanted
    if slash and head in {"deploy", "deployment", "sts", "statefulset", "ds", "daemonset", "pod"}:
        kind, name = head, rest
    elif slash:
        namespace, name = head, rest
    pods = client.get("Pod", namespace)
    exact = [pod for pod in pods if pod["metadata"]["name"] == name]
    if namespace is None and len(exact) > 1:
        exact = [pod for pod in exact if pod["metadata"]["namespace"] == "default"] or exact
    fits = exact or [pod for pod in pods if _belongs(pod, kind, name)]
    if not fits:
        there = ", ".join(sorted(_full(pod) for pod in pods)) or "none"
        raise NotFound(f"no pod {wanted!r} in lab {client.address.name}", hint=f"pods: {there}")
    if kind == "" and len(fits) > 1:
        several = ", ".join(sorted(_full(pod) for pod in fits))
        raise ConfigError(f"{wanted!r} fits several pods: {several}", hint="give more of the name")
    chosen = min(fits, key=_full)
    return chosen["metadata"]["namespace"], chosen["metadata"]["name"]


def _belongs(pod: dict[str, Any], kind: str, name: str) -> bool:
    return bool(pod["metadata"]["name"].startswith(f"{name}-" if kind else name))


def _full(pod: dict[str, Any]) -> str:
    return f"{pod['metadata']['namespace']}/{pod['metadata']['name']}"
