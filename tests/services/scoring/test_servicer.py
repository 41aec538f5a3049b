import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import soundfile
import torch
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from grpc_status import rpc_status

from milonga.v1 import audio_pb2
from milonga.v1 import scoring_pb2 as pb
from milonga.v1 import scoring_pb2_grpc as rpc
from milonga.v1.audio_pb2 import Clip, PromptedClip
from services.models.manifest import read_manifest
from services.scoring.scorers import Scorer
from services.scoring.servicer import SERVICE_NAME
from tests.services.audio.sounds import antiphase, file_of, float32, silent_flac, tone
from tests.services.scoring.serving import Served, serving
from tests.tiny import tiny_clap
from tests.waiting import until

PROMPT = "a dog barks then a siren wails"
FLAC = file_of(tone(), kind="FLAC")


def _pair(prompt: str = PROMPT, clip: Clip | None = None) -> PromptedClip:
    return PromptedClip(prompt=prompt, clip=clip or float32(tone()))


def _refusal(call: Callable[[], object]) -> dict[str, str]:
    """Return the violated fields and what is said of them."""
    with pytest.raises(grpc.RpcError) as caught:
        call()
    error: Any = caught.value
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT, error
    bad_request = error_details_pb2.BadRequest()
    for detail in rpc_status.from_call(error).details:
        if detail.Is(bad_request.DESCRIPTOR):
            detail.Unpack(bad_request)
    return {violation.field: violation.description for violation in bad_request.field_violations}


@contextmanager
def _held(scorer: Scorer) -> Iterator[threading.Event]:
    """Hold the audio side of a scorer inside of its model; yields the event of the first entry."""
    model: Any = scorer._model
    embed, entered, leave = model.embed_windows, threading.Event(), threading.Event()

    def hold(clips: Any) -> Any:
        entered.set()
        assert leave.wait(20)
        return embed(clips)

    model.embed_windows = hold
    try:
        yield entered
    finally:
        leave.set()
        del model.embed_windows


def test_a_prompt_without_a_known_word_has_no_score(stub: rpc.ScoringServiceStub) -> None:
    response = stub.BatchScoreAudio(pb.BatchScoreAudioRequest(pairs=[_pair("a zebra brays"), _pair()]))
    unread, read = response.results
    assert (list(unread.scores), list(unread.unread)) == ([0.0] * 3, [True] * 3)
    assert all(read.scores) and not read.unread


def test_scores_are_those_of_the_models(stub: rpc.ScoringServiceStub, folders: dict[str, Path]) -> None:
    clips = [tone(0.5), tone(2.5, hertz=880.0)]
    prompts = [PROMPT, "a bell rings"]
    response = stub.BatchScoreAudio(
        pb.BatchScoreAudioRequest(pairs=[_pair(p, float32(c)) for p, c in zip(prompts, clips, strict=True)])
    )
    assert [scorer.name for scorer in response.scorers] == ["a", "b", "a2"]
    for place, seed in enumerate((0, 1, 0)):
        expected = tiny_clap(seed).score(prompts, clips, 16_000).numpy()
        np.testing.assert_allclose([result.scores[place] for result in response.results], expected, atol=1e-5)
    for scorer, folder in zip(response.scorers, ("a", "b", "a"), strict=True):
        assert scorer.model.name == f"tiny-{folder}"
        assert scorer.model.digest == read_manifest(folders[folder]).digest
        assert (scorer.dimension, scorer.sample_rate_hertz) == (16, 16_000)


def test_warnings_come_with_the_pair_or_clip_that_they_are_about(stub: rpc.ScoringServiceStub) -> None:
    fine, odd = float32(tone()), float32(antiphase())
    scored = stub.BatchScoreAudio(pb.BatchScoreAudioRequest(pairs=[_pair(clip=fine), _pair(clip=odd)]))
    embedded = stub.BatchEmbedAudio(pb.BatchEmbedAudioRequest(clips=[fine, odd]))
    for results in (scored.results, embedded.results):
        first, (second,) = (result.warnings for result in results)
        assert (list(first), second.startswith("clip has channels that cancel each other")) == ([], True)


