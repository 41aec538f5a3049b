import asyncio
import itertools
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
from prometheus_client import generate_latest

from milonga.v1 import audio_pb2
from milonga.v1 import reward_pb2 as pb
from milonga.v1 import reward_pb2_grpc as rpc
from services.models.reward.model import RewardModel
from tests.services.audio.sounds import antiphase
from tests.services.reward.serving import CLAP, MODEL, Served, float32, serving, tone, wav
from tests.tiny import tiny_clap, tiny_reward
from tests.waiting import until

PROMPT = "A dog barks then a siren wails"
OTHER = "rain falls"
NAN_N = np.full(8_000, np.nan, np.float32)


def pair(clip: audio_pb2.Clip, prompt: str = PROMPT) -> audio_pb2.PromptedClip:
    return audio_pb2.PromptedClip(prompt=prompt, clip=clip)


def expected(model: RewardModel, prompt: str, *clips: Any) -> list[float]:
    """What the model itself says, one clip at a time."""
    return [model.reward([prompt], [model.prepare(clip, 16_000)]).item() for clip in clips]


def refusal(call: Any, request: Any) -> list[str]:
    """Fields that a call refuses."""
    with pytest.raises(grpc.RpcError) as caught:
        call(request)
    assert isinstance(caught.value, grpc.Call)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT, caught.value
    status = rpc_status.from_call(caught.value)
    bad = error_details_pb2.BadRequest()
    assert any(detail.Unpack(bad) for detail in status.details if detail.Is(bad.DESCRIPTOR))
    return [violation.field for violation in bad.field_violations]


def test_prompt_and_clips_are_refused_together(served: Served) -> None:
    request = pb.RankAudioRequest(prompt=" ", clips=[float32(tone()), float32(NAN_N)])
    assert refusal(served.stub.RankAudio, request) == ["clips[1].audio", "prompt"]
    assert refusal(served.stub.RankAudio, pb.RankAudioRequest()) == ["clips", "prompt"]


def test_each_clip_is_scored_for_its_own_prompt(served: Served, model: RewardModel) -> None:
    low, high, long = tone(hertz=300), tone(hertz=2_000), tone(3.3, hertz=700)
    answer = served.stub.BatchComputeRewards(
        pb.BatchComputeRewardsRequest(
            pairs=[pair(float32(low)), pair(float32(high), OTHER), pair(float32(long))]
        )
    )
    wanted = [*expected(model, PROMPT, low), *expected(model, OTHER, high), *expected(model, PROMPT, long)]
    assert [reward.logit for reward in answer.rewards] == pytest.approx(wanted, abs=1e-4)
    for reward in answer.rewards:
        assert reward.probability == pytest.approx(1 / (1 + math.exp(-reward.logit)))
    assert (answer.model.name, answer.model.digest) == (MODEL.identity.name, MODEL.digest)


def test_a_wav_file_in_stereo_at_another_rate_is_heard(served: Served, model: RewardModel) -> None:
    at_44 = tone(rate=44_100)
    stereo = np.stack([at_44, at_44], axis=1)
    answer = served.stub.BatchComputeRewards(
        pb.BatchComputeRewardsRequest(pairs=[pair(wav(stereo, 44_100)), pair(float32(at_44, 44_100))])
    )
    by_file, bare = (reward.logit for reward in answer.rewards)
    assert by_file == pytest.approx(bare, abs=1e-2)  # 16 bits


def test_warnings_come_with_the_reward_that_they_are_about(served: Served) -> None:
    clips = [wav(antiphase()), float32(tone())]
    answer = served.stub.BatchComputeRewards(pb.BatchComputeRewardsRequest(pairs=map(pair, clips)))
    ranking = served.stub.RankAudio(pb.RankAudioRequest(prompt=PROMPT, clips=clips)).ranking
    ranked = [place.reward for place in sorted(ranking, key=lambda place: place.clip_index)]
    for rewards in (answer.rewards, ranked):
        (first,), second = (reward.warnings for reward in rewards)
        assert (first.startswith("clip has channels that cancel each other"), list(second)) == (True, [])


def test_what_the_model_does_not_read_of_a_prompt_is_warned_of(served: Served) -> None:
    clip, prompt = float32(tone()), "a zebra " * 20
    pairs = [audio_pb2.PromptedClip(prompt=prompt, clip=clip), pair(clip)]
    answer = served.stub.BatchComputeRewards(pb.BatchComputeRewardsRequest(pairs=pairs))
    ranking = served.stub.RankAudio(pb.RankAudioRequest(prompt=prompt, clips=[clip])).ranking
    expected = [
        "prompt has words that the model does not know: zebra, and none for a sound that it knows; "
        "use other words",
        "prompt has 42 tokens and the model reads the first 32; shorten it",
    ]
    assert [list(reward.warnings) for reward in answer.rewards] == [expected, []]
    assert list(ranking[0].reward.warnings) == expected


