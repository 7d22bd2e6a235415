"""Routes as the waypoint holds them: Gateway API routes on a Service parent, resolved.

The controller has bound the routes, judged them and looked their backends up; what arrives
here can be carried out as it is, or says why it cannot (`Backend.problem`). Field names follow
HTTPRoute and GRPCRoute (gateway.networking.k8s.io/v1); regular expressions are RE2. Values only;
`waypoint.plan` compiles them, by the precedence of the specification.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

RouteKind = Literal["GRPCRoute", "HTTPRoute", "TLSRoute", "TCPRoute"]
PathKind = Literal["Exact", "PathPrefix", "RegularExpression"]
ValueKind = Literal["Exact", "RegularExpression"]


@dataclass(frozen=True, slots=True)
class PathMatch:
    """A path comparison, without the query. A prefix counts whole segments."""

    kind: PathKind = "PathPrefix"
    value: str = "/"


@dataclass(frozen=True, slots=True)
class NamedMatch:
    """A comparison of one header (any case of the name) or one query parameter."""

    name: str
    value: str
    kind: ValueKind = "Exact"


@dataclass(frozen=True, slots=True)
class MethodMatch:
    """A gRPC method. Empty means any."""

    service: str = ""
    method: str = ""
    kind: ValueKind = "Exact"


@dataclass(frozen=True, slots=True)
class RouteMatch:
    """One match: its set fields are AND'ed. `grpc` is set for a GRPCRoute, whose path is unused."""

    path: PathMatch = PathMatch()
    headers: tuple[NamedMatch, ...] = ()
    query_params: tuple[NamedMatch, ...] = ()
    method: str = ""
    grpc: MethodMatch | None = None


@dataclass(frozen=True, slots=True)
class HeaderChange:
    """RequestHeaderModifier or ResponseHeaderModifier; no name is under two of them."""

    set: tuple[tuple[str, str], ...] = ()
    add: tuple[tuple[str, str], ...] = ()
    remove: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class PathChange:
    """A new path: the whole, or in the place of the matched prefix."""

    kind: Literal["ReplaceFullPath", "ReplacePrefixMatch"]
    value: str


@dataclass(frozen=True, slots=True)
class Redirect:
    """RequestRedirect. Empty or None leaves that part as the request has it."""

    scheme: str = ""
    hostname: str = ""
    path: PathChange | None = None
    port: int | None = None
    status: int = 302


@dataclass(frozen=True, slots=True)
class Rewrite:
    """URLRewrite."""

    hostname: str = ""
    path: PathChange | None = None


@dataclass(frozen=True, slots=True)
class Mirror:
    """RequestMirror of `numerator` out of `denominator` requests."""

    backend: Backend
    numerator: int = 100
    denominator: int = 100


@dataclass(frozen=True, slots=True)
class Cors:
    """The CORS filter; `max_age_seconds` is always sent."""

    allow_origins: tuple[str, ...] = ()
    allow_credentials: bool = False
    allow_methods: tuple[str, ...] = ()
    allow_headers: tuple[str, ...] = ()
    expose_headers: tuple[str, ...] = ()
    max_age_seconds: int = 5


@dataclass(frozen=True, slots=True)
class Fault:
    """Injected faults, for tests of the callers: shares are of 0 to 100."""

    delay_seconds: float = 0.0
    delay_percent: float = 0.0
    abort_status: int = 0
    abort_percent: float = 0.0


@dataclass(frozen=True, slots=True)
class RouteFilter:
    """One entry of `filters`: exactly one field is set."""

    request_headers: HeaderChange | None = None
    response_headers: HeaderChange | None = None
    redirect: Redirect | None = None
    rewrite: Rewrite | None = None
    mirror: Mirror | None = None
    cors: Cors | None = None
    fault: Fault | None = None
    extension: str = ""
    """`group/kind/namespace/name` of an ExtensionRef; one that is unknown answers 500."""


@dataclass(frozen=True, slots=True)
class Backend:
    """A backendRef. `service` is `namespace/hostname`; `problem` says why its share of the requests
    is answered 500 (UNAVAILABLE for gRPC), or is empty.
    """

    service: str
    port: int
    weight: int = 1
    filters: tuple[RouteFilter, ...] = ()
    problem: str = ""