def test_what_the_scorers_do_not_read_of_a_prompt_is_warned_of(stub: rpc.ScoringServiceStub) -> None:
    prompts = ["a dog barks", "a zebra barks 🐕", "a dog " * 20]
    pairs = [_pair(prompt=prompt, clip=float32(tone())) for prompt in prompts]
    scored = stub.BatchScoreAudio(pb.BatchScoreAudioRequest(pairs=pairs))
    embedded = stub.BatchEmbedText(pb.BatchEmbedTextRequest(prompts=prompts))
    for results in (scored.results, embedded.results):
        assert [list(result.warnings) for result in results] == [
            [],
            ["prompt has words that the model does not know: zebra, 🐕; use other words"],
            ["prompt has 42 tokens and the model reads the first 32; shorten it"],
        ]


def test_requests_pick_scorers_by_name_and_in_their_order(stub: rpc.ScoringServiceStub) -> None:
    every = stub.BatchScoreAudio(pb.BatchScoreAudioRequest(pairs=[_pair()])).results[0].scores
    some = stub.BatchScoreAudio(pb.BatchScoreAudioRequest(pairs=[_pair()], scorers=["b", "a"]))
    assert [scorer.name for scorer in some.scorers] == ["b", "a"]
    np.testing.assert_allclose(some.results[0].scores, [every[1], every[0]], atol=1e-6)


def test_embeddings_are_those_of_the_models(stub: rpc.ScoringServiceStub) -> None:
    clips = [tone(0.5), tone(2.5)]
    audio = stub.BatchEmbedAudio(
        pb.BatchEmbedAudioRequest(clips=[float32(clip) for clip in clips], scorers=["b"])
    )
    text = stub.BatchEmbedText(pb.BatchEmbedTextRequest(prompts=[PROMPT, "rain", PROMPT], scorers=["b"]))
    for response in (audio, text):
        assert [scorer.name for scorer in response.scorers] == ["b"]
    model = tiny_clap(1)
    heard_BD = [result.embeddings[0].values for result in audio.results]
    read_BD = [result.embeddings[0].values for result in text.results]
    np.testing.assert_allclose(heard_BD, model.embed_audio(clips, 16_000), atol=1e-5)
    np.testing.assert_allclose(read_BD, model.embed_text([PROMPT, "rain", PROMPT]), atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(heard_BD, axis=1), 1.0, atol=1e-5)


def test_every_encoding_and_rate_is_heard_alike(stub: rpc.ScoringServiceStub) -> None:
    stereo_NC = np.stack([tone(rate=48_000)] * 2, axis=1)
    clips = [
        float32(tone()),
        Clip(audio=FLAC),
        Clip(audio=file_of(tone()), encoding=audio_pb2.AUDIO_ENCODING_WAV, sample_rate_hertz=16_000),
        Clip(audio=file_of(stereo_NC, 48_000)),
    ]
    response = stub.BatchScoreAudio(pb.BatchScoreAudioRequest(pairs=[_pair(clip=clip) for clip in clips]))
    scores = np.array([result.scores for result in response.results])
    np.testing.assert_allclose(scores, scores[:1].repeat(4, axis=0), atol=5e-3)


def test_the_listing_says_what_is_served_and_what_a_call_may_hold(
    stub: rpc.ScoringServiceStub, served: Served
) -> None:
    listing = stub.ListScorers(pb.ListScorersRequest())
    assert [scorer.name for scorer in listing.scorers] == ["a", "b", "a2"]
    assert listing.limits.max_batch_size == 64
    assert listing.limits.max_request_bytes == 256 * 2**20
    assert served.scorers["a"] is served.scorers["a2"]  # one model in memory


def test_a_minute_of_stereo_passes(stub: rpc.ScoringServiceStub) -> None:
    clip = float32(tone(60.0, 48_000, channels=2), 48_000)
    assert len(clip.audio) == 60 * 48_000 * 2 * 4  # 23 MB: five times gRPC's usual limit
    response = stub.BatchScoreAudio(pb.BatchScoreAudioRequest(pairs=[_pair(clip=clip)]))
    assert np.isfinite(response.results[0].scores).all()


