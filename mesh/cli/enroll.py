"""`ambit enroll` and `ambit unenroll`: the label that takes a namespace into the mesh."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from mesh.cli.choose import Where, mesh_client, where_options
from mesh.cli.output import NotFound, errors, say
from mesh.errors import ConfigError
from mesh.lab.control import NotThere

LABEL = "istio.io/dataplane-mode"
AMBIENT = "ambient"

_write_option = click.option(
    "--write", is_flag=True, help="Also write the label into the directory's YAML file."
)


@click.command()
@click.argument("namespace")
@where_options
@_write_option
def enroll(namespace: str, where: Where, write: bool) -> None:
    """Take NAMESPACE into the mesh, while its pods run.

    Sets the label istio.io/dataplane-mode=ambient on the live namespace. A pod that carries
    the label istio.io/dataplane-mode=none stays out.

    \b
    Examples:
      ambit enroll shop
      ambit enroll shop --context staging
      ambit enroll shop --write          also edit the namespace's file
    """
    _label(namespace, where, AMBIENT, write=write)
    say(f"namespace {namespace} is enrolled: its pods are being captured")


@click.command()
@click.argument("namespace")
@where_options
@_write_option
def unenroll(namespace: str, where: Where, write: bool) -> None:
    """Take NAMESPACE out of the mesh, while its pods run.

    Connections that are open go on through the tunnel until they end.

    \b
    Examples:
      ambit unenroll shop
      ambit unenroll shop --context staging
      ambit unenroll shop --write        also edit the namespace's file
    """
    _label(namespace, where, None, write=write)
    say(f"namespace {namespace} is leaving the mesh: new connections go direct")


def _label(namespace: str, where: Where, value: str | None, *, write: bool) -> None:
    with errors():
        client = mesh_client(where)
        try:
            patch = {"metadata": {"labels": {LABEL: value}}}
            changed = client.patch("Namespace", "", namespace, patch)
        except NotThere as exc:
            raise NotFound(
                f"no namespace {namespace!r} in {client.where}",
                hint=f"there are: {', '.join(_names(client.get('Namespace')))}",
            ) from exc
        if write:
            directory = client.status().get("directory")
            if directory is None:
                raise ConfigError(
                    "--write is for labs: a cluster keeps no files",
                    hint=f"the label of {namespace} is set in {client.where}",
                )
            write_label(Path(directory), changed, value)


def _names(objects: list[dict[str, Any]]) -> list[str]:
    return sorted(item["metadata"]["name"] for item in objects)


def write_label(directory: Path, namespace: Mapping[str, Any], value: str | None) -> None:
    """Set or remove the label in the file that the namespace came from, comments kept.

    Raises ConfigError when the namespace stands in no file of the directory.
    """
    from ruamel.yaml import YAML

    name = namespace["metadata"]["name"]
    source = namespace["metadata"].get("annotations", {}).get("ambit.dev/source", "")
    file = Path(source.rpartition(":")[0])
    path = file if file.is_absolute() else directory / file
    if not source or not path.is_file():
        raise ConfigError(
            f"namespace {name} stands in no file of {directory}",
            hint=f"add a Namespace object, or leave --write out: the live label of {name} is set",
        )
    yaml = YAML(typ="rt")
    yaml.preserve_quotes = True
    yaml.indent(mapping=2, sequence=4, offset=2)
    documents = list(yaml.load_all(path.read_text("utf-8")))
    for document in documents:
        if (
            document
            and document.get("kind") == "Namespace"
            and document["metadata"]["name"] == name
        ):
            metadata = document["metadata"]
            if value is not None:
                metadata.setdefault("labels", {})[LABEL] = value
            elif "labels" in metadata:
                metadata["labels"].pop(LABEL, None)
                if not metadata["labels"]:
                    del metadata["labels"]
            break
    else:
        raise ConfigError(f"no Namespace {name} any more", file=str(path))
    # Beside the file and then renamed, so that a watcher never reads half of it.
    beside = path.with_name(f".{path.name}.new")
    with beside.open("w", encoding="utf-8") as out:
        yaml.dump_all(documents, out)
    beside.chmod(path.stat().st_mode & 0o777)
    beside.replace(path)
    say(f"wrote {path}")
