"""Whose items are batched, and which calls are refused, in virtual time."""

import asyncio
from collections.abc import Awaitable, Callable
from random import Random
from typing import Any

import pytest

from services.errors import DeadlineExceededError, QueueFullError
from services.runtime.batch_pace import BatchPace
from tests.services.jobs import Job
from tests.services.runtime.simulation import MAX_BATCH, Simulation, Times, run_virtually, simulate

DEVICES: dict[str, Times] = {
    "every item costs": lambda cost: 0.1 * cost,
    "batches have a fixed cost": lambda cost: 0.2 + 0.106 * cost,
    "items are nearly free": lambda cost: 0.5 * (1 + cost / 32),
}


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> Times:
    return DEVICES[request.param]


def virtually(times: Times, test: Callable[[Simulation], Awaitable[None]]) -> None:
    async def run() -> None:
        async with simulate(times) as simulation:
            await test(simulation)
            for task in simulation.tasks:
                task.cancel()

    run_virtually(run())


async def settled() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def overload(simulation: Simulation, rate: float, seconds: float, **options: Any) -> list[Job]:
    """Calls at random times, each of a caller of its own."""
    random, end, number = Random(1), simulation.now + seconds, 0
    while simulation.now < end:
        number += 1
        simulation.start(simulation.call(f"caller {number}", **options))
        await asyncio.sleep(random.expovariate(rate))
    return simulation.jobs


@pytest.mark.parametrize(
    ("greedy", "count"),
    [({}, 32), ({}, 200), ({"priority": "batch"}, 200), ({"clips": 64}, 1), ({"clips": 64}, 4)],
)
def test_a_caller_next_to_a_greedy_one_waits_three_times_as_long_at_most(
    device: Times, greedy: dict[str, Any], count: int
) -> None:
    async def test(simulation: Simulation) -> None:
        unloaded = (await simulation.call("alone")).seconds
        start = simulation.now
        for _ in range(count):
            simulation.loop("greedy", until=start + 400 * unloaded, **greedy)
        await asyncio.sleep(5 * unloaded)
        simulation.loop("caller", until=start + 390 * unloaded, pause=0.7 * unloaded)
        await asyncio.sleep(395 * unloaded)
        calls = [job for job in simulation.jobs if job.caller == "caller"]
        assert len(calls) > 100
        assert all(job.good for job in calls)
        seconds = sorted(job.seconds for job in calls)
        assert seconds[round(0.99 * len(seconds)) - 1] <= 3 * unloaded
        assert seconds[-1] <= 3.5 * unloaded

    virtually(device, test)


def test_of_two_greedy_callers_each_gets_half_whatever_they_ask_for(device: Times) -> None:
    async def test(simulation: Simulation) -> None:
        end = simulation.now + 200
        for _ in range(32):
            simulation.loop("many", until=end)
        simulation.loop("large", until=end, clips=64)
        await asyncio.sleep(200)
        many, large = (sum(job.work for job in simulation.of(caller)) for caller in ("many", "large"))
        assert large / 1.3 <= many <= 1.3 * (large + 64), "a large call may have 64 clips half done"

    virtually(device, test)


def test_batch_work_gets_its_share_next_to_interactive_callers_who_never_stop(device: Times) -> None:
    async def test(simulation: Simulation) -> None:
        for number in range(16):
            simulation.loop(f"interactive {number}", until=simulation.now + 300)
        for _ in range(16):
            simulation.loop("batch", until=simulation.now + 300, priority="batch")
        await asyncio.sleep(300)
        done, batch = sum(job.good for job in simulation.jobs), len(simulation.of("batch"))
        assert done / 20 <= batch <= done / 4, "one ninth"

    virtually(device, test)


def test_a_large_call_of_one_caller_uses_large_batches_where_they_are_of_use(device: Times) -> None:
    async def test(simulation: Simulation) -> None:
        await simulation.call("alone", clips=64)
        before = simulation.batcher.stats
        start = simulation.now
        await simulation.call("alone", clips=64)
        after = simulation.batcher.stats
        assert simulation.now - start <= 1.06 * 8 * device(MAX_BATCH) + 0.01
        if device(2) == 2 * device(1):
            assert after.calls - before.calls > 60, "otherwise a newcomer would wait for no use"

    virtually(device, test)


