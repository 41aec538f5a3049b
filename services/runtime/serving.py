"""The life of a service's process: bind, load, be ready, drain, close. The same for every service."""

import asyncio
import os
import signal
import threading
import time
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import structlog

from services.runtime.metrics import ServerMetrics
from services.runtime.server import Server
from services.runtime.settings import ServerSettings

log = structlog.get_logger()

Loaded = TypeVar("Loaded")


async def serve(
    settings: ServerSettings,
    *,
    load: Callable[[], Loaded],
    add: Callable[[Server, ServerMetrics, Loaded], None],
    describe: Callable[[Loaded], dict[str, Any]],
    close: Callable[[Loaded], Awaitable[None]],
) -> None:
    """Serve until SIGTERM or SIGINT.

    Args:
        settings: of the server; its ports are bound before anything is loaded.
        load: makes what is served; runs on a thread, as it takes seconds.
        add: registers the service, and its metrics, with the server.
        describe: what the log says of it when it is ready.
        close: frees it, once every call has ended or had its grace.

    Raises:
        MilongaError: the service could not start: a setting, the port, a model.
    """
    start = time.monotonic()
    _leave_on_sigterm()
    metrics = ServerMetrics()
    server = Server(settings, metrics)
    try:
        loaded = await asyncio.to_thread(load)
        add(server, metrics, loaded)
    except BaseException:
        await server.stop(0)
        raise
    try:
        await server.start()
        log.info(
            "ready",
            listen=settings.listen,
            port=server.port,
            tls=settings.tls_cert_file is not None,
            health_port=server.health_port,
            metrics_port=server.metrics_port,
            **describe(loaded),
            seconds=round(time.monotonic() - start, 2),
        )
        await server.serve_until_signal()
    finally:
        await close(loaded)
    log.info("stopped")


def _leave_on_sigterm() -> None:
    """Until there is something to drain, SIGTERM ends the process at once.

    Without a handler it would too, but not where it is the first of a container: there it would be ignored.
    """
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
