"""What the pages of both proxies say of workloads and services: `ambit explain` relies on it."""

from __future__ import annotations

from mesh.model.service import Service
from mesh.model.shown import show_endpoint, show_service
from mesh.model.workload import TunnelProtocol, Workload, WorkloadStatus


def test_an_endpoint() -> None:
    workload = Workload("u", "web", "shop", ("10.0.0.1", "fd00::1"), node="n1", service_account="w",
                        tunnel_protocol=TunnelProtocol.HBONE,
                        status=WorkloadStatus.UNHEALTHY)  # fmt: skip
    assert show_endpoint(workload, 80) == {
        "port": 80,
        "workload": {
            "uid": "u",
            "name": "web",
            "namespace": "shop",
            "node": "n1",
            "addresses": ["10.0.0.1", "fd00::1"],
            "identity": "spiffe://cluster.local/ns/shop/sa/w",
            "protocol": "HBONE",
            "healthy": False,
        },
    }


def test_a_service() -> None:
    assert show_service(None) is None
    names = {"name": "web", "namespace": "shop", "hostname": "web.shop"}
    assert show_service(Service("web", "shop", "web.shop")) == names
