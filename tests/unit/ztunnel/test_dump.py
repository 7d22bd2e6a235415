"""`/config_dump`: upstream's keys, and no secrets."""

from __future__ import annotations

import json

from mesh.identity import SpiffeId
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
from mesh.model.service import LoadBalancing, Mode, Scope, Service, ServicePort
from mesh.model.store import Store
from mesh.model.workload import GatewayAddress, NamespacedHostname, NetworkAddress, Workload
from mesh.secrets import SecretEntry
from tests.support.certs import make_ca
from ztunnel.config import ZtunnelConfig
from ztunnel.dump import dump_certificates, dump_config, dump_pods, dump_policy, dump_store
from ztunnel.workloads import Pod

WAYPOINT = GatewayAddress(NamespacedHostname("shop", "wp.shop.svc.cluster.local"), 15008)
WEB = Service(
    "web",
    "shop",
    "web.shop.svc.cluster.local",
    (NetworkAddress("", "10.96.0.1"),),
    ports={80: ServicePort(80, 8080)},
    waypoint=WAYPOINT,
    load_balancing=LoadBalancing((Scope.NETWORK, Scope.ZONE), Mode.FAILOVER),
)


def test_store() -> None:
    store = Store()
    workload = Workload(
        "u", "web-1", "shop", ("10.0.0.1",), services={str(WEB.key): {80: 8080}, "x/y": {1: 2}}
    )
    store.apply_addresses([WEB, workload], [])
    dump = dump_store(store)
    assert dump["workloads"] == [
        {
            "uid": "u",
            "name": "web-1",
            "namespace": "shop",
            "workloadIps": ["10.0.0.1"],
            "protocol": "TCP",
            "networkMode": "Standard",
            "status": "Healthy",
            "clusterId": "Kubernetes",
            "capacity": 1,
            "serviceAccount": "default",
            "trustDomain": "cluster.local",
            "workloadType": "pod",
            "services": {"shop/web.shop.svc.cluster.local": {"80": 8080}, "x/y": {"1": 2}},
        }
    ]
    assert dump["services"] == [
        {
            "name": "web",
            "namespace": "shop",
            "hostname": "web.shop.svc.cluster.local",
            "vips": ["/10.96.0.1"],
            "ports": {"80": 8080},
            "endpoints": {"u": {"workloadUid": "u", "port": {"80": 8080}, "status": "Healthy"}},
            "subjectAltNames": [],
            "canonical": False,
            "visibility": "Public",
            "waypoint": {
                "destination": "shop/wp.shop.svc.cluster.local",
                "hboneMtlsPort": 15008,
            },
            "loadBalancer": {
                "routingPreferences": ["Network", "Zone"],
                "mode": "Failover",
                "healthPolicy": "OnlyHealthy",
            },
        }
    ]
    assert dump["stagedServices"] == {"x/y": ["u"]}


def test_policy() -> None:
    matches = (
        Match(
            principals=(StringMatch(StringKind.EXACT, "p"), StringMatch(StringKind.PRESENCE)),
            not_source_ips=("10.0.0.0/8",),
            destination_ports=(80,),
        ),
    )
    policy = Authorization(
        "p", "shop", PolicyScope.WORKLOAD_SELECTOR, Action.DENY, (Rule((Clause(matches),)),)
    )
    assert dump_policy(policy) == {
        "name": "p",
        "namespace": "shop",
        "scope": "WorkloadSelector",
        "action": "Deny",
        "dryRun": False,
        "rules": [
            [
                [
                    {
                        "principals": [{"Exact": "p"}, {"Presence": []}],
                        "notSourceIps": ["10.0.0.0/8"],
                        "destinationPorts": [80],
                    }
                ]
            ]
        ],
    }


def test_certificates_without_keys() -> None:
    leaf = make_ca().issue(SpiffeId("cluster.local", "shop", "web"))
    entries = [
        SecretEntry(leaf.identity, leaf.certificate(), "Available", ""),
        SecretEntry(SpiffeId("cluster.local", "shop", "x"), None, "Unavailable", "no route"),
    ]
    ready, waiting = dump_certificates(entries)
    assert ready["identity"] == "spiffe://cluster.local/ns/shop/sa/web"
    assert len(ready["certChain"]) == 2
    assert set(ready["certChain"][0]) == {"pem", "serialNumber", "validFrom", "expirationTime"}
    assert len(ready["rootCerts"]) == 1
    assert waiting == {
        "identity": "spiffe://cluster.local/ns/shop/sa/x",
        "state": "Unavailable",
        "error": "no route",
    }
    assert "PRIVATE" not in json.dumps([ready, waiting])


def test_pods_and_settings() -> None:
    pods = dump_pods([(Pod("u", "web", "shop", "sa"), "Pending", "address in use")], [])
    assert pods["u"]["state"] == "Pending"
    assert pods["u"]["connections"] == {"inbound": [], "outbound": []}
    assert dump_config(ZtunnelConfig(node_name="n1"))["nodeName"] == "n1"
