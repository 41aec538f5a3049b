import asyncio
import math
import threading
from collections.abc import Sequence
from typing import Any

import grpc
import grpc.aio
import numpy as np
import pytest
import torch
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from numpy.typing import NDArray
from prometheus_client import generate_latest
from torch import Tensor

from milonga.v1 import audio_pb2
from milonga.v1 import captioning_pb2 as pb
from milonga.v1 import captioning_pb2_grpc as rpc
from services.models.captioner.model import Candidate, CaptionClip, Captioner
from services.models.clap.model import ClapModel
from tests.services.audio.sounds import antiphase
from tests.services.captioning.serving import CLAP_MODEL, MODEL, Served, serving
from tests.services.reward.serving import float32, tone, wav
from tests.tiny import tiny_captioner
from tests.waiting import until


def ask(served: Served, *clips: audio_pb2.Clip, **options: Any) -> pb.CaptionAudioResponse:
    return served.stub.CaptionAudio(pb.CaptionAudioRequest(clips=clips, **options))


def refusal(served: Served, *clips: audio_pb2.Clip, **options: Any) -> dict[str, str]:
    """Fields that a call refuses, with the descriptions."""
    with pytest.raises(grpc.RpcError) as caught:
        ask(served, *clips, **options)
    assert isinstance(caught.value, grpc.Call)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT, caught.value
    status = rpc_status.from_call(caught.value)
    bad = error_details_pb2.BadRequest()
    assert any(detail.Unpack(bad) for detail in status.details if detail.Is(bad.DESCRIPTOR))
    return {violation.field: violation.description for violation in bad.field_violations}


def expected(
    captioner: Captioner, waveform: NDArray[np.float32], beams: Sequence[int], tokens: int = 8
) -> list[Candidate]:
    """What the model itself writes for one clip."""
    (found,) = captioner.generate(captioner.encode([captioner.prepare(waveform, 16_000)]), beams, tokens)
    return found


def clap_score(clap: ClapModel, text: str, waveform: NDArray[np.float32]) -> float:
    audio = clap.embed_windows([clap.prepare(waveform, 16_000)])
    return float((clap.embed_text([text]) * audio).sum())


def test_clap_chooses_among_what_the_model_writes(
    served: Served, captioner: Captioner, clap: ClapModel
) -> None:
    low, high = tone(hertz=300), tone(0.6, hertz=2_000)
    answer = ask(served, float32(low), float32(high))
    for caption, waveform in zip(answer.captions, (low, high), strict=True):
        wanted = {one.beams: one for one in expected(captioner, waveform, (2, 3))}
        assert {one.beams for one in caption.candidates} == {2, 3}
        for one in caption.candidates:
            assert one.text == wanted[one.beams].text
            assert one.log_probability == pytest.approx(wanted[one.beams].log_probability, abs=1e-3)
            assert one.clap_score == pytest.approx(clap_score(clap, one.text, waveform), abs=1e-4)
        scores = [one.clap_score for one in caption.candidates]
        assert scores == sorted(scores, reverse=True)
        assert caption.text == caption.candidates[0].text
    assert (answer.model.name, answer.model.digest) == (MODEL.name, MODEL.digest)
    assert (answer.scorer.name, answer.scorer.model.digest) == ("clap", CLAP_MODEL.digest)


def test_without_refinement_the_most_probable_candidate_is_the_caption(
    served: Served, captioner: Captioner
) -> None:
    answer = ask(served, float32(tone()), refine=False, beams=[1, 3, 2])
    (caption,) = answer.captions
    wanted = sorted(expected(captioner, tone(), (1, 3, 2)), key=lambda one: -one.log_probability)
    assert [one.text for one in caption.candidates] == [one.text for one in wanted]
    assert not any(one.HasField("clap_score") for one in caption.candidates)
    assert not answer.HasField("scorer")
    assert [one.beams for one in ask(served, float32(tone()), refine=False).captions[0].candidates] == [4]


