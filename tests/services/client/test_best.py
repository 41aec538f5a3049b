from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from milonga.v1 import generation_pb2
from services.api.best import ScoredClips, next_seed, portions, rank, run
from services.api.generation import Clip, Generation, Timings
from services.api.model import ModelVersion
from services.api.scoring import Reward, Rewards, Scorer, Scores
from services.client import Best
from services.errors import InvalidInputError, ServiceUnavailableError
from tests.services.client.serving import Told, ask


def _best(face: str, target: str | None, **options: Any) -> Best:
    best = ask(face, lambda client: client.generate_best("rain", **options), target, retries=0)
    assert isinstance(best, Best)
    return best


def _seeds(told: Told) -> list[tuple[int | None, int]]:
    """Seed and number of clips of every generation that was asked for."""
    return [
        (request.seed if request.HasField("seed") else None, request.clip_count)
        for request in told.requests
        if isinstance(request, generation_pb2.GenerateAudioRequest)
    ]


@pytest.mark.parametrize(
    ("count", "most", "parts"), [(4, 8, [4]), (8, 3, [3, 3, 2]), (5, 0, [5]), (1, 1, [1])]
)
def test_portions_add_up(count: int, most: int, parts: list[int]) -> None:
    assert portions(count, most) == parts


def test_seeds_are_reproducible_and_all_different() -> None:
    used = [7]
    for _ in range(200):
        used.append(next_seed(used))
    again = [7]
    for _ in range(200):
        again.append(next_seed(again))
    assert used == again
    assert len(set(used)) == 201
    assert all(0 <= seed < 2**32 for seed in used)
    assert next_seed([8]) != next_seed([7])
    # What would come next is taken: another one comes.
    taken = next_seed([7, 9])
    assert next_seed([7, taken]) != taken


@pytest.mark.parametrize("rank_by", ["reward", "clap"])
def test_the_best_comes_first(face: str, told: Told, target: str, rank_by: Any) -> None:
    best = _best(face, target, candidates=3, seed=11, rank_by=rank_by, num_inference_steps=5)
    # Worth 77, 80, 83, by index.
    assert [clip.index for clip in best.clips] == [2, 1, 0]
    expected = [83.0, 80.0, 77.0] if rank_by == "reward" else [0.6225, 0.6, 0.5775]
    assert [one.value for one in best.candidates] == pytest.approx(expected)
    assert best.rank_by == rank_by
    assert [judge.name for judge in best.scorers] == (["told"] if rank_by == "reward" else ["told"] * 2)
    assert [clip.index for clip in best.generation.clips] == [0, 1, 2]
    assert _seeds(told) == [(11, 3)]


def test_more_candidates_than_a_call_makes_come_from_several(face: str, told: Told, target: str) -> None:
    best = _best(face, target, candidates=8, seed=11)
    (first, second, third) = _seeds(told)
    assert (first, second[1], third[1]) == ((11, 3), 3, 2)
    noise = [(clip.seed, clip.index) for clip in best.clips]
    assert len(set(noise)) == 8
    assert [one.value for one in best.candidates] == sorted(
        (one.value for one in best.candidates), reverse=True
    )
    # The reward service takes four at once.
    assert [one.value for one in best.candidates] == [float(clip.audio[0]) for clip in best.clips]
    assert (best.generation.seed, best.generation.timings.total) == (11, 6.0)
    assert best.generation.warnings == ("told",)
    assert _best(face, target, candidates=8, seed=11) == best


def test_what_can_not_be_read_is_not_ranked() -> None:
    version = ModelVersion(name="m", version="1", digest="sha256:0", license="")
    rewards = Rewards(rewards=(Reward.of(3.0), Reward.of(2.0, (), False)), model=version)
    with pytest.raises(InvalidInputError, match="no word for a sound that the reward model knows"):
        ScoredClips.by_reward(rewards)
    scorers = tuple(Scorer(name=n, model=version, dimension=2, sampling_rate=16_000) for n in "ab")
    values = np.array([[0.5, 0.0], [0.25, 0.0]], dtype=np.float32)
    scores = Scores(scorers=scorers, values=values, readable=np.array([[True, False]] * 2), warnings=((), ()))
    assert list(ScoredClips.by_clap(scores).values) == [0.5, 0.25]
    with pytest.raises(InvalidInputError, match="no word for a sound that the scorers know"):
        ScoredClips.by_clap(replace(scores, readable=np.zeros((2, 2), dtype=bool)))


def test_warnings_of_the_scorers_name_their_candidates() -> None:
    on_all, on_one = "prompt has words that the model does not know: zebra", "clip is silent"
    model = ModelVersion(name="m", version="1", digest="", license="")
    clips = tuple(
        Clip(audio=b"", encoding="wav", sampling_rate=8_000, duration=1.0, index=index, seed=1)
        for index in range(3)
    )
    timings = Timings(queued=0.0, encode=0.0, denoise=0.0, decode=0.0, total=0.0)
    made = Generation(clips=clips, seed=1, model=model, warnings=("told",), timings=timings)
    rewards = [
        Reward.of(float(index), (on_all, on_one) if index == 1 else (on_all,)) for index in range(len(clips))
    ]

    async def score(some: Sequence[Clip]) -> ScoredClips:
        chosen = tuple(rewards[clip.index] for clip in some)
        return ScoredClips.by_reward(Rewards(rewards=chosen, model=model))

    best = run(rank(made, "reward", 2, score))
    assert [one.warnings for one in best.candidates] == [(on_all,), (on_all, on_one), (on_all,)]
    assert best.warnings == ("told", on_all, f"{on_one} (candidate 2)")


def test_without_a_seed_the_drawn_one_makes_them_again(face: str, told: Told, target: str) -> None:
    drawn = _best(face, target, candidates=5)
    assert _seeds(told)[0] == (None, 3)
    assert _best(face, target, candidates=5, seed=drawn.generation.seed) == drawn


def test_what_makes_no_sense_is_refused_before_anything_is_made(face: str, told: Told, target: str) -> None:
    with pytest.raises(InvalidInputError) as caught:
        _best(face, target, candidates=0, rank_by="taste", clip_count=2)
    assert [v.field for v in caught.value.violations] == ["candidates", "rank_by", "clip_count"]
    assert told.requests == []


def test_an_absent_judge_is_told_before_anything_is_made(face: str, told: Told, target: str) -> None:
    with pytest.raises(ServiceUnavailableError, match="milonga serve reward"):
        ask(face, lambda client: client.generate_best("rain"), target, reward="127.0.0.1:1", retries=0)
    with pytest.raises(InvalidInputError, match="scoring service has no address"):
        ask(face, lambda client: client.generate_best("rain", rank_by="clap"), reward=target)
    assert told.requests == []
