"""Run the web door: bind, serve, drain on SIGTERM."""

import asyncio
import contextlib
import gc
import signal
import socket
import sys
from collections.abc import Iterator

import structlog
import uvicorn

from services.environment import quiet_libraries
from services.errors import InvalidInputError, MilongaError, invalid
from services.runtime import listening
from services.runtime.logs import configure_logs
from services.runtime.scraping import MetricsServer
from services.runtime.settings import load_settings
from services.runtime.telemetry import start as start_traces
from services.web.app import Readiness, build_app
from services.web.metrics import WebMetrics
from services.web.protocol import PromptProtocol
from services.web.settings import WebSettings

log = structlog.get_logger()

_BACKLOG = 2048
_SIGNALS = (signal.SIGTERM, signal.SIGINT)


def main() -> int:
    """Run with settings from the environment; return the exit code."""
    try:
        run(load_settings(WebSettings))
    except MilongaError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, InvalidInputError) else 1
    finally:
        gc.freeze()
    return 0


def run(settings: WebSettings) -> None:
    """Serve until SIGTERM or SIGINT.

    Raises:
        InvalidInputError: a setting, a file or a port was refused.
    """
    quiet_libraries(online=False)
    configure_logs(settings.log_format, settings.log_level)
    start_traces("milonga-web")
    # A URL of ratings may hold a password.
    log.info("settings", **settings.model_dump(mode="json", exclude={"ratings"}))
    asyncio.run(serve(settings))


async def serve(settings: WebSettings) -> None:
    """Serve on the running loop until SIGTERM or SIGINT."""
    metrics, readiness = WebMetrics(), Readiness()
    app = build_app(settings, metrics, readiness)
    listener = bind(settings.listen)
    scraped = None
    try:
        if settings.metrics_port is not None:
            scraped = MetricsServer(metrics.registry, settings.host, settings.metrics_port)
        server = make_server(settings, app)
        stopping = asyncio.Event()
        loop = asyncio.get_running_loop()

        def stop() -> None:
            server.force_exit = stopping.is_set()
            stopping.set()

        for number in _SIGNALS:
            loop.add_signal_handler(number, stop)
        running = asyncio.create_task(server.serve(sockets=[listener]))
        waiting = asyncio.create_task(stopping.wait())
        log.info("ready", listen=settings.listen, port=listener.getsockname()[1], services=settings.addresses)
        await asyncio.wait((running, waiting), return_when=asyncio.FIRST_COMPLETED)
        if not running.done():
            log.info("draining")
            readiness.draining = True
            await asyncio.sleep(settings.drain_delay_seconds)
            server.should_exit = True
        waiting.cancel()
        await running
    finally:
        listener.close()
        if scraped is not None:
            await asyncio.to_thread(scraped.stop)
    log.info("stopped")


class Server(uvicorn.Server):
    """uvicorn's server, whose signals are handled elsewhere."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Handle none."""
        yield


def make_server(settings: WebSettings, app: object) -> Server:
    """Return the HTTP server of an app. Raises `InvalidInputError` for wrong files of TLS."""
    limits = {"head_seconds": settings.body_seconds, "send_seconds": settings.send_seconds}
    protocol = type("Protocol", (PromptProtocol,), limits)
    config = uvicorn.Config(
        app,  # type: ignore[arg-type]
        http=protocol,
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=max(1, round(settings.grace_seconds)),
        ssl_certfile=settings.tls_cert_file,
        ssl_keyfile=settings.tls_key_file,
    )
    try:
        config.load()
    except OSError as error:
        files = f"{settings.tls_cert_file}, {settings.tls_key_file}"
        raise invalid(
            "tls_cert_file", f"is {files}, which can't be used: {error.strerror or error}"
        ) from error
    return Server(config)


def bind(listen: str) -> socket.socket:
    """Return a socket that listens on HOST:PORT. Raises `InvalidInputError`."""
    host, _, port = listen.rpartition(":")
    try:
        return listening.listen(host, int(port), _BACKLOG)
    except OSError as error:
        raise invalid("listen", f"can't listen on {listen}: {error.strerror or error}") from error
