"""The three services as they are, with tiny models, behind one client."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from services.client import AudioClient, RankBy, Sound
from services.errors import InvalidInputError
from tests.services.generation import serving as generation
from tests.services.reward import serving as reward
from tests.services.scoring import serving as scoring
from tests.tiny import tiny_clap, tiny_reward

PROMPT = "a dog barks then a siren wails"


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AudioClient]:
    torch.set_num_threads(1)
    parent = tmp_path_factory.mktemp("scorers")
    scorers = {
        name: f"file:{scoring.save_tiny_clap(parent / name, seed)}" for seed, name in enumerate(("a", "b"))
    }
    with (
        generation.tiny_engine(max_clip_count=3) as engine,
        generation.serving(engine) as generating,
        scoring.serving(scorers) as scored,
        reward.serving(tiny_reward(tiny_clap())) as rewarded,
        AudioClient(
            generating.target, scoring=scored.hosted.target, reward=rewarded.target, timeout=60, retries=0
        ) as client,
    ):
        yield client


def test_what_is_generated_is_scored_and_judged(client: AudioClient) -> None:
    clips = client.generate(PROMPT, seed=3, clip_count=2).clips
    scores = client.score_audio([(PROMPT, clip) for clip in clips])
    assert ([scorer.name for scorer in scores.scorers], scores.values.shape) == (["a", "b"], (2, 2))
    sounds = client.embed_audio(clips, scorers=["b"])
    (text,) = client.embed_text([PROMPT], scorers=["b"]).vectors
    np.testing.assert_allclose((sounds.vectors[0] * text).sum(-1), scores.values[:, 1], atol=1e-5)
    rewards = client.compute_rewards([(PROMPT, clip) for clip in clips])
    ranking = client.rank_audio(PROMPT, clips)
    assert [place.reward.logit for place in ranking.places] == pytest.approx(
        sorted((reward.logit for reward in rewards.rewards), reverse=True), abs=1e-5
    )
    assert client.get_reward_model().model.digest == rewards.model.digest


def test_the_same_sound_scores_the_same_however_it_is_sent(client: AudioClient, tmp_path: Path) -> None:
    (clip,) = client.generate(PROMPT, seed=3, encoding="float32").clips
    waveform_N = clip.waveform()
    (flac,) = client.generate(PROMPT, seed=3, encoding="flac").clips
    path = tmp_path / "clip.flac"
    path.write_bytes(flac.audio)
    stereo = np.stack([waveform_N, waveform_N])
    sounds: list[Sound] = [
        clip,
        (waveform_N, clip.sampling_rate),
        (stereo, clip.sampling_rate),
        flac,
        flac.audio,
        path,
    ]
    values = client.score_audio([(PROMPT, sound) for sound in sounds]).values
    np.testing.assert_allclose(values[1:], np.broadcast_to(values[0], values[1:].shape), atol=1e-3)


@pytest.mark.parametrize("rank_by", ["reward", "clap"])
def test_the_best_of_several_is_what_the_judge_says(client: AudioClient, rank_by: RankBy) -> None:
    best = client.generate_best(
        PROMPT,
        candidates=4,
        rank_by=rank_by,
        seed=5,
        encoding="float32",
    )
    assert len({clip.audio for clip in best.clips}) == 4
    assert (
        best.generation.clips[:3] == client.generate(PROMPT, seed=5, clip_count=3, encoding="float32").clips
    )
    pairs = [(PROMPT, clip) for clip in best.clips]
    if rank_by == "reward":
        expected = [reward.logit for reward in client.compute_rewards(pairs).rewards]
    else:
        expected = client.score_audio(pairs).values.mean(axis=1).tolist()
    assert [one.value for one in best.candidates] == pytest.approx(expected, abs=1e-5)
    assert expected == pytest.approx(sorted(expected, reverse=True), abs=1e-5)


def test_services_name_fields_as_the_client_does(client: AudioClient) -> None:
    with pytest.raises(InvalidInputError) as caught:
        client.score_audio([("rain", b"no sound at all"), ("", b"RIFF")])
    fields = [violation.field for violation in caught.value.violations]
    assert fields == ["pairs[0].clip.audio", "pairs[1].prompt", "pairs[1].clip.audio"]
