"""Whatever stands in a directory, planning ends in a plan: strange values become faults.

And a plan never gives one address, name or cluster IP to two.
"""

from __future__ import annotations

import copy
import json
from typing import Any

import yaml
from hypothesis import given
from hypothesis import strategies as st

from mesh.lab.topology import Plan, diff, plan

OBJECTS: list[dict[str, Any]] = list(
    yaml.safe_load_all("""
apiVersion: apps/v1
kind: Deployment
metadata: {name: web, namespace: shop, labels: {a: b}, annotations: {c: d}}
spec:
  replicas: 2
  selector: {matchLabels: {app: web}}
  template:
    metadata: {labels: {app: web}, annotations: {x: y}}
    spec:
      containers:
        - name: main
          command: [run]
          args: [x]
          env: [{name: A, valueFrom: {fieldRef: {fieldPath: metadata.name}}}, {name: B, value: b}]
          envFrom: [{configMapRef: {name: c}}]
          ports: [{name: http, containerPort: 80}]
          readinessProbe: {httpGet: {path: /, port: http, httpHeaders: [{name: a, value: b}]}}
          livenessProbe: {exec: {command: [true-ish]}}
          volumeMounts: [{name: v, mountPath: /v, subPath: s}]
      volumes:
        - {name: v, projected: {sources: [{configMap: {name: c, items: [{key: k, path: p}]}}]}}
      hostAliases: [{ip: 1.2.3.4, hostnames: [a]}]
---
apiVersion: apps/v1
kind: StatefulSet
metadata: {name: db, namespace: shop}
spec:
  serviceName: db
  replicas: 1
  selector: {matchLabels: {app: db}}
  template:
    metadata: {labels: {app: db}}
    spec:
      containers: [{name: main, command: [run]}]
      volumes: [{name: w, secret: {secretName: s}}]
  volumeClaimTemplates: [{metadata: {name: data}}]
---
apiVersion: v1
kind: Pod
metadata: {name: one, namespace: shop, labels: {app: one}}
spec: {nodeSelector: {kubernetes.io/hostname: node1}, containers: [{name: main, command: [run]}]}
---
apiVersion: v1
kind: Service
metadata: {name: web, namespace: shop}
spec:
  ipFamilyPolicy: PreferDualStack
  ipFamilies: [IPv4]
  clusterIP: 10.96.0.99
  selector: {app: web}
  ports: [{name: http, port: 80, targetPort: http}, {name: two, port: 81}]
---
apiVersion: v1
kind: Node
metadata: {name: alpha, labels: {zone: a}}
""")
)
SCALARS = st.none() | st.booleans() | st.integers() | st.text(max_size=8) | st.floats()
STRANGE = st.recursive(
    SCALARS,
    lambda below: (
        st.lists(below, max_size=3) | st.dictionaries(st.text(max_size=8), below, max_size=3)
    ),
    max_leaves=5,
)
IDENTITY = ("apiVersion", "kind", "name", "namespace")


def paths(value: Any, here: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place below `metadata` and `spec`; what names an object is judged before planning."""
    found = []
    pairs = value.items() if isinstance(value, dict) else enumerate(value)
    for key, below in pairs:
        path = (*here, key)
        if (
            path[0] in IDENTITY
            or path == ("metadata",)
            or path[:2] in [("metadata", n) for n in IDENTITY]
        ):
            pass
        else:
            found.append(path)
        if isinstance(below, dict | list):
            found += paths(below, path)
    return found


def put(obj: Any, path: tuple[Any, ...], value: Any) -> None:
    for key in path[:-1]:
        obj = obj[key]
    obj[path[-1]] = value


@st.composite
def mutated(draw: st.DrawFn) -> list[dict[str, Any]]:
    objects = copy.deepcopy(OBJECTS)
    for _ in range(draw(st.integers(1, 2))):
        obj = draw(st.sampled_from(objects))
        put(obj, draw(st.sampled_from(paths(obj))), draw(STRANGE))
    return objects


@given(mutated())
def test_strange_values_become_faults_and_nothing_else(objects: list[dict[str, Any]]) -> None:
    good = plan(OBJECTS, Plan())
    for previous in (Plan(), good):
        made = plan(objects, previous)
        for fault in made.faults:
            assert str(fault)
        for pod in made.pods.values():
            json.dumps(pod.object)
            assert dict(pod.labels) is not None


@given(st.lists(mutated(), min_size=1, max_size=6))
def test_nothing_is_given_twice(steps: list[list[dict[str, Any]]]) -> None:
    made = Plan()
    for objects in steps:
        before, made = made, plan(objects, made)
        changes = diff(before, made)
        pods = [*made.pods.values(), *(stop.pod for stop in changes.stop)]
        used = [ip for pod in pods if not pod.spec.host_network for ip in pod.ips]
        assert len(used) == len(set(used))
        assert len({pod.uid for pod in pods}) == len(pods)
        vips = [ip for service in made.services.values() for ip in service.cluster_ips]
        assert len(vips) == len(set(vips))
        started = {pod.uid for pod in changes.start}
        assert started == {p.uid for p in made.pods.values()} - {
            p.uid for p in before.pods.values()
        }
