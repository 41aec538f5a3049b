"""The life cycle of every service process: bind ports, load models, serve, drain, close.

Each service has a `SERVICE` in ``services/NAME/serve.py``; ``python -m services.NAME`` runs `main` with it.
"""

import asyncio
import faulthandler
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
from services.runtime.gpu_memory import gpu_memory
from services.runtime.logs import configure_logs
from services.runtime.metrics import ServerMetrics
from services.runtime.server import CLOSE_SECONDS, Server
from services.runtime.settings import ServerSettings, load_settings
from services.runtime.telemetry import start as start_traces

log = structlog.get_logger()

_STDERR = 2
"""Its file descriptor: `sys.stderr` may have none."""

Settings = TypeVar("Settings", bound=ServerSettings)
Loaded = TypeVar("Loaded")


@dataclass(frozen=True, kw_only=True, slots=True)
class Service(Generic[Settings, Loaded]):
    """The parts in which services differ. `Loaded` is the type of its models in memory."""

    name: str
    """Its name in `services.catalogue`."""
    settings: type[Settings]
    """Class of its settings."""
    check: Callable[[Settings], bool]
    """Check the settings before torch is imported; return whether a model may have to be fetched from the
    Hugging Face hub. Raises `InvalidInputError`."""
    load: Callable[[Settings], Loaded]
    """Load the models. Called on a thread, since it takes seconds. Raises `MilongaError`."""
    add: Callable[[Server, ServerMetrics, Loaded, Settings], None]
    """Add the gRPC services and the metrics to a server."""
    watch: Callable[[Loaded, Callable[[str], None]], None]
    """Have the models call the function, which is thread-safe, with a reason when they can't work any longer:
    the service then stops (`Server.fail`)."""
    describe: Callable[[Loaded], dict[str, Any]]
    """Return the fields of the log event `ready` that describe the models."""
    close: Callable[[Loaded], Awaitable[None]]
    """Free the models, after every call has ended or used up its grace."""


def main(service: Service[Any, Any]) -> int:
    """Run a service with settings from the environment; return the exit code.

    0: stopped by a signal; 1: internal error, or the service has failed; 2: a setting or a model was refused.
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
        MilongaError: a setting, a port or a model was refused.
        ServiceFailedError: the service has failed.
    """
    quiet_libraries(online=service.check(settings))
    configure_logs(settings.log_format, settings.log_level)
    start_traces(f"milonga-{service.name}")
    log.info("settings", **settings.model_dump(mode="json"))
    asyncio.run(_serve(service, settings))


async def _serve(service: Service[Settings, Loaded], settings: Settings) -> None:
    start = time.monotonic()
    _exit_on_sigterm()
    metrics = ServerMetrics()
    server = Server(settings, metrics, end_within=end_within)
    try:
        loaded = await asyncio.to_thread(service.load, settings)
        service.add(server, metrics, loaded, settings)
        service.watch(loaded, server.fail)
        metrics.add(gpu_memory)
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
        end_within(CLOSE_SECONDS)
        await service.close(loaded)
    log.info("stopped")


def end_within(seconds: float) -> None:
    """Have the process end with exit code 1 after `seconds`, unless it has ended before.

    It then writes what each thread was doing. Needs neither the event loop nor the interpreter's lock, one of
    which may be what hangs. Each call replaces the one before.
    """
    faulthandler.dump_traceback_later(seconds, exit=True, file=_STDERR)


def _exit_on_sigterm() -> None:
    """Exit at once on SIGTERM while models load; `Server.serve_until_signal` replaces this handler.

    Needed in containers: the kernel ignores SIGTERM for a process with PID 1 and no handler.
    """
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
