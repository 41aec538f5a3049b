"""A real server in the test's process, on a thread of its own; and one of tiny scorers in it."""

import asyncio
import logging
import threading
from collections.abc import Awaitable, Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import structlog

from services.models.manifest import write_manifest
from services.runtime.metrics import ServerMetrics
from services.runtime.server import Server
from services.runtime.settings import ServerSettings, load_settings
from services.scoring.scorers import Scorer, load
from services.scoring.serve import add_scoring
from services.scoring.settings import ScoringSettings
from tests.tiny import tiny_clap


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
    settings: ServerSettings,
    add: Callable[[Server, ServerMetrics], None],
    close: Callable[[], Awaitable[None]],
) -> Iterator[Hosted]:
    """Serve what `add` adds until the end of the context; then `close`, on the server's loop."""
    # The access log, written from the server's thread, would land between the tests' dots.
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    started: Future[Hosted] = Future()
    stop = threading.Event()

    async def serve() -> None:
        try:
            metrics = ServerMetrics()
            server = Server(settings, metrics)
            add(server, metrics)
            await server.start()
        except BaseException as error:
            started.set_exception(error)
            return
        started.set_result(
            Hosted(
                target=f"127.0.0.1:{server.port}",
                server=server,
                metrics=metrics,
                loop=asyncio.get_running_loop(),
            )
        )
        await asyncio.to_thread(stop.wait)
        await server.stop(0)
        await close()

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    try:
        yield started.result(30)
    finally:
        stop.set()
        thread.join()


@dataclass(frozen=True, kw_only=True, slots=True)
class Served:
    hosted: Hosted
    scorers: Mapping[str, Scorer]


def save_tiny_clap(folder: Path, seed: int) -> Path:
    """Write a tiny CLAP model and its manifest into `folder`."""
    tiny_clap(seed).save(folder)
    write_manifest(folder, folder.name, "1", "Apache-2.0")
    return folder


@contextmanager
def serving(scorers: Mapping[str, str], **settings: Any) -> Iterator[Served]:
    """Load scorers by name and URI, and serve them on a free port until the end of the context."""
    flags = {"listen": "127.0.0.1:0", "grace_seconds": 0, "threads": 1, "device": "cpu", **settings}
    config = load_settings(ScoringSettings, scorers=dict(scorers), **flags)
    loaded = load(config)

    async def close() -> None:
        for scorer in dict.fromkeys(loaded.values()):
            await scorer.close()

    with hosting(
        config, lambda server, metrics: add_scoring(server, metrics, loaded, config), close
    ) as hosted:
        yield Served(hosted=hosted, scorers=loaded)
