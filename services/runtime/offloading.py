"""Run a servicer's blocking work on threads, off the event loop."""

import asyncio
import contextvars
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Final, TypeVar

AT_ONCE: Final = 4
"""Maximum number of requests that are decoded at a time; bounds the memory for decoding."""

Result = TypeVar("Result")


class OffLoop:
    """Runs functions on `AT_ONCE` threads. A function that is cancelled while queued is not run."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(AT_ONCE, "decode")

    async def __call__(self, work: Callable[[], Result]) -> Result:
        """Run `work` on a thread; return its result, or raise its exception."""
        context = contextvars.copy_context()
        return await asyncio.get_running_loop().run_in_executor(self._threads, context.run, work)
