"""The bounded, fair queue of a batcher: which calls are refused, and which items are the next batch.

Start-time fair queueing by priority class, caller and call (`services.fairness`), charged by cost. A batch
can't be interrupted, so its size is what keeps others waiting: while several callers are there, it holds one
item of each caller whose turn it is, and others as far as they hardly slow it down. On a device that every
item occupies, batches are then small; on one that small batches do not fill, they are large.
"""

import asyncio
import itertools
import math
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Final, Generic, NamedTuple, TypeVar

from services.errors import DeadlineExceededError, QueueFullError
from services.fairness import Account, FairShares, Path, leaves_room, retry_after, work_ahead
from services.runtime import tracing
from services.runtime.batch_pace import TRIAL, BatchPace
from services.runtime.callers import Caller

Item = TypeVar("Item")
Result = TypeVar("Result")

_QUANTA: Final = 24
"""Quanta of fair queueing in a batch of the largest cost."""
_ALONE_SECONDS: Final = 60.0
"""Time without a call of another caller after which batches of one caller are as large as they may be."""
_PLANNED: Final = 0.9
"""Share of the time to its deadline that a call may be planned to take; below it, it is dropped."""
_CAUTION: Final = 1.5
"""By how much an estimated wait is raised before a call is received and decoded: if it were right on average
only, half of the calls of a full queue would end after their deadlines."""
_MAX_IDLE: Final = 3.0
"""Longest time between batches that counts, as a multiple of a batch's."""
_ROUNDING: Final = 1e-6
_FIRST_GUESS_SECONDS: Final = 1.0
"""Wait before anything was measured."""

_arrivals: Final = itertools.count()
_arrival: ContextVar[int | None] = ContextVar("arrival", default=None)
"""Number of the current context's call, ascending."""


@contextmanager
def arriving() -> Iterator[int]:
    """Number the call of this context, unless it has a number: its place among those that are prepared."""
    number = _arrival.get()
    if number is not None:
        yield number
        return
    token = _arrival.set(number := next(_arrivals))
    try:
        yield number
    finally:
        _arrival.reset(token)


class Call(Generic[Item, Result]):
    """The items of one `submit`."""

    def __init__(
        self,
        items: Sequence[Item],
        cost: Callable[[Item], float],
        path: Path,
        arrived: float,
        deadline: float | None,
    ) -> None:
        self.path, self.arrived, self.deadline = path, arrived, deadline
        self.largest = float("inf")
        """Cost of the largest batch that it may share, for its deadline's sake."""
        self.waiting = deque((index, item, cost(item)) for index, item in enumerate(items))
        self.cost = sum(cost for _, _, cost in self.waiting)
        """Cost of the items that are still in the queue."""
        self.queued_from, self.trace = arrived, tracing.current()
        self.results: dict[int, Result] = {}
        self.size = len(items)
        self.done: asyncio.Future[list[Result]] = asyncio.get_running_loop().create_future()

    def deliver(self, index: int, result: Result) -> None:
        """Set the result of an item; the last ends the call."""
        self.results[index] = result
        if len(self.results) == self.size and not self.done.done():
            self.done.set_result([self.results[index] for index in range(self.size)])

    def record_batch(self, start: float, end: float, size: int) -> None:
        """Record that some of its items were in a batch of `size`, and waited until then."""
        tracing.record("queue", self.queued_from, start, self.trace)
        tracing.record("model", start, end, self.trace, batch=size)
        self.queued_from = end

    def fail(self, error: Exception) -> None:
        """End the call with an error."""
        if not self.done.done():
            self.done.set_exception(error)


class Taken(NamedTuple, Generic[Item, Result]):
    """An item of a batch."""

    call: Call[Item, Result]
    number: int
    """Of the item in its call."""
    item: Item
    cost: float


@dataclass(kw_only=True)
class Refusals:
    """Totals."""

    refused: int = 0
    """Calls that were refused: no room, or not the time."""
    dropped: int = 0
    """Calls that left the queue since they could no longer be done before their deadline."""


