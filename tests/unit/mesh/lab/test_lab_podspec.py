"""Pod specs: probes, volumes and the complaints about them."""

from __future__ import annotations

import pytest
import yaml

from mesh.cluster.fields import Reader
from mesh.errors import ConfigError
from mesh.lab.podspec import PodSpec, Probe, VolumeSource, parse_pod_spec


def parse(text: str) -> PodSpec:
    return parse_pod_spec(Reader(yaml.safe_load(text), ("spec",)))


def probe(text: str) -> Probe | None:
    return (
        parse(f"containers: [{{name: a, command: [a], readinessProbe: {text}}}]")
        .containers[0]
        .readiness
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{tcpSocket: {port: 80}}", Probe("tcp", port=80)),
        (
            "{httpGet: {path: ready, port: http, httpHeaders: [{name: A, value: b}]}}",
            Probe("http", port="http", path="/ready", headers=(("A", "b"),)),
        ),
        (
            "{exec: {command: [test, -f, /x]}, periodSeconds: 1, initialDelaySeconds: 2,"
            " timeoutSeconds: 3, failureThreshold: 4, successThreshold: 5}",
            Probe(
                "exec",
                command=("test", "-f", "/x"),
                initial_delay=2,
                period=1,
                timeout=3,
                failures=4,
                successes=5,
            ),
        ),
    ],
)
def test_probes(text: str, expected: Probe) -> None:
    assert probe(text) == expected


@pytest.mark.parametrize(
    ("text", "field"),
    [
        ("containers: []", "spec.containers"),
        ("containers: [{name: a}]", "spec.containers[0].command"),
        ("containers: [{name: a, command: [1]}]", "spec.containers[0].command[0]"),
        (
            "containers: [{name: a, command: [a]}, {name: a, command: [a]}]",
            "spec.containers",
        ),
        (
            "containers: [{name: a, command: [a], volumeMounts: [{name: v, mountPath: /v}]}]",
            "spec.containers[0].volumeMounts[0].name",
        ),
        (
            "{volumes: [{name: v}], containers: [{name: a, command: [a],"
            " volumeMounts: [{name: v, mountPath: /a/../../etc}]}]}",
            "spec.containers[0].volumeMounts[0].mountPath",
        ),
        (
            "containers: [{name: a, command: [a], readinessProbe: {grpc: {port: 1}}}]",
            "spec.containers[0].readinessProbe",
        ),
        (
            "containers: [{name: a, command: [a], readinessProbe: {tcpSocket: {port: 70000}}}]",
            "spec.containers[0].readinessProbe.tcpSocket.port",
        ),
        (
            "containers: [{name: a, command: [a], livenessProbe:"
            ' {httpGet: {port: 1, path: "/a b\\r\\nX: y"}}}]',
            "spec.containers[0].livenessProbe.httpGet.path",
        ),
        (
            "containers: [{name: a, command: [a], readinessProbe:"
            " {tcpSocket: {port: 1}, periodSeconds: 0}}]",
            "spec.containers[0].readinessProbe.periodSeconds",
        ),
        (
            "{volumes: [{name: v, nfs: {server: x}}], containers: [{name: a, command: [a]}]}",
            "spec.volumes[0]",
        ),
        (
            "{restartPolicy: Sometimes, containers: [{name: a, command: [a]}]}",
            "spec.restartPolicy",
        ),
    ],
)
def test_refusals_name_the_field(text: str, field: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(text)
    assert caught.value.field == field


def test_two_volumes_at_one_path_are_refused() -> None:
    with pytest.raises(ConfigError, match="share one file tree"):
        parse("""
volumes: [{name: v}, {name: w}]
containers:
  - {name: a, command: [a], volumeMounts: [{name: v, mountPath: /x}]}
  - {name: b, command: [a], volumeMounts: [{name: w, mountPath: /x/}]}
""")


def test_an_empty_argument_is_an_argument() -> None:
    assert parse("containers: [{name: a, command: [redis], args: [--save, '']}]").containers[
        0
    ].arguments == ("--save", "")


def test_volumes() -> None:
    spec = parse(
        """
volumes:
  - {name: a, configMap: {name: settings, items: [{key: k, path: dir/file}], defaultMode: 0o400}}
  - {name: b, secret: {secretName: keys, optional: true}}
  - {name: c}
  - {name: d, persistentVolumeClaim: {claimName: disk}}
  - name: e
    projected:
      sources:
        - {serviceAccountToken: {path: token, audience: istio-ca}}
        - {configMap: {name: root}}
containers: [{name: a, command: [a]}]
""".replace("0o400", "256")
    )
    kinds = [(volume.kind, volume.path) for volume in spec.volumes]
    assert kinds == [("files", ""), ("files", ""), ("empty", ""), ("claim", "disk"), ("files", "")]
    assert spec.volumes[0].mode == 0o400
    assert spec.volumes[0].sources[0].items == (("k", "dir/file"),)
    assert spec.volumes[1].sources == (VolumeSource("Secret", "keys", optional=True),)
    assert [source.kind for source in spec.volumes[4].sources] == ["token", "ConfigMap"]


def test_sidecars_restart_always() -> None:
    spec = parse("""
initContainers:
  - {name: once, command: [a]}
  - {name: beside, command: [a], restartPolicy: Always}
containers: [{name: a, command: [a]}]
""")
    assert [container.is_sidecar for container in spec.init_containers] == [False, True]
