"""The batcher in virtual time: the real `MicroBatcher` on an event loop that does not wait, with a model that
only lets the time pass.

Loads of minutes run in seconds and give the same figures on every machine.
"""

import asyncio
import selectors
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest

from services.errors import MilongaError
from services.fairness import Priority
from services.runtime import microbatching
from services.runtime.callers import Caller, calling
from services.runtime.microbatching import MicroBatcher
from tests.services.jobs import Job

Times = Callable[[float], float]
"""Seconds of a batch by its cost."""

MAX_BATCH, MAX_QUEUE = 8.0, 384.0
"""In clips, each of which costs 1: as 80 and 3,840 seconds of clips of ten."""


class _Selector(selectors.SelectSelector):
    """Instead of waiting, lets the virtual time pass."""

    now = 1000.0

    def select(self, timeout: float | None = None) -> list[Any]:
        self.now += timeout or 0.0
        return super().select(0)


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop in virtual time."""

    def __init__(self) -> None:
        self._virtual = _Selector()
        super().__init__(self._virtual)

    def time(self) -> float:
        return self._virtual.now


def run_virtually(main: Coroutine[Any, Any, None]) -> None:
    """Run a coroutine in virtual time."""
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        runner.run(main)


class _VirtualModel:
    """Takes the place of `ModelThread`: a call of the model takes virtual time, and returns the items."""

    def __init__(self, run: Callable[[Sequence[float]], Awaitable[list[float]]], **_: Any) -> None:
        self._run = run

    async def __call__(self, items: Sequence[float]) -> list[float]:
        return await self._run(items)

    async def close(self) -> None:
        pass


@dataclass(kw_only=True)
class Simulation:
    """Calls that arrive in virtual time."""

    batcher: MicroBatcher[float, float]
    jobs: list[Job] = field(default_factory=list)
    tasks: set[asyncio.Task[Any]] = field(default_factory=set)

    @property
    def now(self) -> float:
        return asyncio.get_running_loop().time()

    async def call(
        self,
        caller: str,
        *,
        clips: int = 1,
        cost: float = 1.0,
        preparation: float = 0.0,
        timeout: float | None = None,
        priority: Priority = "interactive",
    ) -> Job:
        """Make a call; return when it has ended. At its deadline it is cancelled, as gRPC does."""
        job = Job(caller=caller, start=self.now, work=clips)
        self.jobs.append(job)
        deadline = None if timeout is None else self.now + timeout
        with calling(Caller(name=caller, priority=priority, deadline=deadline)):
            try:
                async with asyncio.timeout(timeout):
                    with self.batcher.expect(clips):
                        await asyncio.sleep(preparation)
                        await self.batcher.submit([cost] * clips)
            except (MilongaError, TimeoutError) as error:
                job.error = error
        job.end = self.now
        return job

    def start(self, coroutine: Coroutine[Any, Any, Any]) -> None:
        """Run a coroutine meanwhile."""
        task = asyncio.create_task(coroutine)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    def loop(self, caller: str, *, until: float, pause: float = 0.0, **options: Any) -> None:
        """Make a call, and another `pause` seconds after it ended, until a time; refused, when it is told."""

        async def repeat() -> None:
            while self.now < until:
                job = await self.call(caller, **options)
                await asyncio.sleep(pause if job.good else getattr(job.error, "retry_after", 1.0))

        self.start(repeat())

    async def settle(self) -> None:
        """Wait for all calls."""
        while self.tasks:
            await asyncio.wait(self.tasks)

    def of(self, caller: str) -> list[Job]:
        """The calls of a caller that ended well."""
        return [job for job in self.jobs if job.caller == caller and job.good]


@asynccontextmanager
async def simulate(times: Times) -> AsyncIterator[Simulation]:
    """Yield a simulation, in a virtual loop, with a device whose batches take `times`."""

    async def run(items: Sequence[float]) -> list[float]:
        await asyncio.sleep(times(sum(items)))
        return list(items)

    virtual_run: Any = run
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(microbatching, "ModelThread", _VirtualModel)
        batcher: MicroBatcher[float, float] = MicroBatcher(
            virtual_run,
            cost=float,
            max_cost=MAX_BATCH,
            max_queue_cost=MAX_QUEUE,
            clock=asyncio.get_running_loop().time,
        )
        simulation = Simulation(batcher=batcher)
        for clips in (1, 1, 8, 8):  # measures the pace
            await simulation.call("warm", clips=clips)
        await asyncio.sleep(100.0)
        simulation.jobs.clear()
        yield simulation
        await batcher.close()