def test_equal_prompts_and_names_of_one_model_cost_once(stub: rpc.ScoringServiceStub, served: Served) -> None:
    scorer = served.scorers["a"]
    before = scorer.text.stats, scorer.audio.stats, scorer.cache.hits
    request = pb.BatchScoreAudioRequest(pairs=[_pair("a cat sings")] * 3, scorers=["a", "a2"])
    stub.BatchScoreAudio(request)
    assert scorer.text.stats.items - before[0].items == 1
    assert scorer.audio.stats.items - before[1].items == 3
    assert scorer.cache.hits == before[2]
    stub.BatchScoreAudio(request)
    assert scorer.cache.hits == before[2] + 1


def test_concurrent_calls_share_batches(uris: dict[str, str]) -> None:
    request = pb.BatchEmbedAudioRequest(clips=[float32(tone())])
    with serving({"a": uris["a"]}, max_wait_seconds=0.5, max_batch_seconds=8.0) as served:
        scorer = served.scorers["a"]
        with grpc.insecure_channel(served.hosted.target) as channel, ThreadPoolExecutor(8) as pool:
            stub = rpc.ScoringServiceStub(channel)
            answers = list(pool.map(lambda _: stub.BatchEmbedAudio(request), range(8)))
        assert scorer.audio.stats.items == 8
        assert scorer.audio.stats.calls < 4
        first, *rest = (np.array(a.results[0].embeddings[0].values) for a in answers)
        for other in rest:
            np.testing.assert_allclose(other, first, atol=1e-5)


@pytest.mark.parametrize(
    ("pair", "field", "said"),
    [
        (_pair(""), "prompt", "is empty"),
        (_pair(" "), "prompt", "is empty"),
        (_pair("a" * 1001), "prompt", "has 1001 characters, the limit is 1000"),
        (PromptedClip(prompt=PROMPT), "clip.audio", "is empty"),
        (_pair(clip=Clip(audio=b"noise")), "clip.audio", "no WAV, FLAC or OGG"),
        (_pair(clip=Clip(audio=FLAC[:-100])), "clip.audio", "FLAC"),
        (
            _pair(clip=Clip(audio=file_of(tone()), encoding=audio_pb2.AUDIO_ENCODING_FLAC)),
            "clip.audio",
            "begins as WAV, and encoding says FLAC",
        ),
        (_pair(clip=float32(np.full(16_000, np.nan, np.float32))), "clip.audio", "holds NaN"),
        (_pair(clip=float32(tone(), 0)), "clip.sample_rate_hertz", "is 0"),
        (_pair(clip=Clip(audio=FLAC, sample_rate_hertz=8_000)), "clip.sample_rate_hertz", "says 16000"),
        (_pair(clip=float32(tone(0.09))), "clip.audio", "lasts 0.09 s"),
        (_pair(clip=float32(tone(60.1))), "clip.audio", "lasts 60.1 s"),
        (_pair(clip=float32(tone(channels=3))), "clip.channel_count", "is 3"),
    ],
)
def test_a_bad_element_is_refused_and_the_others_are_not_blamed(
    stub: rpc.ScoringServiceStub, pair: PromptedClip, field: str, said: str
) -> None:
    request = pb.BatchScoreAudioRequest(pairs=[_pair(), pair, _pair()])
    found = _refusal(lambda: stub.BatchScoreAudio(request))
    assert list(found) == [f"pairs[1].{field}"]
    assert said in found[f"pairs[1].{field}"]


