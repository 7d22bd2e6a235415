"""`ambit waypoint`: the L7 proxies that namespaces opt in to, as Gateways of class istio-waypoint.

The verbs and columns are istioctl's. A waypoint is an ordinary Gateway object; the controller
makes the proxy's Deployment, Service and ServiceAccount from it, and says in the Gateway's status
how far it is.
"""

from __future__ import annotations

import re
import select
import time
from collections.abc import Iterable, Mapping
from typing import Any, Final

import click

from mesh.cli.choose import MeshClient, Where, mesh_client, where_options
from mesh.cli.output import NotFound, emit, errors, output_option, say
from mesh.errors import ConfigError, Unavailable
from mesh.lab.control import NotThere

CLASS: Final = "istio-waypoint"
USE_LABEL: Final = "istio.io/use-waypoint"
FOR_LABEL: Final = "istio.io/waypoint-for"
REVISION_LABEL: Final = "istio.io/rev"
TRAFFIC: Final = ("service", "workload", "all", "none")
_NAME = re.compile(r"[a-z0-9](?:[-a-z0-9]{0,61}[a-z0-9])?")
_POLL_SECONDS = 0.2

Object = dict[str, Any]

_namespace_option = click.option(
    "-n", "--namespace", default="default", show_default=True, help="Where the waypoint is."
)
_name_option = click.option(
    "--name", "waypoint", default="waypoint", show_default=True, help="What it is called."
)
_all_option = click.option(
    "-A", "--all-namespaces", "everywhere", is_flag=True, help="All of them."
)
_for_option = click.option(
    "--for",
    "traffic",
    type=click.Choice(TRAFFIC),
    help="Whose traffic it takes; service unless said.",
)
_revision_option = click.option("-r", "--revision", default="", help="Its label istio.io/rev.")


def gateway(namespace: str, name: str, traffic: str | None, revision: str) -> Object:
    """The Gateway object of a waypoint. Raises ConfigError for a name that cannot be."""
    if name == "none":
        raise ConfigError("a waypoint cannot be called none: that word opts out", field="name")
    if not _NAME.fullmatch(name):
        raise ConfigError(f"{name!r} is no name of a waypoint (a DNS label is)", field="name")
    labels = {}
    if traffic:
        labels[FOR_LABEL] = traffic
    if revision:
        labels[REVISION_LABEL] = revision
    return {
        "apiVersion": "gateway.networking.k8s.io/v1",
        "kind": "Gateway",
        "metadata": {
            "name": name,
            "namespace": namespace,
            **({"labels": labels} if labels else {}),
        },
        "spec": {
            "gatewayClassName": CLASS,
            "listeners": [{"name": "mesh", "port": 15008, "protocol": "HBONE"}],
        },
    }


def condition(found: Mapping[str, Any], kind: str) -> Mapping[str, Any]:
    """A condition of an object's status; empty when it has none of that type."""
    conditions = (found.get("status") or {}).get("conditions") or []
    return next((each for each in conditions if each.get("type") == kind), {})


@click.group()
def waypoint() -> None:
    """Deploy and look at waypoints: L7 routing and policy for who opts in.

    \b
    Examples:
      ambit waypoint apply -n shop --enroll-namespace --wait
      ambit waypoint list -A
      ambit waypoint generate -n shop --for all > waypoint.yaml
    """


@waypoint.command()
@_namespace_option
@_name_option
@_for_option
@_revision_option
def generate(namespace: str, waypoint: str, traffic: str | None, revision: str) -> None:
    """Print the Gateway of a waypoint as YAML, to be kept with the rest.

    \b
    Examples:
      ambit waypoint generate -n shop
      ambit waypoint generate -n shop --name l7 --for workload
      ambit waypoint generate -n shop > shop/waypoint.yaml
    """
    with errors():
        emit(gateway(namespace, waypoint, traffic, revision), "yaml")