class BatchQueue(Generic[Item, Result]):
    """The calls that wait. Belongs to one event loop; other threads may use `check` and `cost`."""

    def __init__(self, *, max_cost: float, max_queue_cost: float, clock: Callable[[], float]) -> None:
        """Args:
        max_cost: maximum cost of a batch; a single item above it is a batch of its own.
        max_queue_cost: maximum cost of the items in the queue.
        clock: returns the time.
        """
        self._max_cost, self._max_queue_cost, self._clock = max_cost, max_queue_cost, clock
        self._shares = FairShares()
        self._numbers = itertools.count()
        self._calls: dict[int, Call[Item, Result]] = {}
        self._expected: dict[int, tuple[Account, float]] = {}
        """Calls that are received or decoded, by their number, with a guess at their cost."""
        self._latest: Account | None = None
        self._latest_at = self._others_at = float("-inf")
        """When the latest call of that account, and of all others, arrived."""
        self._began, self._running = 0.0, 0.0
        """When the running batch began, and its cost; 0 without one."""
        self._ended: float | None = None
        """When the latest batch ended, if other calls waited then."""
        self._item = 1.0
        """Cost of the latest item: a guess at a call that is not decoded yet."""
        self.pace = BatchPace()
        """How long the model takes."""
        self._turnaround = BatchPace()
        """How long it takes from batch to batch while calls wait: also what reading and decoding delay."""
        self.totals = Refusals()
        self.cost = 0.0
        """Cost of the items in the queue."""

    def __len__(self) -> int:
        """Return the number of calls that wait."""
        return len(self._calls)

    @property
    def oldest(self) -> float:
        """When the oldest call arrived. There must be one."""
        return min(call.arrived for call in self._calls.values())

    def check(self, cost: float, caller: Caller) -> None:
        """Raise `QueueFullError` if a call of `cost` has no room, or can't be done before its deadline.

        An empty queue accepts any cost, and an idle model any deadline.
        """
        account = Account(caller.key, caller.priority)
        self._check_room(account, cost)
        self._check_time(account, cost, caller.deadline)

    def _check_room(self, account: Account, cost: float) -> None:
        if self.cost > 0:
            free = self._max_queue_cost - self.cost
            if free <= 0 or cost > free:
                self._refuse_room(account, cost, "the queue is full")
            calls = tuple(self._calls.values())
            if not leaves_room(sum(call.cost for call in calls if call.path.account == account), cost, free):
                self._refuse_room(account, cost, "the room that the caller leaves is for others")

    @contextmanager
    def expect(self, items: int, caller: Caller) -> Iterator[None]:
        """Count a call of `items` as waiting while it is prepared: until it is added, or the context ends.

        Raises `QueueFullError` if an item like the latest has no room, or `items` like it not the time.
        """
        account, cost = Account(caller.key, caller.priority), items * self._item
        with arriving() as number:
            self._check_room(account, self._item)
            self._check_time(account, cost, caller.deadline, caution=_CAUTION)
            self._expected[number] = account, cost
            try:
                yield
            finally:
                self._expected.pop(number, None)

    def _check_time(
        self, account: Account, cost: float, deadline: float | None, *, caution: float = 1.0
    ) -> None:
        waiting = self._waiting()
        if deadline is None or self.pace.unit is None or not (waiting or self._running):
            return
        left = deadline - self._clock()
        own = self._turnaround.seconds(cost)
        wait = max(0.0, self._seconds_to_end(waiting, account, cost, left) - own)
        needed = caution * wait + own
        if needed > left:
            self.totals.refused += 1
            raise QueueFullError(
                f"the call would end after its deadline: with others before it, it takes {needed:.1f} s; "
                "try again later, or allow more time",
                retry_after=retry_after(needed - left),
                refusal="time",
                needed=needed,
            )

    def add(self, items: Sequence[Item], cost: Callable[[Item], float], caller: Caller) -> Call[Item, Result]:
        """Add a call. Raises what `check` raises."""
        path = Path(caller.priority, caller.key, next(self._numbers))
        call: Call[Item, Result] = Call(items, cost, path, self._clock(), caller.deadline)
        self.check(call.cost, caller)
        if (number := _arrival.get()) is not None:
            self._expected.pop(number, None)
        if call.deadline is not None:
            call.largest = self._largest(call.deadline - call.arrived)
        if self._latest != path.account:
            self._others_at, self._latest = self._latest_at, path.account
        self._latest_at = call.arrived
        self._shares.enter(path)
        self._calls[path.number] = call
        self._count_cost()
        return call

    def remove(self, call: Call[Item, Result]) -> None:
        """Remove what is left of a call, if anything is."""
        if self._calls.pop(call.path.number, None) is not None:
            self._shares.leave(call.path)
            self._count_cost()

    def calls(self) -> tuple[Call[Item, Result], ...]:
        """Return the calls that wait."""
        return tuple(self._calls.values())

    def take(self) -> list[Taken[Item, Result]]:
        """Remove and return the next batch. `end_batch` must follow. Drops calls that are too late."""
        self._drop_late()
        if not self._calls:
            return []
        turn, others = self._by_turn()
        least = turn[0][0].waiting[0][2]
        alone = self._alone()
        batch = _Batch[Item, Result](self._full(least, alone=alone))
        for calls in turn:
            self._move(calls, batch)
        if not alone:
            batch.limit = min(self._max_cost, self.pace.spare(batch.cost, least))
        order = others + [calls for calls in turn if calls]
        while order:
            order = [calls for calls in order if self._move(calls, batch)]
        self._count_cost()
        self._began, self._running = self._clock(), batch.cost
        return batch.taken

    def end_batch(self) -> None:
        """Note the end of the running batch."""
        now = self._clock()
        if self._running:
            seconds = now - self._began
            self.pace.add(self._running, seconds)
            idle = 0.0 if self._ended is None else self._began - self._ended
            # A caller who sends slowly does not keep others waiting, so what is between batches is bounded.
            self._turnaround.add(self._running, seconds + min(idle, _MAX_IDLE * seconds))
        self._running = 0.0
        self._ended = now if self._calls or self._expected else None

    def _by_turn(self) -> "tuple[list[_Waiting[Item, Result]], list[_Waiting[Item, Result]]]":
        """Return the calls of each account, next first: of those that share the next batch, and of others.

        Accounts of one class share it that have, or have not, used up a quantum.
        """
        ranked = sorted((self._shares.rank(call.path), number) for number, call in self._calls.items())
        leader = self._calls[ranked[0][1]].path.priority, ranked[0][0].exhausted
        turn: defaultdict[Account, _Waiting[Item, Result]] = defaultdict(deque)
        others: defaultdict[Account, _Waiting[Item, Result]] = defaultdict(deque)
        for rank, number in ranked:
            call = self._calls[number]
            side = turn if (call.path.priority, rank.exhausted) == leader else others
            side[call.path.account].append(call)
        return list(turn.values()), list(others.values())

    def _move(self, calls: "_Waiting[Item, Result]", batch: "_Batch[Item, Result]") -> bool:
        """Move the next item of an account's calls into a batch if it fits; return whether it has others.

        The calls take turns.
        """
        call = calls[0]
        index, item, cost = call.waiting[0]
        limit = min(batch.limit, call.largest)
        if batch.taken and batch.cost + cost > limit:
            return False
        self._item = cost
        batch.limit = limit
        batch.cost += cost
        batch.taken.append(Taken(call, index, item, cost))
        call.waiting.popleft()
        self._shares.charge(call.path, cost * _QUANTA / self._max_cost)
        call.cost = sum(cost for _, _, cost in call.waiting)
        calls.popleft()
        if call.waiting:
            calls.append(call)
        else:
            del self._calls[call.path.number]
            self._shares.leave(call.path)
        return bool(calls)

    def _alone(self) -> bool:
        """Return whether one account only has called for a while."""
        if self._clock() - self._others_at <= _ALONE_SECONDS:
            return False
        return all(call.path.account == self._latest for call in self._calls.values())

    def _drop_late(self) -> None:
        """Drop calls that can't be done before their deadline, in batches that let others be done in time."""
        now = self._clock()
        for call in tuple(self._calls.values()):
            if call.deadline is None:
                continue
            left = call.deadline - now
            full = self._full(call.waiting[0][2])
            batch = max(min(full, call.largest, self.cost), call.cost)
            # The last one is tried in any case: estimates may be wrong.
            needed = self.pace.seconds(batch) if len(self._calls) > 1 else 0.0
            if left <= 0 or needed > left:
                self.remove(call)
                self.totals.dropped += 1
                call.fail(
                    DeadlineExceededError(
                        f"the call waited {now - call.arrived:.1f} s and takes {needed:.1f} s, but its "
                        f"deadline is in {max(left, 0.0):.1f} s; allow more time, or send less at a time",
                        refusal="time" if len(call.waiting) == call.size else None,
                    )
                )

    def _refuse_room(self, account: Account, cost: float, reason: str) -> None:
        self.totals.refused += 1
        wait = self._seconds_to_end(self._waiting(), account, cost, float("inf"))
        raise QueueFullError(
            f"{reason}: {self.cost:.1f} of {self._max_queue_cost:g} are queued, no room for {cost:.1f} more; "
            "try again later",
            retry_after=retry_after(wait),
        )

    def _waiting(self) -> list[tuple[Account, float]]:
        """Return account and cost of each call that waits, or is being prepared since before the current."""
        current = _arrival.get()
        waiting = [(call.path.account, call.cost) for call in tuple(self._calls.values())]
        return waiting + [
            one for number, one in tuple(self._expected.items()) if current is None or number < current
        ]

    def _seconds_to_end(
        self, waiting: Sequence[tuple[Account, float]], account: Account, cost: float, within: float
    ) -> float:
        """Estimate the seconds until a new call of `cost` ends, if it is to end `within` so many."""
        if self.pace.unit is None:
            return _FIRST_GUESS_SECONDS
        cost = cost or self._item
        running = self.pace.seconds(self._running) - (self._clock() - self._began) if self._running else 0.0
        total = sum(left for _, left in waiting) + cost
        batch = min(self._full(min(cost, self._item)), self._largest(within), total)
        batch = max(batch, min(cost, self._item))
        batches = math.ceil((work_ahead(account, cost, waiting) + cost) / batch - _ROUNDING)
        return max(running, 0.0) + batches * self._turnaround.seconds(batch)

    def _full(self, least: float, *, alone: bool = False) -> float:
        """Return the cost of a batch while many calls wait, the first item of which costs `least`."""
        largest = self._max_cost
        if not (alone or self.pace.known):
            largest = min(largest, TRIAL * least)
        return self.pace.efficient(least, largest)

    def _largest(self, within: float) -> float:
        """Return the cost of the largest batch for a call that is to end `within` so many seconds.

        A call that arrives while such a batch runs waits for its end, and then for its own batch.
        """
        return self.pace.within(_PLANNED * within / 2)

    def _count_cost(self) -> None:
        # Summed again: a running difference would accumulate rounding errors.
        self.cost = sum(call.cost for call in self._calls.values())


_Waiting = deque[Call[Item, Result]]
"""The calls of an account, next first."""


class _Batch(Generic[Item, Result]):
    """A batch that is put together."""

    def __init__(self, limit: float) -> None:
        self.limit = limit
        self.cost = 0.0
        self.taken: list[Taken[Item, Result]] = []
