"""L7 policies as the waypoint holds them, and the configuration that carries them.

One `TrafficConfig` is one xDS resource: what a waypoint does for one service, or, with an empty
service, for everything that passes it (policies that target the Gateway or its class). The
controller has resolved targets; `source` of a policy is `file:line` where one is known.

String lists of an authorization keep the syntax of `security.istio.io/v1`: exact, `prefix*`,
`*suffix`, `*`, path templates. The waypoint compiles them. Values only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

from mesh.model.route import DEFAULT_BACKEND, BackendSettings, Route

OnFailure = Literal["Allow", "Deny"]
L7Action = Literal["ALLOW", "DENY", "AUDIT", "CUSTOM"]


@dataclass(frozen=True, slots=True)
class L7Source:
    """`from[].source`: set fields are AND'ed, values OR'ed, `not_` is none of."""

    principals: tuple[str, ...] = ()
    not_principals: tuple[str, ...] = ()
    request_principals: tuple[str, ...] = ()
    not_request_principals: tuple[str, ...] = ()
    namespaces: tuple[str, ...] = ()
    not_namespaces: tuple[str, ...] = ()
    service_accounts: tuple[str, ...] = ()
    not_service_accounts: tuple[str, ...] = ()
    ip_blocks: tuple[str, ...] = ()
    not_ip_blocks: tuple[str, ...] = ()
    remote_ip_blocks: tuple[str, ...] = ()
    not_remote_ip_blocks: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class L7Operation:
    """`to[].operation`."""

    hosts: tuple[str, ...] = ()
    not_hosts: tuple[str, ...] = ()
    ports: tuple[str, ...] = ()
    not_ports: tuple[str, ...] = ()
    methods: tuple[str, ...] = ()
    not_methods: tuple[str, ...] = ()
    paths: tuple[str, ...] = ()
    not_paths: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class L7Condition:
    """`when[]`."""

    key: str
    values: tuple[str, ...] = ()
    not_values: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class L7Rule:
    """Any `source`, any `operation`, every `condition`; a missing part is anything."""

    sources: tuple[L7Source, ...] = ()
    operations: tuple[L7Operation, ...] = ()
    conditions: tuple[L7Condition, ...] = ()


@dataclass(frozen=True, slots=True)
class ExternalAuthorizer:
    """A CUSTOM provider: ext_authz over gRPC or HTTP. `service` is `namespace/hostname`; names of
    headers have the syntax of policies' strings. `problem`: it cannot be asked, and denies.
    """

    name: str
    protocol: Literal["grpc", "http"]
    service: str
    port: int
    timeout_seconds: float = 5.0
    is_fail_open: bool = False
    status_on_error: int = 403
    path_prefix: str = ""
    request_headers: tuple[str, ...] = ()
    upstream_headers_on_allow: tuple[str, ...] = ()
    downstream_headers_on_deny: tuple[str, ...] = ()
    max_body_bytes: int = 0
    allows_partial_body: bool = False
    packs_body_as_bytes: bool = False
    additional_headers: tuple[tuple[str, str], ...] = ()
    downstream_headers_on_allow: tuple[str, ...] = ()
    problem: str = ""


@dataclass(frozen=True, slots=True)
class L7Authorization:
    """One AuthorizationPolicy. `problem`: it was not understood, and denies what it targets."""

    namespace: str
    name: str
    action: L7Action = "ALLOW"
    rules: tuple[L7Rule, ...] = ()
    is_dry_run: bool = False
    provider: ExternalAuthorizer | None = None
    source: str = ""
    problem: str = ""


@dataclass(frozen=True, slots=True)
class TokenPlace:
    """Where a token is looked for; `kind` header takes a prefix."""

    kind: Literal["header", "param", "cookie"]
    name: str
    prefix: str = ""


@dataclass(frozen=True, slots=True)
class JwtRule:
    """`jwtRules[]` of a RequestAuthentication. No `jwks` and no `jwks_uri`: OIDC discovery."""

    issuer: str
    audiences: tuple[str, ...] = ()
    jwks: str = ""
    jwks_uri: str = ""
    places: tuple[TokenPlace, ...] = ()
    forwards_token: bool = False
    payload_header: str = ""
    claim_headers: tuple[tuple[str, str], ...] = ()
    space_delimited_claims: tuple[str, ...] = ()
    timeout_seconds: float = 5.0


@dataclass(frozen=True, slots=True)
class RequestAuthentication:
    """Which tokens count."""

    namespace: str
    name: str
    rules: tuple[JwtRule, ...] = ()
    source: str = ""


@dataclass(frozen=True, slots=True)
class RequestCondition:
    """Which requests a rate limit or redaction concerns: set fields AND'ed, values OR'ed, in the
    syntax of AuthorizationPolicy strings; `headers` are name and value (`*`: present).
    `route_rules` are `namespace/name` of a route, or `namespace/name/rule` with the rule's name.
    """

    methods: tuple[str, ...] = ()
    paths: tuple[str, ...] = ()
    hosts: tuple[str, ...] = ()
    headers: tuple[tuple[str, str], ...] = ()
    principals: tuple[str, ...] = ()
    not_principals: tuple[str, ...] = ()
    namespaces: tuple[str, ...] = ()
    route_rules: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class RateLimitKey:
    """A part of the bucket's key. `name` is the header's or claim's; `descriptor_key` what a
    rate-limit service calls it, empty for the name or the kind in lower case.
    """

    kind: Literal["Identity", "Namespace", "SourceIP", "Header", "Path", "Method", "Claim", "Host"]
    name: str = ""
    descriptor_key: str = ""


@dataclass(frozen=True, slots=True)
class RateLimitOverride:
    """Another limit for one key: the values of the rule's key parts, in their order."""

    key: tuple[str, ...]
    requests: int


