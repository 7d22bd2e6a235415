"""Specs of our own policies that must be taken, and some that must not, for reader and schema."""

from __future__ import annotations

import base64
from typing import Any

from google.protobuf import descriptor_pb2

Spec = dict[str, Any]
TARGET = {"group": "", "kind": "Service", "name": "web"}
WHEN = {
    "methods": ["GET"],
    "paths": ["/api/*"],
    "hosts": ["*.shop"],
    "headers": [{"name": "X-Tier", "value": "free"}, {"name": "X-Any"}],
    "principals": ["cluster.local/ns/shop/sa/*"],
    "notPrincipals": ["*/admin"],
    "namespaces": ["shop"],
}
LIMIT = {"requests": 10, "window": "1m"}


def descriptors() -> str:
    """A FileDescriptorSet with shop.v1.User.email, in base64."""
    field = descriptor_pb2.FieldDescriptorProto(name="email", number=1, type=9, label=1)
    user = descriptor_pb2.DescriptorProto(name="User", field=[field])
    file = descriptor_pb2.FileDescriptorProto(
        name="user.proto", package="shop.v1", syntax="proto3", message_type=[user]
    )
    whole = descriptor_pb2.FileDescriptorSet(file=[file])
    return base64.b64encode(whole.SerializeToString()).decode()


def limit(*rules: Any, **more: Any) -> tuple[str, Spec]:
    return "RateLimitPolicy", {"targetRefs": [TARGET], "rules": list(rules), **more}


def redaction(*rules: Any, **more: Any) -> tuple[str, Spec]:
    return "RedactionPolicy", {"targetRefs": [TARGET], "rules": list(rules), **more}


ACCEPTED = [
    limit({"limit": LIMIT}),
    limit(
        {
            "name": "per-user",
            "limit": {**LIMIT, "burst": 5},
            "when": WHEN,
            "key": [{"type": "Identity"}, {"type": "Header", "name": "X-User"}],
            "overrides": [{"key": ["a", ""], "requests": 99}],
            "cost": 2,
            "costHeader": "X-Cost",
            "shadow": True,
        },
        {"limit": {"requests": 0, "window": "100ms"}},
        shared={
            "type": "Redis",
            "address": "redis://r:6379/0",
            "domain": "d",
            "timeout": "20ms",
            "onFailure": "Deny",
            "replicas": 2,
        },
        headers=False,
    ),
    limit(
        {"name": "a", "key": [{"type": "Method", "descriptorKey": "verb"}]},
        {"name": "b", "descriptor": [{"key": "plan", "value": "gold"}]},
        {"limit": LIMIT},
        shared={"type": "RateLimitService", "address": "limits.shop:8081", "onFailure": "Deny"},
    ),
    redaction({"detector": "email"}),
    redaction({"headers": ["X-Card"], "action": {"type": "drop"}}, maxBodyBytes=0),
    redaction({"grpcFields": ["shop.v1.User.email"]}, descriptorFile="shop.pb"),
    redaction({"grpcFields": ["shop.v1.User.email"]}, descriptors=descriptors()),
    redaction(
        {
            "name": "card",
            "detector": "custom",
            "pattern": "[0-9]{16}",
            "validator": "luhn",
            "jsonPaths": ["$.a.b[*].c", "$..card"],
            "headers": ["X-Card"],
            "cookies": ["c"],
            "queryParams": ["q"],
            "formFields": ["f"],
            "action": {"type": "mask", "keepLast": 4, "mask": "#"},
        },
        {"detector": "iban", "action": {"type": "hash"}},
        direction="Response",
        when=WHEN,
        onUninspectable="Pass",
        maxBodyBytes=1 << 20,
        dryRun=True,
        keyFile="key",
        audit=False,
    ),
]

# Each is refused by the reader; the second half also needs the schema's expressions (CEL).
REFUSED_BY_SHAPE = [
    limit(),
    limit({"limit": {"requests": 1}}),
    limit({"limit": {"window": "1s"}}),
    limit({"limit": {**LIMIT, "window": "soon"}}),
    limit({"limit": {**LIMIT, "requests": -1}}),
    limit({"limit": {**LIMIT, "requests": "10"}}),
    limit({"limit": {**LIMIT, "requests": 10**10}}),
    limit({"limit": LIMIT, "key": [{}]}),
    limit({"limit": LIMIT, "key": [{"type": "Shoe"}]}),
    limit({"limit": LIMIT, "when": {"paths": []}}),
    limit({"limit": LIMIT, "when": {"paths": "/a"}}),
    limit({"limit": LIMIT}, shared={"onFailure": "Shrug"}),
    limit({"limit": LIMIT}, targetRefs=[]),
    limit({"limit": LIMIT}, targetRefs=[TARGET] * 17),
    limit({"limit": LIMIT}, targetRefs=[{"kind": "Service"}]),
    limit(*[{"limit": LIMIT}] * 65),
    redaction(),
    redaction({"detector": "shoe-size"}),
    redaction({"headers": [""]}),
    redaction({"detector": "email"}, maxBodyBytes=1 << 40),
    redaction({"detector": "email"}, direction="Up"),
    redaction({"detector": "email"}, dryRun="yes"),
    redaction({"detector": "email", "action": {"type": "mask", "mask": "#" * 65}}),
]
REFUSED_BY_RULES = [
    limit({}),
    limit({"limit": LIMIT, "key": [{"type": "Header"}]}),
    limit({"limit": LIMIT, "key": [{"type": "Path", "name": "x"}]}),
    limit({"limit": LIMIT, "overrides": [{"key": ["a"], "requests": 1}]}),
    limit({"limit": LIMIT}, shared={"type": "Redis"}),
    limit({"limit": LIMIT}, shared={"address": "redis://r"}),
    limit({"limit": LIMIT}, targetRefs=[{**TARGET, "sectionName": "http"}]),
    redaction({}),
    redaction({"action": {"type": "drop"}}),
    redaction({"detector": "custom"}),
    redaction({"detector": "email", "pattern": "x"}),
    redaction({"detector": "email", "action": {"type": "hash"}}),
    redaction({"detector": "email", "action": {"type": "drop", "keepLast": 1}}),
]


def policy(kind: str, spec: Spec, name: str = "p", namespace: str = "demo") -> Spec:
    return {
        "apiVersion": "ambit.dev/v1alpha1",
        "kind": kind,
        "metadata": {"name": name, "namespace": namespace},
        "spec": spec,
    }
