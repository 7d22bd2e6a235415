"""Authorization policies between wire (`istio.security`) and model.

Strict on purpose. Other readers drop a matcher that they cannot read; a DENY that lost a
value then denies less, an ALLOW that lost a condition allows more. Here the whole policy
is refused, the control plane hears why, and the previous version stays in force.
"""

from __future__ import annotations

from collections.abc import Iterable

from mesh.errors import ConfigError
from mesh.model.authorization import (
    Action,
    Authorization,
    Clause,
    Match,
    PolicyScope,
    Rule,
    ServiceAccountMatch,
    StringKind,
    StringMatch,
)
from mesh.proto import authorization_pb2
from mesh.xds.scalars import enum_member, enum_number, network_from, network_parts, port_number


def authorization_from_proto(message: authorization_pb2.Authorization) -> Authorization:
    """Raises ConfigError."""
    return Authorization(
        name=message.name,
        namespace=message.namespace,
        scope=enum_member(PolicyScope, message.scope),
        action=enum_member(Action, message.action),
        rules=tuple(
            Rule(
                tuple(
                    Clause(tuple(_match_from(match) for match in clause.matches))
                    for clause in rule.clauses
                )
            )
            for rule in message.rules
        ),
        dry_run=message.dry_run,
    )


def authorization_to_proto(policy: Authorization) -> authorization_pb2.Authorization:
    """Raises ConfigError when an address is not a network."""
    message = authorization_pb2.Authorization(
        name=policy.name,
        namespace=policy.namespace,
        scope=enum_number(policy.scope),
        action=enum_number(policy.action),
        dry_run=policy.dry_run,
    )
    for rule in policy.rules:
        to_rule = message.rules.add()
        for clause in rule.clauses:
            to_clause = to_rule.clauses.add()
            to_clause.matches.extend(_match_to(match) for match in clause.matches)
    return message


def _match_from(message: authorization_pb2.Match) -> Match:
    return Match(
        namespaces=_strings_from(message.namespaces),
        not_namespaces=_strings_from(message.not_namespaces),
        principals=_strings_from(message.principals),
        not_principals=_strings_from(message.not_principals),
        source_ips=_networks_from(message.source_ips),
        not_source_ips=_networks_from(message.not_source_ips),
        destination_ips=_networks_from(message.destination_ips),
        not_destination_ips=_networks_from(message.not_destination_ips),
        destination_ports=tuple(map(port_number, message.destination_ports)),
        not_destination_ports=tuple(map(port_number, message.not_destination_ports)),
        service_accounts=_accounts_from(message.service_accounts),
        not_service_accounts=_accounts_from(message.not_service_accounts),
    )


def _match_to(match: Match) -> authorization_pb2.Match:
    return authorization_pb2.Match(
        namespaces=map(_string_to, match.namespaces),
        not_namespaces=map(_string_to, match.not_namespaces),
        principals=map(_string_to, match.principals),
        not_principals=map(_string_to, match.not_principals),
        source_ips=map(_network_to, match.source_ips),
        not_source_ips=map(_network_to, match.not_source_ips),
        destination_ips=map(_network_to, match.destination_ips),
        not_destination_ips=map(_network_to, match.not_destination_ips),
        destination_ports=match.destination_ports,
        not_destination_ports=match.not_destination_ports,
        service_accounts=map(_account_to, match.service_accounts),
        not_service_accounts=map(_account_to, match.not_service_accounts),
    )


def _strings_from(messages: Iterable[authorization_pb2.StringMatch]) -> tuple[StringMatch, ...]:
    matches = []
    for message in messages:
        match message.WhichOneof("match_type"):
            case "exact":
                matches.append(StringMatch(StringKind.EXACT, message.exact))
            case "prefix":
                matches.append(StringMatch(StringKind.PREFIX, message.prefix))
            case "suffix":
                matches.append(StringMatch(StringKind.SUFFIX, message.suffix))
            case "presence":
                matches.append(StringMatch(StringKind.PRESENCE))
            case _:
                raise ConfigError("a string match says neither exact, prefix, suffix nor presence")
    return tuple(matches)


def _string_to(match: StringMatch) -> authorization_pb2.StringMatch:
    match match.kind:
        case StringKind.EXACT:
            return authorization_pb2.StringMatch(exact=match.value)
        case StringKind.PREFIX:
            return authorization_pb2.StringMatch(prefix=match.value)
        case StringKind.SUFFIX:
            return authorization_pb2.StringMatch(suffix=match.value)
        case StringKind.PRESENCE:
            message = authorization_pb2.StringMatch()
            message.presence.SetInParent()
            return message


def _networks_from(messages: Iterable[authorization_pb2.Address]) -> tuple[str, ...]:
    return tuple(network_from(message.address, message.length) for message in messages)


def _network_to(prefix: str) -> authorization_pb2.Address:
    packed, length = network_parts(prefix)
    return authorization_pb2.Address(address=packed, length=length)


def _accounts_from(
    messages: Iterable[authorization_pb2.ServiceAccountMatch],
) -> tuple[ServiceAccountMatch, ...]:
    return tuple(
        ServiceAccountMatch(message.namespace, message.serviceAccount) for message in messages
    )


def _account_to(match: ServiceAccountMatch) -> authorization_pb2.ServiceAccountMatch:
    return authorization_pb2.ServiceAccountMatch(
        namespace=match.namespace, serviceAccount=match.service_account
    )
