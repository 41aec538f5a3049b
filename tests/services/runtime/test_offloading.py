import asyncio
import threading

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


async def test_results_and_errors_come_through() -> None:
    off_loop = OffLoop()
    assert await off_loop(lambda: 7) == 7
    try:
        await off_loop(lambda: 1 // 0)
    except ZeroDivisionError:
        return
    raise AssertionError("the error was lost")
