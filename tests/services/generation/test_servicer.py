import asyncio
import io
import threading
from typing import Any

import grpc
import numpy as np
import pytest
import soundfile
from google.protobuf.duration_pb2 import Duration
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from milonga.v1 import generation_pb2 as pb
from milonga.v1 import generation_pb2_grpc as rpc
from services.audio.encoding import ENCODINGS, MIN_SAMPLING_RATE
from services.client import AsyncAudioClient, AudioClient, Clip, Finished, Preview, Progress, Queued
from services.engine import Engine
from services.errors import (
    DeadlineExceededError,
    InvalidInputError,
    QueueFullError,
    ServiceUnavailableError,
)
from tests.services.generation.serving import MODEL, Serving, serving, tiny_engine
from tests.waiting import until

PROMPT = "A dog barks then a siren wails"


def test_a_prompt_becomes_a_clip(client: AudioClient) -> None:
    generation = client.generate(PROMPT, seed=7)
    (clip,) = generation.clips
    waveform_N, rate = soundfile.read(io.BytesIO(clip.audio), dtype="float32")
    assert (rate, len(waveform_N), clip.duration) == (16_000, 10_240, 0.64)
    assert (clip.index, clip.seed, clip.encoding, clip.sampling_rate) == (0, 7, "wav", 16_000)
    assert (generation.seed, generation.model.name, generation.model.digest) == (7, "tiny", MODEL.digest)
    assert generation.warnings == ()
    stages = generation.timings
    assert stages.denoise > 0
    assert stages.decode > 0
    assert stages.total >= stages.denoise + stages.decode


def test_the_service_sends_what_the_engine_makes_bit_for_bit(client: AudioClient, engine: Engine) -> None:
    made = engine.generate(engine.request(PROMPT, seed=7, clip_count=2, guidance_scale=3.1, duration=0.5))
    sent = client.generate(
        PROMPT, seed=7, clip_count=2, guidance_scale=3.1, duration=0.5, encoding="float32"
    ).clips
    assert [clip.index for clip in sent] == [0, 1]
    for ours, theirs in zip(made.clips, sent, strict=True):
        assert ours.waveform().tobytes() == theirs.audio


def test_without_a_seed_one_is_drawn_and_named(client: AudioClient) -> None:
    first, second = (client.generate(PROMPT, encoding="float32") for _ in range(2))
    assert first.seed != second.seed
    again = client.generate(PROMPT, encoding="float32", seed=first.seed)
    assert again.clips[0].audio == first.clips[0].audio


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("sampling_rate", [None, 48_000])
def test_every_encoding_decodes_back(client: AudioClient, encoding: str, sampling_rate: int | None) -> None:
    (reference,) = client.generate(PROMPT, seed=1, encoding="float32", sampling_rate=sampling_rate).clips
    (clip,) = client.generate(PROMPT, seed=1, encoding=encoding, sampling_rate=sampling_rate).clips
    assert (clip.encoding, clip.sampling_rate) == (encoding, sampling_rate or 16_000)
    if encoding not in ("linear16", "float32"):
        decoded_N, rate = soundfile.read(io.BytesIO(clip.audio), dtype="float32")
        assert rate == clip.sampling_rate
    else:
        decoded_N = clip.waveform()
    assert len(decoded_N) == round(0.64 * clip.sampling_rate)
    if encoding not in ("ogg", "mp3", "opus"):
        np.testing.assert_allclose(decoded_N, reference.waveform(), atol=1e-4)


def test_unknown_words_are_named_in_a_warning(client: AudioClient) -> None:
    (warning,) = client.generate("a dog and a xylophone").warnings
    assert "xylophone" in warning


def test_the_stream_tells_in_order(client: AudioClient) -> None:
    updates = list(
        client.stream(PROMPT, clip_count=2, seed=3, num_inference_steps=5, preview_interval_steps=2)
    )
    assert isinstance(updates[0], Queued)
    kinds = [type(update) for update in updates]
    assert kinds.index(Progress) > kinds.index(Queued)
    assert kinds.index(Clip) > kinds.index(Progress)
    assert kinds[-1] is Finished
    assert kinds.count(Finished) == 1
    assert sorted(update.index for update in updates if isinstance(update, Clip)) == [0, 1]
    progress = [update for update in updates if isinstance(update, Progress)]
    fractions = [update.fraction for update in progress]
    assert fractions == sorted(fractions)
    assert fractions[-1] == 1.0
    assert {update.num_inference_steps for update in progress} == {5}
    previews = [update for update in updates if isinstance(update, Preview)]
    assert [preview.step for preview in previews] == [2, 4]
    assert previews[0].mel_TM.shape[1] == 64


def test_stream_and_unary_give_the_same_clip(client: AudioClient) -> None:
    unary = client.generate(PROMPT, seed=3, encoding="float32").clips[0]
    streamed = [u for u in client.stream(PROMPT, seed=3, encoding="float32") if isinstance(u, Clip)]
    assert streamed[0].audio == unary.audio


