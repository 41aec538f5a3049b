"""A real server in the test's process, on a thread of its own, and a real engine on a tiny pipeline."""

import asyncio
import logging
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import structlog
import torch

from services.api.model import ModelVersion
from services.engine import Engine, EngineConfig
from services.generation.serve import add_generation
from services.generation.slot import EngineSlot, Served
from services.runtime.metrics import ServerMetrics
from services.runtime.server import Server
from services.runtime.settings import ServerSettings, load_settings
from services.weights.uri import ResolvedModel
from tests.tiny import tiny_pipeline

MODEL = ResolvedModel(
    folder=Path("tiny"),
    identity=ModelVersion(name="tiny", version="1", digest="sha256:" + "0" * 64, license="Apache-2.0"),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Serving:
    target: str
    server: Server
    engine: Engine
    slot: EngineSlot
    loop: asyncio.AbstractEventLoop

    def run(self, coroutine: Any) -> Any:
        """Run a coroutine on the server's loop, and wait for it."""
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(30)


Started = Future[tuple[Server, EngineSlot, asyncio.AbstractEventLoop]]


def _nothing_to_load(model: ResolvedModel) -> Engine:
    raise AssertionError(f"nobody asked for {model.identity.name}")


def tiny_engine(**config: Any) -> Engine:
    torch.set_num_threads(1)
    return Engine(tiny_pipeline(), EngineConfig(threads=1, **config), MODEL.identity)


@contextmanager
def serving(
    engine: Engine,
    *,
    token: str | None = None,
    load: Callable[[ResolvedModel], Engine] = _nothing_to_load,
    **settings: Any,
) -> Iterator[Serving]:
    """Serve `engine` on a free port until the end of the context. The engine stays open.

    With a `token`, the operator's rpc is served too, and engines of other models are what `load` makes.
    """
    # The access log, written from the server's thread, would land between the tests' dots.
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    started: Started = Future()
    stop = threading.Event()
    flags = {"listen": "127.0.0.1:0", "grace_seconds": 0, **settings}
    config = load_settings(ServerSettings, **flags)
    thread = threading.Thread(target=lambda: asyncio.run(_serve(engine, config, token, load, started, stop)))
    thread.start()
    try:
        server, slot, loop = started.result(30)
        target = f"127.0.0.1:{server.port}"
        yield Serving(target=target, server=server, engine=engine, slot=slot, loop=loop)
    finally:
        stop.set()
        thread.join()


async def _serve(
    engine: Engine,
    settings: ServerSettings,
    token: str | None,
    load: Callable[[ResolvedModel], Engine],
    started: "Started",
    stop: threading.Event,
) -> None:
    try:
        metrics = ServerMetrics()
        server = Server(settings, metrics)
        slot = EngineSlot(Served(engine, MODEL.folder), load)
        add_generation(server, metrics, slot, token)
        await server.start()
        started.set_result((server, slot, asyncio.get_running_loop()))
    except BaseException as error:
        started.set_exception(error)
        return
    await asyncio.to_thread(stop.wait)
    await server.stop(0)
