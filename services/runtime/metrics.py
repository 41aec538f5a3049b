"""Prometheus metrics of a service, in a separate registry, and the HTTP server that exposes them."""

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Self
from wsgiref.simple_server import WSGIServer

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    PlatformCollector,
    ProcessCollector,
    start_http_server,
)
from prometheus_client.core import CounterMetricFamily, InfoMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from services.api.model import ModelVersion
from services.errors import FieldViolation, InvalidInputError

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
            "Time from the arrival of a call to its end.",
            ["rpc"],
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


class MetricsServer:
    """The HTTP server that Prometheus scrapes, on a separate thread."""

    def __init__(self, server: WSGIServer, thread: threading.Thread) -> None:
        self._server, self._thread = server, thread
        self.port: int = server.server_port

    @classmethod
    def start(cls, registry: CollectorRegistry, host: str, port: int) -> Self:
        """Serve `registry` on ``host:port``.

        Raises:
            InvalidInputError: the port is in use, or the host is not an address of this machine.
        """
        try:
            return cls(*start_http_server(port, addr=host.strip("[]"), registry=registry))
        except OSError as error:
            raise InvalidInputError(
                FieldViolation("metrics_port", f"can't listen on {host}:{port}: {error.strerror or error}")
            ) from error

    def stop(self) -> None:
        """Stop the server and free its port."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