def _bad_request() -> pb.GenerateAudioRequest:
    return pb.GenerateAudioRequest(
        prompt="\x07",
        duration=Duration(seconds=-1),
        clip_count=0,
        num_inference_steps=10_000,
        guidance_scale=float("nan"),
        scheduler="euler",
        encoding=99,  # type: ignore[arg-type]  # an open enum carries what it does not know
        sample_rate_hertz=7,
    )


BAD_FIELDS = {
    "prompt",
    "duration",
    "clip_count",
    "num_inference_steps",
    "guidance_scale",
    "scheduler",
    "encoding",
    "sample_rate_hertz",
}


@pytest.mark.parametrize("streamed", [False, True])
def test_every_violated_field_is_reported_at_once(served: Serving, streamed: bool) -> None:
    with grpc.insecure_channel(served.target) as channel:
        stub = rpc.GenerationServiceStub(channel)
        message = pb.StreamGenerateAudioRequest(request=_bad_request(), preview_interval_steps=-1)
        call: Any = (
            stub.StreamGenerateAudio(message) if streamed else stub.GenerateAudio.future(_bad_request())
        )
        with pytest.raises(grpc.RpcError) as caught:
            list(call) if streamed else call.result()
    status = rpc_status.from_call(caught.value)  # type: ignore[arg-type]  # the error of a call is a call
    assert status is not None
    assert status.code == grpc.StatusCode.INVALID_ARGUMENT.value[0]
    found = error_details_pb2.BadRequest()
    assert any(detail.Unpack(found) for detail in status.details if detail.Is(found.DESCRIPTOR))
    expected = (
        {f"request.{field}" for field in BAD_FIELDS} | {"preview_interval_steps"} if streamed else BAD_FIELDS
    )
    assert {violation.field for violation in found.field_violations} == expected
    assert all(violation.description for violation in found.field_violations)


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"num_inference_steps": 0}, "num_inference_steps"),
        ({"num_inference_steps": -1}, "num_inference_steps"),
        ({"guidance_scale": 21.0}, "guidance_scale"),
        ({"guidance_scale": float("inf")}, "guidance_scale"),
        ({"duration": 0.0}, "duration"),
        ({"duration": 2.57}, "duration"),
        ({"clip_count": 9}, "clip_count"),
        ({"scheduler": "euler"}, "scheduler"),
        ({"sampling_rate": 192_000}, "sample_rate_hertz"),
        ({"negative_prompt": "x" * 1001}, "negative_prompt"),
    ],
)
def test_each_limit_holds(client: AudioClient, options: Any, field: str) -> None:
    for call in (client.generate, lambda *a, **k: list(client.stream(*a, **k))):
        with pytest.raises(InvalidInputError) as caught:
            call(PROMPT, **options)
        assert [violation.field for violation in caught.value.violations] == [field]


@pytest.mark.parametrize("prompt", ["", "  ", "x" * 1001, "a\ndog", "a \x00 dog"])
def test_bad_prompts_are_refused(client: AudioClient, prompt: str) -> None:
    with pytest.raises(InvalidInputError) as caught:
        client.generate(prompt)
    assert [violation.field for violation in caught.value.violations] == ["prompt"]


def test_the_bounds_themselves_are_allowed(client: AudioClient) -> None:
    limits = client.get_model().limits
    (clip,) = client.generate(
        "a " * 498 + "dog.",
        num_inference_steps=1,
        guidance_scale=0,
        duration=limits.max_duration,
        sampling_rate=MIN_SAMPLING_RATE,
    ).clips
    assert clip.duration == 2.56


def test_get_model_describes_the_model(client: AudioClient) -> None:
    model = client.get_model()
    assert (model.model.name, model.model.version, model.model.license) == ("tiny", "1", "Apache-2.0")
    assert (model.geometry.sampling_rate, model.geometry.latent_channels) == (16_000, 4)
    assert model.limits.max_duration == 2.56
    assert set(model.limits.schedulers) == {"ddpm", "ddim", "dpmsolver++", "unipc"}
    assert model.defaults.duration == 0.64
    assert (model.defaults.num_inference_steps, model.defaults.scheduler) == (4, "dpmsolver++")


def test_the_largest_answer_stays_within_what_get_model_says(client: AudioClient) -> None:
    limits = client.get_model().limits
    clips = client.generate(
        PROMPT,
        clip_count=limits.max_clip_count,
        num_inference_steps=1,
        duration=2.56,
        encoding="float32",
        sampling_rate=48_000,
    ).clips
    size = sum(len(clip.audio) for clip in clips)
    assert size > 4 * 2**20 * 0.9
    assert size <= limits.max_response_bytes < size * 1.1


