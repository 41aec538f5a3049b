"""Prometheus metrics of a service, in a separate registry. ``docs/metrics.md`` lists all of them."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Final

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

from services.api.measurements import Observer, Quantity
from services.api.model import ModelVersion

SECONDS: Final = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0)
"""Buckets from a cached answer to a long render on a CPU."""
_SHORT_SECONDS: Final = (0.001, 0.002, 0.005, *SECONDS[:-3])
"""Buckets from a step of a small model on a GPU."""
_SHARES: Final = (0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1.0)

_HISTOGRAMS: Final[Mapping[Quantity, tuple[str, str, tuple[str, ...], tuple[float, ...]]]] = {
    "queue_wait": (
        "milonga_queue_wait_seconds",
        "Time that a request, or a clip or prompt of one, waited for the device, also if it left without.",
        ("queue", "priority"),
        SECONDS,
    ),
    "first_step": (
        "milonga_first_step_seconds",
        "Time from the arrival of a request to the end of its first denoising step.",
        ("queue", "priority"),
        SECONDS,
    ),
    "step": (
        "milonga_step_seconds",
        "Time of a denoising step, by the rows of the batch, padding included.",
        ("queue", "rows"),
        _SHORT_SECONDS,
    ),
    "decode": ("milonga_decode_seconds", "Time to decode a clip.", ("queue",), _SHORT_SECONDS),
    "batch": ("milonga_batch_seconds", "Time of a call of the model.", ("queue",), _SHORT_SECONDS),
    "fill": (
        "milonga_batch_fill_ratio",
        "Used share of a batch: of its rows, padding included; in the others, of its limit.",
        ("queue",),
        _SHARES,
    ),
}
"""Name, help, labels and buckets of each histogram."""


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
            buckets=SECONDS,
            registry=self.registry,
        )
        self.in_flight = Gauge(
            "milonga_requests_in_flight", "Calls in progress.", ["rpc"], registry=self.registry
        )
        self.slack = Histogram(
            "milonga_deadline_slack_seconds",
            "Time left to the caller's deadline at the end of a call, 0 if it was missed; of calls with one.",
            ["rpc", "code"],
            buckets=(0.0, *SECONDS),
            registry=self.registry,
        )
        self.refusals = Counter(
            "milonga_refusals",
            "Calls, and requests in streams, that were refused before any work was done for them, by reason.",
            ["rpc", "reason"],
            registry=self.registry,
        )
        self.streamed = Counter(
            "milonga_stream_requests",
            "Requests in streams of the Open Inference Protocol that ended, by status.",
            ["code"],
            registry=self.registry,
        )
        self._histograms: dict[Quantity, Histogram] = {}

    def add(self, collect: Callable[[], Iterable[Metric]]) -> None:
        """Add a service's own metrics: `collect` returns them at each scrape."""
        self.registry.register(_FunctionCollector(collect))

    def count_refusal(self, rpc: str, error: BaseException | None) -> None:
        """Count a call or request that ended with `error`, if that is a refusal."""
        reason = getattr(error, "refusal", None)
        if reason is not None:
            self.refusals.labels(rpc, reason).inc()

    def observer(self, queue: str, *quantities: Quantity) -> Observer:
        """Return an observer of a queue, which fills the histograms of `quantities`. Thread-safe."""
        for quantity in quantities:
            if quantity not in self._histograms:
                name, text, labels, buckets = _HISTOGRAMS[quantity]
                self._histograms[quantity] = Histogram(
                    name, text, labels, buckets=buckets, registry=self.registry
                )
        return partial(self._observe, queue)

    def _observe(self, queue: str, quantity: Quantity, value: float, label: str = "") -> None:
        self._histograms[quantity].labels(queue, *filter(None, [label])).observe(value)


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
