"""Typed, frozen views of AuthorizationPolicy and PeerAuthentication, strictly read.

A misspelt field in a policy is an open door or a closed one that nobody expects, so
unknown fields are refused here, with the field's path; so are values that cannot mean
anything (empty entries, ports that are none, `from: []`). Values that only an L7 proxy
can judge are kept as they are: who translates decides (`istiod_lite.policies`).
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from mesh.cluster.api import Object
from mesh.cluster.fields import Reader, shown
from mesh.cluster.objects import Metadata, read_metadata
from mesh.errors import ConfigError

MAX_TARGETS = 16
ACTIONS = ("ALLOW", "DENY", "AUDIT", "CUSTOM")
MTLS_MODES = ("UNSET", "DISABLE", "PERMISSIVE", "STRICT")

# Conditions that a tunnel can judge, and how their values are read.
L4_CONDITIONS = (
    "source.ip",
    "source.namespace",
    "source.principal",
    "source.serviceAccount",
    "destination.ip",
    "destination.port",
)
_L7_CONDITIONS = (
    "remote.ip",
    "request.auth.principal",
    "request.auth.audiences",
    "request.auth.presenter",
    "connection.sni",
)
_DIGITS = re.compile(r"[0-9]{1,5}")
_L7_CONDITION_PREFIXES = ("request.headers[", "request.auth.claims[", "experimental.envoy.")


@dataclass(frozen=True, slots=True)
class Source:
    """`from[].source`. The last two hold the names of L7 fields that are set."""

    principals: tuple[str, ...] = ()
    not_principals: tuple[str, ...] = ()
    namespaces: tuple[str, ...] = ()
    not_namespaces: tuple[str, ...] = ()
    service_accounts: tuple[str, ...] = ()
    not_service_accounts: tuple[str, ...] = ()
    ip_blocks: tuple[str, ...] = ()
    not_ip_blocks: tuple[str, ...] = ()
    l7: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Operation:
    """`to[].operation`; `l7` maps the names of L7 fields that are set to their values."""

    ports: tuple[int, ...] = ()
    not_ports: tuple[int, ...] = ()
    l7: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Condition:
    """`when[]`."""

    key: str
    values: tuple[str, ...] = ()
    not_values: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Rule:
    """One rule; an empty part means "any"."""

    sources: tuple[Source, ...] = ()
    operations: tuple[Operation, ...] = ()
    conditions: tuple[Condition, ...] = ()

    @property
    def needs_http(self) -> bool:
        """Whether some part of it can be judged by an HTTP proxy only."""
        return (
            any(each.l7 for each in self.sources)
            or any(each.l7 for each in self.operations)
            or any(each.key not in L4_CONDITIONS for each in self.conditions)
        )


@dataclass(frozen=True, slots=True)
class TargetRef:
    """What a policy is attached to instead of pods."""

    group: str
    kind: str
    name: str
    namespace: str = ""
    section: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class AuthorizationPolicy(Metadata):
    """`selector` None: the whole namespace (or mesh). No rules never matches. `provider` is the
    name of the external authorizer of CUSTOM.
    """

    action: str = "ALLOW"
    provider: str = ""
    selector: Mapping[str, str] | None = None
    target_refs: tuple[TargetRef, ...] = ()
    rules: tuple[Rule, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerAuthentication(Metadata):
    """`selector` None: the whole namespace (or mesh). `port_modes` are by workload port."""

    selector: Mapping[str, str] | None = None
    mode: str = "UNSET"
    port_modes: Mapping[int, str] = field(default_factory=dict)


def parse_authorization_policy(obj: Object) -> AuthorizationPolicy:
    """Read an AuthorizationPolicy. Raises ConfigError naming the field."""
    top = Reader(obj).only("apiVersion", "kind", "metadata", "spec", "status")
    spec = top.get("spec").only(
        "selector", "targetRef", "targetRefs", "rules", "action", "provider"
    )
    action = spec.get("action").choice(ACTIONS, "ALLOW")
    if spec.get("provider").exists and action != "CUSTOM":
        spec.get("provider").fail("only a CUSTOM policy has a provider")
    selector = read_selector(spec.get("selector"))
    refs = read_target_refs(spec)
    if refs and selector is not None:
        spec.get("targetRefs").fail("beside a selector: a policy has one or the other")
    return AuthorizationPolicy(
        **read_metadata(obj),
        action=action,
        provider=spec.get("provider").only("name").get("name").text(),
        selector=selector,
        target_refs=refs,
        rules=tuple(_rule(each) for each in spec.get("rules").items()),
    )


def parse_peer_authentication(obj: Object) -> PeerAuthentication:
    """Read a PeerAuthentication. Raises ConfigError naming the field."""
    top = Reader(obj).only("apiVersion", "kind", "metadata", "spec", "status")
    spec = top.get("spec").only("selector", "mtls", "portLevelMtls")
    selector = read_selector(spec.get("selector"))
    modes = {}
    for key, each in spec.get("portLevelMtls").entries():
        if not _DIGITS.fullmatch(key):
            each.fail(f"not a port: {shown(key)}")
        number = Reader(int(key), each.path).port()
        modes[number] = each.only("mode").get("mode").choice(MTLS_MODES, "UNSET")
    if modes and not selector:
        spec.get("portLevelMtls").fail("needs a selector with labels")
    return PeerAuthentication(
        **read_metadata(obj),
        selector=selector,
        mode=spec.get("mtls").only("mode").get("mode").choice(MTLS_MODES, "UNSET"),
        port_modes=modes,
    )


def read_selector(selector: Reader) -> Mapping[str, str] | None:
    """The labels of a selector, None if there is no selector. Raises ConfigError."""
    if not selector.exists:
        return None
    labels = selector.only("matchLabels").get("matchLabels")
    for key, each in labels.entries():
        if "*" in key or "*" in each.text():
            each.fail("wildcards are not for labels")
    return labels.labels()


def read_target_refs(spec: Reader) -> tuple[TargetRef, ...]:
    """What a policy is attached to, `targetRef` of old included. Raises ConfigError."""
    refs = [_target_ref(each) for each in spec.get("targetRefs").items()]
    if spec.get("targetRef").exists:
        refs.append(_target_ref(spec.get("targetRef")))
    if len(refs) > MAX_TARGETS:
        spec.get("targetRefs").fail(f"{len(refs)} targets, allowed are {MAX_TARGETS}")
    return tuple(refs)


def _target_ref(ref: Reader) -> TargetRef:
    ref.only("group", "kind", "name", "namespace", "sectionName")
    group, kind = ref.get("group").text(), ref.get("kind").name()
    if ref.get("sectionName").exists and not kind.endswith("Route"):
        ref.get("sectionName").fail("only rules of routes can be named here")
    return TargetRef(
        "" if group == "core" else group,
        kind,
        ref.get("name").name(),
        ref.get("namespace").text(),
        ref.get("sectionName").text(),
    )


def _rule(rule: Reader) -> Rule:
    if not rule.exists:
        rule.fail("empty: write {} for a rule that always matches")
    rule.only("from", "to", "when")
    for part in ("from", "to"):
        if rule.get(part).value == []:
            rule.get(part).fail("an empty list: leave it out to match any")
    return Rule(
        tuple(_source(each) for each in rule.get("from").items()),
        tuple(_operation(each) for each in rule.get("to").items()),
        tuple(_condition(each) for each in rule.get("when").items()),
    )


_SOURCE_L7 = (
    "requestPrincipals",
    "notRequestPrincipals",
    "remoteIpBlocks",
    "notRemoteIpBlocks",
)
_OPERATION_L7 = ("hosts", "notHosts", "methods", "notMethods", "paths", "notPaths")


def _source(entry: Reader) -> Source:
    source = entry.only("source").get("source")
    if not source.value:
        source.fail("empty")
    source.only(
        "principals",
        "notPrincipals",
        "namespaces",
        "notNamespaces",
        "serviceAccounts",
        "notServiceAccounts",
        "ipBlocks",
        "notIpBlocks",
        *_SOURCE_L7,
    )
    accounts = (*source.get("serviceAccounts").items(), *source.get("notServiceAccounts").items())
    for each in accounts:
        if "*" in each.name() or each.name().count("/") > 1:
            each.fail(f"not a service account: {shown(each.value)}", hint="namespace/name, or name")
        if any(source.get(key).value for key in ("principals", "namespaces")):
            each.fail("service accounts beside principals or namespaces: name one or the other")
    found = Source(
        principals=source.get("principals").texts(),
        not_principals=source.get("notPrincipals").texts(),
        namespaces=source.get("namespaces").texts(),
        not_namespaces=source.get("notNamespaces").texts(),
        service_accounts=source.get("serviceAccounts").texts(),
        not_service_accounts=source.get("notServiceAccounts").texts(),
        ip_blocks=_networks(source.get("ipBlocks")),
        not_ip_blocks=_networks(source.get("notIpBlocks")),
        l7=_l7(source, _SOURCE_L7),
    )
    if found == Source():
        source.fail("matches nothing: every list in it is empty")
    return found


def _operation(entry: Reader) -> Operation:
    operation = entry.only("operation").get("operation")
    if not operation.value:
        operation.fail("empty")
    operation.only("ports", "notPorts", *_OPERATION_L7)
    found = Operation(
        ports=_ports(operation.get("ports")),
        not_ports=_ports(operation.get("notPorts")),
        l7=_l7(operation, _OPERATION_L7),
    )
    if found == Operation():
        operation.fail("matches nothing: every list in it is empty")
    return found


def _l7(of: Reader, names: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
    return {name: of.get(name).texts() for name in names if of.get(name).value}


def _condition(condition: Reader) -> Condition:
    condition.only("key", "values", "notValues")
    key = condition.get("key").name()
    known = key in (*L4_CONDITIONS, *_L7_CONDITIONS) or (
        key.startswith(_L7_CONDITION_PREFIXES) and key.endswith("]")
    )
    if not known and not key.startswith("experimental.envoy."):
        condition.get("key").fail(f"unknown attribute {shown(key)}")
    values, not_values = condition.get("values"), condition.get("notValues")
    if not values.value and not not_values.value:
        condition.fail("neither values nor notValues")
    for part in (values, not_values):
        if key in ("source.ip", "destination.ip"):
            _networks(part)
        elif key == "destination.port":
            _ports(part)
    return Condition(key, values.texts(), not_values.texts())


def _networks(blocks: Reader) -> tuple[str, ...]:
    return tuple(_network(each) for each in blocks.items())


def _network(block: Reader) -> str:
    try:
        return parse_network(block.name())
    except ConfigError:
        block.fail(f"not an address or a CIDR block: {shown(block.value)}")


def parse_network(text: str) -> str:
    """An address or CIDR block as a canonical CIDR block. Raises ConfigError."""
    try:
        return str(ipaddress.ip_network(text, strict=False))
    except ValueError as exc:
        raise ConfigError(f"not an address or a CIDR block: {text[:80]!r}") from exc


def _ports(ports: Reader) -> tuple[int, ...]:
    return tuple(_port(each) for each in ports.items())


def _port(port: Reader) -> int:
    # The API writes ports as text here; a bare number can only be meant the same way.
    if isinstance(port.value, str) and _DIGITS.fullmatch(port.value):
        return Reader(int(port.value), port.path).port()
    return port.port()