def test_options_bound_tokens_and_candidates(served: Served, captioner: Captioner) -> None:
    answer = ask(served, float32(tone()), beams=[1, 2, 3], max_new_tokens=2, max_candidates=1)
    (caption,) = answer.captions
    (only,) = caption.candidates
    assert only.text == caption.text
    assert only.text in {one.text for one in expected(captioner, tone(), (1, 2, 3), 2)}


def test_every_encoding_gives_the_same_caption(served: Served) -> None:
    at_44 = tone(rate=44_100)
    stereo = np.stack([at_44, at_44], axis=1)
    answer = ask(served, wav(stereo, 44_100), float32(at_44, 44_100))
    first, second = answer.captions
    assert first.text == second.text


def test_timings_are_of_the_stages(served: Served) -> None:
    timings = ask(served, float32(tone())).timings
    stages = [timings.prepare, timings.encode, timings.generate, timings.refine]
    assert all(one.ToNanoseconds() > 0 for one in stages)
    assert sum(one.ToNanoseconds() for one in stages) <= timings.total.ToNanoseconds()
    plain = ask(served, float32(tone()), refine=False).timings
    assert plain.refine.ToMilliseconds() == 0


def test_warnings_come_with_the_clip_that_they_are_about(served: Served) -> None:
    loud = tone()
    long = float32(tone(2.0))
    quiet = antiphase() + np.array([0.2, 0.0], dtype=np.float32) * tone(len(antiphase()) / 16_000)[:, None]
    answer = ask(served, float32(loud), long, wav(quiet))
    (none, of_long, of_stereo) = (list(one.warnings) for one in answer.captions)
    assert none == []
    assert any("0.64 s" in one for one in of_long)
    assert any(one.startswith("clip has channels that cancel each other") for one in of_stereo)


def test_get_captioner_names_the_models_the_defaults_and_the_limits(served: Served) -> None:
    answer = served.stub.GetCaptioner(pb.GetCaptionerRequest())
    assert (answer.model.digest, answer.scorer.model.digest) == (MODEL.digest, CLAP_MODEL.digest)
    assert (answer.refines, answer.sample_rate_hertz) == (True, 16_000)
    assert (list(answer.refined_beams), list(answer.plain_beams)) == ([2, 3], [4])
    assert (answer.max_new_tokens, answer.max_beams, answer.max_total_beams) == (8, 16, 64)
    assert answer.read_duration.ToMilliseconds() == 640
    assert (answer.limits.max_batch_size, answer.limits.max_duration.ToSeconds()) == (64, 30)


# Refusals

SILENCE = float32(np.zeros(16_000, np.float32))
FAULTS = {
    "silence": (SILENCE, "is silent"),
    "channels that cancel": (wav(antiphase()), "cancel each other"),
    "too short": (float32(tone(0.05)), "send a longer one"),
    "too long": (float32(tone(60.0)), "cut it"),
    "six channels": (wav(np.repeat(tone()[:, None], 6, axis=1)), "mix it down"),
    "NaN": (float32(np.full(8_000, np.nan, np.float32)), "send finite samples"),
    "a text file": (audio_pb2.Clip(audio=b"a dog barks, he said\n" * 20), "begins with 61 20 64 6f"),
    "a wrong encoding": (
        audio_pb2.Clip(audio=wav(tone()).audio, encoding=audio_pb2.AUDIO_ENCODING_FLAC),
        "correct the one or the other",
    ),
    "nothing": (audio_pb2.Clip(), "is empty"),
}


@pytest.mark.parametrize(("clip", "remedy"), FAULTS.values(), ids=FAULTS)
def test_a_bad_clip_is_named_with_the_remedy(served: Served, clip: audio_pb2.Clip, remedy: str) -> None:
    ((field, description),) = refusal(served, float32(tone()), clip).items()
    assert field == "clips[1].audio"
    assert remedy in description


