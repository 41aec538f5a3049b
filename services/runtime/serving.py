"""The life of a service's process: bind, load, be ready, drain, close. The same for every service.

What differs is the `SERVICE` in ``services/NAME/serve.py``; ``python -m services.NAME`` runs `main` with it.
"""

import asyncio
import gc
import os
import signal
import sys
import threading
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import structlog

from services.environment import quiet_libraries
from services.errors import InvalidInputError, MilongaError, ModelError
from services.runtime.logs import configure_logs
from services.runtime.metrics import ServerMetrics
from services.runtime.server import Server
from services.runtime.settings import ServerSettings, load_settings

log = structlog.get_logger()

Settings = TypeVar("Settings", bound=ServerSettings)
Loaded = TypeVar("Loaded")


@dataclass(frozen=True, kw_only=True, slots=True)
class Service(Generic[Settings, Loaded]):
    """What is particular to a service. `Loaded` is what it serves: models that are in memory."""

    settings: type[Settings]
    """Its settings."""
    check: Callable[[Settings], bool]
    """Refuses settings that can't be served, before anything slow is imported; raises `InvalidInputError`.
    Returns whether a model may have to be fetched from the Hugging Face hub."""
    load: Callable[[Settings], Loaded]
    """Loads what is served. Called on a thread, since it takes seconds; raises `MilongaError`."""
    add: Callable[[Server, ServerMetrics, Loaded, Settings], None]
    """Adds the gRPC services and the metrics to a server."""
    describe: Callable[[Loaded], dict[str, Any]]
    """Returns what the log says of it when it is ready."""
    close: Callable[[Loaded], Awaitable[None]]
    """Frees it, once every call has ended or had its grace."""


def main(service: Service[Any, Any]) -> int:
    """Run a service with settings from the environment; return the exit code.

    0: stopped by a signal; 1: a fault of ours; 2: a setting or a model was refused.
    """
    try:
        run(service, load_settings(service.settings))
    except MilongaError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, InvalidInputError | ModelError) else 1
    finally:
        # At exit Python would look for cycles among what torch and the others imported, which takes a second.
        gc.freeze()
    return 0


def run(service: Service[Settings, Any], settings: Settings) -> None:
    """Serve until SIGTERM or SIGINT.

    Raises:
        MilongaError: the service could not start: a setting, the port, a model.
    """
    quiet_libraries(online=service.check(settings))
    configure_logs(settings.log_format, settings.log_level)
    log.info("settings", **settings.model_dump(mode="json"))
    asyncio.run(_serve(service, settings))


async def _serve(service: Service[Settings, Loaded], settings: Settings) -> None:
    start = time.monotonic()
    _leave_on_sigterm()
    metrics = ServerMetrics()
    server = Server(settings, metrics)
    try:
        loaded = await asyncio.to_thread(service.load, settings)
        service.add(server, metrics, loaded, settings)
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
            **service.describe(loaded),
            seconds=round(time.monotonic() - start, 2),
        )
        await server.serve_until_signal()
    finally:
        await service.close(loaded)
    log.info("stopped")


def _leave_on_sigterm() -> None:
    """Until there is something to drain, SIGTERM ends the process at once.

    Without a handler it would too, but not where it is the first of a container: there it would be ignored.
    """
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
