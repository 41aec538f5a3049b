"""Dynamic batching: items of concurrent calls share calls of a model.

::

    batcher = MicroBatcher(run, cost=seconds, max_cost=80.0, max_queue_cost=3840.0)
    results = await batcher.submit(items)       # from many coroutines of one event loop
    await batcher.close()

Whatever ends its work fails every call, and is reported once to the function that `watch` was given.
"""

import asyncio
import contextvars
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Generic, TypeVar

import structlog

from services.api.measurements import Observer, ignore
from services.errors import QueueFullError, ServiceUnavailableError, TooLargeError, is_out_of_memory
from services.runtime import tracing
from services.runtime.callers import current_caller
from services.runtime.model_thread import ModelThread

log = structlog.get_logger()

Item = TypeVar("Item")
Result = TypeVar("Result")

_FIRST_GUESS_SECONDS = 1.0
"""`QueueFullError.retry_after` until the first call of the model has ended."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchStats:
    """Totals of a batcher since its start. Costs have the unit of the batcher's `cost`."""

    calls: int = 0
    """Batches, including failed ones. Each is one call of the model, unless it fails."""
    items: int = 0
    """Items in these calls."""
    cost: float = 0.0
    """Cost of these items."""
    seconds: float = 0.0
    """Time in calls of the model."""
    waited: float = 0.0
    """Time that items spent in the queue, in seconds, summed over items."""
    queue_cost: float = 0.0
    """Cost of the items that are in the queue now."""
    refused: int = 0
    """Submissions refused because the queue was full."""


class _Call(Generic[Item, Result]):
    """The items of one `submit`."""

    def __init__(self, items: Sequence[Item], cost: Callable[[Item], float]) -> None:
        self.arrived = self.queued_from = time.monotonic()
        self.trace, self.priority = tracing.current(), current_caller().priority
        self.waiting = deque((index, item, cost(item)) for index, item in enumerate(items))
        self.results: dict[int, Result] = {}
        self.size = len(items)
        self.done: asyncio.Future[list[Result]] = asyncio.get_running_loop().create_future()

    @property
    def cost(self) -> float:
        """Cost of the items that are still in the queue."""
        return sum(cost for _, _, cost in self.waiting)

    def deliver(self, index: int, result: Result) -> None:
        self.results[index] = result
        if len(self.results) == self.size and not self.done.done():
            self.done.set_result([self.results[index] for index in range(self.size)])

    def record_batch(self, start: float, end: float, size: int) -> None:
        """Record that some of its items were in a batch of `size`, and waited until then."""
        tracing.record("queue", self.queued_from, start, self.trace)
        tracing.record("model", start, end, self.trace, batch=size)
        self.queued_from = end

    def fail(self, error: Exception) -> None:
        if not self.done.done():
            self.done.set_exception(error)


