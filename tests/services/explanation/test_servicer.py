import asyncio
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from prometheus_client import generate_latest

from milonga.v1 import audio_pb2, generation_pb2
from milonga.v1 import explanation_pb2 as pb
from services.api.explanation import Explanation, ExplanationProgress, ExplanationRequest, Report
from services.api.generation import Queued
from services.explanation.servicer import explain
from services.explanation.settings import ExplanationSettings
from services.explanation.worker import ExplanationWorker
from services.models.explaining.explainer import DiffusionExplainer
from services.runtime.settings import load_settings
from services.wire.explanation import read_explanation_request
from tests.services.explanation.serving import MODEL, Served, serving
from tests.services.reward.serving import float32, tone, wav
from tests.waiting import until

PROMPT = "a dog barks, then the siren wails"
WORDS = ["a", "dog", "barks", "then", "the", "siren", "wails"]


def message(prompt: str = PROMPT, **fields: Any) -> pb.ExplainAudioRequest:
    """A request; fields of the generation by their names, too."""
    inner = set(generation_pb2.GenerateAudioRequest.DESCRIPTOR.fields_by_name)
    own = {name: value for name, value in fields.items() if name not in inner}
    generation: dict[str, Any] = {"seed": 3, "prompt": prompt} | {
        n: value for n, value in fields.items() if n in inner
    }
    return pb.ExplainAudioRequest(request=generation_pb2.GenerateAudioRequest(**generation), **own)


def ask(served: Served, request: pb.ExplainAudioRequest) -> pb.Explanation:
    *_, last = served.stub.ExplainAudio(request)
    return last.explanation


def refusal(served: Served, request: pb.ExplainAudioRequest) -> dict[str, str]:
    """Fields that a call refuses, with the descriptions."""
    with pytest.raises(grpc.RpcError) as caught:
        list(served.stub.ExplainAudio(request))
    error: Any = caught.value
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT, error
    bad = error_details_pb2.BadRequest()
    details = rpc_status.from_call(error).details
    assert any(detail.Unpack(bad) for detail in details if detail.Is(bad.DESCRIPTOR))
    return {violation.field: violation.description for violation in bad.field_violations}


def alone(explainer: DiffusionExplainer, request: pb.ExplainAudioRequest) -> Explanation:
    """What the model itself answers."""
    read, faults = read_explanation_request(request, explainer.description, None)
    assert not faults
    return explainer.explain(read, lambda _: None)


@pytest.mark.parametrize("method", ["", "attention", "mask"])
def test_the_answer_is_the_explainers(served: Served, explainer: DiffusionExplainer, method: str) -> None:
    request = message(method=method, iterations=3, encoding="AUDIO_ENCODING_FLOAT32")
    answer, expected = ask(served, request), alone(explainer, request)
    assert list(answer.words) == WORDS and answer.frame_count == 16
    np.testing.assert_array_equal(np.reshape(answer.values, (7, 16)), expected.matrix_WT)
    assert answer.method == (method or "occlusion") and answer.seed == 3
    assert answer.frame_duration.ToMilliseconds() == 40
    assert answer.model.digest == MODEL.digest
    assert answer.clip.audio == expected.clip.audio
    assert answer.HasField("mask_size") == (method == "mask")
    assert answer.elapsed.ToNanoseconds() > 0


def test_progress_is_streamed_before_the_answer(served: Served) -> None:
    found = list(served.stub.ExplainAudio(message()))
    events = [one.WhichOneof("event") for one in found]
    assert events[0] == "queued" and events[-1] == "explanation"
    assert set(events[1:-1]) == {"progress"} and len(events) > 5
    fractions = [one.progress.fraction for one in found[1:-1]]
    assert fractions == sorted(fractions) and fractions[-1] == 1.0


