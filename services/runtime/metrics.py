"""Prometheus metrics of a service, in a separate registry."""

from collections.abc import Callable, Iterable, Iterator, Mapping

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    PlatformCollector,
    ProcessCollector,
)
from prometheus_client.core import CounterMetricFamily, InfoMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from services.api.model import ModelVersion

# From a cached answer to a minute-long render on a CPU.
LATENCY_BUCKETS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)


class ServerMetrics:
    """Metrics of calls, which every service has."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)
        self.requests = Counter(
            "milonga_requests",
            "Calls that ended, by rpc and status.",
            ["rpc", "code"],
            registry=self.registry,
        )
        self.latency = Histogram(
            "milonga_request_seconds",
            "Time from the arrival of a call to its end, by rpc and status.",
            ["rpc", "code"],
            buckets=LATENCY_BUCKETS,
            registry=self.registry,
        )
        self.in_flight = Gauge(
            "milonga_requests_in_flight", "Calls in progress.", ["rpc"], registry=self.registry
        )

    def add(self, collect: Callable[[], Iterable[Metric]]) -> None:
        """Add a service's own metrics: `collect` returns them at each scrape."""
        self.registry.register(_FunctionCollector(collect))


class _FunctionCollector(Collector):
    def __init__(self, collect: Callable[[], Iterable[Metric]]) -> None:
        self._collect = collect

    def collect(self) -> Iterable[Metric]:
        return self._collect()


def counters(table: Mapping[str, tuple[str, str]], stats: object) -> Iterator[Metric]:
    """Yield a counter for each attribute of `stats` in `table`, which has the metrics' names and helps."""
    for attribute, (name, text) in table.items():
        yield CounterMetricFamily(name, text, getattr(stats, attribute))


def identity(version: ModelVersion) -> dict[str, str]:
    """Return the labels that identify weights."""
    return {"name": version.name, "version": version.version, "digest": version.digest}


def served_weights(name: str, text: str, version: ModelVersion) -> Metric:
    """Return the info metric that identifies weights."""
    return InfoMetricFamily(name, text, identity(version))