def test_a_prompt_without_a_known_word_has_no_reward(served: Served) -> None:
    clips = [float32(tone()), float32(tone(hertz=880.0))]
    pairs = [pair(clips[0], prompt) for prompt in ("a zebra brays", PROMPT)]
    unread, read = served.stub.BatchComputeRewards(pb.BatchComputeRewardsRequest(pairs=pairs)).rewards
    assert (unread.unread, unread.logit, unread.probability) == (True, 0.0, 0.0)
    assert "none for a sound that it knows" in unread.warnings[0]
    assert not read.unread and 0 < read.probability < 1
    ranked = served.stub.RankAudio(pb.RankAudioRequest(prompt="a zebra brays", clips=clips)).ranking
    assert [place.clip_index for place in ranked] == [0, 1]
    assert all(place.reward.unread for place in ranked)


def test_clips_are_ranked_best_first(served: Served, model: RewardModel) -> None:
    clips = [tone(hertz=hertz) for hertz in (200, 900, 3_000, 6_000)]
    answer = served.stub.RankAudio(pb.RankAudioRequest(prompt=PROMPT, clips=[float32(c) for c in clips]))
    logits = expected(model, PROMPT, *clips)
    order = sorted(range(4), key=lambda index: -logits[index])
    assert [place.clip_index for place in answer.ranking] == order
    places = list(answer.ranking)
    for place, following in itertools.pairwise(places):
        difference = place.reward.logit - following.reward.logit
        assert place.beats_next == pytest.approx(1 / (1 + math.exp(-difference)))
        assert 0.5 <= place.beats_next <= 1
    assert not places[-1].HasField("beats_next")
    assert places[0].reward.probability == pytest.approx(1 / (1 + math.exp(-places[0].reward.logit)))
    assert answer.model.digest == MODEL.digest


def test_the_same_clip_beats_itself_half_of_the_time(served: Served) -> None:
    answer = served.stub.RankAudio(pb.RankAudioRequest(prompt=PROMPT, clips=[float32(tone())] * 3))
    assert {place.clip_index for place in answer.ranking} == {0, 1, 2}
    # Rows of one batch differ by rounding.
    assert [place.beats_next for place in answer.ranking][:2] == pytest.approx([0.5, 0.5], abs=1e-5)


def test_get_reward_model_names_both_models_and_the_limits(served: Served) -> None:
    answer = served.stub.GetRewardModel(pb.GetRewardModelRequest())
    assert (answer.model.digest, answer.clap.digest) == (MODEL.digest, CLAP.digest)
    assert answer.clap.name == "tiny-clap"
    assert answer.sample_rate_hertz == 16_000
    assert (answer.limits.max_batch_size, answer.limits.max_request_bytes) == (64, 256 * 2**20)
    assert answer.limits.max_duration.ToSeconds() == 60


def test_a_minute_of_stereo_at_48_khz_passes(served: Served) -> None:
    stereo = np.stack([tone(60.0, rate=48_000)] * 2, axis=1)
    clip = float32(stereo, 48_000)
    clip.channel_count = 2
    assert len(clip.audio) > 4 * 2**20
    answer = served.stub.RankAudio(pb.RankAudioRequest(prompt=PROMPT, clips=[clip]))
    assert len(answer.ranking) == 1


def test_every_wrong_element_is_named_at_once(served: Served) -> None:
    good = float32(tone())
    cut = wav(tone())
    cut.audio = cut.audio[:-100]
    wrong_rate = float32(tone())
    wrong_rate.sample_rate_hertz = 0
    pairs = [
        pair(good),
        pair(good, ""),
        pair(float32(NAN_N)),
        pair(cut, "a\x00dog"),
        pair(audio_pb2.Clip(audio=b"ID3\x04 no sound file")),
        pair(wrong_rate),
        pair(float32(tone(0.05))),
        pair(audio_pb2.Clip(), "x" * 1001),
        audio_pb2.PromptedClip(prompt=PROMPT),
    ]
    fields = refusal(served.stub.BatchComputeRewards, pb.BatchComputeRewardsRequest(pairs=pairs))
    assert fields == [
        "pairs[1].prompt",
        "pairs[2].clip.audio",
        "pairs[3].prompt",
        "pairs[3].clip.audio",
        "pairs[4].clip.audio",
        "pairs[5].clip.sample_rate_hertz",
        "pairs[6].clip.audio",
        "pairs[7].prompt",
        "pairs[7].clip.audio",
        "pairs[8].clip.audio",
    ]


def test_a_ranking_names_prompt_and_clips_at_once(served: Served) -> None:
    request = pb.RankAudioRequest(prompt=" ", clips=[float32(tone()), float32(NAN_N)])
    assert refusal(served.stub.RankAudio, request) == ["clips[1].audio", "prompt"]


