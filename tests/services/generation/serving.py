"""A real server in the test's process, on a thread of its own, and a real engine on a tiny pipeline."""

import asyncio
import logging
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import structlog
import torch

from milonga.v1 import generation_pb2_grpc as rpc
from services.engine import Engine, EngineConfig
from services.generation.metrics import EngineCollector
from services.generation.servicer import SERVICE_NAME, GenerationServicer
from services.runtime.metrics import ServerMetrics
from services.runtime.model_uri import ResolvedModel
from services.runtime.server import Server
from services.runtime.settings import ServerSettings, load_settings
from tests.tiny import tiny_pipeline

MODEL = ResolvedModel(
    folder=Path("tiny"), name="tiny", version="1", digest="sha256:" + "0" * 64, license="Apache-2.0"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Served:
    target: str
    server: Server
    engine: Engine
    loop: asyncio.AbstractEventLoop

    def run(self, coroutine: Any) -> Any:
        """Run a coroutine on the server's loop, and wait for it."""
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(30)


def tiny_engine(**config: Any) -> Engine:
    torch.set_num_threads(1)
    return Engine(tiny_pipeline(), EngineConfig(threads=1, **config))


@contextmanager
def serving(engine: Engine, **settings: Any) -> Iterator[Served]:
    """Serve `engine` on a free port until the end of the context. The engine stays open."""
    # The access log, written from the server's thread, would land between the tests' dots.
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    started: Future[tuple[Server, asyncio.AbstractEventLoop]] = Future()
    stop = threading.Event()
    flags = {"listen": "127.0.0.1:0", "grace_seconds": 0, **settings}
    config = load_settings(ServerSettings, **flags)
    thread = threading.Thread(target=lambda: asyncio.run(_serve(engine, config, started, stop)))
    thread.start()
    try:
        server, loop = started.result(30)
        yield Served(target=f"127.0.0.1:{server.port}", server=server, engine=engine, loop=loop)
    finally:
        stop.set()
        thread.join()


async def _serve(
    engine: Engine,
    settings: ServerSettings,
    started: "Future[tuple[Server, asyncio.AbstractEventLoop]]",
    stop: threading.Event,
) -> None:
    try:
        metrics = ServerMetrics()
        metrics.registry.register(EngineCollector(engine, MODEL))
        server = Server(settings, metrics)
        servicer = GenerationServicer(engine, MODEL)
        server.add(
            SERVICE_NAME,
            lambda grpc_server: rpc.add_GenerationServiceServicer_to_server(servicer, grpc_server),
        )
        await server.start()
        started.set_result((server, asyncio.get_running_loop()))
    except BaseException as error:
        started.set_exception(error)
        return
    await asyncio.to_thread(stop.wait)
    await server.stop(0)
