"""Requests of one stream, answered side by side."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterable, Callable
from contextlib import aclosing, suppress
from typing import TypeVar

Request = TypeVar("Request")
Answer = TypeVar("Answer")


async def interleave(
    requests: AsyncIterable[Request],
    answer: Callable[[Request], AsyncGenerator[Answer, None]],
    at_once: int,
) -> AsyncGenerator[Answer, None]:
    """Yield the answers of every request as they come, those of one request in order.

    No more than `at_once` requests are under way; the others are not read from the stream. Left early, all of
    them end. Raises what an answer raises; then the others end too.
    """
    answers: asyncio.Queue[Answer | None] = asyncio.Queue(1)
    places = asyncio.Semaphore(at_once)

    async def run(request: Request) -> None:
        try:
            async with aclosing(answer(request)) as made:
                async for one in made:
                    await answers.put(one)
        finally:
            places.release()

    async def read() -> Exception | None:
        failure: Exception | None = None
        try:
            async with asyncio.TaskGroup() as tasks:
                async for request in requests:
                    await places.acquire()
                    tasks.create_task(run(request))
        except ExceptionGroup as group:
            failure = group.exceptions[0]
        await answers.put(None)
        return failure

    reading = asyncio.create_task(read())
    try:
        while (one := await answers.get()) is not None:
            yield one
        failure = await reading
        if failure is not None:
            raise failure
    finally:
        reading.cancel()
        with suppress(asyncio.CancelledError):
            await reading
