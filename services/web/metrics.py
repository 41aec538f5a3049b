"""Prometheus metrics of the web door."""

from typing import Final

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    PlatformCollector,
    ProcessCollector,
)

from services.runtime.metrics import SECONDS

_METHODS: Final = ("GET", "POST", "HEAD", "PUT", "DELETE", "OPTIONS", "PATCH")


class WebMetrics:
    """Counts, times and states of HTTP requests, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)
        labels = ["method", "route", "code"]
        self._requests = Counter(
            "milonga_http_requests", "Requests that ended.", labels, registry=self.registry
        )
        self._seconds = Histogram(
            "milonga_http_request_seconds",
            "Time from the head of a request to the end of its response.",
            labels,
            buckets=SECONDS,
            registry=self.registry,
        )
        self.in_flight = Gauge(
            "milonga_http_requests_in_flight", "Requests in progress.", registry=self.registry
        )

        self.waiting = Gauge(
            "milonga_http_requests_waiting",
            "Requests that wait for room in the queue of a service.",
            registry=self.registry,
        )

    @property
    def in_flight_now(self) -> float:
        """Number of requests in progress."""
        return next(iter(self.in_flight.collect())).samples[0].value

    def observe(self, method: str, route: str, code: int, seconds: float) -> None:
        """Record a request; `route` is its path's template, empty if there is none."""
        labels = (method if method in _METHODS else "other", route or "none", str(code))
        self._requests.labels(*labels).inc()
        self._seconds.labels(*labels).observe(seconds)
