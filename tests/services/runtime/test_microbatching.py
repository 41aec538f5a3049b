import asyncio
import contextlib
import threading
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from services.errors import QueueFullError, ServiceUnavailableError, TooLargeError
from services.runtime import model_thread
from services.runtime.microbatching import MicroBatcher


class Model:
    """Doubles numbers, remembers its calls, and can be held."""

    def __init__(self) -> None:
        self.calls: list[list[float]] = []
        self.threads: set[str] = set()
        self.open = threading.Event()
        self.open.set()
        self.entered = threading.Event()

    def __call__(self, items: Sequence[float]) -> list[float]:
        self.calls.append(list(items))
        self.threads.add(threading.current_thread().name)
        self.entered.set()
        assert self.open.wait(10)
        if any(item < 0 for item in items):
            raise ArithmeticError("negative")
        return [2 * item for item in items]


def _batcher(
    model: Callable[[Sequence[float]], Sequence[float]], **config: Any
) -> MicroBatcher[float, float]:
    settings: dict[str, Any] = {"max_cost": 10.0, "max_wait": 0.05, "max_queue_cost": 30.0} | config
    return MicroBatcher(model, cost=abs, **settings)


async def _busy(batcher: MicroBatcher[float, float], model: Model) -> "asyncio.Task[list[float]]":
    """Start a call of the model, and hold it until `model.open` is set."""
    model.open.clear()
    model.entered.clear()
    task = asyncio.create_task(batcher.submit([10.0]))
    assert await asyncio.to_thread(model.entered.wait, 10)
    return task


async def _settled() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def test_callers_share_a_call_and_each_gets_its_own_in_order() -> None:
    model = Model()
    batcher = _batcher(model)
    got = await asyncio.gather(batcher.submit([1, 2]), batcher.submit([3]), batcher.submit([]))
    assert list(got) == [[2, 4], [6], []]
    assert [sorted(call) for call in model.calls] == [[1, 2, 3]]
    assert len(model.threads) == 1
    assert threading.current_thread().name not in model.threads
    stats = batcher.stats
    assert (stats.calls, stats.items, stats.cost, stats.queue_cost) == (1, 3, 6.0, 0.0)
    assert stats.waited > 0
    await batcher.close()


async def test_calls_stay_within_the_largest_cost_and_a_larger_item_runs_alone() -> None:
    model = Model()
    batcher = _batcher(model)
    items = [6.0, 5.0, 4.0, 25.0, 1.0, 2.0]
    assert await batcher.submit(items) == [2 * item for item in items]
    assert model.calls == [[6], [5, 4], [25], [1, 2]]
    await batcher.close()


async def test_a_full_call_does_not_wait_and_a_part_of_one_waits_for_company() -> None:
    model = Model()
    batcher = _batcher(model, max_wait=3600.0)
    assert await batcher.submit([10.0]) == [20.0]
    part = asyncio.create_task(batcher.submit([1.0]))
    await _settled()
    assert not part.done()
    assert await batcher.submit([9.0]) == [18.0]
    assert await part == [2.0]
    assert model.calls == [[10.0], [1.0, 9.0]]
    await batcher.close()


async def test_a_part_of_a_call_waits_no_longer_than_it_is_told() -> None:
    model = Model()
    batcher = _batcher(model, max_wait=0.01)
    assert await batcher.submit([1.0]) == [2.0]
    assert batcher.stats.waited >= 0.01
    await batcher.close()


async def test_arrivals_gather_while_a_call_runs_and_callers_take_turns() -> None:
    model = Model()
    batcher = _batcher(model)
    first = await _busy(batcher, model)
    many = asyncio.create_task(batcher.submit([4.0, 4.1, 4.2, 4.3]))
    await _settled()
    one = asyncio.create_task(batcher.submit([3.0]))
    await _settled()
    assert batcher.stats.queue_cost == pytest.approx(19.6)
    model.open.set()
    assert await one == [6.0]
    assert await many == [8.0, 8.2, 8.4, 8.6]
    await first
    assert model.calls[1] == [4.0, 3.0]  # and not behind the other three
    await batcher.close()


