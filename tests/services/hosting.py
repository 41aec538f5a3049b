"""A real service in the test's process, on a thread of its own."""

import asyncio
import logging
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import structlog

from services.runtime.metrics import ServerMetrics
from services.runtime.server import Server
from services.runtime.serving import Service
from services.runtime.settings import ServerSettings


@dataclass(frozen=True, kw_only=True, slots=True)
class Hosted:
    target: str
    server: Server
    metrics: ServerMetrics
    loop: asyncio.AbstractEventLoop

    def run(self, coroutine: Any) -> Any:
        """Run a coroutine on the server's loop, and wait for it."""
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(30)


@contextmanager
def hosting(
    service: Service[Any, Any], loaded: Any, settings: ServerSettings, *, close: bool = True
) -> Iterator[Hosted]:
    """Serve what is `loaded` until the end of the context; then close it, unless it is the caller's."""
    # The access log, written from the server's thread, would land between the tests' dots.
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    started: Future[Hosted] = Future()
    stop = threading.Event()

    async def serve() -> None:
        try:
            metrics = ServerMetrics()
            server = Server(settings, metrics)
            service.add(server, metrics, loaded, settings)
            await server.start()
        except BaseException as error:
            started.set_exception(error)
            return
        target, loop = f"127.0.0.1:{server.port}", asyncio.get_running_loop()
        started.set_result(Hosted(target=target, server=server, metrics=metrics, loop=loop))
        await asyncio.to_thread(stop.wait)
        await server.stop(0)
        if close:
            await service.close(loaded)

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    try:
        yield started.result(30)
    finally:
        stop.set()
        thread.join()