def test_every_wrong_clip_and_option_is_named_at_once(served: Served) -> None:
    clips = [float32(tone()), SILENCE, float32(tone(0.05))]
    found = refusal(served, *clips, beams=[3, 17, 3, 0], max_new_tokens=9, max_candidates=-1)
    assert list(found) == [
        *("clips[1].audio", "clips[2].audio"),
        *("beams[1]", "beams[2]", "beams[3]", "max_new_tokens", "max_candidates"),
    ]
    assert "the same as beams[0]" in found["beams[2]"]


def test_too_many_beams_in_all_are_refused(served: Served) -> None:
    found = refusal(served, float32(tone()), beams=range(10, 16))
    assert found == {"beams": "are 75 in all, must be at most 64; give fewer or smaller"}


def test_no_clips_and_too_many_are_refused(served: Served) -> None:
    assert list(refusal(served)) == ["clips"]
    assert list(refusal(served, *[float32(tone(0.1))] * 65)) == ["clips"]


def test_refinement_without_a_scorer_is_refused(captioner: Captioner) -> None:
    with serving(captioner) as served:
        assert "clap or scoring" in refusal(served, float32(tone()), refine=True)["refine"]
        answer = ask(served, float32(tone()))
        assert [one.beams for one in answer.captions[0].candidates] == [4]
        description = served.stub.GetCaptioner(pb.GetCaptionerRequest())
        assert (description.refines, description.HasField("scorer")) == (False, False)


# Batches and queues


def test_concurrent_calls_share_batches_and_get_their_own_captions(
    captioner: Captioner, clap: ClapModel
) -> None:
    clips = [tone(hertz=200 + 100 * index) for index in range(12)]
    beams: list[tuple[int, ...]] = [(2, 3), (1,), (4,)]
    wanted = [{one.text for one in expected(captioner, clip, beams[i % 3])} for i, clip in enumerate(clips)]
    with serving(captioner, clap, max_wait_seconds=0.3) as served:

        async def ask_all() -> list[pb.CaptionAudioResponse]:
            async with grpc.aio.insecure_channel(served.target) as channel:
                stub: Any = rpc.CaptioningServiceStub(channel)
                requests = [
                    pb.CaptionAudioRequest(clips=[float32(clip)], beams=beams[index % 3])
                    for index, clip in enumerate(clips)
                ]
                return list(await asyncio.gather(*(stub.CaptionAudio(one) for one in requests)))

        answers = asyncio.run(ask_all())
        for answer, texts in zip(answers, wanted, strict=True):
            assert {one.text for one in answer.captions[0].candidates} == texts
        assert served.worker.batcher.stats.items == 12
        assert served.worker.batcher.stats.calls < 12
        # 0.5 s each, in proportion to the 5 beams of the model's own numbers.
        assert served.worker.batcher.stats.cost == pytest.approx(0.5 * (4 * 5 + 4 * 1 + 4 * 4) / 5)
        text = generate_latest(served.metrics.registry).decode()
        assert "milonga_captioning_clips_total 12.0" in text
        assert 'milonga_captioning_stage_seconds_total{stage="generate"}' in text
        assert f'milonga_refine_model_info{{digest="{CLAP_MODEL.digest}"' in text
        assert f'digest="{MODEL.digest}"' in text


class _Slow(Captioner):
    """Says that it was called, waits for `go`, and then encodes as usual."""

    called: threading.Event
    go: threading.Event

    def encode(self, clips: Sequence[CaptionClip]) -> Tensor:
        self.called.set()
        assert self.go.wait(20)
        return super().encode(clips)


def _slow() -> _Slow:
    model = tiny_captioner()
    model.__class__ = _Slow
    assert isinstance(model, _Slow)
    model.called, model.go = threading.Event(), threading.Event()
    return model


