"""Lines in front of the services' queues: callers wait a little for room, in turn."""

import asyncio
from collections.abc import Awaitable, Callable, Hashable
from typing import Final, TypeVar

from prometheus_client import Gauge

from services.errors import QueueFullError, QuotaExceededError

T = TypeVar("T")
Line = Hashable
"""Whose requests wait in turn: a caller and a service."""

_POLL_SECONDS: Final = 0.2
"""Longest time between two tries of the first in a line: room opens with every clip that ends."""


def _nothing() -> None:
    pass


class WaitingRoom:
    """A line per caller and service, so that nobody waits behind another caller's requests.

    A service's own queue is bounded and fair. A request that it refuses for lack of room waits here; the
    first of each line asks again. Belongs to one event loop.
    """

    def __init__(self, seconds: float, waiting: Gauge) -> None:
        """`seconds`: longest wait, 0 for none. `waiting` counts those who wait."""
        self._seconds, self._waiting = seconds, waiting
        self._lines: dict[Line, _Line] = {}

    async def enter(
        self, line: Line, attempt: Callable[[], Awaitable[T]], on_wait: Callable[[], None] = _nothing
    ) -> T:
        """Return the result of `attempt`, which is repeated while the queue is full.

        Args:
            line: whose request it is, and of which service.
            attempt: calls the service.
            on_wait: is called once if the request has to wait.

        Raises:
            QueueFullError: there was no room in time; or the caller's quota is used up.
        """
        if line in self._lines:
            refusal = QueueFullError("too many requests wait for a place", retry_after=self._seconds)
        else:
            try:
                return await attempt()
            except QuotaExceededError:
                raise
            except QueueFullError as error:
                refusal = error
        if not self._seconds:
            raise refusal
        with self._waiting.track_inprogress():
            on_wait()
            return await self._wait(line, attempt, refusal)

    async def _wait(self, name: Line, attempt: Callable[[], Awaitable[T]], refusal: QueueFullError) -> T:
        end = asyncio.get_running_loop().time() + self._seconds
        line = self._lines.setdefault(name, _Line())
        line.length += 1
        try:
            try:
                async with asyncio.timeout_at(end):
                    await line.turn.acquire()
            except TimeoutError:
                raise refusal from None
            try:
                return await _repeated(attempt, end)
            finally:
                line.turn.release()
        finally:
            line.length -= 1
            if not line.length:
                del self._lines[name]


class _Line:
    """The requests that wait in one line."""

    def __init__(self) -> None:
        self.turn, self.length = asyncio.Lock(), 0


async def _repeated(attempt: Callable[[], Awaitable[T]], end: float) -> T:
    """Return the result of `attempt`, repeated until the time `end` of the loop while the queue is full."""
    while True:
        try:
            return await attempt()
        except QuotaExceededError:
            raise
        except QueueFullError as error:
            pause = min(error.retry_after, _POLL_SECONDS)
            if asyncio.get_running_loop().time() + pause >= end:
                raise
        await asyncio.sleep(pause)