UNIT_SECONDS: Final = (1.0, 60.0, 3600.0, 86400.0)
"""The windows that a rate-limit service can be told: second, minute, hour and day."""


@dataclass(frozen=True, slots=True)
class RateLimitRule:
    """`requests` in `window_seconds` for each key, `burst` at once (0: as many as `requests`).
    Each request costs `cost`, or what the header `cost_header` of the request says.

    A window of 0 leaves the limit to a rate-limit service. That is asked with `descriptor`, fixed
    keys and values, before those of `keys`; None: its `generic_key` is the rule's name.
    """

    name: str
    requests: int
    window_seconds: float
    burst: int = 0
    condition: RequestCondition = RequestCondition()
    keys: tuple[RateLimitKey, ...] = ()
    overrides: tuple[RateLimitOverride, ...] = ()
    cost: int = 1
    cost_header: str = ""
    is_shadow: bool = False
    descriptor: tuple[tuple[str, str], ...] | None = None


@dataclass(frozen=True, slots=True)
class SharedLimiter:
    """Where buckets are shared. `address` is `redis://host:port/db`, or `host:port` (perhaps with
    `namespace/` before it) of a rate-limit service in the mesh. `LocalShare` divides the limit by
    `replicas` while the store does not answer.
    """

    kind: Literal["Local", "Redis", "RateLimitService"] = "Local"
    address: str = ""
    domain: str = "ambit"
    timeout_seconds: float = 0.05
    on_failure: Literal["Allow", "Deny", "LocalShare"] = "LocalShare"
    replicas: int = 1


@dataclass(frozen=True, slots=True)
class RateLimitPolicy:
    """`ambit.dev/v1alpha1` RateLimitPolicy. A request is throttled if any rule's bucket is over."""

    namespace: str
    name: str
    rules: tuple[RateLimitRule, ...] = ()
    shared: SharedLimiter = SharedLimiter()
    sends_headers: bool = True
    source: str = ""
    problem: str = ""


DetectorKind = Literal[
    "email", "phone", "payment-card", "iban", "national-id", "ip", "jwt", "cloud-key",
    "private-key", "custom",
]  # fmt: skip


@dataclass(frozen=True, slots=True)
class RedactionAction:
    """What happens to a value: `mask` keeps `keep_last`; `hash` and `tokenize` are keyed."""

    kind: Literal["mask", "drop", "hash", "tokenize", "block"] = "mask"
    keep_last: int = 0
    mask: str = "*"


@dataclass(frozen=True, slots=True)
class RedactionRule:
    """One search: by detector anywhere in what is covered, or by place. `pattern` is RE2 (detector
    custom). Places: header names, cookie names, query parameters, JSON paths (`$.a.b[*].c`,
    `$..name`), form fields, fields of gRPC messages (`shop.v1.User.email`, or by path).
    """

    name: str
    detector: DetectorKind | None = None
    pattern: str = ""
    validator: Literal["", "luhn", "mod97"] = ""
    headers: tuple[str, ...] = ()
    cookies: tuple[str, ...] = ()
    query_params: tuple[str, ...] = ()
    json_paths: tuple[str, ...] = ()
    form_fields: tuple[str, ...] = ()
    grpc_fields: tuple[str, ...] = ()
    action: RedactionAction = RedactionAction()


@dataclass(frozen=True, slots=True)
class RedactionPolicy:
    """`ambit.dev/v1alpha1` RedactionPolicy. `key_file` names the mounted secret of hash and
    tokenize; `on_uninspectable` says what happens to content that cannot be looked into, which is
    also what is longer than `max_body_bytes` (0: any length). `descriptors` is a FileDescriptorSet
    in base64; `descriptor_file` one beside the keys.
    """

    namespace: str
    name: str
    direction: Literal["Request", "Response", "Both"] = "Both"
    condition: RequestCondition = RequestCondition()
    rules: tuple[RedactionRule, ...] = ()
    on_uninspectable: Literal["Pass", "Block"] = "Block"
    max_body_bytes: int = 0
    is_dry_run: bool = False
    key_file: str = ""
    descriptors: str = ""
    descriptor_file: str = ""
    audits: bool = True
    source: str = ""
    problem: str = ""


@dataclass(frozen=True, slots=True)
class TrafficConfig:
    """What a waypoint does for `service` (`namespace/hostname`), or for everything (empty).

    `gateway` is the waypoint, `namespace/name`. The order of policies is their precedence.
    """

    gateway: str
    service: str = ""
    routes: tuple[Route, ...] = ()
    backend: BackendSettings = DEFAULT_BACKEND
    backends: tuple[tuple[str, BackendSettings], ...] = ()
    """Settings of other services that the routes lead to, `namespace/hostname`."""
    authorizations: tuple[L7Authorization, ...] = ()
    authentications: tuple[RequestAuthentication, ...] = ()
    rate_limits: tuple[RateLimitPolicy, ...] = ()
    redactions: tuple[RedactionPolicy, ...] = ()
    path_normalization: Literal["NONE", "BASE", "MERGE_SLASHES", "DECODE_AND_MERGE_SLASHES"] = (
        "BASE"
    )
    shows_client_identity: bool = False
    """Whether callees get `x-forwarded-client-cert`; what callers send of it is removed."""
    explains_denials: bool = False
    """Whether a denial's response names policy and rule."""

    @property
    def key(self) -> str:
        """The xDS resource name."""
        return f"{self.gateway}/{self.service}" if self.service else self.gateway
