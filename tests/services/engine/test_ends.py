"""How a request ends otherwise than well, and how the engine goes on."""

import operator
import threading
import time

import numpy as np
import pytest
import torch

from services.api.generation import Clip, Event, Failed, Finished, Progress, Queued
from services.engine import Engine, EngineConfig, Handle
from services.errors import (
    DeadlineExceededError,
    InvalidInputError,
    NotFiniteError,
    QueueFullError,
    RequestCancelledError,
    ServiceUnavailableError,
)
from services.models.tango.pipeline import TangoPipeline
from tests.services.engine.watching import Watch, broken, denoiser_calls

ONE = EngineConfig(threads=1)
ONE_PLACE = EngineConfig(threads=1, batch_shapes=(1,))


class Gate:
    """Holds the engine's worker after a request's first step until it is opened."""

    def __init__(self) -> None:
        self.reached = threading.Event()
        self.opened = threading.Event()

    def __call__(self, event: Event) -> None:
        if isinstance(event, Progress) and event.step == 1:
            self.reached.set()
            assert self.opened.wait(60)


def held(engine: Engine, *, clip_count: int = 1, steps: int = 3) -> tuple[Gate, Watch, Handle]:
    """Start a request and hold the worker after its first step."""
    gate = Gate()
    watch = Watch(gate)
    request = engine.request("rain", seed=1, num_inference_steps=steps, clip_count=clip_count)
    handle = engine.submit(request, watch)
    assert gate.reached.wait(60)
    return gate, watch, handle


def test_a_cancelled_request_frees_its_place_within_one_step(pipeline: TangoPipeline) -> None:
    with (
        denoiser_calls(pipeline) as calls,
        Engine(pipeline, ONE_PLACE) as engine,
    ):
        gate, first, handle = held(engine, steps=1000)
        second = Watch()
        engine.submit(engine.request("a dog", seed=2, num_inference_steps=2), second)
        handle.cancel()
        gate.opened.set()
        assert isinstance(first.error(), RequestCancelledError)
        assert isinstance(second.wait(), Finished)
        assert engine.stats.cancelled == 1
    assert len(calls) == 3, "one step before the cancellation, two of the next request"
    assert len(first.of(Progress)) == 1


def test_a_request_can_be_cancelled_while_it_waits(pipeline: TangoPipeline) -> None:
    with Engine(pipeline, ONE_PLACE) as engine:
        gate, first, _ = held(engine)
        second = Watch()
        handle = engine.submit(engine.request("a dog", seed=2, clip_count=3), second)
        assert engine.stats.queue_depth == 3
        handle.cancel()
        gate.opened.set()
        assert isinstance(second.error(), RequestCancelledError)
        assert second.of(Progress) == []
        assert isinstance(first.wait(), Finished)
        handle.cancel()
        assert handle.wait(10)
        assert engine.stats.queue_depth == 0


def test_closing_the_stream_cancels(pipeline: TangoPipeline) -> None:
    with Engine(pipeline, ONE) as engine:
        events = engine.stream(engine.request("a dog", seed=1, num_inference_steps=1000))
        assert isinstance(next(events), Queued)
        assert isinstance(next(events), Progress)
        events.close()  # type: ignore[attr-defined]
        engine.generate(engine.request("a cat", seed=1))
        assert engine.stats.cancelled == 1


def test_the_deadline_frees_the_device(pipeline: TangoPipeline) -> None:
    with denoiser_calls(pipeline) as calls, Engine(pipeline, ONE) as engine:
        request = engine.request("a dog", seed=1, num_inference_steps=1000)
        with pytest.raises(DeadlineExceededError, match=r"after \d+ of 1000 steps"):
            engine.generate(request, deadline=time.monotonic() + 0.3)
        assert 0 < len(calls) < 1000
        assert engine.stats.expired == 1


def test_a_deadline_that_has_passed_costs_no_step(pipeline: TangoPipeline) -> None:
    with denoiser_calls(pipeline) as calls, Engine(pipeline, ONE) as engine:
        with pytest.raises(DeadlineExceededError):
            engine.generate(engine.request("a dog", seed=1), deadline=time.monotonic() - 1)
        assert calls == []


def test_a_full_queue_refuses_at_once_and_says_when_to_come_back(pipeline: TangoPipeline) -> None:
    with Engine(pipeline, EngineConfig(threads=1, batch_shapes=(1,), max_queue=3)) as engine:
        assert engine.limits.max_clip_count == 3
        gate, first, _ = held(engine)
        waiting = Watch()
        engine.submit(engine.request("a dog", seed=2, clip_count=2), waiting)
        refused = Watch()
        with pytest.raises(QueueFullError, match="2 of 3 clips wait, no room for 2 more") as caught:
            engine.submit(engine.request("a cat", seed=3, clip_count=2), refused)
        assert 0 < caught.value.retry_after <= 60
        assert refused.events == []
        last = Watch()
        engine.submit(engine.request("a cat", seed=3), last)
        gate.opened.set()
        assert all(isinstance(watch.wait(), Finished) for watch in (first, waiting, last))
        engine.generate(engine.request("a cat", seed=3, clip_count=3))


def test_bad_input_is_refused_before_it_queues(pipeline: TangoPipeline) -> None:
    with Engine(pipeline, ONE) as engine:
        with pytest.raises(InvalidInputError) as caught:
            engine.generate(engine.request(" ", seed=1, duration=9.0, scheduler="euler", clip_count=9))
        fields = [violation.field for violation in caught.value.violations]
        assert fields == ["prompt", "duration", "clip_count", "scheduler"]
        assert engine.stats.running == 0


