"""`ambit install` and `ambit uninstall`: the mesh into a Kubernetes cluster, and out of it.

What is applied is `manifest` and `definitions`, by server-side apply. Definitions that Istio
has brought are left alone. Uninstalling refuses while namespaces are enrolled: their pods'
traffic would lead to a proxy that is gone.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import click
import trio

from mesh import __version__
from mesh.cli import definitions, manifest
from mesh.cli.choose import access_options
from mesh.cli.enroll import AMBIENT, LABEL
from mesh.cli.output import errors, say
from mesh.cli.values import Values
from mesh.cluster.api import Object, Ref, Synced, ref_of
from mesh.cluster.open import ClusterChoice, open_cluster
from mesh.errors import ConfigError, Unavailable

_SERVED_SECONDS = 30.0


_namespace_option = click.option(
    "-n", "--namespace", default="istio-system", show_default=True, help="The mesh's own."
)


@click.command()
@access_options
@_namespace_option
@click.option("--image", help="Image of the daemons.  [default: ambit:VERSION]")
@click.option("--replicas", default=2, show_default=True, help="Controllers.")
@click.option("--trust-domain", default="cluster.local", show_default=True)
@click.option("--cluster-id", default="Kubernetes", show_default=True)
@click.option("--dry-run", is_flag=True, help="Print the YAML, and touch no cluster.")
def install(
    kubeconfig: Path | None,
    context: str,
    namespace: str,
    image: str | None,
    replicas: int,
    trust_domain: str,
    cluster_id: str,
    dry_run: bool,
) -> None:
    """Install the mesh into a Kubernetes cluster, or bring it up to date.

    Applies definitions, rights, the controller, and node proxy and agent for each node.
    Nothing is in the mesh before its namespace is enrolled.

    \b
    Examples:
      ambit install --image registry.example/ambit:1.0
      ambit install --dry-run | kubectl diff -f -
      ambit install --context staging --replicas 3
    """
    values = Values(
        namespace=namespace,
        image=image or f"ambit:{__version__}",
        replicas=replicas,
        trust_domain=trust_domain,
        cluster_id=cluster_id,
    )
    if dry_run:
        click.echo(
            as_yaml([*definitions.ours(), *definitions.istios(), *manifest.objects(values)]),
            nl=False,
        )
        return
    with errors():
        trio.run(_install, _choice(kubeconfig, context), values)
        say(f"ambit {__version__} is installed in {namespace}")
        say(f"hint: kubectl -n {namespace} rollout status deployment/istiod")


@click.command()
@access_options
@_namespace_option
@click.option("--purge", is_flag=True, help="Also the namespace (with the root key) and policies.")
@click.option("--force", is_flag=True, help="Even while namespaces are enrolled.")
def uninstall(
    kubeconfig: Path | None, context: str, namespace: str, purge: bool, force: bool
) -> None:
    """Take the mesh out of a Kubernetes cluster.

    The namespace with the authority's key, and the policies' definitions, stay unless --purge
    is given, so that installing again continues with the same root.

    \b
    Examples:
      ambit uninstall
      ambit uninstall --context staging
      ambit uninstall --purge
    """
    with errors():
        trio.run(partial(_uninstall, _choice(kubeconfig, context), namespace, purge, force))
        say(f"ambit is removed from {namespace}")


def as_yaml(objects: Sequence[Object]) -> str:
    """The objects as one stream of YAML documents."""
    import yaml

    class Plain(yaml.SafeDumper):
        """Writes what stands in several places each time: API servers refuse anchors."""

        def ignore_aliases(self, data: object) -> bool:
            return True

    return "".join(
        "---\n" + yaml.dump(each, Dumper=Plain, sort_keys=False, width=1000) for each in objects
    )


def _choice(kubeconfig: Path | None, context: str) -> ClusterChoice:
    return ClusterChoice("kubernetes", None, kubeconfig, context)


async def _install(choice: ClusterChoice, values: Values) -> None:
    cluster = open_cluster(choice, manager="ambit", report=lambda _event, _fields: None)
    for definition in definitions.ours():
        await cluster.apply(definition)
    for definition in definitions.istios():
        found = await cluster.get(ref_of(definition))
        if found is None or _is_ours(found):
            await cluster.apply(definition)
    has_gateways = await cluster.get(
        Ref("CustomResourceDefinition", "", "gatewayclasses.gateway.networking.k8s.io")
    )
    for obj in manifest.objects(values, gateway_class=has_gateways is not None):
        await cluster.apply(obj)
        say(f"applied {ref_of(obj)}")
    if has_gateways is None:
        say("Gateway API is not installed: there are no waypoints, so no layer 7")
        say("hint: apply its standard-install.yaml, and install again")


async def _uninstall(choice: ClusterChoice, namespace: str, purge: bool, force: bool) -> None:
    cluster = open_cluster(choice, manager="ambit", report=lambda _event, _fields: None)
    enrolled = []
    async with cluster.watch(["Namespace"]) as events:
        with trio.move_on_after(_SERVED_SECONDS) as scope:
            while not isinstance(event := await events.receive(), Synced):
                obj = getattr(event, "object", {})
                labels = obj.get("metadata", {}).get("labels") or {}
                if labels.get(LABEL) == AMBIENT:
                    enrolled.append(obj["metadata"]["name"])
        if scope.cancelled_caught:
            raise Unavailable("the cluster does not answer", hint="is the context the right one?")
    if enrolled and not force:
        raise ConfigError(
            f"namespaces are enrolled: {', '.join(sorted(enrolled))}",
            hint="their pods would be cut off; first remove their label " + LABEL,
        )
    going = manifest.objects(Values(namespace=namespace))
    if purge:
        going = [*definitions.ours(), *going]
    for obj in reversed(going):
        if purge or obj["kind"] != "Namespace":
            await cluster.delete(ref_of(obj))
            say(f"deleted {ref_of(obj)}")


def _is_ours(definition: Object) -> bool:
    labels = definition["metadata"].get("labels") or {}
    return bool(labels.get("app.kubernetes.io/part-of") == "ambit")
