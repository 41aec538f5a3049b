"""Run a servicer's blocking work on threads, off the event loop, in turns by caller."""

import asyncio
import contextvars
import itertools
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final, Generic, TypeVar

from services.audio.steps import Steps
from services.errors import DeadlineExceededError, QueueFullError
from services.fairness import FairShares, Path, retry_after, work_ahead
from services.runtime.callers import Caller, current_caller

AT_ONCE: Final = 2
"""Maximum number of requests that are worked on at a time; bounds the memory for decoding."""

_SLICE_SECONDS: Final = 0.05
"""Time after which work yields its thread to that of others."""
_QUANTUM_SECONDS: Final = 0.25
"""Quantum of fair queueing: an ordinary request is done within it."""

Result = TypeVar("Result")


@dataclass(kw_only=True, slots=True, eq=False)
class _Task(Generic[Result]):
    """The work of one request."""

    steps: Steps[Result]
    path: Path
    work: float
    """Amount of work, in the unit of `OffLoop.steps`; 0 if unknown."""
    done: asyncio.Future[Result]
    context: contextvars.Context = field(default_factory=contextvars.copy_context)
    seconds: float = 0.0
    """Time on threads so far."""
    is_running: bool = False
    is_cancelled: bool = False


class OffLoop:
    """Runs work on `AT_ONCE` threads, in slices that are shared fairly among callers.

    Work that is cancelled ends after its present step, or is never begun. Belongs to one event loop.
    """

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(AT_ONCE, "decode")
        self._shares = FairShares()
        self._numbers = itertools.count()
        self._tasks: dict[Path, _Task[Any]] = {}
        self._running = 0
        self._work, self._seconds = 0.0, 0.0
        """Totals of what was done: their ratio is the time that work takes."""

    async def __call__(self, work: Callable[[], Result]) -> Result:
        """Run `work` as one step; return its result, or raise its exception."""

        def step() -> Steps[Result]:
            yield from ()
            return work()

        return await self.steps(step())

    async def steps(self, steps: Steps[Result], work: float = 0.0) -> Result:
        """Run `steps`; return their result, or raise their exception.

        Args:
            steps: the work. Each step blocks for milliseconds.
            work: how much it is, in any unit, for estimates of the time that it takes; 0: little.

        Raises:
            DeadlineExceededError: it would take longer than there is time to the caller's deadline.
            QueueFullError: it would be done after the deadline, since there is other work before it.
        """
        caller = current_caller()
        path = Path(caller.priority, caller.key, next(self._numbers))
        self._check(caller, path, work)
        task = _Task(steps=steps, path=path, work=work, done=asyncio.get_running_loop().create_future())
        self._tasks[path] = task
        self._shares.enter(path)
        self._dispatch()
        try:
            result: Result = await task.done
            return result
        finally:
            task.is_cancelled = True
            if not task.is_running:
                self._forget(task)

    def _check(self, caller: Caller, path: Path, work: float) -> None:
        """Raise an error if work can't be done before the deadline, by the time that it took so far."""
        if caller.deadline is None or not work or not self._work:
            return
        pace = self._seconds / self._work
        left = caller.deadline - time.monotonic()
        if work * pace > left:
            raise DeadlineExceededError(
                f"decoding the clips takes {work * pace:.1f} s, and the deadline is in {left:.1f} s; "
                "allow more time, or send fewer clips"
            )
        waiting = (
            (task.path.account, max(0.0, task.work * pace - task.seconds)) for task in self._tasks.values()
        )
        wait = work_ahead(path.account, work * pace, waiting) / AT_ONCE
        if wait + work * pace > left:
            late = wait + work * pace - left
            raise QueueFullError(
                f"the clips would be decoded {late:.1f} s after the deadline, since {wait:.1f} s of work are "
                "before them; try again later",
                retry_after=retry_after(late),
                refusal="time",
            )

    def _dispatch(self) -> None:
        """Give each idle thread the task whose turn it is."""
        while self._running < AT_ONCE:
            waiting = [task for task in self._tasks.values() if not task.is_running]
            if not waiting:
                return
            task = min(waiting, key=lambda task: self._shares.rank(task.path))
            task.is_running, self._running = True, self._running + 1
            slice_ = asyncio.get_running_loop().run_in_executor(self._threads, _run_slice, task)
            slice_.add_done_callback(partial(self._returned, task))

    def _returned(self, task: _Task[Any], slice_: "asyncio.Future[tuple[float, _Outcome | None]]") -> None:
        """Charge a slice to its caller, and give its thread to the next task."""
        self._running, task.is_running = self._running - 1, False
        seconds, outcome = slice_.result()
        task.seconds += seconds
        self._shares.charge(task.path, seconds / _QUANTUM_SECONDS)
        # The future is cancelled some turns of the loop before its caller wakes up and sets `is_cancelled`.
        if task.is_cancelled or task.done.done():
            self._forget(task)
        elif outcome is not None:
            if task.work and outcome.error is None:
                self._work, self._seconds = self._work + task.work, self._seconds + task.seconds
            outcome.deliver(task.done)
            self._forget(task)
        self._dispatch()

    def _forget(self, task: _Task[Any]) -> None:
        if self._tasks.pop(task.path, None) is not None:
            task.steps.close()
            self._shares.leave(task.path)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Outcome:
    """How work ended."""

    value: Any = None
    error: BaseException | None = None

    def deliver(self, done: asyncio.Future[Any]) -> None:
        if done.done():  # the caller has just left
            return
        if self.error is None:
            done.set_result(self.value)
        else:
            done.set_exception(self.error)


def _run_slice(task: _Task[Any]) -> tuple[float, _Outcome | None]:
    """Do steps for a slice of time, on a thread; return the seconds, and how the work ended if it did."""
    start = time.monotonic()
    outcome: _Outcome | None = None
    try:
        while not task.is_cancelled:
            task.context.run(next, task.steps)
            if time.monotonic() - start >= _SLICE_SECONDS:
                break
    except StopIteration as end:
        outcome = _Outcome(value=end.value)
    except BaseException as error:
        # Without this frame, which has the outcome: in a cycle, the message would stay in memory.
        outcome = _Outcome(error=error.with_traceback(error.__traceback__ and error.__traceback__.tb_next))
    return time.monotonic() - start, outcome