async def test_a_full_queue_refuses_at_once_and_says_when_to_come_back() -> None:
    model = Model()
    batcher = _batcher(model)
    await batcher.submit([10.0])
    first = await _busy(batcher, model)
    waiting = asyncio.create_task(batcher.submit([35.0]))  # alone on an empty queue: admitted
    await _settled()
    with pytest.raises(QueueFullError, match=r"35\.0 of 30") as caught:
        await batcher.submit([1.0])
    assert caught.value.retry_after > 0
    with pytest.raises(QueueFullError):
        batcher.check()
    assert batcher.stats.refused == 2
    model.open.set()
    assert await waiting == [70.0]
    await first
    assert await batcher.submit([1.0]) == [2.0]
    batcher.check()
    await batcher.close()


async def test_before_the_first_call_has_ended_the_time_to_come_back_is_a_guess() -> None:
    model = Model()
    batcher = _batcher(model)
    first = await _busy(batcher, model)
    waiting = asyncio.create_task(batcher.submit([30.0]))
    await _settled()
    with pytest.raises(QueueFullError) as caught:
        await batcher.submit([1.0])
    assert 1.0 <= caught.value.retry_after <= 1.3
    model.open.set()
    await asyncio.gather(first, waiting)
    await batcher.close()


async def test_who_is_cancelled_leaves_the_queue_unheard() -> None:
    model = Model()
    batcher = _batcher(model)
    first = await _busy(batcher, model)
    gone = asyncio.create_task(batcher.submit([5.0, 6.0]))
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01):
            await batcher.submit([7.0])
    stays = asyncio.create_task(batcher.submit([1.0]))
    await _settled()
    gone.cancel()
    await _settled()
    assert batcher.stats.queue_cost == 1.0
    model.open.set()
    assert await stays == [2.0]
    await first
    assert model.calls == [[10.0], [1.0]]
    assert gone.cancelled()
    await batcher.close()


async def test_the_gathering_survives_that_everybody_leaves() -> None:
    model = Model()
    batcher = _batcher(model)
    gone = asyncio.create_task(batcher.submit([5.0]))
    await _settled()
    gone.cancel()
    await asyncio.sleep(0.1)
    assert model.calls == []
    assert await batcher.submit([1.0]) == [2.0]
    await batcher.close()


async def test_a_fault_reaches_exactly_those_whose_items_were_in_the_call() -> None:
    model = Model()
    batcher = _batcher(model)
    first = await _busy(batcher, model)
    broken = asyncio.create_task(batcher.submit([-9.0, 3.0]))
    await _settled()
    fine = asyncio.create_task(batcher.submit([2.0, 4.0]))
    await _settled()
    model.open.set()
    with pytest.raises(ArithmeticError):
        await broken
    assert await fine == [4.0, 8.0]
    await first
    assert model.calls == [[10.0], [-9.0], [2.0, 4.0]]  # what was left of the broken one is not run
    await batcher.close()


async def test_a_model_that_forgets_a_result_is_a_fault() -> None:
    batcher = _batcher(lambda items: [])
    with pytest.raises(RuntimeError, match="0 results for 1 items"):
        await batcher.submit([1.0, 2.0])
    await batcher.close()


async def test_close_refuses_what_waits_and_finishes_what_runs() -> None:
    model = Model()
    batcher = _batcher(model)
    first = await _busy(batcher, model)
    waiting = asyncio.create_task(batcher.submit([1.0]))
    await _settled()
    closing = asyncio.create_task(batcher.close())
    with pytest.raises(ServiceUnavailableError):
        await waiting
    with pytest.raises(ServiceUnavailableError):
        await batcher.submit([1.0])
    model.open.set()
    await closing
    assert await first == [20.0]
    await batcher.close()
    await _batcher(model).close()  # one that never ran


async def test_the_thread_is_initialised_once() -> None:
    seen: list[str] = []
    batcher = _batcher(Model(), initialize=lambda: seen.append(threading.current_thread().name))
    await batcher.submit([1.0])
    await batcher.submit([1.0])
    assert len(seen) == 1
    assert seen[0] != threading.current_thread().name
    await batcher.close()


class Memory(Model):
    """A model with room for four items."""

    def __call__(self, items: Sequence[float]) -> list[float]:
        if len(items) > 4 or 9.0 in items:
            self.calls.append(list(items))
            raise MemoryError
        return super().__call__(items)