def test_clips_come_as_requested(served: Served) -> None:
    request = message(
        without="dog", encoding="AUDIO_ENCODING_FLAC", sample_rate_hertz=8_000, num_inference_steps=2
    )
    answer = ask(served, request)
    (variant,) = answer.variants
    assert (variant.kind, variant.words, variant.prompt) == ("without", "dog", PROMPT)
    for clip in (answer.clip, variant.clip):
        assert clip.audio.startswith(b"fLaC") and clip.sample_rate_hertz == 8_000
    other = ask(served, message(without="dog", replacement="cat", num_inference_steps=2)).variants[0]
    assert (other.kind, other.prompt) == ("replaced", PROMPT.replace("dog", "cat"))


def test_a_given_clip_is_explained(served: Served) -> None:
    answer = ask(served, message(clip=wav(tone(0.5, rate=44_100), 44_100)))
    assert answer.clip.sample_rate_hertz == 44_100 and answer.clip.duration.ToMilliseconds() == 500
    assert answer.frame_count in (12, 13)
    assert any(answer.values)


def test_get_explainer_names_the_model_its_methods_and_limits(served: Served) -> None:
    answer = served.stub.GetExplainer(pb.GetExplainerRequest())
    assert answer.generator.model.digest == MODEL.digest
    assert list(answer.methods) == ["occlusion", "attention", "mask"]
    assert answer.frame_duration.ToMilliseconds() == 40
    assert (answer.max_words, answer.max_iterations) == (64, 1000)
    assert answer.iterations > 0 and answer.explains_given and answer.makes_variants
    assert answer.generator.defaults.num_inference_steps == 4


@pytest.mark.parametrize(
    ("fields", "refused"),
    [
        ({"prompt": ""}, {"request.prompt": "is empty"}),
        ({"prompt": "… – !"}, {"request.prompt": "has no words"}),
        ({"prompt": "rain " * 65}, {"request.prompt": "has 65 words, must have at most 64; shorten it"}),
        ({"method": "magic"}, {"method": "one of occlusion, attention, mask"}),
        ({"without": "cat"}, {"without": "its words are a, dog, barks, then, the, siren, wails"}),
        ({"without": "barks dog"}, {"without": "not in the prompt"}),
        ({"replacement": "cat"}, {"replacement": "give them as without"}),
        ({"without": "dog", "replacement": "a\nb"}, {"replacement": "control character"}),
        ({"iterations": 1001}, {"iterations": "between 1 and 1000"}),
        ({"iterations": -1}, {"iterations": "between 1 and 1000"}),
        ({"clip_count": 2}, {"request.clip_count": "give 1"}),
        ({"encoding": 99}, {"request.encoding": "must be one of"}),
        (
            {"num_inference_steps": 0, "guidance_scale": -1.0, "without": "cat"},
            {"request.num_inference_steps": "is 0", "request.guidance_scale": "is -1", "without": "cat"},
        ),
        ({"clip": float32(tone(3.0))}, {"clip": "lasts 3 s, must be between 0.04 and 2.56 s; cut it"}),
        ({"clip": float32(tone(0.5, rate=4_000), 4_000)}, {"clip.sample_rate_hertz": "4000"}),
        ({"clip": audio_pb2.Clip(audio=b"a dog")}, {"clip.audio": "begins with 61 20 64"}),
        ({"clip": float32(tone(0.5)), "without": "dog"}, {"without": "leave out the clip"}),
        (
            {"clip": audio_pb2.Clip(audio=b"a dog"), "method": "magic"},
            {"clip.audio": "begins", "method": "magic"},
        ),
    ],
)
def test_invalid_requests_name_every_field(
    served: Served, fields: dict[str, Any], refused: dict[str, str]
) -> None:
    found = refusal(served, message(**fields))
    assert found.keys() == refused.keys()
    for field, text in refused.items():
        assert text in found[field], found[field]


class Gated:
    """A real explainer whose steps wait until the test lets them."""

    def __init__(self, inner: DiffusionExplainer) -> None:
        self.inner, self.description = inner, inner.description
        self.started, self.free = threading.Semaphore(0), threading.Semaphore(0)
        self.ended: list[type[BaseException] | None] = []
        self.steps = 0

    def explain(self, request: ExplanationRequest, report: Report) -> Explanation:
        def gated(progress: ExplanationProgress) -> None:
            self.started.release()
            assert self.free.acquire(timeout=60)
            self.steps += 1
            report(progress)

        try:
            found = self.inner.explain(request, gated)
        except BaseException as error:
            self.ended.append(type(error))
            raise
        self.ended.append(None)
        return found


