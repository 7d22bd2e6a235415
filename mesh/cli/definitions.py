"""The CustomResourceDefinitions: of our own kinds, and of Istio's where they are missing. Pure.

Istio's own definitions are stricter than these and are never replaced: they let a cluster
without Istio take the same YAML. What an object says is judged by the controller, strictly.
"""

from __future__ import annotations

from mesh.cluster.api import Object
from mesh.cluster.l7_schema import rate_limit_spec, redaction_spec

_OPEN: Object = {"type": "object", "x-kubernetes-preserve-unknown-fields": True}
_CONDITION: Object = {
    "type": "object",
    "required": ["type", "status"],
    "properties": {
        "type": {"type": "string"},
        "status": {"type": "string", "enum": ["True", "False", "Unknown"]},
        "reason": {"type": "string"},
        "message": {"type": "string"},
        "lastTransitionTime": {"type": "string", "format": "date-time"},
        "observedGeneration": {"type": "integer", "format": "int64"},
    },
}
_STATUS: Object = {
    "type": "object",
    "x-kubernetes-preserve-unknown-fields": True,
    "properties": {
        "conditions": {
            "type": "array",
            "items": _CONDITION,
            "x-kubernetes-list-type": "map",
            "x-kubernetes-list-map-keys": ["type"],
        }
    },
}
_AGE = {"name": "Age", "type": "date", "jsonPath": ".metadata.creationTimestamp"}


def ours() -> list[Object]:
    """RateLimitPolicy and RedactionPolicy."""
    columns: list[Object] = [
        {"name": "Target", "type": "string", "jsonPath": ".spec.targetRefs[*].name"},
        {
            "name": "Accepted",
            "type": "string",
            "jsonPath": '.status.conditions[?(@.type=="Accepted")].status',
        },
        {
            "name": "Reason",
            "type": "string",
            "priority": 1,
            "jsonPath": '.status.conditions[?(@.type=="Accepted")].reason',
        },
        _AGE,
    ]
    return [
        _definition("ambit.dev", kind, plural, short, ["v1alpha1"], spec, columns)
        for kind, plural, short, spec in (
            ("RateLimitPolicy", "ratelimitpolicies", "rlp", rate_limit_spec()),
            ("RedactionPolicy", "redactionpolicies", "rdp", redaction_spec()),
        )
    ]


def istios() -> list[Object]:
    """The kinds of Istio that the controller reads."""
    action = {"name": "Action", "type": "string", "jsonPath": ".spec.action"}
    mode = {"name": "Mode", "type": "string", "jsonPath": ".spec.mtls.mode"}
    hosts = {"name": "Hosts", "type": "string", "jsonPath": ".spec.hosts"}
    host = {"name": "Host", "type": "string", "jsonPath": ".spec.host"}
    address = {"name": "Address", "type": "string", "jsonPath": ".spec.address"}
    security, networking = "security.istio.io", "networking.istio.io"
    versions, both = ["v1", "v1beta1"], ["v1", "v1beta1", "v1alpha3"]
    return [
        _definition(
            security, "AuthorizationPolicy", "authorizationpolicies", "ap", versions, _OPEN,
            [action, _AGE],
        ),
        _definition(
            security, "PeerAuthentication", "peerauthentications", "pa", versions, _OPEN,
            [mode, _AGE],
        ),
        _definition(
            security, "RequestAuthentication", "requestauthentications", "ra", versions, _OPEN,
            [_AGE],
        ),
        _definition(
            networking, "ServiceEntry", "serviceentries", "se", both, _OPEN, [hosts, _AGE]
        ),
        _definition(
            networking, "WorkloadEntry", "workloadentries", "we", both, _OPEN, [address, _AGE]
        ),
        _definition(
            networking, "DestinationRule", "destinationrules", "dr", both, _OPEN, [host, _AGE]
        ),
    ]  # fmt: skip


def _definition(
    group: str,
    kind: str,
    plural: str,
    short: str,
    versions: list[str],
    spec: Object,
    columns: list[Object],
) -> Object:
    required = {"required": ["spec"]} if group == "ambit.dev" else {}
    schema = {"type": "object", **required, "properties": {"spec": spec, "status": _STATUS}}
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {
            "name": f"{plural}.{group}",
            "labels": {"app.kubernetes.io/part-of": "ambit"},
        },
        "spec": {
            "group": group,
            "scope": "Namespaced",
            "names": {
                "kind": kind,
                "plural": plural,
                "singular": kind.lower(),
                "listKind": f"{kind}List",
                "shortNames": [short],
                "categories": ["ambit" if group == "ambit.dev" else "istio-io"],
            },
            "versions": [
                {
                    "name": version,
                    "served": True,
                    "storage": version == versions[0],
                    "schema": {"openAPIV3Schema": schema},
                    "subresources": {"status": {}},
                    "additionalPrinterColumns": columns,
                }
                for version in versions
            ],
        },
    }
