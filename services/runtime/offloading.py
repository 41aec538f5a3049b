"""Blocking work of a servicer, off the event loop."""

import asyncio
import contextvars
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Final, TypeVar

AT_ONCE: Final = 4
"""Requests that are decoded at the same time: what decoding takes of memory is that of so many."""

Made = TypeVar("Made")


class OffLoop:
    """Runs functions on `AT_ONCE` threads of its own. What is cancelled before its turn is not run."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(AT_ONCE, "decode")

    async def __call__(self, work: Callable[[], Made]) -> Made:
        """Return what `work` returns, or raise what it raises."""
        context = contextvars.copy_context()
        return await asyncio.get_running_loop().run_in_executor(self._threads, context.run, work)
