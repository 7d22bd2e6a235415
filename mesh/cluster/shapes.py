"""The fields that Kubernetes' own kinds have, and those of an object that are none of them. Pure.

A misspelt `selectr` is no error to a parser that reads what it knows: the Service would
quietly select nothing. Tables go as deep as somebody here reads; `ANY` is what nobody reads.
Istio's kinds are not here: `mesh.cluster.policies` refuses their unknown fields itself.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from typing import Any, TypeAlias

from mesh.cluster.fields import format_path

#: The fields of a mapping (or of each mapping in a list), and what may be inside them.
Shape: TypeAlias = Mapping[str, "Shape | None"]

ANY = None
# Per object: a file that is no manifest at all must not fill the screen.
MAX_TOLD = 8


def _fields(names: str, **inner: Shape) -> Shape:
    return {**dict.fromkeys(names.split(), ANY), **inner}


_METADATA = _fields(
    "annotations creationTimestamp deletionGracePeriodSeconds deletionTimestamp finalizers "
    "generateName generation labels managedFields name namespace ownerReferences "
    "resourceVersion selfLink uid"
)
_SELECTOR = _fields("matchLabels", matchExpressions=_fields("key operator values"))
_KEY = _fields("key name optional")
_TARGET = _fields("host port")
_PROBE = _fields(
    "failureThreshold grpc initialDelaySeconds periodSeconds successThreshold "
    "terminationGracePeriodSeconds timeoutSeconds",
    exec=_fields("command"),
    httpGet=_fields("host path port protocol scheme", httpHeaders=_fields("name value")),
    tcpSocket=_TARGET,
)
_CONTAINER = _fields(
    "args command image imagePullPolicy lifecycle name resizePolicy resources restartPolicy "
    "restartPolicyRules securityContext stdin stdinOnce terminationMessagePath "
    "terminationMessagePolicy tty volumeDevices workingDir",
    env=_fields(
        "name value",
        valueFrom=_fields(
            "fileKeyRef resourceFieldRef",
            configMapKeyRef=_KEY,
            fieldRef=_fields("apiVersion fieldPath"),
            secretKeyRef=_KEY,
        ),
    ),
    envFrom=_fields(
        "prefix", configMapRef=_fields("name optional"), secretRef=_fields("name optional")
    ),
    livenessProbe=_PROBE,
    ports=_fields("containerPort hostIP hostPort name protocol"),
    readinessProbe=_PROBE,
    startupProbe=_PROBE,
    volumeMounts=_fields(
        "bindMountOptions mountPath mountPropagation name readOnly recursiveReadOnly subPath "
        "subPathExpr"
    ),
)
_ITEMS = _fields("key mode path user")
_PATHS = _fields("mode path resourceFieldRef user", fieldRef=_fields("apiVersion fieldPath"))
_VOLUME = _fields(
    "awsElasticBlockStore azureDisk azureFile cephfs cinder csi ephemeral fc flexVolume flocker "
    "gcePersistentDisk gitRepo glusterfs image iscsi name nfs photonPersistentDisk "
    "portworxVolume quobyte rbd scaleIO storageos vsphereVolume",
    configMap=_fields("defaultMode defaultUser name optional", items=_ITEMS),
    downwardAPI=_fields("defaultMode defaultUser", items=_PATHS),
    emptyDir=_fields("medium mode sizeLimit"),
    hostPath=_fields("path type"),
    persistentVolumeClaim=_fields("claimName readOnly"),
    projected=_fields(
        "defaultMode defaultUser",
        sources=_fields(
            "clusterTrustBundle podCertificate",
            configMap=_fields("name optional", items=_ITEMS),
            downwardAPI=_fields("", items=_PATHS),
            secret=_fields("name optional", items=_ITEMS),
            serviceAccountToken=_fields("audience expirationSeconds path user"),
        ),
    ),
    secret=_fields("defaultMode defaultUser optional secretName", items=_ITEMS),
)
_POD_SPEC = _fields(
    "activeDeadlineSeconds affinity automountServiceAccountToken dnsConfig dnsPolicy "
    "enableServiceLinks ephemeralContainers evictionResponders hostIPC hostNetwork hostPID "
    "hostUsers hostname hostnameOverride imagePullSecrets nodeName nodeSelector os overhead "
    "preemptionPolicy priority priorityClassName readinessGates resourceClaims resources "
    "restartPolicy runtimeClassName schedulerName schedulingGates schedulingGroup "
    "securityContext serviceAccount serviceAccountName setHostnameAsFQDN shareProcessNamespace "
    "subdomain terminationGracePeriodSeconds tolerations topologySpreadConstraints",
    containers=_CONTAINER,
    hostAliases=_fields("hostnames ip"),
    initContainers=_CONTAINER,
    volumes=_VOLUME,
)
_TEMPLATE = _fields("", metadata=_METADATA, spec=_POD_SPEC)
_SETS = "minReadySeconds revisionHistoryLimit"


def _kind(names: str = "status", **inner: Shape) -> Shape:
    return _fields(f"apiVersion kind {names}", metadata=_METADATA, **inner)


def _workload(names: str) -> Shape:
    return _kind(spec=_fields(names, selector=_SELECTOR, template=_TEMPLATE))


KINDS: Mapping[str, Shape] = {
    "ConfigMap": _kind("binaryData data immutable"),
    "DaemonSet": _workload(f"{_SETS} updateStrategy"),
    "Deployment": _workload(f"{_SETS} paused progressDeadlineSeconds replicas strategy"),
    "EndpointSlice": _kind(
        "addressType",
        endpoints=_fields(
            "addresses deprecatedTopology hints hostname nodeName zone",
            conditions=_fields("ready serving terminating"),
            targetRef=_fields("apiVersion fieldPath kind name namespace resourceVersion uid"),
        ),
        ports=_fields("appProtocol name port protocol"),
    ),
    "Namespace": _kind("spec status"),
    "Node": _kind("spec status"),
    "Pod": _kind(spec=_POD_SPEC),
    "ReplicaSet": _workload("minReadySeconds replicas"),
    "Secret": _kind("data immutable stringData type"),
    "Service": _kind(
        spec=_fields(
            "allocateLoadBalancerNodePorts clusterIP clusterIPs externalIPs externalName "
            "externalTrafficPolicy healthCheckNodePort internalTrafficPolicy ipFamilies "
            "ipFamilyPolicy loadBalancerClass loadBalancerIP loadBalancerSourceRanges "
            "publishNotReadyAddresses selector sessionAffinity sessionAffinityConfig "
            "trafficDistribution type",
            ports=_fields("appProtocol name nodePort port protocol targetPort"),
        )
    ),
    "ServiceAccount": _kind("automountServiceAccountToken imagePullSecrets secrets"),
    "StatefulSet": _workload(
        f"{_SETS} ordinals persistentVolumeClaimRetentionPolicy podManagementPolicy replicas "
        "serviceName updateStrategy volumeClaimTemplates"
    ),
}


def unknown_fields(kind: str, obj: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Path of each field that `kind` does not have, and the name it may have been meant for.

    None for a kind that is not in the tables. At most `MAX_TOLD`.
    """
    shape = KINDS.get(kind)
    if shape is None:
        return
    for count, (path, key, known) in enumerate(_unknown(obj, shape, ())):
        if count == MAX_TOLD:
            return
        close = difflib.get_close_matches(key[:80], known, n=1, cutoff=0.6)
        yield format_path(path), close[0] if close else ""


_Path = tuple[str | int, ...]


def _unknown(value: Any, shape: Shape, path: _Path) -> Iterator[tuple[_Path, str, list[str]]]:
    # What has the wrong type is the parsers' to tell.
    if isinstance(value, list):
        for index, each in enumerate(value):
            if isinstance(each, Mapping):
                yield from _unknown(each, shape, (*path, index))
    elif isinstance(value, Mapping):
        for key, each in value.items():
            if key not in shape:
                yield (*path, key), key, list(shape)
            elif (inner := shape[key]) is not None:
                yield from _unknown(each, inner, (*path, key))
