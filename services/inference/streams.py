"""Serve the requests of one stream concurrently."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterable, Callable
from contextlib import aclosing, suppress
from typing import TypeVar

Request = TypeVar("Request")
Response = TypeVar("Response")


async def interleave(
    requests: AsyncIterable[Request],
    respond: Callable[[Request], AsyncGenerator[Response, None]],
    max_concurrent: int,
) -> AsyncGenerator[Response, None]:
    """Yield the responses to all requests as they arrive, those to one request in order.

    At most `max_concurrent` requests run at a time; further ones are not read from the stream. Closing the
    generator cancels all of them, and so does an exception of one, which is raised.
    """
    responses: asyncio.Queue[Response | None] = asyncio.Queue(1)
    permits = asyncio.Semaphore(max_concurrent)

    async def run(request: Request) -> None:
        try:
            responding = respond(request)
            del request  # only as long in memory as `respond` needs it
            async with aclosing(responding) as stream:
                async for response in stream:
                    await responses.put(response)
        finally:
            permits.release()

    async def read() -> Exception | None:
        failure: Exception | None = None
        try:
            async with asyncio.TaskGroup() as tasks:
                async for request in requests:
                    await permits.acquire()
                    tasks.create_task(run(request))
                    del request
        except ExceptionGroup as group:
            failure = group.exceptions[0]
        await responses.put(None)
        return failure

    reading = asyncio.create_task(read())
    try:
        while (response := await responses.get()) is not None:
            yield response
        failure = await reading
        if failure is not None:
            raise failure
    finally:
        reading.cancel()
        with suppress(asyncio.CancelledError):
            await reading