def test_a_full_queue_says_when_to_come_back() -> None:
    model = _slow()
    request = pb.CaptionAudioRequest(clips=[float32(tone(0.64))], beams=[2, 3])
    with serving(model, max_batch_seconds=0.64, max_queue_seconds=0.64) as served:
        running = served.stub.CaptionAudio.future(request)
        assert model.called.wait(10)
        waiting = served.stub.CaptionAudio.future(request)
        until(lambda: served.worker.batcher.stats.queue_cost == pytest.approx(0.64))
        with pytest.raises(grpc.RpcError) as caught:
            served.stub.CaptionAudio(request)
        assert isinstance(caught.value, grpc.Call)
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        retry = error_details_pb2.RetryInfo()
        status = rpc_status.from_call(caught.value)
        assert any(detail.Unpack(retry) for detail in status.details if detail.Is(retry.DESCRIPTOR))
        assert served.worker.batcher.stats.refused == 1
        # Who waits can leave, and makes room.
        waiting.cancel()
        until(lambda: served.worker.batcher.stats.queue_cost == 0)
        model.go.set()
        assert len(running.result(10).captions) == 1
        assert served.worker.batcher.stats.items == 1


def test_a_passed_deadline_leaves_the_queue() -> None:
    model = _slow()
    request = pb.CaptionAudioRequest(clips=[float32(tone(0.64))])
    with serving(model, max_batch_seconds=0.64) as served:
        running = served.stub.CaptionAudio.future(request)
        assert model.called.wait(10)
        with pytest.raises(grpc.RpcError) as caught:
            served.stub.CaptionAudio(request, timeout=0.3)
        assert isinstance(caught.value, grpc.Call)
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        until(lambda: served.worker.batcher.stats.queue_cost == 0)
        model.go.set()
        assert len(running.result(10).captions) == 1
        assert served.worker.batcher.stats.items == 1


class _Scarce(Captioner):
    """Has memory for two clips at a time."""

    def encode(self, clips: Sequence[CaptionClip]) -> Tensor:
        if len(clips) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return super().encode(clips)


def test_a_batch_that_is_too_large_is_halved(captioner: Captioner) -> None:
    model = tiny_captioner()
    model.__class__ = _Scarce
    clips = [tone(hertz=200 + 100 * index) for index in range(7)]
    with serving(model) as served:
        answer = ask(served, *map(float32, clips))
    assert [one.text for one in answer.captions] == [expected(captioner, one, (4,))[0].text for one in clips]


class _Broken(Captioner):
    """Finds its candidates infinitely improbable."""

    def generate(self, *arguments: Any, **options: Any) -> list[list[Candidate]]:
        found = super().generate(*arguments, **options)
        return [[Candidate(text=c.text, log_probability=math.nan, beams=c.beams) for c in of] for of in found]


def test_a_number_that_is_not_finite_fails_with_a_diagnosis() -> None:
    model = tiny_captioner()
    model.__class__ = _Broken
    with serving(model) as served, pytest.raises(grpc.RpcError) as caught:
        ask(served, float32(tone()))
    assert isinstance(caught.value, grpc.Call)
    assert caught.value.code() is grpc.StatusCode.INTERNAL
    details = caught.value.details() or ""
    assert "candidate of clip 0" in details
    assert MODEL.digest in details


class _Mute(Captioner):
    """Writes one candidate without words, and one with a control character."""

    def generate(self, *arguments: Any, **options: Any) -> list[list[Candidate]]:
        found = super().generate(*arguments, **options)
        return [
            [Candidate(text=("", "\x07")[i], log_probability=-1.0 - i, beams=i) for i in range(2)]
            for _ in found
        ]


def test_sentences_that_clap_can_not_score_lose(clap: ClapModel) -> None:
    model = tiny_captioner()
    model.__class__ = _Mute
    with serving(model, clap) as served:
        (caption,) = ask(served, float32(tone())).captions
    assert [one.log_probability for one in caption.candidates] == [-1.0, -2.0]
    assert not any(one.HasField("clap_score") for one in caption.candidates)
    (warning,) = caption.warnings
    assert warning.startswith("clip has no candidate that CLAP can score")
