"""The generation service in the test's process, with a real engine on a tiny pipeline."""

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from services.api.model import ModelVersion
from services.engine import Engine, EngineConfig
from services.generation.serve import SERVICE
from services.generation.settings import GenerationSettings
from services.generation.slot import EngineSlot, Served
from services.runtime.metrics import ServerMetrics
from services.runtime.server import Server
from services.runtime.settings import load_settings
from services.weights.uri import ResolvedModel
from tests.services.hosting import hosting
from tests.tiny import tiny_pipeline

MODEL = ResolvedModel(
    folder=Path("tiny"),
    identity=ModelVersion(name="tiny", version="1", digest="sha256:" + "0" * 64, license="Apache-2.0"),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Serving:
    target: str
    server: Server
    metrics: ServerMetrics
    engine: Engine
    slot: EngineSlot
    loop: asyncio.AbstractEventLoop

    def run(self, coroutine: Any) -> Any:
        """Run a coroutine on the server's loop, and wait for it."""
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(30)


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
    flags = {"listen": "127.0.0.1:0", "grace_seconds": 0, "operator_token": token, **settings}
    slot = EngineSlot(Served(engine, MODEL.folder), load)
    with hosting(SERVICE, slot, load_settings(GenerationSettings, **flags), close=False) as hosted:
        yield Serving(
            target=hosted.target, server=hosted.server, metrics=hosted.metrics,
            engine=engine, slot=slot, loop=hosted.loop,
        )  # fmt: skip
