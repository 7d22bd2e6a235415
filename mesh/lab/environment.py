"""A container's variables, command line and files, from its spec and the objects it names.

Pure. `$(NAME)` is expanded as Kubernetes does: from variables defined earlier, `$$(NAME)`
escapes, an unknown name stays as written.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mesh.errors import ConfigError, Unavailable
from mesh.lab.podspec import Container, Variable, Volume, VolumeSource

Objects = Callable[[str, str], Mapping[str, Any] | None]
"""Looks up a ConfigMap or Secret of the pod's namespace: (kind, name) -> object."""

_REFERENCE = re.compile(r"\$(\$|\(([^()]*)\))")
_SUBSCRIPT = re.compile(r"metadata\.(labels|annotations)\['([^']+)'\]")


@dataclass(frozen=True, slots=True)
class PodFacts:
    """What the downward API can tell about a pod."""

    name: str
    namespace: str
    uid: str
    node: str
    node_ips: tuple[str, ...]
    ips: tuple[str, ...]
    service_account: str
    labels: Mapping[str, str] = field(default_factory=dict)
    annotations: Mapping[str, str] = field(default_factory=dict)

    def value(self, path: str) -> str:
        """The value of a `fieldPath`. Raises ConfigError for one the lab does not know."""
        plain = {
            "metadata.name": self.name,
            "metadata.namespace": self.namespace,
            "metadata.uid": self.uid,
            "spec.nodeName": self.node,
            "spec.serviceAccountName": self.service_account,
            "status.podIP": self.ips[0] if self.ips else "",
            "status.podIPs": ",".join(self.ips),
            "status.hostIP": self.node_ips[0] if self.node_ips else "",
            "status.hostIPs": ",".join(self.node_ips),
            "metadata.labels": _lines(self.labels),
            "metadata.annotations": _lines(self.annotations),
        }
        if path in plain:
            return plain[path]
        if (found := _SUBSCRIPT.fullmatch(path)) is not None:
            table = self.labels if found[1] == "labels" else self.annotations
            return table.get(found[2], "")
        raise ConfigError(f"unknown fieldPath {path!r}", field="fieldPath")


def _lines(table: Mapping[str, str]) -> str:
    return "\n".join(f'{key}="{value}"' for key, value in sorted(table.items()))


def expand(text: str, variables: Mapping[str, str]) -> str:
    """`text` with its `$(NAME)` references replaced."""

    def replacement(match: re.Match[str]) -> str:
        if match[1] == "$":
            return "$"
        return variables.get(match[2], match[0])

    return _REFERENCE.sub(replacement, text)


def variables_of(
    container: Container, base: Mapping[str, str], facts: PodFacts, objects: Objects
) -> dict[str, str]:
    """The container's environment, on top of `base`.

    Raises Unavailable while a ConfigMap or Secret is missing (the container waits for it) and
    ConfigError for a key or field that does not exist.
    """
    made = dict(base)
    for group in container.variable_sets:
        table = _table(group.source, group.object_name, objects, optional=group.optional)
        made.update(
            {group.prefix + key: value.decode("utf-8", "replace") for key, value in table.items()}
        )
    for variable in container.variables:
        value = _value(variable, made, facts, objects)
        if value is not None:
            made[variable.name] = value
    return made


def _value(
    variable: Variable, made: Mapping[str, str], facts: PodFacts, objects: Objects
) -> str | None:
    match variable.source:
        case "literal":
            return expand(variable.value, made)
        case "field":
            return facts.value(variable.key)
        case "ConfigMap" | "Secret":
            name = variable.object_name
            table = _table(variable.source, name, objects, optional=variable.optional)
            if variable.key in table:
                return table[variable.key].decode("utf-8", "replace")
            if variable.optional:
                return None
            raise ConfigError(f"{variable.source} {name} has no key {variable.key!r}")


def command_line(container: Container, variables: Mapping[str, str]) -> tuple[str, ...]:
    """The container's argv."""
    return tuple(expand(text, variables) for text in (*container.command, *container.arguments))


def volume_files(
    volume: Volume,
    facts: PodFacts,
    objects: Objects,
    token: Callable[[VolumeSource], str] | None = None,
) -> dict[str, bytes]:
    """The files of a volume of kind `files`: relative path -> content.

    `token` issues service account tokens. Raises as `variables_of`.
    """
    files: dict[str, bytes] = {}
    for source in volume.sources:
        match source.kind:
            case "fields":
                files.update({path: facts.value(key).encode() for key, path in source.items})
            case "token":
                if token is not None:
                    files[source.items[0][1]] = token(source).encode()
            case "ConfigMap" | "Secret":
                table = _table(source.kind, source.object_name, objects, optional=source.optional)
                files.update(_chosen(source, table))
    return files


def _chosen(source: VolumeSource, table: Mapping[str, bytes]) -> dict[str, bytes]:
    if not source.items:
        return dict(table)
    chosen: dict[str, bytes] = {}
    for key, path in source.items:
        if key in table:
            chosen[path] = table[key]
        elif not source.optional:
            raise ConfigError(f"{source.kind} {source.object_name} has no key {key!r}")
    return chosen


def _table(kind: str, name: str, objects: Objects, *, optional: bool) -> dict[str, bytes]:
    """Keys and contents of a ConfigMap or Secret."""
    found = objects(kind, name)
    if found is None:
        if optional:
            return {}
        raise Unavailable(f"waits for {kind} {name}", hint=f"add the {kind} to the directory")
    table: dict[str, bytes] = {}
    for key, value in _pairs(found, "data", f"{kind} {name}"):
        table[key] = _decode(value, f"{kind} {name}", key) if kind == "Secret" else value.encode()
    plain, encoded = ("stringData", "") if kind == "Secret" else ("", "binaryData")
    for key, value in _pairs(found, plain, f"{kind} {name}"):
        table[key] = value.encode()
    for key, value in _pairs(found, encoded, f"{kind} {name}"):
        table[key] = _decode(value, f"{kind} {name}", key)
    return {key: value for key, value in table.items() if _is_file_name(key)}


def _pairs(found: Mapping[str, Any], key: str, what: str) -> Sequence[tuple[str, str]]:
    table = found.get(key) or {}
    if not isinstance(table, Mapping) or not all(isinstance(v, str) for v in table.values()):
        raise ConfigError(f"{what}: the values of {key} must be strings", hint="quote them")
    return [(str(name), value) for name, value in table.items()]


def _is_file_name(key: str) -> bool:
    return bool(key) and "/" not in key and key not in {".", ".."}


def _decode(value: str, what: str, key: str) -> bytes:
    try:
        return base64.b64decode(value, validate=False)
    except binascii.Error as exc:
        raise ConfigError(f"{what}: {key} is not base64") from exc