@dataclass(frozen=True, slots=True)
class Retry:
    """How often a failed try is repeated. Without codes: connection failures alone."""

    attempts: int = 2
    codes: tuple[int, ...] = ()
    backoff_seconds: float = 0.025
    on_connection_failure: bool = True


@dataclass(frozen=True, slots=True)
class SessionPersistence:
    """Requests of one session go to one endpoint. No `absolute_seconds`: no end."""

    kind: Literal["Cookie", "Header"] = "Cookie"
    name: str = ""
    path: str = "/"
    is_permanent: bool = False
    absolute_seconds: float | None = None


@dataclass(frozen=True, slots=True)
class RouteRule:
    """One rule. Timeouts are seconds, None is none; for TCP and TLS only `backends` counts."""

    name: str = ""
    matches: tuple[RouteMatch, ...] = (RouteMatch(),)
    filters: tuple[RouteFilter, ...] = ()
    backends: tuple[Backend, ...] = ()
    request_timeout: float | None = None
    backend_timeout: float | None = None
    retry: Retry | None = None
    session: SessionPersistence | None = None


@dataclass(frozen=True, slots=True)
class Route:
    """One route as bound to one Service. `ports` are the service ports it is bound to, none is all.
    A consumer route (its namespace is not the Service's) concerns callers of its own namespace.
    `created` is RFC 3339 and orders equals; `source` is `file:line` where the object came from.
    """

    kind: RouteKind
    namespace: str
    name: str
    rules: tuple[RouteRule, ...] = ()
    ports: tuple[int, ...] = ()
    hostnames: tuple[str, ...] = ()
    created: str = ""
    source: str = ""
    is_consumer: bool = False

    @property
    def key(self) -> str:
        """`namespace/name`."""
        return f"{self.namespace}/{self.name}"


@dataclass(frozen=True, slots=True)
class OutlierDetection:
    """When an endpoint is ejected, and for how long (longer each time), seconds.
    `consecutive_errors` counts 502, 503, 504 and no response, `consecutive_5xx` every 5xx too; 0:
    not counted. One endpoint may always be out, if there is another.
    """

    consecutive_errors: int = 5
    base_ejection_seconds: float = 30.0
    max_ejection_percent: int = 50
    consecutive_5xx: int = 0
    min_health_percent: int = 0


@dataclass(frozen=True, slots=True)
class ConnectionLimits:
    """Bounds for one service's port; 0 is none. Retries as a share of the active requests, or, with
    an interval, of the requests in it; `max_retries` is a plain number instead of a share.
    """

    max_connections: int = 0
    max_requests: int = 0
    max_pending: int = 0
    retry_budget_percent: float = 20.0
    retry_budget_minimum: int = 3
    retry_interval_seconds: float = 0.0
    retry_minimum_seconds: float = 1.0
    max_retries: int = 0
    max_requests_per_connection: int = 0
    connect_seconds: float = 0.0
    idle_seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class LoadBalancing:
    """How an endpoint is chosen for each request. `hash_on` is `header:NAME`, `cookie:NAME`,
    `query:NAME` or `source-ip` for CONSISTENT_HASH. A cookie with `cookie_seconds` is given to who
    has none, for that long; 0: for the client's session.
    """

    kind: Literal["LEAST_REQUEST", "RANDOM", "ROUND_ROBIN", "CONSISTENT_HASH"] = "LEAST_REQUEST"
    hash_on: str = ""
    cookie_path: str = "/"
    cookie_seconds: float | None = None
    ring_size: int = 1024


@dataclass(frozen=True, slots=True)
class BackendSettings:
    """What holds for calls to one service, from DestinationRule or XBackendTrafficPolicy."""

    outlier: OutlierDetection | None = OutlierDetection()
    limits: ConnectionLimits = ConnectionLimits()
    balancing: LoadBalancing = LoadBalancing()
    session: SessionPersistence | None = None
    ports: tuple[tuple[int, BackendSettings], ...] = ()
    """Settings of single ports, instead of these."""

    def of(self, port: int) -> BackendSettings:
        """What holds for a port."""
        return dict(self.ports).get(port, self)


DEFAULT_BACKEND = BackendSettings()
