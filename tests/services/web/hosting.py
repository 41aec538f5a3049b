"""The web door in the test's process, on a thread of its own, in front of real services."""

import asyncio
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any

import httpx

from services.runtime.settings import load_settings
from services.web.app import Readiness, build_app
from services.web.metrics import WebMetrics
from services.web.serve import bind, make_server
from services.web.settings import WebSettings


@contextmanager
def hosting_web(**settings: Any) -> Iterator[str]:
    """Serve until the end of the context; yield the URL. Without the studio, unless it is asked for."""
    flags = load_settings(WebSettings, **{"listen": "127.0.0.1:0", "studio": False, **settings})
    started: Future[tuple[str, asyncio.AbstractEventLoop, Any]] = Future()

    async def serve() -> None:
        try:
            server = make_server(flags, build_app(flags, WebMetrics(), Readiness()))
            listener = bind(flags.listen)
        except BaseException as error:
            started.set_exception(error)
            return
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        started.set_result((url, asyncio.get_running_loop(), server))
        await server.serve(sockets=[listener])
        listener.close()

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    try:
        url, _, server = started.result(60)
        try:
            yield url
        finally:
            server.should_exit = True
    finally:
        thread.join()


@contextmanager
def calling(url: str, **headers: str) -> Iterator[httpx.Client]:
    """Yield a client of a web door."""
    with httpx.Client(base_url=url, timeout=60, headers=headers, trust_env=False) as client:
        yield client


def faults(response: httpx.Response) -> dict[str, str]:
    """Return the violations of a response by field."""
    assert response.headers["content-type"] == "application/problem+json"
    problem = response.json()
    assert problem["status"] == response.status_code
    return {one["field"]: one["description"] for one in problem.get("errors", ())}
