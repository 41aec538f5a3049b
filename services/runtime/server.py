"""The gRPC server that every service runs in: health, reflection, TLS, metrics, graceful drain.

::

    server = Server(settings, metrics)        # binds its ports, so that a port in use is reported at once
    …                                         # load the model
    server.add("milonga.v1.GenerationService", lambda grpc_server: add_…_to_server(servicer, grpc_server))
    await server.start()
    await server.serve_until_signal()         # drains on SIGTERM; raises after `server.fail(reason)`
"""

import asyncio
import contextlib
import signal
import socket
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

import grpc
import grpc.aio
import structlog
from grpc_health.v1 import health_pb2_grpc

from services.errors import FieldViolation, InvalidInputError, MilongaError
from services.runtime.access import Access
from services.runtime.budget import Budget
from services.runtime.gate import MAX_CALLS, Gate
from services.runtime.health import HealthServicer
from services.runtime.interceptors import CallInterceptor
from services.runtime.metrics import ServerMetrics
from services.runtime.parsing import ParsingInterceptor
from services.runtime.reflection import add_reflection
from services.runtime.scraping import MetricsServer
from services.runtime.settings import ServerSettings

if TYPE_CHECKING:
    from services.runtime.certificates import Certificates

log = structlog.get_logger()

FAILURE_DELAY_SECONDS: Final = 1.0
"""Time after `Server.fail` in which calls still arrive, and get the reason. Later ones are reset by gRPC."""

FAILURE_GRACE_SECONDS: Final = 3.0
"""Seconds that calls may take to end after that, so that their errors reach the callers."""

CLOSE_SECONDS: Final = 10.0
"""Maximum time from the end of the last call to the end of the process."""

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class ServiceFailedError(MilongaError):
    """The service can't work any longer; its process ends."""


class Server:
    """The gRPC server of one service. Belongs to one event loop; only `fail` is thread-safe."""

    def __init__(
        self,
        settings: ServerSettings,
        metrics: ServerMetrics,
        *,
        end_within: Callable[[float], None] = lambda _: None,
    ) -> None:
        """Bind every port; calls are served after `start`. Call it inside the running event loop.

        Args:
            settings: addresses, TLS, limits and times.
            metrics: metrics of the calls.
            end_within: called from any thread when the service begins to stop, with the seconds that it may
                take. Ends the process after them in any case.

        Raises:
            InvalidInputError: a port is in use, a TLS file can't be read or is not PEM, or `Access` refuses
                the settings.
        """
        self._loop = asyncio.get_running_loop()
        self._stops: asyncio.Queue[signal.Signals | ServiceFailedError] = asyncio.Queue()
        self._failure: ServiceFailedError | None = None
        self._end_within = end_within
        self._reloads: list[Callable[[], None]] = []
        self._watch: asyncio.Task[None] | None = None
        self._settings = settings
        self.metrics = metrics
        self._names: list[str] = []
        self._health = HealthServicer()
        self.access = Access(settings)
        self.gate = Gate()
        self.budget = Budget(settings.held_bytes, settings.max_request_bytes)
        metrics.add(self.budget.collect)
        calls = CallInterceptor(metrics, self.access, self.gate, self.budget)
        self._server = grpc.aio.server(interceptors=[ParsingInterceptor(), calls], options=_options(settings))
        if settings.callers_file is not None:
            self.on_reload(self.access.reload)
        self._certificates = _read_certificates(settings, metrics)
        credentials = None
        if self._certificates is not None:
            credentials = self._certificates.credentials()
            self.on_reload(self._certificates.reload)
        self.port = _bind(self._server, "listen", settings.listen, credentials)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        self._health_server: grpc.aio.Server | None = None
        self.health_port: int | None = None
        if settings.health_port is not None:
            self._health_server = grpc.aio.server(
                interceptors=[ParsingInterceptor()], options=_options(settings)
            )
            address = f"{settings.host}:{settings.health_port}"
            self.health_port = _bind(self._health_server, "health_port", address, None)
            health_pb2_grpc.add_HealthServicer_to_server(self._health, self._health_server)
        self._metrics_server: MetricsServer | None = None
        if settings.metrics_port is not None:
            self._metrics_server = MetricsServer(metrics.registry, settings.host, settings.metrics_port)

    @property
    def metrics_port(self) -> int | None:
        """Port of the metrics; None if they are off."""
        return None if self._metrics_server is None else self._metrics_server.port

    @property
    def ready(self) -> bool:
        """Whether the server has started, and is not draining."""
        return self._health.is_serving("")

    def add(self, name: str, register: Callable[[grpc.aio.Server], None]) -> None:
        """Add a service by its full name; `register` adds its servicer to the gRPC server."""
        register(self._server)
        self._names.append(name)

    def on_reload(self, reload: Callable[[], None]) -> None:
        """Have `reload` called on SIGHUP, on the event loop. Without any, SIGHUP ends the process."""
        self._reloads.append(reload)
        if threading.current_thread() is threading.main_thread():  # others can't handle signals
            self._loop.add_signal_handler(signal.SIGHUP, self._reload)

    async def start(self) -> None:
        """Start serving, and report SERVING, unless the service has failed already."""
        if self.access.anonymous and not self._settings.is_local:
            log.warning(
                "anonymous callers", listen=self._settings.listen, reason="anyone who reaches it may call"
            )
        if self._settings.reflection:
            add_reflection((*self._names, "grpc.health.v1.Health"), self._server)
        if self._failure is None:
            self._health.serve(("", *self._names))
        await self._server.start()
        if self._certificates is not None:
            self._watch = self._loop.create_task(self._certificates.watch())
        if self._health_server is not None:
            await self._health_server.start()

    def fail(self, reason: str) -> None:
        """Stop the service for a fault that it can't recover from. Only the first reason counts.

        Thread-safe. The service reports NOT_SERVING, and `serve_until_signal` raises `ServiceFailedError`
        within `FAILURE_DELAY_SECONDS` and `FAILURE_GRACE_SECONDS`.
        """
        if self._failure is not None:
            return
        self._failure = failure = ServiceFailedError(f"the service has failed: {reason}")
        log.critical("failed", reason=reason)
        self._end_within(FAILURE_DELAY_SECONDS + FAILURE_GRACE_SECONDS + CLOSE_SECONDS)
        # Without a loop the process is ending already.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._health.drain)
            self._loop.call_soon_threadsafe(self._stops.put_nowait, failure)

    async def serve_until_signal(self) -> None:
        """Serve until SIGTERM or SIGINT, then drain. A second signal cancels running calls.

        Raises:
            ServiceFailedError: `fail` was called.
        """
        for number in _SIGNALS:
            self._loop.add_signal_handler(number, self._stops.put_nowait, number)
        try:
            cause = await self._stops.get()
            if isinstance(cause, signal.Signals):
                log.info("draining", signal=cause.name)
                self._end_within(
                    self._settings.drain_delay_seconds + self._settings.grace_seconds + CLOSE_SECONDS
                )
                await self._drain_unless_stopped()
            if self._failure is not None:
                await asyncio.sleep(FAILURE_DELAY_SECONDS)
                await self.stop(FAILURE_GRACE_SECONDS)
                raise self._failure
        finally:
            for number in _SIGNALS:
                self._loop.remove_signal_handler(number)

    def _reload(self) -> None:
        for reload in self._reloads:
            reload()

    async def _drain_unless_stopped(self) -> None:
        drain = asyncio.ensure_future(self.drain())
        second = asyncio.ensure_future(self._stops.get())
        await asyncio.wait((drain, second), return_when=asyncio.FIRST_COMPLETED)
        second.cancel()
        if drain.done():
            drain.result()
            return
        drain.cancel()
        if self._failure is None:
            await self.stop(0)

    async def drain(self) -> None:
        """Stop gracefully: report NOT_SERVING, serve `drain_delay_seconds` more, then `stop` with grace."""
        self._health.drain()
        await asyncio.sleep(self._settings.drain_delay_seconds)
        await self.stop(self._settings.grace_seconds)

    async def stop(self, grace: float) -> None:
        """Refuse new calls, cancel running ones after `grace` seconds, and free every port."""
        self._health.drain()
        self._health.close()
        if self._watch is not None:
            self._watch.cancel()
        await self._server.stop(grace)
        if self._health_server is not None:
            await self._health_server.stop(0)
        if self._metrics_server is not None:
            await asyncio.to_thread(self._metrics_server.stop)
            self._metrics_server = None