@pytest.mark.parametrize("patience", [8.0, 20.0])
def test_with_deadlines_the_device_does_what_can_be_done(device: Times, patience: float) -> None:
    async def test(simulation: Simulation) -> None:
        unloaded = (await simulation.call("alone")).seconds
        simulation.jobs.clear()
        most = MAX_BATCH / device(MAX_BATCH)
        jobs = await overload(simulation, 3 * most, 300, timeout=patience * unloaded)
        good = [job for job in jobs if job.good]
        assert len(good) >= 0.9 * 300 * most
        refused = [job for job in jobs if isinstance(job.error, QueueFullError)]
        assert all(job.end == job.start for job in refused), "at once"
        late = [job for job in jobs if isinstance(job.error, DeadlineExceededError | TimeoutError)]
        assert len(late) <= 0.06 * len(good), "few are taken in vain"

    virtually(device, test)


def test_calls_that_are_being_decoded_count_as_waiting(device: Times) -> None:
    async def test(simulation: Simulation) -> None:
        unloaded = (await simulation.call("alone")).seconds
        simulation.jobs.clear()
        most = MAX_BATCH / device(MAX_BATCH)
        options = {"timeout": 8 * unloaded, "preparation": unloaded}
        jobs = await overload(simulation, 3 * most, 100, **options)
        good = [job for job in jobs if job.good]
        assert len(good) >= 0.8 * 100 * most
        refused = [job for job in jobs if isinstance(job.error, QueueFullError)]
        assert sum(job.end == job.start for job in refused) >= 0.75 * len(refused), "before they are decoded"

    virtually(device, test)


def test_without_deadlines_the_queue_is_bounded_and_the_device_is_busy(device: Times) -> None:
    async def test(simulation: Simulation) -> None:
        most = MAX_BATCH / device(MAX_BATCH)
        jobs = await overload(simulation, 3 * most, 300)
        assert sum(job.good for job in jobs) >= 0.9 * 300 * most
        refused = [job.error for job in jobs if job.error is not None]
        assert refused
        assert all(isinstance(error, QueueFullError) for error in refused)

    virtually(device, test)


def test_the_time_to_come_back_is_the_wait(device: Times) -> None:
    async def test(simulation: Simulation) -> None:
        for number in range(500):
            simulation.start(simulation.call(f"caller {number}"))
        await settled()
        error = simulation.jobs[-1].error
        assert isinstance(error, QueueFullError)
        start = simulation.now
        await simulation.settle()
        assert error.retry_after == pytest.approx(simulation.now - start, rel=0.5)

    virtually(device, test)


def test_one_caller_leaves_room_for_others(device: Times) -> None:
    async def test(simulation: Simulation) -> None:
        for _ in range(10):
            simulation.start(simulation.call("greedy", clips=64))
        await settled()
        error = simulation.jobs[-1].error
        assert isinstance(error, QueueFullError)
        other = await simulation.call("caller", clips=8)
        assert other.good

    virtually(device, test)


def test_a_call_that_can_no_longer_be_done_is_dropped_and_one_alone_is_tried(device: Times) -> None:
    async def test(simulation: Simulation) -> None:
        seconds = device(1.0)
        assert (await simulation.call("idle", timeout=seconds + 0.01)).good
        simulation.batcher._queue._began = simulation.now  # as if the running batch were about to end
        running = asyncio.create_task(simulation.call("running", clips=1))
        await asyncio.sleep(0.006)
        waiting = [asyncio.create_task(simulation.call("other", clips=8)) for _ in range(2)]
        await settled()
        simulation.batcher._queue.pace.unit, unit = None, simulation.batcher._queue.pace.unit
        late = asyncio.create_task(simulation.call("late", clips=2, timeout=seconds + 0.02))
        await settled()
        simulation.batcher._queue.pace.unit = unit
        job = await late
        assert isinstance(job.error, DeadlineExceededError)
        assert "allow more time, or send less at a time" in str(job.error)
        assert simulation.batcher.stats.dropped == 1
        await asyncio.gather(running, *waiting)

    virtually(device, test)


def test_the_time_of_a_batch_is_learnt_from_few_and_from_noisy_ones() -> None:
    pace, random = BatchPace(), Random(1)
    assert pace.seconds(8.0) == 0.0
    pace.add(1.0, 100.0)  # compiles
    pace.add(1.0, 0.3)
    assert pace.seconds(2.0) == pytest.approx(0.6)
    assert pace.spare(1.0, 1.0) == 2.0, "to learn more"
    assert pace.efficient(1.0, 8.0) == 8.0
    for _ in range(500):
        cost = random.choice([1.0, 2.0, 8.0])
        pace.add(cost, (0.2 + 0.1 * cost) * random.uniform(0.8, 1.2))
    assert pace.seconds(1.0) == pytest.approx(0.3, rel=0.15)
    assert pace.seconds(8.0) == pytest.approx(1.0, rel=0.15)
    assert pace.within(0.5) == pytest.approx(3.0, rel=0.2)
