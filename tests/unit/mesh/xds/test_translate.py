"""Wire to model: what is read, what it means, and each reason for a NACK."""

from __future__ import annotations

from typing import Any

import pytest
from google.protobuf.message import Message

from mesh.errors import ConfigError
from mesh.model.authorization import Action, Authorization, PolicyScope
from mesh.model.service import Service, Visibility
from mesh.model.workload import (
    CidrAddress,
    NetworkAddress,
    TunnelProtocol,
    Workload,
    WorkloadType,
)
from mesh.proto import authorization_pb2 as security
from mesh.proto import workload_pb2 as wire
from mesh.xds.scalars import network_from, network_parts
from mesh.xds.translate import decode_address, decode_authorization, encode, resource_name

UID = "Kubernetes//Pod/demo/sleep-1"


def workload(**fields: Any) -> bytes:
    return wire.Address(workload=wire.Workload(uid=UID, **fields)).SerializeToString()


def service(**fields: Any) -> bytes:
    message = wire.Service(namespace="demo", hostname="a.demo.svc.cluster.local", **fields)
    return wire.Address(service=message).SerializeToString()


def policy(*matches: Message, **fields: Any) -> bytes:
    message = security.Authorization(name="p", namespace="demo", **fields)
    message.rules.add().clauses.add().matches.extend(matches)
    return message.SerializeToString()


def test_empty_fields_mean_their_defaults() -> None:
    decoded = decode_address(workload())
    assert isinstance(decoded, Workload)
    assert decoded == Workload(
        uid=UID, name="", namespace="", workload_type=WorkloadType.DEPLOYMENT
    )
    assert (decoded.trust_domain, decoded.service_account) == ("cluster.local", "default")
    assert (decoded.cluster_id, decoded.capacity) == ("Kubernetes", 1)


def test_a_capacity_of_zero_is_not_the_default() -> None:
    message = wire.Workload(uid=UID)
    message.capacity.value = 0
    decoded = decode_address(wire.Address(workload=message).SerializeToString())
    assert isinstance(decoded, Workload)
    assert decoded.capacity == 0
    assert decode_address(encode(decoded)) == decoded


def test_the_default_trust_domain_is_written_empty() -> None:
    data = encode(Workload(uid=UID, name="a", namespace="demo"))
    assert wire.Address.FromString(data).workload.trust_domain == ""


def test_a_mapped_ipv4_address_is_the_ipv4_address() -> None:
    decoded = decode_address(workload(addresses=[bytes(10) + b"\xff\xff\x0a\x00\x00\x01"]))
    assert isinstance(decoded, Workload)
    assert decoded.addresses == ("10.0.0.1",)


def test_a_service_address_with_a_length_is_a_range() -> None:
    decoded = decode_address(
        service(
            addresses=[
                wire.NetworkAddress(network="n", address=bytes([10, 96, 0, 1])),
                wire.NetworkAddress(network="n", address=bytes([10, 97, 3, 1]), length=16),
                wire.NetworkAddress(network="n", address=bytes(4), length=0),
            ]
        )
    )
    assert isinstance(decoded, Service)
    assert decoded.addresses == (NetworkAddress("n", "10.96.0.1"),)
    assert decoded.cidr_addresses == (
        CidrAddress("n", "10.97.0.0/16"),
        CidrAddress("n", "0.0.0.0/0"),
    )