@waypoint.command()
@_namespace_option
@_name_option
@_for_option
@_revision_option
@click.option("--enroll-namespace", is_flag=True, help="Label the namespace to use it.")
@click.option("--overwrite", is_flag=True, help="Also when it uses another waypoint now.")
@click.option("-w", "--wait", is_flag=True, help="Until the waypoint serves.")
@click.option("--waypoint-timeout", default=90.0, show_default=True, help="Seconds to wait.")
@where_options
def apply(
    namespace: str,
    waypoint: str,
    traffic: str | None,
    revision: str,
    enroll_namespace: bool,
    overwrite: bool,
    wait: bool,
    waypoint_timeout: float,
    where: Where,
) -> None:
    """Deploy a waypoint, or change one.

    \b
    Examples:
      ambit waypoint apply -n shop --enroll-namespace --wait
      ambit waypoint apply -n shop --name l7 --for all
      ambit waypoint apply -n shop --enroll-namespace --overwrite
    """
    with errors():
        wanted = gateway(namespace, waypoint, traffic, revision)
        client = mesh_client(where)
        around = _namespace(client, namespace)
        if enroll_namespace:
            _check_use(around, waypoint, overwrite=overwrite)
        client.apply(wanted)
        say(f"waypoint {namespace}/{waypoint} applied")
        if wait:
            _wait(client, namespace, [waypoint], waypoint_timeout)
        if enroll_namespace:
            patch = {"metadata": {"labels": {USE_LABEL: waypoint}}}
            client.patch("Namespace", "", namespace, patch)
            say(f"namespace {namespace} uses waypoint {waypoint}")


@waypoint.command()
@_namespace_option
@click.argument("names", nargs=-1)
@click.option("--all", "everything", is_flag=True, help="Every waypoint of the namespace.")
@_revision_option
@where_options
def delete(
    namespace: str, names: tuple[str, ...], everything: bool, revision: str, where: Where
) -> None:
    """Delete waypoints, and what was made for them. Services that have L7 policy stay closed.

    \b
    Examples:
      ambit waypoint delete -n shop
      ambit waypoint delete -n shop l7
      ambit waypoint delete -n shop --all
    """
    with errors():
        client = mesh_client(where)
        there = _waypoints(client, namespace, revision)
        if everything and names:
            raise ConfigError("either names or --all")
        known = [each["metadata"]["name"] for each in there]
        for name in known if everything else names or ("waypoint",):
            try:
                if name not in known:
                    raise NotThere(name)
                client.delete("Gateway", namespace, name)
            except NotThere as exc:
                raise _missing(namespace, name, known) from exc
            say(f"waypoint {namespace}/{name} deleted")
            if _uses(_namespace(client, namespace)) == name:
                client.patch(
                    "Namespace", "", namespace, {"metadata": {"labels": {USE_LABEL: None}}}
                )
                say(f"namespace {namespace} no longer uses it")


@waypoint.command("list")
@_namespace_option
@_all_option
@where_options
@output_option
def list_(namespace: str, everywhere: bool, where: Where, form: str) -> None:
    """List waypoints.

    \b
    Examples:
      ambit waypoint list -n shop
      ambit waypoint list -A
      ambit waypoint list -A -o json
    """
    with errors():
        rows = [
            _listed(each) for each in _waypoints(mesh_client(where), _where(namespace, everywhere))
        ]
        columns = ["namespace", "name", "revision", "traffic type", "programmed"]
        emit(rows, form, columns=_columns(columns), rows=rows)


@waypoint.command()
@_namespace_option
@click.argument("names", nargs=-1)
@_all_option
@click.option("--wait/--no-wait", default=True, show_default=True, help="Until they serve.")
@click.option("--waypoint-timeout", default=90.0, show_default=True, help="Seconds to wait.")
@where_options
@output_option
def status(
    namespace: str,
    names: tuple[str, ...],
    everywhere: bool,
    wait: bool,
    waypoint_timeout: float,
    where: Where,
    form: str,
) -> None:
    """Show the conditions of waypoints; waits until they serve.

    \b
    Examples:
      ambit waypoint status -n shop
      ambit waypoint status -n shop l7 --no-wait
      ambit waypoint status -A -o json
    """
    with errors():
        client = mesh_client(where)
        found = _waypoints(client, _where(namespace, everywhere))
        known = [each["metadata"]["name"] for each in found]
        for name in names:
            if name not in known:
                raise _missing(namespace, name, known)
        if wait and not everywhere:
            _wait(client, namespace, names or known, waypoint_timeout)
            found = _waypoints(client, namespace)
        chosen = [each for each in found if not names or each["metadata"]["name"] in names]
        rows = [row for each in chosen for row in _conditions(each)]
        columns = ["namespace", "name", "status", "type", "reason", "message"]
        emit(rows, form, columns=_columns(columns), rows=rows)


