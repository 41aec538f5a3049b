"""The requests of one call on the engine, and their events as they come."""

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence

from services.api.generation import Event, Failed, Finished, GenerationRequest, Update
from services.engine import Engine, Handle
from services.inference.model import Caller


async def run(
    engine: Engine, requests: Sequence[GenerationRequest], caller: Caller
) -> AsyncGenerator[tuple[int, Update], None]:
    """Yield the index of a request and its next event, until each of `requests` is `Finished`.

    Raises what one failed with, or what refused it. Then, and when left early, all are cancelled.
    """
    loop = asyncio.get_running_loop()
    events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
    deadline = _deadline(caller)
    handles: list[Handle] = []

    def submit(index: int, request: GenerationRequest) -> Handle:
        def on_event(event: Event) -> None:
            # Called on the engine's thread, which may outlive the loop of a stopped server.
            if not loop.is_closed():
                loop.call_soon_threadsafe(events.put_nowait, (index, event))

        return engine.submit(request, on_event, deadline=deadline)

    try:
        for index, request in enumerate(requests):
            handles.append(submit(index, request))
        left = len(requests)
        while left:
            index, event = await events.get()
            if isinstance(event, Failed):
                raise event.error
            yield index, event
            left -= isinstance(event, Finished)
    finally:
        for handle in handles:
            handle.cancel()


def _deadline(caller: Caller) -> float | None:
    """Return the caller's deadline on `time.monotonic`'s clock."""
    left: float | None = caller.time_remaining()  # of which grpc's stubs forget that it may be None
    return None if left is None else time.monotonic() + left
