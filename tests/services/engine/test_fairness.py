"""Who gets the device, and who is refused, in virtual time."""

from collections.abc import Iterator
from random import Random
from typing import Any

import pytest

from services.errors import DeadlineExceededError, QueueFullError
from services.fairness import FairShares, Path
from tests.services.engine.simulation import Simulation, Times, linear, simulate, wide
from tests.services.jobs import Job

DEVICES: dict[str, tuple[Times, float]] = {
    "every row costs": (linear(0.019), 0.009),
    "calls have a fixed cost": (lambda frames, rows: (0.02 + 0.0106 * rows) * frames / 32, 0.009),
    "rows are nearly free": (wide(0.02), 0.001),
}


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> Iterator[Simulation]:
    step, decode = DEVICES[request.param]
    with simulate(step, decode=decode) as simulation:
        yield simulation


def alone(simulation: Simulation, **options: Any) -> float:
    job = simulation.submit("alone", **options)
    simulation.run()
    return job.seconds


def capacity(simulation: Simulation, seconds: float) -> float:
    """Requests per second of callers who never stop."""
    start = simulation.clock.now
    for _ in range(16):
        simulation.loop("capacity", until=start + seconds)
    simulation.run(start + seconds)
    return (
        sum(job.end is not None and job.end <= start + seconds for job in simulation.of("capacity")) / seconds
    )


def overload(simulation: Simulation, rate: float, seconds: float, **options: Any) -> list[Job]:
    """Calls at random times, each of a caller of its own."""
    random, when, first = Random(1), simulation.clock.now, len(simulation.jobs)
    end = when + seconds
    number = 0
    while (when := when + random.expovariate(rate)) < end:
        number += 1
        simulation.at(when, lambda number=number: simulation.submit(f"caller {number}", **options))  # type: ignore[misc, arg-type]
    simulation.run(end)
    return simulation.jobs[first:]