def _where(namespace: str, everywhere: bool) -> str | None:
    return None if everywhere else namespace


def _columns(names: Iterable[str]) -> list[tuple[str, str]]:
    return [(name.upper(), name.replace(" ", "_")) for name in names]


def _waypoints(client: MeshClient, namespace: str | None, revision: str = "") -> list[Object]:
    def fits(found: Object) -> bool:
        labels = found["metadata"].get("labels") or {}
        is_ours = (found.get("spec") or {}).get("gatewayClassName") == CLASS
        return is_ours and revision in ("", labels.get(REVISION_LABEL))

    return [each for each in client.get("Gateway", namespace) if fits(each)]


def _namespace(client: MeshClient, name: str) -> Object:
    found = client.get("Namespace", None, name)
    if not found:
        there = ", ".join(sorted(each["metadata"]["name"] for each in client.get("Namespace")))
        raise NotFound(f"no namespace {name!r}", hint=f"there are: {there}")
    return found[0]


def _uses(namespace: Object) -> str:
    return str((namespace["metadata"].get("labels") or {}).get(USE_LABEL, ""))


def _check_use(namespace: Object, waypoint: str, *, overwrite: bool) -> None:
    now = _uses(namespace)
    if now not in ("", waypoint) and not overwrite:
        name = namespace["metadata"]["name"]
        raise ConfigError(
            f"namespace {name} uses waypoint {now} already", hint="say --overwrite to change that"
        )


def _missing(namespace: str, name: str, known: list[str]) -> NotFound:
    hint = f"there are: {', '.join(known)}" if known else "ambit waypoint apply makes one"
    return NotFound(f"no waypoint {name!r} in namespace {namespace}", hint=hint)


def _listed(found: Object) -> Object:
    metadata = found["metadata"]
    labels = metadata.get("labels") or {}
    return {
        "namespace": metadata["namespace"],
        "name": metadata["name"],
        "revision": labels.get(REVISION_LABEL, "default"),
        "traffic_type": labels.get(FOR_LABEL, "service"),
        "programmed": condition(found, "Programmed").get("status", "Unknown"),
    }


def _conditions(found: Object) -> list[Object]:
    metadata = found["metadata"]
    told = (found.get("status") or {}).get("conditions") or [
        {"status": "Unknown", "type": "Programmed", "reason": "Pending", "message": ""}
    ]
    keys = ("status", "type", "reason", "message")
    return [
        {
            "namespace": metadata["namespace"],
            "name": metadata["name"],
            **{key: each.get(key, "") for key in keys},
        }
        for each in told
    ]


def _wait(client: MeshClient, namespace: str, names: Iterable[str], timeout: float) -> None:
    """Until every one of them is programmed. Raises Unavailable."""
    wanted = tuple(names)
    deadline = time.monotonic() + timeout
    while True:
        told = {
            each["metadata"]["name"]: condition(each, "Programmed")
            for each in _waypoints(client, namespace)
        }
        late = next((each for each in wanted if told.get(each, {}).get("status") != "True"), None)
        if late is None:
            return
        if time.monotonic() > deadline:
            break
        # What we wait for is somebody else's object.
        select.select([], [], [], _POLL_SECONDS)
    why = told.get(late, {})
    raise Unavailable(
        f"waypoint {namespace}/{late} does not serve after {timeout:.0f} s"
        + (f": {why.get('message') or why.get('reason')}" if why else ""),
        hint=f"ambit waypoint status -n {namespace} --no-wait",
    )
