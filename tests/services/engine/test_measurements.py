"""What the engine reports of single steps, clips and requests."""

import time
from collections import defaultdict
from typing import Any

import pytest

from services.api.measurements import Quantity
from services.engine import Engine, EngineConfig
from services.errors import DeadlineExceededError, QueueFullError
from services.fairness import Account
from services.models.tango.pipeline import TangoPipeline
from tests.services.engine.watching import Watch, denoiser_calls


class Record:
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.seen: defaultdict[str, list[tuple[float, str]]] = defaultdict(list)

    def __call__(self, quantity: Quantity, value: float, label: str = "") -> None:
        self.seen[quantity].append((value, label))

    def values(self, quantity: Quantity) -> list[float]:
        return [value for value, _ in self.seen[quantity]]

    def labels(self, quantity: Quantity) -> list[str]:
        return [label for _, label in self.seen[quantity]]


def recorded(pipeline: TangoPipeline, **config: Any) -> tuple[Engine, Record]:
    engine, record = Engine(pipeline, EngineConfig(threads=1, **config)), Record()
    engine.observe(record)
    return engine, record


def test_steps_have_their_rows_and_the_share_that_is_used(pipeline: TangoPipeline) -> None:
    engine, record = recorded(pipeline, batch_shapes=(4,))
    with engine, denoiser_calls(pipeline) as calls:
        options: Any = {"duration": 0.64, "seed": 1, "num_inference_steps": 3}
        engine.generate(engine.request("rain", **options, clip_count=3, guidance_scale=1.0))
        engine.generate(engine.request("rain", **options, clip_count=3, guidance_scale=3.0))
    assert record.labels("step") == [str(call.rows) for call in calls] == 3 * ["4"] + 3 * ["8"]
    assert record.values("fill") == [0.75] * 6
    assert len(record.values("decode")) == 6
    assert all(seconds > 0 for seconds in record.values("step") + record.values("decode"))


def test_each_request_has_one_wait_and_one_first_step_by_priority(pipeline: TangoPipeline) -> None:
    engine, record = recorded(pipeline)
    with engine:
        request = engine.request("rain", duration=0.64, seed=1, num_inference_steps=2, clip_count=2)
        began = time.monotonic()
        watches = [Watch(), Watch()]
        accounts = (Account("a", "interactive"), Account("a", "batch"))
        handles = [
            engine.submit(request, watch, account=account)
            for watch, account in zip(watches, accounts, strict=True)
        ]
        assert all(handle.wait(60) for handle in handles)
        took = time.monotonic() - began
    for quantity in ("queue_wait", "first_step"):
        assert sorted(record.labels(quantity)) == ["batch", "interactive"]
    waits, firsts = ({label: value for value, label in record.seen[q]} for q in ("queue_wait", "first_step"))
    for priority in ("interactive", "batch"):
        assert 0 <= waits[priority] < firsts[priority] < took


def test_a_request_that_never_starts_has_waited_too(pipeline: TangoPipeline) -> None:
    engine, record = recorded(pipeline)
    with engine:
        long = engine.submit(engine.request("rain", num_inference_steps=200), Watch())
        late = engine.submit(
            engine.request("rain", num_inference_steps=200),
            Watch(),
            deadline=time.monotonic() + 0.05,
            account=Account("b", "batch"),
        )
        assert late.wait(60)
        long.cancel()
        assert long.wait(60)
    assert sorted(record.labels("queue_wait")) == ["batch", "interactive"]


def test_refusals_say_why(pipeline: TangoPipeline) -> None:
    engine, _ = recorded(pipeline, max_queue=1, batch_shapes=(1,), max_clip_count=1)
    with engine:
        short = engine.request("rain", duration=0.64, num_inference_steps=20)
        engine.generate(short)
        watch = Watch()
        running = [engine.submit(engine.request("rain", num_inference_steps=200), watch) for _ in range(2)]
        with pytest.raises(QueueFullError) as full:
            engine.submit(short, watch)
        assert full.value.refusal == "room"
        running[1].cancel()
        assert running[1].wait(60)
        with pytest.raises(DeadlineExceededError) as late:
            engine.submit(short, watch, deadline=time.monotonic() + 1e-6)
        assert late.value.refusal == "time"
        running[0].cancel()