async def test_a_batch_that_does_not_fit_into_memory_is_halved() -> None:
    model = Memory()
    batcher = _batcher(model, max_cost=100.0)
    assert await batcher.submit([1.0] * 10) == [2.0] * 10
    assert [len(call) for call in model.calls] == [10, 5, 2, 3, 5, 2, 3]
    good, bad = await asyncio.gather(
        batcher.submit([1.0, 2.0]), batcher.submit([3.0, 9.0]), return_exceptions=True
    )
    assert good == [2.0, 4.0]
    assert isinstance(bad, TooLargeError)
    assert "item 1 " in str(bad)
    await batcher.close()


@pytest.mark.parametrize("fault", [SystemExit(), KeyboardInterrupt(), asyncio.CancelledError()])
async def test_whatever_ends_the_thread_fails_every_call_and_is_reported_once(fault: BaseException) -> None:
    model = Model()
    reasons: list[str] = []

    def run(items: Sequence[float]) -> list[float]:
        model(items)
        raise fault

    batcher = _batcher(run)
    batcher.watch(reasons.append)
    first = await _busy(batcher, model)
    waiting = asyncio.create_task(batcher.submit([1.0]))
    await _settled()
    model.open.set()
    for call in (first, waiting):
        with pytest.raises(ServiceUnavailableError, match="thread has ended"):
            await call
    with pytest.raises(ServiceUnavailableError, match="thread has ended"):
        await batcher.submit([1.0])
    late: list[str] = []
    batcher.watch(late.append)
    assert reasons == late == ["the model's thread has ended"]
    await batcher.close()


async def test_whatever_ends_the_batching_fails_every_call_and_is_reported() -> None:
    model = Model()
    reasons: list[str] = []
    batcher = _batcher(model)
    batcher.watch(reasons.append)
    first = await _busy(batcher, model)
    waiting = asyncio.create_task(batcher.submit([1.0]))
    await _settled()
    assert batcher._worker is not None
    batcher._worker.cancel()
    for call in (first, waiting):
        with pytest.raises(ServiceUnavailableError, match="batching has ended with CancelledError"):
            await call
    assert len(reasons) == 1
    model.open.set()
    await batcher.close()


async def test_a_hung_call_fails_every_call_and_does_not_keep_close_waiting(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(model_thread, "CLOSE_SECONDS", 0.05)
    model = Model()
    batcher = _batcher(model, max_run_seconds=0.1)
    first = await _busy(batcher, model)
    waiting = asyncio.create_task(batcher.submit([1.0]))
    for call in (first, waiting):
        with pytest.raises(ServiceUnavailableError, match=r"not ended within 0\.1 s"):
            await call
    await batcher.close()
    unlimited = _batcher(model)
    call = asyncio.create_task(unlimited.submit([1.0]))
    await asyncio.sleep(0.2)
    assert not call.done()
    await unlimited.close()
    with pytest.raises(ServiceUnavailableError, match="stopping"):
        await call
    model.open.set()


@pytest.mark.parametrize("fault", [RuntimeError("CUDA error"), StopIteration(), MemoryError()])
async def test_a_model_that_never_works_is_given_up_and_one_that_works_is_not(fault: Exception) -> None:
    broken = True

    def run(items: Sequence[float]) -> list[float]:
        if broken or 7.0 in items:
            raise fault
        return list(items)

    batcher = _batcher(run)
    for _ in range(2):
        with pytest.raises((type(fault), TooLargeError, RuntimeError)):
            await batcher.submit([7.0])
    broken = False
    assert await batcher.submit([2.0, 1.0]) == [2.0, 1.0]
    for _ in range(10):
        with pytest.raises((type(fault), TooLargeError, RuntimeError)):
            await batcher.submit([7.0])
    broken = True
    while batcher._failure is None:
        with contextlib.suppress(type(fault), TooLargeError, RuntimeError, ServiceUnavailableError):
            await batcher.submit([1.0])
    with pytest.raises(ServiceUnavailableError, match="batches of the model have all failed"):
        await batcher.submit([1.0])
    await batcher.close()


async def test_an_initialisation_that_fails_is_tried_again() -> None:
    tries: list[int] = []

    def initialize() -> None:
        tries.append(1)
        if len(tries) == 1:
            raise OSError("not yet")

    batcher = _batcher(Model(), initialize=initialize)
    with pytest.raises(OSError, match="not yet"):
        await batcher.submit([1.0])
    assert await batcher.submit([1.0]) == [2.0]
    assert await batcher.submit([1.0]) == [2.0]
    assert len(tries) == 2
    await batcher.close()