def _read_certificates(settings: ServerSettings, metrics: ServerMetrics) -> "Certificates | None":
    if settings.tls_cert_file is None:
        return None
    # Imported here: only TLS needs cryptography.
    from services.runtime.certificates import Certificates

    return Certificates(settings, metrics)


def _options(settings: ServerSettings) -> list[tuple[str, Any]]:
    options: list[tuple[str, Any]] = [
        # The default allows two servers on one port, each with half of the calls.
        ("grpc.so_reuseport", 0),
        ("grpc.max_receive_message_length", settings.max_request_bytes),
        # Identity only: gRPC inflates a compressed request before it checks the limit, 300 KB to 300 MB.
        ("grpc.compression_enabled_algorithms_bitset", 1),
        ("grpc.max_concurrent_streams", MAX_CALLS),
        # Otherwise gRPC resets calls which its clients begin as others end (REFUSED_STREAM, UNAVAILABLE).
        ("grpc.http.overload_protection", 0),
        # Responses are bounded by the service's own limits.
        ("grpc.max_send_message_length", -1),
        # Detect a lost client within 40 seconds, so that its requests don't occupy the device.
        ("grpc.keepalive_time_ms", 30_000),
        ("grpc.keepalive_timeout_ms", 10_000),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.min_recv_ping_interval_without_data_ms", 10_000),
    ]
    if settings.max_connection_age_seconds is not None:
        # No max_connection_age_grace_ms: running calls of a connection may finish.
        options.append(("grpc.max_connection_age_ms", round(settings.max_connection_age_seconds * 1000)))
    return options


def _bind(
    server: grpc.aio.Server, field: str, address: str, credentials: grpc.ServerCredentials | None
) -> int:
    check_free(field, address)
    try:
        if credentials is None:
            return server.add_insecure_port(address)
        return server.add_secure_port(address, credentials)
    except RuntimeError as error:
        raise InvalidInputError(
            FieldViolation(
                field,
                f"can't listen on {address}: it is in use, not an address of this machine, or in a folder "
                "that does not exist",
            )
        ) from error


def check_free(field: str, address: str) -> None:
    """Raise `InvalidInputError` if `address` can't be bound, with the system's reason: gRPC gives none."""
    host, _, port = address.rpartition(":")
    if address.startswith("unix"):
        return
    try:
        family, kind, _, _, name = socket.getaddrinfo(
            host.strip("[]") or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        with socket.socket(family, kind) as probe:
            # As gRPC does, so that connections in TIME_WAIT don't count.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(name)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InvalidInputError(FieldViolation(field, f"can't listen on {address}: {reason}")) from error