@pytest.mark.parametrize("leave", [lambda call: call.cancel(), None])
def test_one_who_leaves_frees_the_device_within_a_step(
    explainer: DiffusionExplainer, leave: Callable[[Any], None] | None
) -> None:
    gated = Gated(explainer)
    with serving(gated) as served:
        call = served.stub.ExplainAudio(message(), timeout=None if leave else 5.0)
        assert gated.started.acquire(timeout=60)
        gated.free.release()
        assert gated.started.acquire(timeout=60)
        if leave:
            leave(call)
        with pytest.raises(grpc.RpcError) as caught:
            list(call)
        error: Any = caught.value
        assert error.code() is (grpc.StatusCode.CANCELLED if leave else grpc.StatusCode.DEADLINE_EXCEEDED)
        # The event loop learns of it at once; the model at its next step.
        until(lambda: not served.worker.batcher._open)
        gated.free.release()
        until(lambda: len(gated.ended) == 1)
        assert gated.ended[0].__name__ == "RequestCancelledError" and gated.steps == 2  # type: ignore[union-attr]
        # It serves the next, which is no proof of a failed model either.
        gated.free.release(1000)
        assert ask(served, message(num_inference_steps=1)).frame_count == 16


def test_a_cancelled_call_leaves_no_task(explainer: DiffusionExplainer) -> None:
    async def run() -> None:
        gated = Gated(explainer)
        worker = ExplanationWorker(
            gated, MODEL, Path("tiny"), load_settings(ExplanationSettings, model="tiny")
        )
        request, _ = read_explanation_request(message(), explainer.description, None)
        updates = explain(worker, request)
        assert isinstance(await anext(updates), Queued)
        waiting = asyncio.create_task(anext(updates))
        await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        await updates.aclose()
        gated.free.release(1000)
        await worker.batcher.close()
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(run())


def test_many_cancelled_calls_are_no_failure_of_the_model(explainer: DiffusionExplainer) -> None:
    gated = Gated(explainer)
    with serving(gated) as served:
        for _ in range(5):
            call = served.stub.ExplainAudio(message())
            assert gated.started.acquire(timeout=60)
            call.cancel()
            until(lambda: not served.worker.batcher._open)
            gated.free.release()
            until(lambda: not gated.started.acquire(blocking=False))
        until(lambda: len(gated.ended) == 5)
        gated.free.release(1000)
        assert ask(served, message(num_inference_steps=1)).frame_count == 16


def test_a_full_queue_refuses_at_once(explainer: DiffusionExplainer) -> None:
    gated = Gated(explainer)
    with serving(gated, max_queue=2) as served:
        running = served.stub.ExplainAudio(message(num_inference_steps=1))
        assert gated.started.acquire(timeout=60)
        waiting = []
        for position in range(2):
            waiting.append(served.stub.ExplainAudio(message(num_inference_steps=1)))
            assert next(waiting[-1]).queued.position == position
        assert served.worker.batcher.stats.queue_cost == 2
        with pytest.raises(grpc.RpcError) as caught:
            list(served.stub.ExplainAudio(message()))
        error: Any = caught.value
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        details = rpc_status.from_call(error).details
        assert any(one.Is(error_details_pb2.RetryInfo.DESCRIPTOR) for one in details)
        gated.free.release(1000)
        answers = [list(call)[-1].explanation for call in (running, *waiting)]
        assert [one.frame_count for one in answers] == [16, 16, 16]
        text = generate_latest(served.metrics.registry).decode()
        assert "milonga_explanations_total 3.0" in text and "milonga_explanation_queue_depth 0.0" in text


def test_the_version_is_the_served_one(explainer: DiffusionExplainer) -> None:
    with serving(explainer) as served:
        assert served.worker.description.generation == replace(explainer.description.generation, model=MODEL)