@pytest.mark.parametrize("count", [0, 65])
def test_no_clips_and_too_many_are_refused(served: Served, count: int) -> None:
    pairs = pb.BatchComputeRewardsRequest(pairs=[pair(float32(tone(0.1)))] * count)
    assert refusal(served.stub.BatchComputeRewards, pairs) == ["pairs"]
    ranking = pb.RankAudioRequest(prompt=PROMPT, clips=[float32(tone(0.1))] * count)
    assert refusal(served.stub.RankAudio, ranking) == ["clips"]


def test_concurrent_calls_share_batches_and_get_their_own_rewards(model: RewardModel) -> None:
    clips = [tone(hertz=200 + 100 * index) for index in range(12)]
    wanted = expected(model, PROMPT, *clips)
    with serving(model, max_wait_seconds=0.3) as served:

        async def ask() -> list[float]:
            async with grpc.aio.insecure_channel(served.target) as channel:
                stub: Any = rpc.RewardServiceStub(channel)
                requests = [pb.BatchComputeRewardsRequest(pairs=[pair(float32(clip))]) for clip in clips]
                answers = await asyncio.gather(*(stub.BatchComputeRewards(r) for r in requests))
            return [answer.rewards[0].logit for answer in answers]

        assert asyncio.run(ask()) == pytest.approx(wanted, abs=1e-4)
        assert served.scorer.batcher.stats.items == 12
        assert served.scorer.batcher.stats.calls < 12
        assert served.scorer.batcher.stats.cost == 12.0  # a window of 1 s each
        text = generate_latest(served.metrics.registry).decode()
        assert "milonga_reward_clips_total 12.0" in text
        assert f'digest="{MODEL.digest}"' in text
        assert f'digest="{CLAP.digest}"' in text


class _Slow(RewardModel):
    """Says that it was called, waits for `go`, and then scores as usual."""

    called: threading.Event
    go: threading.Event

    def reward(self, prompts: Sequence[str], clips: Sequence[Any]) -> torch.Tensor:
        self.called.set()
        assert self.go.wait(20)
        return super().reward(prompts, clips)


def _slow() -> _Slow:
    model = tiny_reward(tiny_clap())
    model.__class__ = _Slow
    assert isinstance(model, _Slow)
    model.called, model.go = threading.Event(), threading.Event()
    return model


def test_a_full_queue_says_when_to_come_back() -> None:
    model = _slow()
    request = pb.BatchComputeRewardsRequest(pairs=[pair(float32(tone(1.0)))])
    with serving(model, max_batch_seconds=1.0, max_queue_seconds=1.0) as served:
        running = served.stub.BatchComputeRewards.future(request)
        assert model.called.wait(10)
        waiting = served.stub.BatchComputeRewards.future(request)
        until(lambda: served.scorer.batcher.stats.queue_cost == 1.0)
        with pytest.raises(grpc.RpcError) as caught:
            served.stub.BatchComputeRewards(request)
        assert isinstance(caught.value, grpc.Call)
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        retry = error_details_pb2.RetryInfo()
        status = rpc_status.from_call(caught.value)
        assert any(detail.Unpack(retry) for detail in status.details if detail.Is(retry.DESCRIPTOR))
        assert retry.retry_delay.ToMilliseconds() > 0
        assert served.scorer.batcher.stats.refused == 1
        # Who waits can leave, and makes room.
        waiting.cancel()
        until(lambda: served.scorer.batcher.stats.queue_cost == 0)
        model.go.set()
        assert len(running.result(10).rewards) == 1
        assert served.scorer.batcher.stats.items == 1


def test_a_passed_deadline_leaves_the_queue() -> None:
    model = _slow()
    request = pb.BatchComputeRewardsRequest(pairs=[pair(float32(tone(1.0)))])
    with serving(model, max_batch_seconds=1.0) as served:
        running = served.stub.BatchComputeRewards.future(request)
        assert model.called.wait(10)
        with pytest.raises(grpc.RpcError) as caught:
            served.stub.BatchComputeRewards(request, timeout=0.3)
        assert isinstance(caught.value, grpc.Call)
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        until(lambda: served.scorer.batcher.stats.queue_cost == 0)
        model.go.set()
        assert len(running.result(10).rewards) == 1
        assert served.scorer.batcher.stats.items == 1


def test_a_reward_that_is_not_finite_fails_with_a_diagnosis() -> None:
    model = tiny_reward(tiny_clap())
    torch.nn.init.constant_(model.head.query, math.nan)
    with serving(model) as served, pytest.raises(grpc.RpcError) as caught:
        served.stub.RankAudio(pb.RankAudioRequest(prompt=PROMPT, clips=[float32(tone())]))
    assert isinstance(caught.value, grpc.Call)
    assert caught.value.code() is grpc.StatusCode.INTERNAL
    details = caught.value.details() or ""
    assert "reward of clip 0" in details
    assert served.scorer.version.digest in details
