"""Dynamic batching: items of concurrent calls share calls of a model.

::

    batcher = MicroBatcher(run, cost=seconds, max_cost=80.0, max_queue_cost=3840.0)
    results = await batcher.submit(items)       # from many coroutines of one event loop
    await batcher.close()

`services.runtime.batch_queue` decides whose items are next, and which calls are refused, by their caller.
Whatever ends its work fails every call, and is reported once to the function that `watch` was given.
"""

import asyncio
import contextvars
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Generic, TypeVar

import structlog

from services.api.measurements import Observer, ignore
from services.errors import ServiceUnavailableError, TooLargeError, is_out_of_memory
from services.runtime import tracing
from services.runtime.batch_queue import BatchQueue, Call, Taken
from services.runtime.callers import current_caller
from services.runtime.model_thread import ModelThread
from services.runtime.settings import BatchedSettings

log = structlog.get_logger()

Item = TypeVar("Item")
Result = TypeVar("Result")


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
    """Calls refused because the queue had no room, or not the time before their deadline."""
    dropped: int = 0
    """Calls that left the queue since they could no longer be done before their deadline."""


class MicroBatcher(Generic[Item, Result]):
    """Collects items of concurrent callers into batches, and runs each on one worker thread.

    While a batch runs, new items collect. Belongs to one event loop.
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
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Args:
        run: the model; returns one result per item, in order. Runs on the worker thread.
        cost: returns the cost of an item, in any unit: for example, seconds of audio.
        max_cost: maximum cost of a batch; a single item above it is a batch of its own.
        max_wait: seconds that the first item waits for others, unless the batch is full before.
        max_queue_cost: maximum cost of the items in the queue.
        max_run_seconds: time after which a call of the model counts as hung; 0: no limit.
        initialize: runs on the worker thread before the first batch.
        clock: returns the time of the event loop.
        """
        self._run, self._cost = run, cost
        self._max_cost, self._max_wait = max_cost, max_wait
        self._max_run_seconds, self._initialize, self._clock = max_run_seconds, initialize, clock
        self._open: set[Call[Item, Result]] = set()
        """Every call that has not ended."""
        self._queue: BatchQueue[Item, Result] = BatchQueue(
            max_cost=max_cost, max_queue_cost=max_queue_cost, clock=clock
        )
        self._changed = asyncio.Event()
        self._worker: asyncio.Task[None] | None = None
        self._model: ModelThread[Item, Result] | None = None
        self._closing = False
        self._failure: str | None = None
        self._on_failure: Callable[[str], None] = lambda _: None
        self.observe: Observer = ignore
        """Called on the event loop with each measurement; may be replaced."""
        self._totals = {"calls": 0, "items": 0, "cost": 0.0, "seconds": 0.0, "waited": 0.0}

    @property
    def stats(self) -> BatchStats:
        """Totals since the start, and the queue's cost now. Thread-safe."""
        refusals = self._queue.totals
        return BatchStats(
            queue_cost=self._queue.cost,
            refused=refusals.refused,
            dropped=refusals.dropped,
            **self._totals,  # type: ignore[arg-type]
        )

    def watch(self, on_failure: Callable[[str], None]) -> None:
        """Have `on_failure` called with a reason when the batcher can't work any longer."""
        self._on_failure = on_failure
        if self._failure is not None:
            on_failure(self._failure)

    def check(self, cost: float = 0.0) -> None:
        """Raise what `submit` would raise for items of `cost` in all. Call it before preparing them.

        Thread-safe.
        """
        if self._closing or self._failure is not None:
            raise self._unavailable()
        self._queue.check(cost, current_caller())

    def expect(self, items: int) -> AbstractContextManager[None]:
        """Return a context that counts `items` as waiting while they are received and decoded.

        On entering, raises what `submit` would raise for such items.
        """
        if self._closing or self._failure is not None:
            raise self._unavailable()
        return self._queue.expect(items, current_caller())

    async def submit(self, items: Sequence[Item]) -> list[Result]:
        """Return the model's results for `items`, in order. The items may be split over several batches.

        Cancelling it removes the items that have not run from the queue.

        Raises:
            QueueFullError: the queue has no room, or the call would end after its deadline. An empty queue
                accepts items of any cost.
            DeadlineExceededError: the call can no longer be done before its deadline.
            ServiceUnavailableError: the batcher is closing, or has failed.
            TooLargeError: one of `items` does not fit into memory, even in a batch of its own.
            Exception: the exception of `run` for one of `items` in a batch of its own.
        """
        if not items:
            return []
        if self._closing or self._failure is not None:
            raise self._unavailable()
        call = self._queue.add(items, self._cost, current_caller())
        self._start()
        self._open.add(call)
        self._changed.set()
        try:
            return await call.done
        finally:
            if call.waiting:
                tracing.record("queue", call.queued_from, self._clock(), call.trace)
            for _ in call.waiting:
                self.observe("queue_wait", self._clock() - call.arrived, call.path.priority)
            self._queue.remove(call)
            self._open.discard(call)

    async def close(self) -> None:
        """Refuse queued items, finish the running batch if it is soon done, and stop the worker thread."""
        self._closing = True
        for call in self._queue.calls():
            self._queue.remove(call)
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
                if self._queue:
                    await self._gather()
                    await self._call(model, self._queue.take())
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
            self._queue.remove(call)
            call.fail(self._unavailable())

    def _unavailable(self) -> ServiceUnavailableError:
        if self._failure is None:
            return ServiceUnavailableError("the service is stopping; try another, or later")
        return ServiceUnavailableError(f"the service has failed: {self._failure}; try another")

    async def _gather(self) -> None:
        """Wait until the batch is full, or the oldest item has waited `max_wait`."""
        due = self._queue.oldest + self._max_wait
        with suppress(TimeoutError):
            async with asyncio.timeout(due - self._clock()):
                while 0 < self._queue.cost < self._max_cost and not self._closing:
                    self._changed.clear()
                    await self._changed.wait()

    async def _call(self, model: ModelThread[Item, Result], taken: Sequence[Taken[Item, Result]]) -> None:
        if not taken:  # every caller was cancelled
            return
        began, cost = self._clock(), sum(one.cost for one in taken)
        for one in taken:
            self.observe("queue_wait", began - one.call.arrived, one.call.path.priority)
        try:
            outcomes = await model([one.item for one in taken])
        finally:
            self._totals["calls"] += 1
            self._totals["items"] += len(taken)
            self._totals["cost"] += cost
            end = self._clock()
            self._queue.end_batch()
            self._totals["seconds"] += end - began
            self._totals["waited"] += sum(began - one.call.arrived for one in taken)
            self.observe("batch", end - began)
            self.observe("fill", min(1.0, cost / self._max_cost))
            for call in dict.fromkeys(one.call for one in taken):
                call.record_batch(began, end, len(taken))
        for (call, index, _, _), outcome in zip(taken, outcomes, strict=True):
            if not isinstance(outcome, Exception):
                call.deliver(index, outcome)
                continue
            self._queue.remove(call)
            call.fail(_too_large(index) if is_out_of_memory(outcome) else outcome)


def batched(
    run: Callable[[Sequence[Item]], Sequence[Result]],
    settings: BatchedSettings,
    *,
    cost: Callable[[Item], float],
) -> MicroBatcher[Item, Result]:
    """Return a batcher of a model with the settings of its service; costs are seconds of audio."""
    return MicroBatcher(
        run,
        cost=cost,
        max_cost=settings.max_batch_seconds,
        max_wait=settings.max_wait_seconds,
        max_queue_cost=settings.max_queue_seconds,
        max_run_seconds=settings.max_batch_run_seconds,
        initialize=partial(set_threads, settings.threads),
    )


def set_threads(count: int | None) -> None:
    """Set the number of CPU threads of torch's models on the current thread; None: torch's choice."""
    if count is not None:
        import torch  # takes seconds

        torch.set_num_threads(count)


def _too_large(index: int) -> TooLargeError:
    return TooLargeError(
        f"item {index} of the call needs more memory than the service has, even in a batch of its own; "
        "send a shorter one"
    )