class MicroBatcher(Generic[Item, Result]):
    """Collects items of concurrent callers into batches, and runs each on one worker thread.

    While a batch runs, new items collect. Callers take turns item by item, so that a call with one clip does
    not wait for a call with 64. Belongs to one event loop.
    """

    def __init__(
        self,
        run: Callable[[Sequence[Item]], Sequence[Result]],
        *,
        cost: Callable[[Item], float],
        max_cost: float,
        max_wait: float = 0.005,
        max_queue_cost: float,
        max_run_seconds: float = 0.0,
        initialize: Callable[[], None] | None = None,
    ) -> None:
        """Args:
        run: the model; returns one result per item, in order. Runs on the worker thread.
        cost: returns the cost of an item, in any unit: for example, seconds of audio.
        max_cost: maximum cost of a batch; a single item above it is a batch of its own.
        max_wait: seconds that the first item waits for others, unless the batch is full before.
        max_queue_cost: maximum cost of the items in the queue.
        max_run_seconds: time after which a call of the model counts as hung; 0: no limit.
        initialize: runs on the worker thread before the first batch.
        """
        self._run, self._cost = run, cost
        self._max_cost, self._max_wait, self._max_queue_cost = max_cost, max_wait, max_queue_cost
        self._max_run_seconds, self._initialize = max_run_seconds, initialize
        self._open: set[_Call[Item, Result]] = set()
        """Every call that has not ended."""
        self._calls: deque[_Call[Item, Result]] = deque()
        self._changed = asyncio.Event()
        self._worker: asyncio.Task[None] | None = None
        self._model: ModelThread[Item, Result] | None = None
        self._closing = False
        self._failure: str | None = None
        self._on_failure: Callable[[str], None] = lambda _: None
        self.observe: Observer = ignore
        """Called on the event loop with each measurement; may be replaced."""
        self._running_cost = 0.0
        self._totals = {"calls": 0, "items": 0, "cost": 0.0, "seconds": 0.0, "waited": 0.0, "refused": 0}
        self._queue_cost = 0.0

    @property
    def stats(self) -> BatchStats:
        """Totals since the start, and the queue's cost now. Thread-safe."""
        return BatchStats(queue_cost=self._queue_cost, **self._totals)  # type: ignore[arg-type]

    def watch(self, on_failure: Callable[[str], None]) -> None:
        """Have `on_failure` called with a reason when the batcher can't work any longer."""
        self._on_failure = on_failure
        if self._failure is not None:
            on_failure(self._failure)

    def check(self, cost: float = 0.0) -> None:
        """Raise what `submit` would raise for items of `cost` in all. Call it before preparing them."""
        if self._closing or self._failure is not None:
            raise self._unavailable()
        full = self._queue_cost >= self._max_queue_cost or self._queue_cost + cost > self._max_queue_cost
        if self._queue_cost > 0 and full:
            self._totals["refused"] += 1
            raise QueueFullError(
                f"the queue is full: {self._queue_cost:.1f} of {self._max_queue_cost:g} are queued, "
                f"no room for {cost:.1f} more; try again later",
                retry_after=self._seconds_left(),
            )

    async def submit(self, items: Sequence[Item]) -> list[Result]:
        """Return the model's results for `items`, in order. The items may be split over several batches.

        Cancelling it removes the items that have not run from the queue.

        Raises:
            QueueFullError: the queue has no room; an empty queue accepts items of any cost.
            ServiceUnavailableError: the batcher is closing, or has failed.
            TooLargeError: one of `items` does not fit into memory, even in a batch of its own.
            Exception: the exception of `run` for one of `items` in a batch of its own.
        """
        if not items:
            return []
        call: _Call[Item, Result] = _Call(items, self._cost)
        self.check(call.cost)
        self._start()
        self._calls.append(call)
        self._open.add(call)
        self._queue_cost += call.cost
        self._changed.set()
        try:
            return await call.done
        finally:
            if call.waiting:
                tracing.record("queue", call.queued_from, time.monotonic(), call.trace)
            self._leave(call)
            self._open.discard(call)

    async def close(self) -> None:
        """Refuse queued items, finish the running batch if it is soon done, and stop the worker thread."""
        self._closing = True
        for call in tuple(self._calls):
            self._leave(call)
            call.fail(self._unavailable())
        self._changed.set()
        if self._model is not None:
            await self._model.close()
        if self._worker is not None:
            # A hung call never delivers its results.
            await asyncio.wait([self._worker], timeout=1.0)
            self._worker.cancel()
            await asyncio.wait([self._worker])

    def _start(self) -> None:
        if self._worker is not None:
            return
        model = ModelThread(
            self._run, cost=self._cost, max_seconds=self._max_run_seconds, initialize=self._initialize
        )
        self._model = model
        # An empty context: otherwise the worker's logs would have the request id of the first caller.
        self._worker = asyncio.get_running_loop().create_task(
            self._work(model), context=contextvars.Context()
        )

    async def _work(self, model: ModelThread[Item, Result]) -> None:
        try:
            while not self._closing:
                if self._calls:
                    await self._gather()
                    await self._call(model, self._take())
                else:
                    self._changed.clear()
                    await self._changed.wait()
        except ServiceUnavailableError as error:
            self._fail(str(error))
        except BaseException as error:
            if isinstance(error, Exception):
                log.critical("batching has ended", exc_info=error)
            self._fail(f"batching has ended with {type(error).__name__}")
            if isinstance(error, asyncio.CancelledError):
                raise

    def _fail(self, reason: str) -> None:
        """Fail every call, refuse new ones, and report the reason unless the service is stopping anyway."""
        if not self._closing:
            self._failure = reason
            self._on_failure(reason)
        for call in tuple(self._open):
            self._leave(call)
            call.fail(self._unavailable())

    def _unavailable(self) -> ServiceUnavailableError:
        if self._failure is None:
            return ServiceUnavailableError("the service is stopping; try another, or later")
        return ServiceUnavailableError(f"the service has failed: {self._failure}; try another")

    async def _gather(self) -> None:
        """Wait until the batch is full, or the oldest item has waited `max_wait`."""
        due = min(call.arrived for call in self._calls) + self._max_wait
        with suppress(TimeoutError):
            async with asyncio.timeout(due - time.monotonic()):
                while 0 < self._queue_cost < self._max_cost and not self._closing:
                    self._changed.clear()
                    await self._changed.wait()

    def _take(self) -> list[tuple[_Call[Item, Result], int, Item]]:
        """Take the next batch from the queue, one item of each caller in turn."""
        taken: list[tuple[_Call[Item, Result], int, Item]] = []
        now = time.monotonic()
        self._running_cost = 0.0
        while self._calls:
            call = self._calls[0]
            index, item, cost = call.waiting[0]
            if taken and self._running_cost + cost > self._max_cost:
                break
            call.waiting.popleft()
            taken.append((call, index, item))
            self._running_cost += cost
            self._totals["waited"] += now - call.arrived
            self.observe("queue_wait", now - call.arrived, call.priority)
            self._calls.popleft()
            if call.waiting:
                self._calls.append(call)
        # Summed again: a running difference would accumulate rounding errors.
        self._queue_cost = sum(call.cost for call in self._calls)
        return taken

    async def _call(
        self, model: ModelThread[Item, Result], taken: Sequence[tuple[_Call[Item, Result], int, Item]]
    ) -> None:
        if not taken:  # every caller was cancelled
            return
        start = time.monotonic()
        try:
            outcomes = await model([item for _, _, item in taken])
        finally:
            self._totals["calls"] += 1
            self._totals["items"] += len(taken)
            self._totals["cost"] += self._running_cost
            end = time.monotonic()
            self._totals["seconds"] += end - start
            self.observe("batch", end - start)
            self.observe("fill", min(1.0, self._running_cost / self._max_cost))
            self._running_cost = 0.0
            for call in dict.fromkeys(call for call, _, _ in taken):
                call.record_batch(start, end, len(taken))
        for (call, index, _), outcome in zip(taken, outcomes, strict=True):
            if not isinstance(outcome, Exception):
                call.deliver(index, outcome)
                continue
            self._leave(call)
            call.fail(_too_large(index) if is_out_of_memory(outcome) else outcome)

    def _leave(self, call: _Call[Item, Result]) -> None:
        with suppress(ValueError):
            self._calls.remove(call)
            self._queue_cost = sum(call.cost for call in self._calls)
            for _ in call.waiting:
                self.observe("queue_wait", time.monotonic() - call.arrived, call.priority)

    def _seconds_left(self) -> float:
        """Estimate the seconds until the queued and running items are done, from the mean time per cost."""
        if not self._totals["cost"]:
            return _FIRST_GUESS_SECONDS
        pace = self._totals["seconds"] / self._totals["cost"]
        return (self._queue_cost + self._running_cost) * pace


def _too_large(index: int) -> TooLargeError:
    return TooLargeError(
        f"item {index} of the call needs more memory than the service has, even in a batch of its own; "
        "send a shorter one"
    )
