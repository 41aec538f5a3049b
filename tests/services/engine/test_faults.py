"""What a device does to the engine that dies, hangs, runs out of memory or returns NaN."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch

from services.api.generation import Finished
from services.engine import Engine, EngineConfig
from services.errors import NotFiniteError, ServiceUnavailableError, TooLargeError
from services.models.tango.pipeline import TangoPipeline
from tests.services.engine.watching import TIMEOUT, Watch, broken, denoiser_calls

ONE = EngineConfig(threads=1)


@contextmanager
def before(part: torch.nn.Module, act: Callable[[Any], object]) -> Iterator[None]:
    """Call `act` with the first argument of each call of `part`."""
    hook = part.register_forward_pre_hook(lambda module, args: (act(args[0] if args else None), None)[1])
    try:
        yield
    finally:
        hook.remove()


def two(engine: Engine, **options: Any) -> list[Watch]:
    watches = [Watch(), Watch()]
    for seed, watch in enumerate(watches):
        engine.submit(engine.request("a dog", **{"seed": seed, "num_inference_steps": 4} | options), watch)
    return watches


def test_a_thread_that_ends_fails_every_request_and_reports_it(pipeline: TangoPipeline) -> None:
    def leave(_: object) -> None:
        raise SystemExit

    reasons: list[str] = []
    with Engine(pipeline, ONE) as engine:
        engine.watch(reasons.append)
        with before(pipeline.unet, leave):
            for watch in two(engine):
                error = watch.error()
                assert isinstance(error, ServiceUnavailableError)
                assert "SystemExit" in str(error)
        with pytest.raises(ServiceUnavailableError):
            engine.generate(engine.request("a dog"))
        assert len(reasons) == 1
        engine.watch(reasons.append)
        assert reasons[0] == reasons[1] == "the engine failed: SystemExit"
        assert engine.stats.running == 0


def test_a_turn_that_hangs_fails_every_request_and_close_returns(
    pipeline: TangoPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.engine.engine._CLOSE_SECONDS", 0.2)
    released = threading.Event()
    reported = threading.Event()
    engine = Engine(pipeline, EngineConfig(threads=1, max_turn_seconds=0.5))
    engine.generate(engine.request("a dog", seed=1))
    engine.watch(lambda reason: reported.set())
    with before(pipeline.unet, lambda _: released.wait(TIMEOUT)):
        for watch in two(engine):
            assert "a turn takes more than 0.5 s" in str(watch.error())
        assert reported.wait(TIMEOUT)
        engine.close()
        released.set()
        engine._thread.join(TIMEOUT)
    assert not engine._thread.is_alive()
    assert not any(isinstance(event, Finished) for event in watch.events)


def test_a_device_that_fails_at_every_request_ends_the_engine(pipeline: TangoPipeline) -> None:
    reported = threading.Event()
    with Engine(pipeline, ONE) as engine, broken(pipeline.unet):
        engine.watch(lambda reason: reported.set())
        for _ in range(3):
            assert not reported.is_set()
            with pytest.raises(RuntimeError, match="the device failed"):
                engine.generate(engine.request("a dog", seed=1))
        assert reported.wait(TIMEOUT)
        with pytest.raises(ServiceUnavailableError, match="fails at every request"):
            engine.generate(engine.request("a dog", seed=1))


def test_requests_that_fail_by_themselves_do_not_end_the_engine(pipeline: TangoPipeline) -> None:
    reasons: list[str] = []
    with Engine(pipeline, ONE) as engine:
        engine.watch(reasons.append)
        engine.generate(engine.request("a dog", seed=1))
        with broken(pipeline.text_encoder):
            for number in range(5):
                with pytest.raises(RuntimeError, match="the device failed"):
                    engine.generate(engine.request("rain " * (number + 1), seed=1))
        assert reasons == []
        engine.generate(engine.request("a dog", seed=1))


def test_out_of_memory_halves_the_call_and_later_ones_and_changes_no_clip(pipeline: TangoPipeline) -> None:
    def limit(latents: torch.Tensor) -> None:
        if len(latents) > 4:
            raise torch.OutOfMemoryError("the device's memory ran out")

    with Engine(pipeline, ONE) as engine:
        expected = engine.generate(engine.request("a dog", seed=3, clip_count=8))
        with before(pipeline.unet, limit), denoiser_calls(pipeline) as calls:
            found = engine.generate(engine.request("a dog", seed=3, clip_count=8))
    assert len(found.clips) == 8
    for ours, theirs in zip(found.clips, expected.clips, strict=True):
        np.testing.assert_allclose(ours.waveform(), theirs.waveform(), atol=1e-3)
    assert {call.rows for call in calls[3:]} == {4}, "after sixteen and eight rows at first"


def test_a_request_that_does_not_fit_alone_is_refused_and_others_are_unharmed(
    pipeline: TangoPipeline,
) -> None:
    def limit(latents: torch.Tensor) -> None:
        if latents.shape[-2] > 16:
            raise torch.OutOfMemoryError("the device's memory ran out")

    with Engine(pipeline, ONE) as engine, before(pipeline.unet, limit):
        large, small = Watch(), Watch()
        engine.submit(engine.request("a dog", seed=1, duration=2.56), large)
        engine.submit(engine.request("a dog", seed=1), small)
        assert isinstance(large.error(), TooLargeError)
        assert isinstance(small.wait(), Finished)
        for _ in range(4):  # such requests alone do not end the engine
            with pytest.raises(TooLargeError, match="shorter duration"):
                engine.generate(engine.request("a dog", seed=1, duration=2.56))
        assert isinstance(two(engine)[1].wait(), Finished)


def test_nan_fails_the_request_that_it_is_of(pipeline: TangoPipeline) -> None:
    hook = pipeline.unet.register_forward_hook(_first_two_rows_nan)
    try:
        with Engine(pipeline, ONE) as engine:
            broken_one, other = two(engine)
            error = broken_one.error()
            assert isinstance(error, NotFiniteError)
            assert "denoised clip 0 is NaN or infinite" in str(error)
            assert isinstance(other.wait(), Finished)
    finally:
        hook.remove()


def _first_two_rows_nan(module: torch.nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    """Return NaN for the first request's rows, as long as there is another."""
    sample = output[0] if isinstance(output, tuple) else output.sample
    if len(sample) > 2:
        sample[:2] = torch.nan
    return output
