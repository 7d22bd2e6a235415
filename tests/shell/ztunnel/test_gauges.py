"""What the node proxy's gauges count, and that the page of metrics names each of them."""

from __future__ import annotations

import re

import trio
from prometheus_client import CollectorRegistry

from mesh.errors import Unavailable
from mesh.hbone.pool import Pool
from mesh.identity import SpiffeId
from mesh.runtime import metrics
from mesh.runtime.http_metrics import HttpMetrics
from mesh.runtime.log import AccessLog
from mesh.runtime.tcp_metrics import TcpMetrics
from mesh.runtime.tracing import TracingSettings, open_tracer
from mesh.secrets import SecretManager
from mesh.tls.certificate import Certificate
from tests.support.certs import make_ca
from tests.support.tree import ROOT
from waypoint.counters import Counters
from ztunnel.monitoring import Gauges

WEB = SpiffeId("cluster.local", "shop", "web")
LOST = SpiffeId("cluster.local", "shop", "lost")
ISSUED = make_ca().issue(str(WEB)).certificate()


async def _fetch(identity: SpiffeId) -> Certificate:
    if identity == LOST:
        raise Unavailable("nobody")
    return ISSUED


async def test_certificates_and_lost_lines() -> None:
    registry = CollectorRegistry()
    now = ISSUED.not_before + 60.0
    secrets = SecretManager(_fetch, clock=lambda: now)
    access = AccessLog(limit_bytes=10)
    gauges = Gauges(registry, secrets, access, list[Pool], lambda: now)

    def value(name: str, **labels: str) -> float | None:
        gauges.count()
        return registry.get_sample_value(name, labels)

    assert value("ambit_certificate_next_expiry_seconds") == 0
    async with trio.open_nursery() as nursery:
        nursery.start_soon(secrets.run)
        with trio.fail_after(10):
            await secrets.get(WEB)
            secrets.prefetch(LOST)
            while value("ambit_certificates", state="Unavailable") != 1:
                await trio.sleep(0.01)
        nursery.cancel_scope.cancel()
    assert value("ambit_certificates", state="Available") == 1
    assert value("ambit_certificate_oldest_age_seconds") == 60
    assert value("ambit_certificate_next_expiry_seconds") == ISSUED.not_after - now
    assert value("ambit_pool_connections") == 0
    access.record({"message": "longer than ten bytes"})
    assert value("ambit_access_log_dropped_total") == 1
    assert value("ambit_access_log_dropped_total") == 1


async def test_the_page_of_metrics_has_every_name_and_no_other() -> None:
    registry = metrics.new_registry("ztunnel", "1")
    TcpMetrics(registry)
    metrics.XdsMetrics(registry)
    metrics.DnsMetrics(registry)
    metrics.WorkloadManagerMetrics(registry)
    Gauges(registry, SecretManager(_fetch), AccessLog(), list[Pool])
    open_tracer(TracingSettings(otlp_endpoint="http://127.0.0.1:9"), "x", {}, registry)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(metrics.watch_loop_lag, registry)
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    assert _names_on_the_page("") == _names_in(registry)


def test_the_page_has_every_name_of_a_waypoint() -> None:
    registry = CollectorRegistry()
    HttpMetrics(registry)
    Counters(registry)
    assert _names_on_the_page("Waypoint") == _names_in(registry)


def _names_in(registry: CollectorRegistry) -> set[str]:
    return {
        f"{family.name}_total" if family.type == "counter" else family.name
        for family in registry.collect()
        if not family.name.startswith("process_")
    }


def _names_on_the_page(section: str) -> set[str]:
    text = (ROOT / "docs" / "reference" / "metrics.md").read_text()
    start, *sections = re.split(r"^## (?=Waypoint|Controller)", text, flags=re.MULTILINE)
    page = next((each for each in sections if section and each.startswith(section)), start)
    cells = re.findall(r"^\| (`[^|]+) \|", page, re.MULTILINE)
    names = {name for cell in cells for name in re.findall(r"`([^`]+)`", cell)}
    return {name for name in names if not name.startswith("process_")}
