import asyncio
import threading
import time

import pytest

from services.audio.steps import Steps
from services.errors import DeadlineExceededError, QueueFullError
from services.runtime.callers import Caller, calling
from services.runtime.offloading import AT_ONCE, OffLoop


async def test_no_more_run_at_once_and_what_was_cancelled_before_its_turn_is_not_run() -> None:
    """Also while callers come and go: a cancelled caller's thread still counts."""
    off_loop = OffLoop()
    go_on, lock = threading.Event(), threading.Lock()
    running = most = runs = 0

    def work() -> None:
        nonlocal running, most, runs
        with lock:
            running, runs = running + 1, runs + 1
            most = max(most, running)
        go_on.wait(30)
        with lock:
            running -= 1

    tasks = [asyncio.ensure_future(off_loop(work)) for _ in range(3 * AT_ONCE)]
    while running < AT_ONCE:
        await asyncio.sleep(0.01)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    last = asyncio.ensure_future(off_loop(work))
    await asyncio.sleep(0.05)
    go_on.set()
    await last
    assert most == AT_ONCE
    assert runs == AT_ONCE + 1


async def test_a_caller_may_leave_as_its_work_ends() -> None:
    """The next work then gets the thread, and the loop reports no error."""
    off_loop, go_on, errors = OffLoop(), threading.Event(), list[dict[str, object]]()
    asyncio.get_running_loop().set_exception_handler(lambda _, context: errors.append(context))
    leaving = [asyncio.ensure_future(off_loop(lambda: go_on.wait(30))) for _ in range(AT_ONCE)]
    waiting = asyncio.ensure_future(off_loop(lambda: 7))
    await asyncio.sleep(0.05)
    go_on.set()
    time.sleep(0.1)  # the work ends, and the loop learns of it in its next turn
    await asyncio.sleep(0)
    for task in leaving:
        task.cancel()
    assert await waiting == 7
    assert await asyncio.gather(*leaving, return_exceptions=True)
    assert errors == []


async def test_results_and_errors_come_through() -> None:
    off_loop = OffLoop()
    assert await off_loop(lambda: 7) == 7
    try:
        await off_loop(lambda: 1 // 0)
    except ZeroDivisionError:
        return
    raise AssertionError("the error was lost")


async def test_work_is_done_in_turns_by_caller() -> None:
    off_loop, order = OffLoop(), list[str]()

    def steps(name: str, count: int) -> Steps[None]:
        for _ in range(count):
            time.sleep(0.06)  # more than a slice
            order.append(name)
            yield

    async def one(name: str, count: int) -> None:
        with calling(Caller(name=name)):
            await off_loop.steps(steps(name, count))

    greedy = [asyncio.create_task(one("greedy", 20)) for _ in range(10)]
    while order.count("greedy") < 10:
        await asyncio.sleep(0.01)
    await one("modest", 2)
    assert order.count("greedy") < 40
    for task in greedy:
        task.cancel()


async def test_cancelled_work_ends_after_its_step_and_is_closed() -> None:
    off_loop, closed, done = OffLoop(), threading.Event(), 0

    def steps() -> Steps[None]:
        nonlocal done
        try:
            while True:
                done += 1
                yield
        finally:
            closed.set()

    task = asyncio.create_task(off_loop.steps(steps()))
    while not done:
        await asyncio.sleep(0.01)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    while not closed.is_set():
        await asyncio.sleep(0.01)
    before = done
    await off_loop(lambda: None)
    assert done == before


async def test_a_thread_whose_caller_leaves_as_its_work_ends_takes_other_work() -> None:
    off_loop, begun, ended, stop = OffLoop(), threading.Event(), threading.Event(), threading.Event()

    def short() -> None:
        begun.wait()
        ended.set()

    first = asyncio.create_task(off_loop(short))
    second = asyncio.create_task(off_loop(stop.wait))
    await asyncio.sleep(0)
    third = asyncio.create_task(off_loop(lambda: None))
    await asyncio.sleep(0)
    begun.set()
    ended.wait()
    time.sleep(0.2)  # the thread has delivered its result to the loop, which is blocked
    asyncio.get_running_loop().call_soon(first.cancel)
    async with asyncio.timeout(60):
        await third
    stop.set()
    await asyncio.gather(first, second, return_exceptions=True)


async def test_work_that_can_not_be_done_before_the_deadline_is_refused_at_once() -> None:
    off_loop, stop = OffLoop(), threading.Event()

    def steps(seconds: float) -> Steps[None]:
        end = time.monotonic() + seconds
        while time.monotonic() < end and not stop.is_set():
            time.sleep(0.01)
            yield

    async def one(work: float, left: float | None) -> None:
        deadline = None if left is None else time.monotonic() + left
        with calling(Caller(name="a", deadline=deadline)):
            await off_loop.steps(steps(work), work=work)

    await one(0.1, None)  # a unit of work takes about a second
    with pytest.raises(DeadlineExceededError, match="decoding the clips takes"):
        await one(100.0, 5.0)
    busy = [asyncio.create_task(one(1000.0, None)) for _ in range(4)]
    await asyncio.sleep(0.05)
    with pytest.raises(QueueFullError, match="after the deadline") as caught:
        await one(20.0, 25.0)
    assert caught.value.retry_after > 0
    stop.set()
    await asyncio.gather(*busy)