@pytest.mark.parametrize("part", ["text_encoder", "vae.decoder", "unet"])
def test_a_fault_of_the_device_fails_the_request_and_not_the_engine(
    pipeline: TangoPipeline, part: str
) -> None:
    with Engine(pipeline, ONE) as engine:
        before = engine.generate(engine.request("a dog", seed=1))
        with broken(_part(pipeline, part)), pytest.raises(RuntimeError, match="the device failed"):
            engine.generate(engine.request("a bell rings", seed=1, clip_count=2))
        after = engine.generate(engine.request("a dog", seed=1))
        assert np.array_equal(before.clips[0].waveform(), after.clips[0].waveform())
        assert (engine.stats.failed, engine.stats.running, engine.stats.queue_depth) == (1, 0, 0)


def _part(pipeline: TangoPipeline, path: str) -> torch.nn.Module:
    part: torch.nn.Module = operator.attrgetter(path)(pipeline)
    return part


def test_a_fault_in_one_decode_spares_the_companions(pipeline: TangoPipeline) -> None:
    first, second = Watch(), Watch()
    with broken(pipeline.vae.decoder, when=lambda: not first.of(Failed)), Engine(pipeline, ONE) as engine:
        gate, held_watch, _ = held(engine, steps=6)
        engine.submit(engine.request("a dog", seed=1, num_inference_steps=1), first)
        gate.opened.set()
        assert str(first.error()) == "the device failed"
        engine.submit(engine.request("a cat", seed=1, num_inference_steps=1), second)
        assert isinstance(second.wait(), Finished)
        assert isinstance(held_watch.wait(), Finished)


def test_a_fault_of_the_denoiser_fails_those_in_the_call_only(pipeline: TangoPipeline) -> None:
    faulty = threading.Event()
    with (
        broken(pipeline.unet, when=faulty.is_set),
        Engine(pipeline, EngineConfig(threads=1, batch_shapes=(1, 2))) as engine,
    ):
        gate, first, _ = held(engine, clip_count=2)
        waiting = Watch()
        engine.submit(engine.request("a dog", seed=1), waiting)
        first.then = lambda event: faulty.clear() if isinstance(event, Failed) else None
        faulty.set()
        gate.opened.set()
        assert str(first.error()) == "the device failed"
        assert isinstance(waiting.wait(), Finished)


def test_a_waveform_that_is_not_finite_is_a_fault_and_no_clip(pipeline: TangoPipeline) -> None:
    hook = pipeline.vocoder.register_forward_hook(lambda module, args, output: output * float("nan"))
    try:
        with Engine(pipeline, ONE) as engine, pytest.raises(NotFiniteError):
            engine.generate(engine.request("a dog", seed=1))
    finally:
        hook.remove()


@pytest.mark.parametrize("kind", [Progress, Clip, Finished])
def test_a_callback_that_raises_loses_its_request_only(pipeline: TangoPipeline, kind: type[Event]) -> None:
    def raise_at(event: Event) -> None:
        if isinstance(event, kind):
            raise ValueError("a fault of the caller's")

    with Engine(pipeline, ONE) as engine:
        handle = engine.submit(engine.request("a dog", seed=1, clip_count=2), Watch(raise_at))
        assert handle.wait(60)
        assert len(engine.generate(engine.request("a cat", seed=1)).clips) == 1
        assert engine.stats.running == 0


def test_a_callback_that_raises_in_submit_leaves_nothing_behind(pipeline: TangoPipeline) -> None:
    def refuse(event: Event) -> None:
        raise ValueError("a fault of the caller's")

    with denoiser_calls(pipeline) as calls, Engine(pipeline, ONE) as engine:
        with pytest.raises(ValueError, match="fault of the caller's"):
            engine.submit(engine.request("a dog", seed=1), refuse)
        engine.generate(engine.request("a cat", seed=1, num_inference_steps=1))
        assert (engine.stats.running, engine.stats.queue_depth, len(calls)) == (0, 0, 1)


def test_close_drains_what_was_accepted(pipeline: TangoPipeline) -> None:
    engine = Engine(pipeline, ONE_PLACE)
    watches = [Watch() for _ in range(3)]
    for seed, watch in enumerate(watches):
        engine.submit(engine.request("a dog", seed=seed), watch)
    engine.close(drain_seconds=60)
    assert all(isinstance(watch.events[-1], Finished) for watch in watches)
    with pytest.raises(ServiceUnavailableError, match="stopping"):
        engine.generate(engine.request("a dog", seed=1))
    engine.close()


def test_close_fails_what_does_not_end_in_time(pipeline: TangoPipeline) -> None:
    engine = Engine(pipeline, ONE_PLACE)
    watches = [Watch() for _ in range(2)]
    for watch in watches:
        engine.submit(engine.request("a dog", seed=1, num_inference_steps=1000), watch)
    engine.close(drain_seconds=0.2)
    assert all(isinstance(watch.error(), ServiceUnavailableError) for watch in watches)


def test_no_new_request_is_taken_while_draining(pipeline: TangoPipeline) -> None:
    engine = Engine(pipeline, ONE)
    gate, first, _ = held(engine)
    closer = threading.Thread(target=engine.close, args=(60,))
    closer.start()
    time.sleep(0.2)
    with pytest.raises(ServiceUnavailableError):
        engine.submit(engine.request("a cat", seed=1), Watch())
    gate.opened.set()
    closer.join(60)
    assert isinstance(first.wait(), Finished)
