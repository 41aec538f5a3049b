"""Blocking work of a servicer, off the event loop."""

import asyncio
from collections.abc import Callable
from typing import Final, TypeVar

AT_ONCE: Final = 4
"""Requests that are decoded at the same time: their memory is that of so many, however many come."""

Made = TypeVar("Made")


class OffLoop:
    """Runs functions on threads, `AT_ONCE` of them at a time. Belongs to one event loop."""

    def __init__(self) -> None:
        self._places = asyncio.Semaphore(AT_ONCE)

    async def __call__(self, work: Callable[[], Made]) -> Made:
        """Return what `work` returns, or raise what it raises."""
        async with self._places:
            return await asyncio.to_thread(work)
