"""What the daemons may do with the Kubernetes API: the least that the code uses. Pure.

Each rule says what for. ztunnel has none at all.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mesh.cli.values import (
    CA_SECRET,
    GATEWAY_API,
    LEASE,
    ROOT_CERTIFICATE,
    Values,
    global_metadata,
    metadata_of,
)
from mesh.cluster.api import Object
from mesh.cluster.mesh_config import NAME as MESH_CONFIG

_ROUTES = ("httproutes", "grpcroutes", "tcproutes", "tlsroutes")
_READ = ("get", "list", "watch")


def _rule(group: str, resources: tuple[str, ...], verbs: tuple[str, ...], *names: str) -> Object:
    rule: Object = {"apiGroups": [group], "resources": list(resources), "verbs": list(verbs)}
    return {**rule, "resourceNames": list(names)} if names else rule


def _bound(
    kind: str, metadata: Mapping[str, Any], rules: list[Object], app: str, values: Values
) -> list[Object]:
    """A role and its binding to `app`'s service account."""
    api = "rbac.authorization.k8s.io"
    return [
        {"apiVersion": f"{api}/v1", "kind": kind, "metadata": dict(metadata), "rules": rules},
        {
            "apiVersion": f"{api}/v1",
            "kind": f"{kind}Binding",
            "metadata": dict(metadata),
            "roleRef": {"apiGroup": api, "kind": kind, "name": metadata["name"]},
            "subjects": [{"kind": "ServiceAccount", "name": app, "namespace": values.namespace}],
        },
    ]


def controller_rights(values: Values) -> list[Object]:
    """Roles of istiod, and their bindings."""
    everywhere = [
        # What the mesh is made of.
        _rule("", ("namespaces", "nodes", "pods", "services"), _READ),
        _rule("discovery.k8s.io", ("endpointslices",), _READ),
        _rule(
            "security.istio.io",
            ("authorizationpolicies", "peerauthentications", "requestauthentications"),
            _READ,
        ),
        _rule(
            "networking.istio.io", ("serviceentries", "workloadentries", "destinationrules"), _READ
        ),
        _rule("gateway.networking.x-k8s.io", ("xbackendtrafficpolicies", "xmeshes"), _READ),
        _rule(GATEWAY_API, ("gateways", "gatewayclasses", "referencegrants", *_ROUTES), _READ),
        _rule("ambit.dev", ("ratelimitpolicies", "redactionpolicies"), _READ),
        # Whose token is this?
        _rule("authentication.k8s.io", ("tokenreviews",), ("create",)),
        # And when nobody can be asked: the public keys that the tokens are signed with.
        {
            "nonResourceURLs": ["/.well-known/openid-configuration", "/openid/v1/jwks"],
            "verbs": ["get"],
        },
        # The root certificate, in every namespace; server-side apply creates by name.
        _rule("", ("configmaps",), ("get", "create", "patch"), ROOT_CERTIFICATE),
        # What became of policies, routes and gateways.
        _rule(
            GATEWAY_API,
            tuple(f"{each}/status" for each in ("gateways", "gatewayclasses", *_ROUTES)),
            ("patch",),
        ),
        _rule(
            "security.istio.io",
            (
                "authorizationpolicies/status",
                "peerauthentications/status",
                "requestauthentications/status",
            ),
            ("patch",),
        ),
        _rule(
            "networking.istio.io", ("destinationrules/status", "serviceentries/status"), ("patch",)
        ),
        _rule(
            "gateway.networking.x-k8s.io",
            ("xbackendtrafficpolicies/status", "xmeshes/status"),
            ("patch",),
        ),
        _rule("ambit.dev", ("ratelimitpolicies/status", "redactionpolicies/status"), ("patch",)),
        _rule("", ("services/status",), ("patch",)),
        _rule("", ("events",), ("create", "patch")),
        # Waypoints: made in the namespace of their Gateway.
        _rule("apps", ("deployments",), ("get", "list", "watch", "create", "patch", "delete")),
        _rule("", ("services", "serviceaccounts"), ("get", "create", "patch", "delete")),
        _rule("", ("serviceaccounts",), ("list", "watch")),
    ]
    at_home = [
        # Names of what is created by POST cannot be told apart.
        _rule("", ("secrets",), ("create",)),
        _rule("", ("secrets",), ("get", "update"), CA_SECRET),
        # MeshConfig, for the external authorizers that it names.
        _rule("", ("configmaps",), ("list", "watch"), MESH_CONFIG),
        _rule("coordination.k8s.io", ("leases",), ("create",)),
        _rule("coordination.k8s.io", ("leases",), ("get", "update"), LEASE),
    ]
    return [
        *_bound("ClusterRole", global_metadata("istiod"), everywhere, "istiod", values),
        *_bound("Role", metadata_of(values, "istiod"), at_home, "istiod", values),
    ]


def agent_rights(values: Values) -> list[Object]:
    """The role of netconfig, and its binding."""
    rules = [
        _rule("", ("pods", "namespaces"), _READ),
        # The annotation that says whether a pod is captured.
        _rule("", ("pods",), ("patch",)),
    ]
    return _bound("ClusterRole", global_metadata("netconfig"), rules, "netconfig", values)