def test_lenient_enumerations() -> None:
    decoded = decode_address(service(visibility=9))
    assert isinstance(decoded, Service)
    assert decoded.visibility is Visibility.PUBLIC
    other = decode_address(workload(workload_type=9))
    assert isinstance(other, Workload)
    assert other.workload_type is WorkloadType.POD


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        pytest.param(b"\xff", "undecodable Address", id="undecodable"),
        pytest.param(b"\x0a\x03\x0a\x01\xff", "undecodable Address", id="not utf-8"),
        pytest.param(b"", "neither a workload nor a service", id="empty oneof"),
        pytest.param(workload(addresses=[b"abc"]), "3 bytes", id="address of 3 bytes"),
        pytest.param(workload(tunnel_protocol=2), "unknown TunnelProtocol 2", id="legacy mtls"),
        pytest.param(workload(status=7), "unknown WorkloadStatus 7", id="status"),
        pytest.param(workload(network_mode=7), "unknown NetworkMode 7", id="network mode"),
        pytest.param(
            workload(waypoint=wire.GatewayAddress(hbone_mtls_port=15008)),
            "no destination",
            id="gateway without destination",
        ),
        pytest.param(
            workload(
                waypoint=wire.GatewayAddress(address=wire.NetworkAddress(address=b"")),
            ),
            "0 bytes",
            id="gateway without address",
        ),
        pytest.param(
            workload(services={"no-slash": wire.PortList()}), "no-slash", id="service key"
        ),
        pytest.param(
            workload(
                services={
                    "a/b": wire.PortList(ports=[wire.Port(service_port=80, target_port=99999)])
                }
            ),
            "not a port: 99999",
            id="port",
        ),
        pytest.param(
            workload(application_tunnel=wire.ApplicationTunnel(protocol=5)),
            "application tunnel protocol 5",
            id="application tunnel",
        ),
        pytest.param(
            service(load_balancing=wire.LoadBalancing(routing_preference=[0])),
            "unknown Scope 0",
            id="scope",
        ),
        pytest.param(
            service(load_balancing=wire.LoadBalancing(mode=9)), "unknown Mode 9", id="mode"
        ),
        pytest.param(service(ip_families=9), "unknown IpFamilies 9", id="families"),
        pytest.param(
            service(ports=[wire.Port(service_port=80, app_protocol=9)]),
            "unknown AppProtocol 9",
            id="app protocol",
        ),
        pytest.param(
            service(addresses=[wire.NetworkAddress(address=bytes(4), length=33)]),
            "prefix length 33",
            id="prefix too long",
        ),
        pytest.param(
            service(weighted_waypoints=[wire.WeightedWaypoint(weight=1)]),
            "no destination",
            id="weighted waypoint",
        ),
    ],
)
def test_reasons_to_refuse_an_address(data: bytes, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        decode_address(data)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        pytest.param(b"\xff", "undecodable Authorization", id="undecodable"),
        pytest.param(policy(action=2), "unknown Action 2", id="action"),
        pytest.param(policy(scope=3), "unknown PolicyScope 3", id="scope"),
        pytest.param(
            policy(security.Match(principals=[security.StringMatch()])),
            "neither exact",
            id="string match",
        ),
        pytest.param(
            policy(security.Match(source_ips=[security.Address(address=b"\x0a", length=8)])),
            "1 bytes",
            id="address",
        ),
        pytest.param(
            policy(security.Match(source_ips=[security.Address(address=bytes(4), length=64)])),
            "prefix length 64",
            id="prefix",
        ),
        pytest.param(policy(security.Match(destination_ports=[70000])), "70000", id="port"),
    ],
)
def test_reasons_to_refuse_a_policy(data: bytes, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        decode_authorization(data)


def test_an_empty_match_stays_a_match() -> None:
    """It never matches, whereas a clause without matches always does."""
    decoded = decode_authorization(policy(security.Match(), action=1))
    assert decoded.action is Action.DENY
    assert len(decoded.rules[0].clauses[0].matches) == 1
    assert decode_authorization(encode(decoded)) == decoded


def test_what_cannot_be_written_is_told_by_name() -> None:
    bad_address = Workload(uid=UID, name="a", namespace="b", addresses=("10.0.0.300",))
    with pytest.raises(ConfigError, match=r"10\.0\.0\.300"):
        encode(bad_address)
    with pytest.raises(ConfigError, match=r"sleep-1.* cannot be encoded"):
        encode(Workload(uid=UID, name="\ud800", namespace="b"))
    with pytest.raises(ConfigError, match="cannot be encoded"):
        encode(Workload(uid=UID, name="a", namespace="b", capacity=-1))


def test_resource_names() -> None:
    assert resource_name(Workload(uid=UID, name="a", namespace="b")) == UID
    assert resource_name(Service("a", "demo", "a.demo.svc")) == "demo/a.demo.svc"
    policy = Authorization("deny", "demo", PolicyScope.NAMESPACE, Action.DENY)
    assert resource_name(policy) == "demo/deny"


def test_hbone_is_one() -> None:
    decoded = decode_address(workload(tunnel_protocol=1))
    assert isinstance(decoded, Workload)
    assert decoded.tunnel_protocol is TunnelProtocol.HBONE


def test_a_prefix_of_a_mapped_address() -> None:
    mapped = bytes(10) + b"\xff\xff\x0a\x00\x00\x01"
    assert network_from(mapped, 104) == "10.0.0.0/8"
    with pytest.raises(ConfigError):
        network_from(mapped, 64)


def test_a_single_address_is_a_network() -> None:
    assert network_parts("fd00::1") == (bytes.fromhex("fd00" + "0" * 27 + "1"), 128)
