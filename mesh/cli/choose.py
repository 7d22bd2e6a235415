"""Which mesh a verb speaks to, a lab's or a Kubernetes cluster's, and which pod a person meant."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import click
from click.core import ParameterSource

from mesh.cli.output import NotFound
from mesh.errors import ConfigError, Unavailable
from mesh.lab.control import LabClient, list_labs

F = TypeVar("F", bound=Callable[..., Any])

DEFAULT = "default"
_IN_CLUSTER = Path("/var/run/secrets/kubernetes.io/serviceaccount/token")

lab_option = click.option(
    "--lab", "--name", "name", metavar="NAME", help="Which lab, when several are up."
)


class MeshClient(Protocol):
    """What verbs ask of a mesh, wherever it runs. See `LabClient` for each call."""

    @property
    def where(self) -> str:
        """Which mesh this is, for messages."""
        ...

    def status(self) -> dict[str, Any]:
        """Its nodes, daemons and pods."""
        ...

    def get(
        self, kind: str, namespace: str | None = None, name: str | None = None
    ) -> list[dict[str, Any]]:
        """Live objects."""
        ...

    def apply(self, *objects: Mapping[str, Any]) -> None:
        """Create or change objects."""
        ...

    def patch(
        self, kind: str, namespace: str, name: str, merge_patch: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Apply a JSON merge patch; the object after it. Raises NotThere."""
        ...

    def delete(self, kind: str, namespace: str, name: str) -> None:
        """Delete an object."""
        ...

    def http_get(self, place: str, path: str, *, port: int = 15000) -> tuple[int, bytes]:
        """A page of a node's proxy, or of a daemon."""
        ...


@dataclass(frozen=True, slots=True)
class Where:
    """Which mesh was asked for. `is_chosen`: the kubeconfig or context was named by option."""

    lab: str | None = None
    kubeconfig: Path | None = None
    context: str = ""
    namespace: str = "istio-system"
    is_chosen: bool = False


def access_options(command: F) -> F:
    """--kubeconfig and --context."""
    context = click.option("--context", default="", metavar="NAME", help="Which context of it.")
    kubeconfig = click.option(
        "--kubeconfig",
        type=click.Path(path_type=Path),
        envvar="KUBECONFIG",
        metavar="FILE",
        help="How to reach the cluster; by default as kubectl does.",
    )
    return kubeconfig(context(command))


def where_options(command: F) -> F:
    """The options that name a mesh; the command gets them as one argument, `where`."""

    @functools.wraps(command)
    def with_where(**given: Any) -> Any:
        context = click.get_current_context()
        named = ("kubeconfig", "context")
        sources = [context.get_parameter_source(each) for each in named]
        where = Where(
            lab=given.pop("lab_name"),
            kubeconfig=given.pop("kubeconfig"),
            context=given.pop("context"),
            namespace=given.pop("istio_namespace"),
            is_chosen=ParameterSource.COMMANDLINE in sources,
        )
        return command(where=where, **given)

    option = click.option(
        "--istio-namespace",
        default="istio-system",
        show_default=True,
        metavar="NAME",
        help="The mesh's own namespace, on Kubernetes.",
    )
    named = click.option(
        "--lab", "lab_name", metavar="NAME", help="Which lab, when several are up."
    )
    return named(access_options(option(with_where)))  # type: ignore[return-value]


def mesh_client(where: Where) -> MeshClient:
    """The mesh that was named; else the lab that is up; else the cluster that kubectl would ask.

    A lab goes before a cluster that is only in the environment: a slip there harms nobody.
    Raises Unavailable when there is none and ConfigError when the choice is not clear.
    """
    if where.lab is not None and where.is_chosen:
        raise ConfigError("either --lab, or --kubeconfig and --context")
    is_lab = where.lab is not None or (not where.is_chosen and list_labs(uid=os.getuid()))
    if not is_lab and (where.is_chosen or where.kubeconfig is not None or _has_default()):
        # The kubernetes package costs most of a second; a lab needs it not.
        from mesh.cli.kube import KubeClient

        return KubeClient(where.kubeconfig, where.context, where.namespace)
    return lab_client(where.lab)


def _has_default() -> bool:
    """Whether kubectl would find a cluster without being told."""
    return _IN_CLUSTER.exists() or (Path.home() / ".kube" / "config").exists()


def lab_client(name: str | None) -> LabClient:
    """The lab called `name`, or the only one that is up.

    Raises Unavailable when none is up and ConfigError when the choice is not clear.
    """
    if name is not None:
        return LabClient(name)
    mine = list_labs(uid=os.getuid())
    if not mine:
        raise Unavailable(
            "no lab is up",
            hint="start one with: ambit lab up --dir DIRECTORY, or name a cluster: --kubeconfig",
        )
    if len(mine) > 1:
        names = ", ".join(lab.name for lab in mine)
        raise ConfigError(f"several labs are up: {names}", hint="choose one with --lab NAME")
    return LabClient(mine[0].name)


def choose_pod(client: MeshClient, wanted: str, namespace: str | None) -> tuple[str, str]:
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
        raise NotFound(f"no pod {wanted!r} in {client.where}", hint=f"pods: {there}")
    if kind == "" and len(fits) > 1:
        several = ", ".join(sorted(_full(pod) for pod in fits))
        raise ConfigError(f"{wanted!r} fits several pods: {several}", hint="give more of the name")
    chosen = min(fits, key=_full)
    return chosen["metadata"]["namespace"], chosen["metadata"]["name"]


def _belongs(pod: dict[str, Any], kind: str, name: str) -> bool:
    return bool(pod["metadata"]["name"].startswith(f"{name}-" if kind else name))


def _full(pod: dict[str, Any]) -> str:
    return f"{pod['metadata']['namespace']}/{pod['metadata']['name']}"
