"""One budget of bytes per process: messages that were received, and the clips that they are decoded to.

gRPC takes memory for a message once it is read, and says how large it is only when all of it is there. So a
message that is being read counts as the largest that is permitted; others wait where they are sent from.
"""

import asyncio
import itertools
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from contextvars import ContextVar
from typing import Final

from prometheus_client.core import GaugeMetricFamily
from prometheus_client.metrics_core import Metric

from services.errors import DeadlineExceededError, QueueFullError
from services.fairness import FairShares, Path, leaves_room, retry_after
from services.runtime.callers import current_caller

_MAX_WAIT_SECONDS: Final = 10.0
"""Time that a message waits to be read."""
_MAX_READ_SECONDS: Final = 120.0
"""Time that a message takes to arrive at most, from then on."""
_MAX_WAITING: Final = 1_024
"""Messages that wait to be read. gRPC has up to 64 KiB of each in memory."""
_QUANTUM: Final = 2**20
"""Quantum of fair queueing: a caller's messages up to this size in all are read before others'."""
_FIRST_GUESS: Final = 1.0
"""Seconds until there is room, before anything was measured."""


class Budget:
    """Counts the bytes that requests hold, and refuses more than `limit`. Belongs to one event loop.

    A request alone is admitted whatever it needs: its own limits bound it. A caller that holds much leaves
    room for others.
    """

    def __init__(self, limit: int, max_message: int) -> None:
        """Args:
        limit: most bytes of all requests.
        max_message: size of the largest message that gRPC accepts.
        """
        self.limit, self._max_message = limit, max_message
        self.held = 0
        """Bytes that are held now."""
        self._held_by: Counter[str] = Counter()
        self._shares, self._numbers = FairShares(), itertools.count()
        self._reading: set[Path] = set()
        self._waiting: dict[Path, asyncio.Future[None]] = {}
        self._less = asyncio.Event()
        """Set when a request holds less, and replaced."""
        self._freed, self._busy, self._since = 0, 0.0, 0.0

    def hold(self) -> "Hold":
        """Return a hold of no bytes, of the current caller."""
        return Hold(self, current_caller().key)

    @contextmanager
    def holding(self) -> Iterator["Hold"]:
        """Make a new hold the current one, and release it at the end of the context."""
        hold = self.hold()
        token = _current.set(hold)
        try:
            yield hold
        finally:
            _current.reset(token)
            hold.release()

    @asynccontextmanager
    async def reading(self) -> AsyncIterator[Callable[[int], None]]:
        """Wait until the current caller may read a message, which it does within the context.

        Yields a function that takes the size of the message, so that large ones count in the caller's turns.

        Raises:
            QueueFullError: the caller has waited for `_MAX_WAIT_SECONDS`, or too many callers wait.
            DeadlineExceededError: the message takes longer than `_MAX_READ_SECONDS` to arrive.
        """
        caller = current_caller()
        path = Path(caller.priority, caller.key, next(self._numbers))
        self._shares.enter(path)
        try:
            await self._turn(path)
            async with asyncio.timeout(_MAX_READ_SECONDS):
                yield lambda size: self._shares.charge(path, size / _QUANTUM)
        except TimeoutError:
            raise DeadlineExceededError(
                f"the message had not arrived after {_MAX_READ_SECONDS:g} s; send less at a time"
            ) from None
        finally:
            self._waiting.pop(path, None)
            self._reading.discard(path)
            self._shares.leave(path)
            self._admit()

    async def room(self, hold: "Hold", size: int) -> None:
        """Wait until `hold` may have `size` bytes in all, `_MAX_WAIT_SECONDS` at most."""
        with suppress(TimeoutError):
            async with asyncio.timeout(_MAX_WAIT_SECONDS):
                while not self._has_room(hold, size):
                    await self._less.wait()

    async def _turn(self, path: Path) -> None:
        if len(self._waiting) >= _MAX_WAITING:
            raise self._full(f"{len(self._waiting)} messages wait to be received", self._max_message)
        turn = self._waiting[path] = asyncio.get_running_loop().create_future()
        self._admit()
        try:
            async with asyncio.timeout(_MAX_WAIT_SECONDS):
                await turn
        except TimeoutError:
            what = f"messages arrive slowly, {len(self._reading)} at present"
            raise self._full(what, self._max_message) from None

    def resize(self, hold: "Hold", size: int) -> None:
        """Let `hold` have `size` bytes in all. Raises `QueueFullError` if there is no room for more."""
        more = size - hold.size
        if not self._has_room(hold, size):
            held = f"requests hold {self.held / 2**20:.0f} of {self.limit / 2**20:.0f} MiB"
            raise self._full(
                f"{held}, {self._held_by[hold.caller] / 2**20:.0f} of them this caller's; "
                f"there is no room for {more / 2**20:.1f} MiB more",
                more,
            )
        now = time.monotonic()
        self._busy += now - self._since if self.held else 0.0
        self._since = now
        self._freed += max(0, -more)
        self.held += more
        self._held_by[hold.caller] += more
        if not self._held_by[hold.caller]:
            del self._held_by[hold.caller]
        hold.size = size
        if more < 0:
            self._admit()
            less, self._less = self._less, asyncio.Event()
            less.set()

    def _has_room(self, hold: "Hold", size: int) -> bool:
        others = self.held - hold.size
        if size <= hold.size or not others:
            return True
        free = self.limit - others
        return size <= free and leaves_room(self._held_by[hold.caller] - hold.size, size, free)

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics."""
        yield GaugeMetricFamily("milonga_held_bytes", "Bytes that requests hold in memory.", self.held)

    def _admit(self) -> None:
        """Let callers read, in turns, as long as there is memory for their messages.

        One always may, and no caller reads as many messages as there is memory for.
        """
        while self._waiting:
            if self._reading and self.held + (len(self._reading) + 1) * self._max_message > self.limit:
                return
            readers = Counter(path.caller for path in self._reading)
            most = max(1, self.limit // self._max_message - 1)
            waiting = [path for path in self._waiting if readers[path.caller] < most]
            if not waiting:
                return
            path = min(waiting, key=self._shares.rank)
            self._reading.add(path)
            turn = self._waiting.pop(path)
            if not turn.done():
                turn.set_result(None)

    def _full(self, what: str, more: int) -> QueueFullError:
        # As fast as bytes were freed so far.
        seconds = self._busy / self._freed * max(0, self.held + more - self.limit) if self._freed else 0.0
        return QueueFullError(
            f"the service has no memory for the request: {what}; try again later, or send less at a time",
            retry_after=retry_after(seconds or _FIRST_GUESS),
            refusal="memory",
        )


class Hold:
    """The bytes that a request holds. A stream's hold has a part for each of its requests."""

    def __init__(self, budget: Budget, caller: str) -> None:
        self._budget, self.caller = budget, caller
        self.size = 0
        self._parts: set[Hold] = set()
        self._whole: Hold | None = None

    def part(self) -> "Hold":
        """Return a new part, which is the current hold from now on."""
        part = Hold(self._budget, self.caller)
        part._whole = self
        self._parts.add(part)
        _current.set(part)
        return part

    def resize(self, size: int) -> None:
        """Hold `size` bytes in all. Raises `QueueFullError` if there is no room for more."""
        self._budget.resize(self, size)

    def release(self) -> None:
        """Hold nothing any longer."""
        self.resize(0)
        for part in tuple(self._parts):
            part.release()
        if self._whole is not None:
            self._whole._parts.discard(self)


_current: ContextVar[Hold | None] = ContextVar("hold", default=None)


def current_hold() -> Hold:
    """Return what the current request holds; outside of a request, a hold without a limit."""
    return _current.get() or Hold(Budget(2**63, 1), "")
