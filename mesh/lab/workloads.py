"""Deployments, StatefulSets and DaemonSets: which pods each of them asks for.

Pure. Names, labels and owner references are made as Kubernetes' own controllers make them:
a Deployment's pod belongs to the ReplicaSet `<name>-<pod-template-hash>`, a StatefulSet's has
its ordinal as name, hostname and label, a DaemonSet has one pod per node that fits.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mesh.cluster.api import SOURCE_ANNOTATION
from mesh.cluster.fields import Reader
from mesh.lab.podspec import PodSpec, parse_pod_spec

KINDS = ("Deployment", "ReplicaSet", "StatefulSet", "DaemonSet")
NOT_RUN = frozenset({"Job", "CronJob", "ReplicationController"})
MAX_REPLICAS = 250
# Kubernetes' alphabet for names: no vowels, nothing that looks like something else.
_ALPHABET = "bcdfghjklmnpqrstvwxz2456789"
_NAME_BASE = 57


@dataclass(frozen=True, slots=True)
class Workload:
    """A controller object, parsed. `revision` names the exact pod template.

    `controller` is what owns the pods: a Deployment's ReplicaSet, otherwise the object itself.
    """

    kind: str
    namespace: str
    name: str
    replicas: int
    revision: str
    spec: PodSpec
    template: Mapping[str, Any]
    controller: tuple[str, str, str]  # apiVersion, kind, name
    service_name: str = ""
    claims: tuple[str, ...] = ()
    source: str = ""

    @property
    def owner(self) -> str:
        """`Kind/namespace/name`."""
        return f"{self.kind}/{self.namespace}/{self.name}"


def parse_workload(obj: Mapping[str, Any]) -> Workload:
    """Read a Deployment, ReplicaSet, StatefulSet or DaemonSet. Raises ConfigError."""
    top = Reader(obj)
    kind, metadata, spec = top.get("kind").name(), top.get("metadata"), top.get("spec")
    name = metadata.get("name").name()
    template = spec.get("template")
    if not template.exists:
        template.fail("missing")
    labels = template.at("metadata", "labels").labels()
    selector = spec.at("selector", "matchLabels").labels()
    if any(labels.get(key) != value for key, value in selector.items()):
        spec.at("selector", "matchLabels").fail(
            "does not select the labels of the pod template",
            hint="repeat the selector's labels in spec.template.metadata.labels",
        )
    claims = tuple(
        each.at("metadata", "name").name() for each in spec.get("volumeClaimTemplates").items()
    )
    body = _with_claims(dict(template.value), claims)
    parsed = parse_pod_spec(Reader(body, template.path).get("spec"))
    replicas = spec.get("replicas").integer(1)
    if not 0 <= replicas <= MAX_REPLICAS:
        spec.get("replicas").fail(f"{replicas} is out of range 0..{MAX_REPLICAS}")
    revision = revision_of(body)
    controller = ("apps/v1", kind, name)
    if kind == "Deployment":
        controller = ("apps/v1", "ReplicaSet", f"{name}-{revision}")
    return Workload(
        kind=kind,
        namespace=metadata.get("namespace").text("default"),
        name=name,
        replicas=replicas,
        revision=revision,
        spec=parsed,
        template=body,
        controller=controller,
        service_name=spec.get("serviceName").text(),
        claims=claims,
        source=metadata.get("annotations").labels().get(SOURCE_ANNOTATION, ""),
    )


def _with_claims(template: dict[str, Any], claims: tuple[str, ...]) -> dict[str, Any]:
    """A StatefulSet's template, with a volume for each of its claims.

    The claim's real name has the pod's ordinal, which `pod_object` puts in.
    """
    if not claims:
        return template
    template = copy.deepcopy(template)
    spec = template.get("spec")
    volumes = spec.get("volumes") or [] if isinstance(spec, dict) else None
    if isinstance(spec, dict) and isinstance(volumes, list):
        others = [v for v in volumes if not (isinstance(v, dict) and v.get("name") in claims)]
        made = [{"name": c, "persistentVolumeClaim": {"claimName": c}} for c in claims]
        spec["volumes"] = others + made
    return template


def revision_of(template: Mapping[str, Any]) -> str:
    """A pod-template-hash: ten characters that name the template's content."""
    return short_hash(json.dumps(template, sort_keys=True, separators=(",", ":")), 10)


def short_hash(text: str, length: int) -> str:
    """A hash of `text` in the characters that Kubernetes puts into names."""
    number = int.from_bytes(hashlib.sha256(text.encode()).digest(), "big")
    characters = []
    for _ in range(length):
        number, index = divmod(number, len(_ALPHABET))
        characters.append(_ALPHABET[index])
    return "".join(characters)


def pod_name(workload: Workload, serial: int) -> str:
    """A new pod's name; `serial` makes it unique (and is the ordinal of a StatefulSet's)."""
    if workload.kind == "StatefulSet":
        return f"{workload.name}-{serial}"
    base = workload.controller[2][:_NAME_BASE]
    return f"{base}-{short_hash(f'{workload.owner} {workload.revision} {serial}', 5)}"


def pod_object(workload: Workload, name: str, ordinal: int, uid_of_owner: str) -> dict[str, Any]:
    """The Pod object of a workload, before a node, an address and a uid are given to it."""
    metadata = Reader(workload.template).get("metadata")
    labels = dict(metadata.get("labels").labels())
    annotations = dict(metadata.get("annotations").labels())
    spec = copy.deepcopy(dict(workload.template.get("spec") or {}))
    match workload.kind:
        case "Deployment":
            labels["pod-template-hash"] = workload.revision
        case "StatefulSet":
            labels["statefulset.kubernetes.io/pod-name"] = name
            labels["apps.kubernetes.io/pod-index"] = str(ordinal)
            labels["controller-revision-hash"] = f"{workload.name}-{workload.revision}"
            spec["hostname"] = name
            spec["subdomain"] = workload.service_name
            for volume in spec.get("volumes") or []:
                if volume.get("name") in workload.claims:
                    volume["persistentVolumeClaim"] = {"claimName": f"{volume['name']}-{name}"}
        case "DaemonSet":
            labels["controller-revision-hash"] = workload.revision
    if workload.source:
        annotations[SOURCE_ANNOTATION] = workload.source
    version, kind, controller = workload.controller
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "name": name,
            "namespace": workload.namespace,
            "labels": labels,
            "annotations": annotations,
            "ownerReferences": [
                {
                    "apiVersion": version,
                    "kind": kind,
                    "name": controller,
                    "uid": uid_of_owner,
                    "controller": True,
                    "blockOwnerDeletion": True,
                }
            ],
        },
        "spec": spec,
    }