def test_a_day_of_packed_silence_is_refused_and_harms_nobody(
    stub: rpc.ScoringServiceStub, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded: list[int] = []
    read = soundfile.SoundFile.read

    def counted(file: Any, *args: Any, **kwargs: Any) -> Any:
        block_NC = read(file, *args, **kwargs)
        decoded.append(len(block_NC))
        return block_NC

    monkeypatch.setattr(soundfile.SoundFile, "read", counted)
    pairs = [_pair(clip=Clip(audio=FLAC)), *[_pair(clip=Clip(audio=silent_flac(24)))] * 16]
    found = _refusal(lambda: stub.BatchScoreAudio(pb.BatchScoreAudioRequest(pairs=pairs)))
    assert list(found) == [f"pairs[{place}].clip.audio" for place in range(1, 17)]
    assert "lasts 86400 s, must last between 0.1 and 60 s" in found["pairs[1].clip.audio"]
    assert 0 < sum(decoded) < 60 * 48_000  # of the sound that is not refused


def test_every_fault_is_told_at_once(stub: rpc.ScoringServiceStub) -> None:
    request = pb.BatchScoreAudioRequest(
        pairs=[_pair(""), _pair(clip=Clip(audio=b"noise"))], scorers=["c", "a", "a"]
    )
    found = _refusal(lambda: stub.BatchScoreAudio(request))
    assert list(found) == ["pairs[0].prompt", "pairs[1].clip.audio", "scorers[0]", "scorers[2]"]
    assert found["scorers[0]"] == "is 'c', must be one of a, b, a2"
    assert found["scorers[2]"] == "is 'a', the same as scorers[1]; name each at most once"


@pytest.mark.parametrize("count", [0, 65])
def test_none_and_too_many_are_refused(stub: rpc.ScoringServiceStub, count: int) -> None:
    calls: dict[str, Callable[[], object]] = {
        "pairs": lambda: stub.BatchScoreAudio(pb.BatchScoreAudioRequest(pairs=[_pair()] * count)),
        "clips": lambda: stub.BatchEmbedAudio(pb.BatchEmbedAudioRequest(clips=[Clip()] * count)),
        "prompts": lambda: stub.BatchEmbedText(pb.BatchEmbedTextRequest(prompts=[""] * count)),
    }
    for field, call in calls.items():
        found = _refusal(call)
        assert list(found) == [field]
        assert "64" in found[field]


def test_clips_and_prompts_alone_are_checked_alike(stub: rpc.ScoringServiceStub) -> None:
    clips = [Clip(audio=FLAC), Clip(audio=FLAC[:500])]
    audio = pb.BatchEmbedAudioRequest(clips=clips, scorers=["?"])
    assert list(_refusal(lambda: stub.BatchEmbedAudio(audio))) == ["clips[1].audio", "scorers[0]"]
    text = pb.BatchEmbedTextRequest(prompts=[PROMPT, "\t"], scorers=["?"])
    assert list(_refusal(lambda: stub.BatchEmbedText(text))) == ["prompts[1]", "scorers[0]"]


def test_bad_calls_do_not_disturb_good_ones(stub: rpc.ScoringServiceStub) -> None:
    good = pb.BatchScoreAudioRequest(pairs=[_pair()])
    bad = pb.BatchScoreAudioRequest(pairs=[_pair(), _pair(clip=Clip(audio=b"noise"))])
    expected = stub.BatchScoreAudio(good).results[0].scores

    def send(number: int) -> Any:
        if number % 2:
            return _refusal(lambda: stub.BatchScoreAudio(bad))
        return stub.BatchScoreAudio(good).results[0].scores

    with ThreadPoolExecutor(8) as pool:
        for number, got in enumerate(pool.map(send, range(24))):
            if number % 2:
                assert list(got) == ["pairs[1].clip.audio"]
            else:
                np.testing.assert_allclose(got, expected, atol=1e-5)


def test_a_full_queue_says_when_to_come_back(uris: dict[str, str]) -> None:
    request = pb.BatchEmbedAudioRequest(clips=[float32(tone())])
    with (
        serving({"a": uris["a"]}, max_batch_seconds=1.0, max_queue_seconds=1.0) as served,
        grpc.insecure_channel(served.hosted.target) as channel,
    ):
        scorer, stub = served.scorers["a"], rpc.ScoringServiceStub(channel)
        with _held(scorer) as entered:
            calls = [stub.BatchEmbedAudio.future(request)]
            assert entered.wait(10)
            calls.append(stub.BatchEmbedAudio.future(request))
            until(lambda: scorer.audio.stats.queue_cost == 1.0)
            with pytest.raises(grpc.RpcError) as caught:
                stub.BatchEmbedAudio(request)
            error: Any = caught.value
            assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            details = rpc_status.from_call(error).details
            assert any(detail.Is(error_details_pb2.RetryInfo.DESCRIPTOR) for detail in details)
            # Prompts are not sound: they still pass.
            assert stub.BatchEmbedText(pb.BatchEmbedTextRequest(prompts=[PROMPT])).results
        assert all(call.result(20).results for call in calls)
        assert scorer.audio.stats.refused == 1


def test_who_goes_away_leaves_the_queue(uris: dict[str, str]) -> None:
    request = pb.BatchEmbedAudioRequest(clips=[float32(tone())])
    with (
        serving({"a": uris["a"]}) as served,
        grpc.insecure_channel(served.hosted.target) as channel,
    ):
        scorer, stub = served.scorers["a"], rpc.ScoringServiceStub(channel)
        with _held(scorer) as entered:
            first = stub.BatchEmbedAudio.future(request)
            assert entered.wait(10)
            with pytest.raises(grpc.RpcError) as caught:
                stub.BatchEmbedAudio(request, timeout=0.3)
            error: Any = caught.value
            assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
            until(lambda: scorer.audio.stats.queue_cost == 0.0)
        assert first.result(20).results
        assert scorer.audio.stats.items == 1


def test_a_fault_of_the_model_is_not_the_callers(uris: dict[str, str]) -> None:
    with serving({"a": uris["a"]}) as served:
        model: Any = served.scorers["a"]._model
        model.clap.audio_projection.linear1.weight.data = torch.zeros(1, 1)
        with grpc.insecure_channel(served.hosted.target) as channel:
            stub = rpc.ScoringServiceStub(channel)
            with pytest.raises(grpc.RpcError) as caught:
                stub.BatchScoreAudio(pb.BatchScoreAudioRequest(pairs=[_pair()]))
            error: Any = caught.value
            assert error.code() is grpc.StatusCode.INTERNAL
            assert "shape" not in error.details()
            assert stub.BatchEmbedText(pb.BatchEmbedTextRequest(prompts=[PROMPT])).results


def test_health_and_reflection_list_the_service(served: Served) -> None:
    with grpc.insecure_channel(served.hosted.target) as channel:
        health: Any = health_pb2_grpc.HealthStub(channel)  # its stubs know no rpc
        status = health.Check(health_pb2.HealthCheckRequest(service=SERVICE_NAME)).status
        assert status == health_pb2.HealthCheckResponse.SERVING
        reflection: Any = reflection_pb2_grpc.ServerReflectionStub(channel)
        ask = reflection_pb2.ServerReflectionRequest(list_services="")
        (answer,) = reflection.ServerReflectionInfo(iter([ask]))
        assert SERVICE_NAME in {service.name for service in answer.list_services_response.service}


def test_metrics_count_by_scorer(uris: dict[str, str]) -> None:
    with serving(uris) as served, grpc.insecure_channel(served.hosted.target) as channel:
        stub = rpc.ScoringServiceStub(channel)
        for _ in range(2):
            stub.BatchScoreAudio(pb.BatchScoreAudioRequest(pairs=[_pair(clip=float32(tone(1.5)))]))

        def value(name: str, scorer: str = "a") -> float | None:
            return served.hosted.metrics.registry.get_sample_value(f"milonga_{name}", {"scorer": scorer})

        assert (value("scoring_clips_total"), value("scoring_texts_total")) == (2, 2)
        assert (value("scoring_audio_calls_total"), value("scoring_text_calls_total")) == (2, 2)
        assert value("scoring_audio_seconds_total") == 4.0  # two windows each
        assert value("scoring_text_cache_hits_total") == 1
        assert value("scoring_text_cache_misses_total") == 1
        assert value("scoring_queue_seconds") == 0.0
        batches = served.hosted.metrics.registry.get_sample_value
        assert batches("milonga_batch_seconds_count", {"queue": "a/audio"}) == 2
        assert batches("milonga_batch_seconds_count", {"queue": "a2/audio"}) is None
        assert value("scoring_clips_total", "b") == 2
        assert value("scoring_clips_total", "a2") is None  # the same weights as a
