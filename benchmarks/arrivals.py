"""Requests that arrive whether or not others are done, and servers that take them."""

import queue
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
from numpy.typing import NDArray

from services.api.generation import Event, Failed, Finished, GenerationRequest
from services.engine import Engine

Submit = Callable[[int, Callable[[], None]], None]
"""Starts request i; the callback is called when its clip is there."""
Server = tuple[Submit, Callable[[], None]]
"""Starts requests; ends when all are done."""


def poisson(rate: float, seconds: float) -> list[float]:
    """Return the times of arrival of a Poisson process, in seconds from the start: three at least."""
    generator = np.random.default_rng(0)
    count = max(3, int(rate * seconds))
    return [float(moment) for moment in np.cumsum(generator.exponential(1 / rate, count))]


def latencies(arrivals: Sequence[float], server: Server) -> NDArray[np.float64]:
    """Send a request at each arrival, whether or not others are done; return their latencies in seconds."""
    submit, close = server
    found: queue.SimpleQueue[tuple[int, float]] = queue.SimpleQueue()
    began = time.perf_counter()

    def note(index: int) -> None:
        # From when it was due: a late sender hides no wait.
        found.put((index, time.perf_counter() - began - arrivals[index]))

    for index, arrival in enumerate(arrivals):
        time.sleep(max(0.0, began + arrival - time.perf_counter()))
        submit(index, partial(note, index))
    done = dict(found.get() for _ in arrivals)
    close()
    return np.array([done[index] for index in range(len(arrivals))])


def engine_server(engine: Engine, request_of: Callable[[int], GenerationRequest]) -> Server:
    """Return a server that submits each request to an engine. Its end raises the error of one that failed."""
    errors: list[Exception] = []

    def submit(index: int, done: Callable[[], None]) -> None:
        def on_event(event: Event) -> None:
            if isinstance(event, Failed):
                errors.append(event.error)
            if isinstance(event, Finished | Failed):
                done()

        engine.submit(request_of(index), on_event)

    def close() -> None:
        for error in errors:
            raise error

    return submit, close


def batch_server(
    render: Callable[[Sequence[int]], object],
    largest: int,
    kind_of: Callable[[int], object] = lambda _: None,
) -> Server:
    """Return a server that renders the first waiting request, with others of its kind, from start to end.

    Up to `largest` requests are rendered together. Those that arrive meanwhile wait.
    """
    waiting: list[tuple[int, Callable[[], None]]] = []
    changed = threading.Condition()
    closing = False

    def take() -> list[tuple[int, Callable[[], None]]]:
        with changed:
            changed.wait_for(lambda: waiting or closing)
            batch = [one for one in waiting if kind_of(one[0]) == kind_of(waiting[0][0])][:largest]
            waiting[:] = [one for one in waiting if one not in batch]
            return batch

    def work() -> None:
        while batch := take():
            render([index for index, _ in batch])
            for _, done in batch:
                done()

    def submit(index: int, done: Callable[[], None]) -> None:
        with changed:
            waiting.append((index, done))
            changed.notify()

    def close() -> None:
        nonlocal closing
        with changed:
            closing = True
            changed.notify()
        thread.join()

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return submit, close
