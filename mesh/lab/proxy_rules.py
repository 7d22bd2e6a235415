"""The nftables ruleset of a node: what kube-proxy does, for the Services of the lab.

Pure. Cluster IP and port become a ready endpoint's address and port, chosen at random, for
connections of pods and of the node itself. A pod that reaches itself through its Service is
masqueraded, or it would see its own address as the other side; nobody else is, so that
servers see the client's address. A cluster IP without ready endpoints refuses at once.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from mesh.lab import addresses
from mesh.lab.services import Endpoint, ServicePlan

TABLE = "ambit-services"
HAIRPIN_MARK = "0x4000"

_FRAME = """\
table inet {table}
delete table inet {table}
table inet {table} {{
{chains}
  chain services {{
{dispatch}  }}
  chain prerouting {{
    type nat hook prerouting priority -100; policy accept;
    jump services
  }}
  chain output {{
    type nat hook output priority -100; policy accept;
    jump services
  }}
  chain postrouting {{
    type nat hook postrouting priority 100; policy accept;
    meta mark & {mark} == {mark} masquerade
  }}
  chain refuse {{
    fib daddr type local accept
    ip daddr {services4} meta l4proto tcp reject with tcp reset
    ip6 daddr {services6} meta l4proto tcp reject with tcp reset
    ip daddr {services4} reject with icmp type port-unreachable
    ip6 daddr {services6} reject with icmpv6 type port-unreachable
  }}
  chain forward {{
    type filter hook forward priority 0; policy accept;
    jump refuse
  }}
  chain local {{
    type filter hook output priority 0; policy accept;
    jump refuse
  }}
}}
"""


def ruleset(services: Iterable[tuple[ServicePlan, Sequence[Endpoint]]], node: str = "") -> str:
    """The whole ruleset of a node, replaced in one transaction by `nft -f`.

    A Service with internalTrafficPolicy Local has the endpoints on `node` only.
    """
    chains: list[str] = []
    dispatch: dict[str, list[str]] = {"IPv4": [], "IPv6": []}
    for service, endpoints in services:
        ready = [
            endpoint
            for endpoint in endpoints
            if endpoint.is_ready and (not service.is_local or endpoint.node == node)
        ]
        for cluster_ip in service.cluster_ips:
            family = addresses.family_of(cluster_ip)
            for _, protocol, port, _ in service.ports:
                targets = [
                    (ip, endpoint.ports[port])
                    for endpoint in ready
                    for ip in endpoint.ips
                    if addresses.family_of(ip) == family and port in endpoint.ports
                ]
                if not targets or protocol == "SCTP":
                    continue
                # nft refuses long names: chains are numbered, and a comment says whose they are.
                number = len(dispatch["IPv4"]) + len(dispatch["IPv6"])
                chains += _chains(number, service, port, (family, protocol.lower()), targets)
                dispatch[family].append(
                    f"{cluster_ip} . {protocol.lower()} . {port} : goto service{number}"
                )
    lines = "".join(
        f"    {'ip' if family == 'IPv4' else 'ip6'} daddr . meta l4proto . th dport vmap "
        f"{{ {', '.join(entries)} }}\n"
        for family, entries in dispatch.items()
        if entries
    )
    return _FRAME.format(
        table=TABLE,
        chains="\n".join(chains),
        dispatch=lines,
        mark=HAIRPIN_MARK,
        services4=addresses.SERVICE_NETWORKS[0],
        services6=addresses.SERVICE_NETWORKS[1],
    )


def _chains(
    number: int,
    service: ServicePlan,
    port: int,
    kind: tuple[str, str],
    targets: Sequence[tuple[str, int]],
) -> list[str]:
    """One chain per endpoint, and the one that chooses among them."""
    family, protocol = kind
    layer = "ip" if family == "IPv4" else "ip6"
    chains = []
    for index, (ip, target) in enumerate(targets):
        where = f"{ip}:{target}" if family == "IPv4" else f"[{ip}]:{target}"
        chains.append(
            f"  chain endpoint{number}_{index} {{\n"
            f"    {layer} saddr {ip} meta mark set meta mark | {HAIRPIN_MARK}\n"
            f"    meta l4proto {protocol} dnat {layer} to {where}\n"
            f"  }}"
        )
    choices = ", ".join(f"{i} : goto endpoint{number}_{i}" for i in range(len(targets)))
    chains.append(
        f"  # {service.namespace}/{service.name} port {port} over {family}\n"
        f"  chain service{number} {{\n"
        f"    numgen random mod {len(targets)} vmap {{ {choices} }}\n"
        f"  }}"
    )
    return chains