def test_a_full_queue_says_when_to_come_back() -> None:
    with (
        tiny_engine(batch_shapes=(1,), max_queue=1, max_clip_count=1) as engine,
        serving(engine) as served,
        AudioClient(served.target, retries=0) as client,
    ):
        streams = [client.stream(PROMPT, num_inference_steps=1000) for _ in range(2)]
        # The first runs before the second takes the only place in the queue.
        while not isinstance(next(streams[0]), Progress):
            pass
        assert isinstance(next(streams[1]), Queued)
        with pytest.raises(QueueFullError) as caught:
            client.generate(PROMPT)
        assert 0 < caught.value.retry_after <= 60
        assert "\n" not in str(caught.value)
        for stream in streams:
            stream.close()  # type: ignore[attr-defined]  # it is a generator
        until(lambda: engine.stats.running == 0)
        # The answer of a full queue is repeated for some milliseconds.
        with AudioClient(served.target) as patient:
            assert patient.generate(PROMPT).clips


def test_leaving_the_stream_frees_the_device(client: AudioClient, engine: Engine) -> None:
    before = engine.stats
    for update in client.stream(PROMPT, num_inference_steps=1000, duration=2.56):
        if isinstance(update, Progress) and update.step == 3:
            break
    until(lambda: engine.stats.running == 0)
    assert engine.stats.cancelled == before.cancelled + 1
    assert engine.stats.clip_steps - before.clip_steps < 200


def test_cancelling_a_unary_call_frees_the_device(served: Serving, engine: Engine) -> None:
    before = engine.stats
    with grpc.insecure_channel(served.target) as channel:
        request = pb.GenerateAudioRequest(prompt=PROMPT, num_inference_steps=1000)
        call = rpc.GenerationServiceStub(channel).GenerateAudio.future(request)
        until(lambda: engine.stats.clip_steps > before.clip_steps)
        call.cancel()
    until(lambda: engine.stats.running == 0)
    assert engine.stats.cancelled == before.cancelled + 1
    assert engine.stats.clip_steps - before.clip_steps < 200


def test_a_vanished_client_frees_the_device(served: Serving, engine: Engine) -> None:
    before = engine.stats
    client = AudioClient(served.target, retries=0)
    stream = client.stream(PROMPT, num_inference_steps=1000)
    while not isinstance(next(stream), Progress):
        pass
    client.close()
    until(lambda: engine.stats.running == 0)
    assert engine.stats.cancelled == before.cancelled + 1
    stream.close()  # type: ignore[attr-defined]  # it is a generator


@pytest.mark.parametrize("streamed", [False, True])
def test_a_passed_deadline_frees_the_device(client: AudioClient, engine: Engine, streamed: bool) -> None:
    before = engine.stats
    call = (lambda *a, **k: list(client.stream(*a, **k))) if streamed else client.generate
    with pytest.raises(DeadlineExceededError):
        call(PROMPT, num_inference_steps=1000, timeout=0.3)
    until(lambda: engine.stats.running == 0)
    ended = (engine.stats.expired + engine.stats.cancelled) - (before.expired + before.cancelled)
    assert ended == 1


def test_many_callers_share_the_engine(served: Serving, engine: Engine) -> None:
    async def ask() -> list[bytes]:
        async with AsyncAudioClient(served.target) as client:
            generations = await asyncio.gather(
                *(client.generate(PROMPT, seed=seed, encoding="float32") for seed in range(6))
            )
        return [generation.clips[0].audio for generation in generations]

    audio = asyncio.run(ask())
    assert len(set(audio)) == 6
    for seed, sent in enumerate(audio):
        made = engine.generate(engine.request(PROMPT, seed=seed)).clips[0].waveform()
        # Other companions may mean another batch shape, which changes a clip inaudibly (ARCHITECTURE.md).
        np.testing.assert_allclose(np.frombuffer(sent, "<f4"), made, atol=1e-2)


def test_a_stopping_engine_is_unavailable_and_a_fault_is_internal() -> None:
    engine = tiny_engine()
    with serving(engine) as served, AudioClient(served.target, retries=0) as client:
        failures: list[BaseException] = []

        def generate() -> None:
            try:
                client.generate(PROMPT, num_inference_steps=1000)
            except BaseException as error:
                failures.append(error)

        thread = threading.Thread(target=generate)
        thread.start()
        until(lambda: engine.stats.clip_steps > 0)
        engine.close(0)
        thread.join()
        assert isinstance(failures[0], ServiceUnavailableError)
        with pytest.raises(ServiceUnavailableError):
            client.generate(PROMPT)


def test_a_fault_of_ours_is_internal_and_never_blamed_on_the_caller(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with tiny_engine() as engine, serving(engine) as served:
        pipeline: Any = engine.pipeline
        pipeline.vae.decoder.conv_out.weight.data = pipeline.vae.decoder.conv_out.weight.data[:, :1]
        with grpc.insecure_channel(served.target) as channel, pytest.raises(grpc.RpcError) as caught:
            rpc.GenerationServiceStub(channel).GenerateAudio(
                pb.GenerateAudioRequest(prompt=PROMPT), metadata=(("x-request-id", "my-id"),)
            )
        call = caught.value
        assert isinstance(call, grpc.Call)
        assert call.code() is grpc.StatusCode.INTERNAL
        assert "my-id" in (call.details() or "")
        assert "weight" not in (call.details() or "")
