"""PeerAuthentication -> the DENY policies that make the tunnel refuse plain text. Pure.

The tunnel knows no modes. STRICT is one static policy in the root namespace, "deny whoever
has no identity", which each workload that must be strict names. Modes for single ports
become a policy of their own: strict with open ports, or open with strict ports.

The workload's own PeerAuthentication goes before its namespace's, that before the mesh's; at
each level the oldest wins. DISABLE means PERMISSIVE, UNSET inherits. A PeerAuthentication
with a selector has an effect outside the root namespace only (all as in Istio).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from mesh.cluster.objects import is_selected
from mesh.cluster.policies import PeerAuthentication
from mesh.model.authorization import (
    Action,
    Authorization,
    Clause,
    Match,
    PolicyScope,
    Rule,
    StringKind,
    StringMatch,
)

STATIC_STRICT = "istio_converted_static_strict"
CONVERTED_PREFIX = "converted_peer_authentication_"

_NO_IDENTITY = Clause((Match(not_principals=(StringMatch(StringKind.PRESENCE),)),))


@dataclass(frozen=True, slots=True)
class _Effective:
    """Whether plain text is refused by default, and at which ports it is otherwise."""

    is_strict: bool
    exceptions: tuple[int, ...]


def reaches(peer: PeerAuthentication, root_namespace: str) -> str | None:
    """The namespace that one concerns: empty for all, None for none."""
    if peer.selector:
        return None if peer.namespace == root_namespace else peer.namespace
    return "" if peer.namespace == root_namespace else peer.namespace


def policies_for(
    peers: Iterable[PeerAuthentication],
    namespace: str,
    labels: Mapping[str, str],
    root_namespace: str,
) -> tuple[str, ...]:
    """The keys of the converted policies that a workload has to name: at most one."""
    listed = list(peers)
    own = [
        peer
        for peer in listed
        if peer.selector
        and peer.namespace == namespace != root_namespace
        and is_selected(peer.selector, labels)
    ]
    chosen = _oldest(own)
    effective = _effective(chosen, _inherited(listed, namespace, root_namespace))
    if chosen is not None and effective.exceptions:
        return (f"{chosen.namespace}/{CONVERTED_PREFIX}{chosen.name}",)
    return (f"{root_namespace}/{STATIC_STRICT}",) if effective.is_strict else ()


def convert(peers: Iterable[PeerAuthentication], root_namespace: str) -> dict[str, Authorization]:
    """Every policy that workloads may have to name, by key."""
    listed = list(peers)
    found = {}
    if listed:
        static = _deny(STATIC_STRICT, root_namespace, [Rule((_NO_IDENTITY,))])
        found[static.key] = static
    for peer in listed:
        if not peer.selector or peer.namespace == root_namespace:
            continue
        effective = _effective(peer, _inherited(listed, peer.namespace, root_namespace))
        if effective.exceptions:
            name = f"{CONVERTED_PREFIX}{peer.name}"
            policy = _deny(name, peer.namespace, _rules(effective))
            found[policy.key] = policy
    return found


def _rules(effective: _Effective) -> list[Rule]:
    ports = effective.exceptions
    if effective.is_strict:
        # Refused at every port but these: all of "it is not this one" must hold.
        spared = (Clause((Match(not_destination_ports=(port,)),)) for port in ports)
        return [Rule((_NO_IDENTITY, *spared))]
    return [Rule((_NO_IDENTITY, Clause((Match(destination_ports=(port,)),)))) for port in ports]


def _deny(name: str, namespace: str, rules: Iterable[Rule]) -> Authorization:
    return Authorization(name, namespace, PolicyScope.WORKLOAD_SELECTOR, Action.DENY, tuple(rules))


def _inherited(peers: Iterable[PeerAuthentication], namespace: str, root_namespace: str) -> bool:
    """Whether a workload is strict by what mesh and namespace say."""
    wide = [peer for peer in peers if not peer.selector]
    is_strict = False
    for home in (root_namespace, namespace):
        peer = _oldest(each for each in wide if each.namespace == home)
        if peer is not None:
            is_strict = _is_strict(peer.mode, is_strict)
    return is_strict


def _effective(peer: PeerAuthentication | None, inherited: bool) -> _Effective:
    if peer is None:
        return _Effective(inherited, ())
    is_strict = _is_strict(peer.mode, inherited)
    exceptions = (
        port for port, mode in peer.port_modes.items() if _is_strict(mode, is_strict) != is_strict
    )
    return _Effective(is_strict, tuple(sorted(exceptions)))


def _is_strict(mode: str, inherited: bool) -> bool:
    return inherited if mode == "UNSET" else mode == "STRICT"


def _oldest(peers: Iterable[PeerAuthentication]) -> PeerAuthentication | None:
    # Without creation times, as in a plain directory, the name decides, and always the same.
    return min(peers, key=lambda each: (each.created, each.name), default=None)
