"""Where a policy that decided is written: file and line, of its rule if one decided.

The lab notes in `ambit.dev/source` from which file an object came; the line of a rule is found by
reading that file as the lab does. A policy that was applied by hand is written nowhere.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from mesh.cluster.api import SOURCE_ANNOTATION
from mesh.cluster.documents import read_documents
from mesh.cluster.policies import parse_authorization_policy
from mesh.errors import ConfigError

#: (kind, namespace, name) -> objects; an empty name means all.
Get: TypeAlias = Callable[[str, str, str], Sequence[dict[str, Any]]]

CONVERTED_STRICT = "istio_converted_static_strict"
CONVERTED_PREFIX = "converted_peer_authentication_"
_MAX_FILE = 4 << 20


def places(get: Get, key: str, rule: int | None, namespace: str) -> list[str]:
    """`file:line` of the policy `key` (as the tunnel names it), or of what it was made of.

    `namespace` is where the destination is, for modes of the whole mesh.
    """
    home, _, name = key.partition("/")
    if name == CONVERTED_STRICT:
        strict = [
            each
            for where in dict.fromkeys((namespace, home))
            for each in get("PeerAuthentication", where, "")
            if ((each.get("spec") or {}).get("mtls") or {}).get("mode") == "STRICT"
        ]
        return [_named("PeerAuthentication", each, "spec.mtls") for each in strict]
    if name.startswith(CONVERTED_PREFIX):
        kind, name, field = "PeerAuthentication", name.removeprefix(CONVERTED_PREFIX), "spec"
        return [_named(kind, each, field) for each in get(kind, home, name)]
    kind = "AuthorizationPolicy"
    found = []
    for each in get(kind, home, name):
        field = "" if rule is None else f"spec.rules[{_written_index(each, rule)}]"
        found.append(_named(kind, each, field))
    return found


def rule_places(get: Get, kind: str, key: str, rule: str | None) -> list[str]:
    """`file:line` of an object that a waypoint named, at its rule: a name, or an index."""
    namespace, _, name = key.partition("/")
    found = []
    for each in get(kind, namespace, name):
        index = _index_of(each, rule) if rule else None
        found.append(_named(kind, each, "" if index is None else f"spec.rules[{index}]"))
    return found


def _index_of(obj: dict[str, Any], rule: str) -> int | None:
    """A rule's index: by its name, if one has it, else the number that it is."""
    rules = (obj.get("spec") or {}).get("rules") or []
    names = [each.get("name") if isinstance(each, dict) else None for each in rules]
    if rule in names:
        return names.index(rule)
    return int(rule) if rule.isdecimal() and int(rule) < len(rules) else None


def _written_index(obj: dict[str, Any], rule: int) -> int:
    """The rule as it is written: of an ALLOW the tunnel does not get rules that ask for HTTP."""
    try:
        policy = parse_authorization_policy(obj)
    except ConfigError:
        return rule
    if policy.action != "ALLOW":
        return rule
    kept = [index for index, each in enumerate(policy.rules) if not each.needs_http]
    return kept[rule] if rule < len(kept) else rule


def _named(kind: str, obj: dict[str, Any], field: str) -> str:
    metadata = obj["metadata"]
    name = f"{kind} {metadata.get('namespace')}/{metadata.get('name')}"
    name += f", {field}" if field else ""
    source = str((metadata.get("annotations") or {}).get(SOURCE_ANNOTATION, ""))
    if not source:
        return f"{name} (applied by hand)"
    return f"{_line_of(kind, metadata, source, field)} ({name})"


def _line_of(kind: str, metadata: dict[str, Any], source: str, field: str) -> str:
    file, _, line = source.rpartition(":")
    if not field:
        return source
    try:
        with Path(file).open("rb") as opened:
            documents = read_documents(opened.read(_MAX_FILE), file, complain=lambda _: None)
    except (OSError, ConfigError):
        return source
    for each in documents:
        ref = each.ref
        if (ref.kind, ref.name) == (kind, metadata.get("name")) and str(each.source.line) == line:
            place = each.source.at(field)
            return f"{place.file}:{place.line}"
    return source
