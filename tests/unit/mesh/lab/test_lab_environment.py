"""Variables, command lines and files of containers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import yaml

from mesh.cluster.fields import Reader
from mesh.errors import ConfigError, Unavailable
from mesh.lab.environment import PodFacts, command_line, expand, variables_of, volume_files
from mesh.lab.podspec import Container, parse_pod_spec

FACTS = PodFacts(
    "web-0",
    "shop",
    "u1",
    "node1",
    ("172.18.0.1",),
    ("10.244.1.10", "fd00:10:244:1::a"),
    "web",
    {"app": "web", "tier/x": "front"},
)
OBJECTS: dict[tuple[str, str], dict[str, Any]] = {
    ("ConfigMap", "settings"): {"data": {"COLOUR": "blue", "app.conf": "x=1\n"}},
    ("Secret", "keys"): {"data": {"KEY": "c2VjcmV0"}, "stringData": {"PLAIN": "p"}},
}


def lookup(kind: str, name: str) -> Mapping[str, Any] | None:
    return OBJECTS.get((kind, name))


def container(text: str) -> Container:
    body = {"containers": [{"name": "a", "command": ["a"], **yaml.safe_load(text)}]}
    return parse_pod_spec(Reader(body)).containers[0]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("$(A)", "1"),
        ("x$(A)y$(B)", "x1y22"),
        ("$$(A)", "$(A)"),
        ("$(C)", "$(C)"),
        ("$$$(A)", "$1"),
        ("$A ${A} $(A", "$A ${A} $(A"),
        ("$()", "$()"),
    ],
)
def test_references_expand_as_kubernetes_does(text: str, expected: str) -> None:
    assert expand(text, {"A": "1", "B": "22"}) == expected


def test_variables_of_every_kind() -> None:
    made = variables_of(
        container("""
env:
  - {name: HOST, value: db}
  - {name: URL, value: "http://$(HOST):$(PORT)/"}
  - {name: POD, valueFrom: {fieldRef: {fieldPath: metadata.name}}}
  - {name: IPS, valueFrom: {fieldRef: {fieldPath: status.podIPs}}}
  - {name: TIER, valueFrom: {fieldRef: {fieldPath: "metadata.labels['tier/x']"}}}
  - {name: NODE, valueFrom: {fieldRef: {fieldPath: spec.nodeName}}}
  - {name: COLOUR, valueFrom: {configMapKeyRef: {name: settings, key: COLOUR}}}
  - {name: KEY, valueFrom: {secretKeyRef: {name: keys, key: KEY}}}
  - {name: GONE, valueFrom: {secretKeyRef: {name: keys, key: x, optional: true}}}
envFrom:
  - {prefix: S_, configMapRef: {name: settings}}
  - {configMapRef: {name: absent, optional: true}}
"""),
        {"PATH": "/bin"},
        FACTS,
        lookup,
    )
    assert made == {
        "PATH": "/bin",
        "HOST": "db",
        "URL": "http://db:$(PORT)/",
        "POD": "web-0",
        "IPS": "10.244.1.10,fd00:10:244:1::a",
        "TIER": "front",
        "NODE": "node1",
        "COLOUR": "blue",
        "KEY": "secret",
        "S_COLOUR": "blue",
        "S_app.conf": "x=1\n",
    }


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("{configMapKeyRef: {name: absent, key: k}}", Unavailable, "waits for ConfigMap absent"),
        ("{configMapKeyRef: {name: settings, key: k}}", ConfigError, "has no key 'k'"),
        ("{fieldRef: {fieldPath: metadata.nonsense}}", ConfigError, "unknown fieldPath"),
    ],
)
def test_what_is_missing_is_told(text: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        variables_of(container(f"env: [{{name: A, valueFrom: {text}}}]"), {}, FACTS, lookup)


def test_the_command_line_takes_variables() -> None:
    one = container("{command: [run, $(A)], args: [--x=$(A), $$(A)]}")
    assert command_line(one, {"A": "1"}) == ("run", "1", "--x=1", "$(A)")


def test_files_of_a_projected_volume() -> None:
    body = yaml.safe_load("""
containers: [{name: a, command: [a]}]
volumes:
  - name: v
    projected:
      sources:
        - {configMap: {name: settings, items: [{key: app.conf, path: etc/app.conf}]}}
        - {secret: {name: keys}}
        - {downwardAPI: {items: [{path: labels, fieldRef: {fieldPath: metadata.labels}}]}}
        - {serviceAccountToken: {path: token, audience: me}}
""")
    volume = parse_pod_spec(Reader(body)).volumes[0]
    assert volume_files(volume, FACTS, lookup, lambda source: f"for {source.audience}") == {
        "etc/app.conf": b"x=1\n",
        "KEY": b"secret",
        "PLAIN": b"p",
        "labels": b'app="web"\ntier/x="front"',
        "token": b"for me",
    }