@pytest.mark.parametrize(
    ("greedy", "count"),
    [
        ({}, 32),
        ({}, 200),
        ({"priority": "batch"}, 200),
        ({"num_inference_steps": 200}, 8),
        ({"num_inference_steps": 1000, "clip_count": 8}, 1),
        ({"clip_count": 8}, 4),
        ({"preview_interval_steps": 1}, 4),
    ],
)
def test_a_caller_next_to_a_greedy_one_waits_three_times_as_long_at_most(
    device: Simulation, greedy: dict[str, Any], count: int
) -> None:
    unloaded = alone(device)
    start = device.clock.now
    for _ in range(count):
        device.loop("greedy", until=start + 60 * unloaded, **greedy)
    device.run(start + 5 * unloaded)
    device.loop("caller", until=start + 50 * unloaded, pause=0.7 * unloaded)
    device.run(start + 60 * unloaded)
    calls = [job for job in device.jobs if job.caller == "caller"]
    assert len(calls) > 10
    assert all(job.good for job in calls)
    assert max(job.seconds for job in calls) <= 3 * unloaded
    assert sorted(job.seconds for job in calls)[len(calls) // 2] <= 2.5 * unloaded


def test_of_two_greedy_callers_each_gets_half_whatever_they_ask_for(device: Simulation) -> None:
    unloaded = alone(device)
    start = device.clock.now
    for _ in range(32):
        device.loop("many", until=start + 100 * unloaded)
    for _ in range(2):
        device.loop("long", until=start + 100 * unloaded, num_inference_steps=100, clip_count=4)
    device.run(start + 100 * unloaded)
    shares = [sum(state.steps_done for state in _states(device, caller)) for caller in ("many", "long")]
    shares = [
        share + sum(job.work for job in device.of(caller))
        for share, caller in zip(shares, ("many", "long"), strict=True)
    ]
    assert max(shares) <= 2 * min(shares), "decodes are work, too"


def _states(simulation: Simulation, caller: str) -> list[Any]:
    return [state for state in simulation.engine._admission.states() if state.path.caller == caller]


def test_batch_work_gets_its_share_next_to_interactive_callers_who_never_stop(device: Simulation) -> None:
    unloaded = alone(device)
    start = device.clock.now
    for number in range(16):
        device.loop(f"interactive {number}", until=start + 100 * unloaded)
    for _ in range(4):
        device.loop("batch", until=start + 100 * unloaded, priority="batch")
    device.run(start + 100 * unloaded)
    done, batch = sum(job.good for job in device.jobs), len(device.of("batch"))
    assert done / 20 <= batch <= done / 5, "one ninth"


def test_with_deadlines_the_device_does_what_can_be_done(device: Simulation) -> None:
    unloaded = alone(device)
    most = capacity(device, 60 * unloaded)
    jobs = overload(device, 3 * most, 300, timeout=8 * unloaded)
    refused = [job for job in jobs if isinstance(job.error, QueueFullError)]
    good = [job for job in jobs if job.good]
    assert len(good) >= 0.9 * 300 * most
    assert all(job.end == job.start for job in refused), "at once"
    late = [job for job in jobs if isinstance(job.error, DeadlineExceededError)]
    assert len(late) <= 0.06 * len(good), "few are taken in vain"


def test_without_deadlines_the_queue_is_bounded_and_the_device_is_busy(device: Simulation) -> None:
    unloaded = alone(device)
    most = capacity(device, 60 * unloaded)
    jobs = overload(device, 3 * most, 300)
    assert sum(job.good for job in jobs) >= 0.9 * 300 * most
    refused = [job.error for job in jobs if job.error is not None]
    assert refused
    assert all(isinstance(error, QueueFullError) for error in refused)


def test_the_time_to_come_back_is_the_wait(device: Simulation) -> None:
    unloaded = alone(device)
    for _ in range(80):
        device.submit("greedy")
    error = device.jobs[-1].error
    assert isinstance(error, QueueFullError)
    start = device.clock.now
    device.run()
    assert error.retry_after == pytest.approx(device.clock.now - start, rel=0.6)
    assert error.retry_after > 5 * unloaded


def test_one_caller_leaves_room_for_others(device: Simulation) -> None:
    for _ in range(200):
        device.submit("greedy")
    assert isinstance(device.jobs[-1].error, QueueFullError)
    assert "the free room is for others" in str(device.jobs[-1].error)
    assert device.submit("caller").error is None


def test_a_request_that_takes_too_long_even_alone_is_refused_with_its_time(device: Simulation) -> None:
    unloaded = alone(device)
    device.submit("other")
    job = device.submit("caller", timeout=unloaded / 2)
    assert isinstance(job.error, DeadlineExceededError)
    assert "allow more time, take fewer steps or a shorter duration" in str(job.error)
    assert job.end == job.start


def test_a_device_that_was_slow_for_a_while_is_not_taken_for_slow_ever_after(device: Simulation) -> None:
    unloaded = alone(device)
    device.pipeline.slower = 20.0
    for _ in range(3):
        alone(device)
    device.pipeline.slower = 1.0
    jobs = []
    for _ in range(40):
        jobs.append(device.submit("caller", timeout=3 * unloaded))
        device.run()
    assert all(job.good for job in jobs), "an idle device tries, and measures again"
    device.submit("other")
    late = device.submit("caller", timeout=4 * unloaded)
    device.run()
    assert late.good


def test_what_can_no_longer_be_done_is_dropped(device: Simulation) -> None:
    unloaded = alone(device)
    device.submit("other", num_inference_steps=1000)
    slow = device.submit("slow", timeout=20 * unloaded, num_inference_steps=200)
    device.clock.now += 16 * unloaded  # something else had the device
    device.run()
    assert isinstance(slow.error, DeadlineExceededError)
    assert slow.end is not None
    assert slow.seconds < 17 * unloaded


def test_a_flow_that_comes_back_has_no_credit_and_others_that_come_all_the_time_do_not_starve_it() -> None:
    shares = FairShares()
    old = Path("interactive", "old", 0)
    shares.enter(old)
    shares.charge(old, 1.5)
    turns = 0
    for number in range(1, 100):
        path = Path("interactive", f"new {number}", number)
        shares.enter(path)
        if shares.rank(old) < shares.rank(path):
            break
        shares.charge(path, 0.9)
        shares.leave(path)
        turns = number
    assert 0 < turns < 10


def test_idle_callers_are_forgotten() -> None:
    shares = FairShares()
    for number in range(2000):
        path = Path("interactive", f"caller {number}", number)
        shares.enter(path)
        shares.charge(path, 0.5)
        shares.leave(path)
    assert len(shares._root.children["interactive"].children) <= 513
