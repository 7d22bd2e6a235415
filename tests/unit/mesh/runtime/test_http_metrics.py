"""L7 metrics as a scraper reads them: sums, counts, cumulative buckets, bounds."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from mesh.runtime.http_metrics import BYTES, LABELS, MILLISECONDS, HttpMetrics

HISTOGRAMS = (
    "istio_request_duration_milliseconds",
    "istio_request_bytes",
    "istio_response_bytes",
)
Samples = dict[str, dict[tuple[str, ...], float]]


def values(name: str) -> tuple[str, ...]:
    return ("waypoint", name, *("x" for _ in LABELS[2:]))


def scrape(registry: CollectorRegistry) -> Samples:
    """By sample name and bucket, summed over series."""
    found: Samples = {}
    for family in text_string_to_metric_families(generate_latest(registry).decode()):
        for sample in family.samples:
            rest = {k: v for k, v in sample.labels.items() if k != "le"}
            assert set(rest) == set(LABELS)
            key = (rest["source_workload"], sample.labels.get("le", ""))
            found.setdefault(sample.name, {})[key] = sample.value
    return found


def test_what_a_scraper_reads_adds_up() -> None:
    registry = CollectorRegistry()
    metrics = HttpMetrics(registry)
    told = [(0.4, 0, 99), (0.5, 100, 101), (999.0, 5_000, 10**9), (10**9, 1, 1)]
    for milliseconds, received, sent in told:
        metrics.series(values("a")).add(milliseconds, received, sent, 1.0)
    found = scrape(registry)
    assert found["istio_requests_total"] == {("a", ""): 4}
    for index, name in enumerate(HISTOGRAMS):
        bounds = MILLISECONDS if index == 0 else BYTES
        assert found[f"{name}_count"] == {("a", ""): 4}
        assert found[f"{name}_sum"] == {("a", ""): sum(each[index] for each in told)}
        buckets = {float(le): count for (_, le), count in found[f"{name}_bucket"].items()}
        assert list(buckets) == [*bounds, float("inf")]
        for bound, count in buckets.items():
            # `le` takes in what is exactly the bound.
            assert count == sum(each[index] <= bound for each in told)


def test_made_up_labels_are_counted_together_and_idle_ones_forgotten() -> None:
    now = [0.0]
    registry = CollectorRegistry()
    metrics = HttpMetrics(registry, max_series=2, idle_seconds=10.0, clock=lambda: now[0])
    for name in ("a", "b", "c", "d"):
        metrics.series(values(name)).add(1.0, 0, 0, now[0])
    found = scrape(registry)["istio_requests_total"]
    assert found == {("a", ""): 1, ("b", ""): 1, ("overflow", ""): 2}
    now[0] = 11.0
    metrics.series(values("e")).add(1.0, 0, 0, now[0])
    assert scrape(registry)["istio_requests_total"] == {("e", ""): 1}
