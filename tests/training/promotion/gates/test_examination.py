"""Scores and rewards of services equal those of the same weights in this process."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from services.api.scoring import REWARD
from services.client import AudioClient
from services.errors import InvalidInputError
from services.models.clap.loading import load_clap
from tests.services.reward.serving import Served as ServedReward
from tests.services.reward.serving import serving as reward_serving
from tests.services.scoring.serving import save_tiny_clap
from tests.services.scoring.serving import serving as scoring_serving
from tests.tiny import tiny_clap, tiny_reward
from training.evaluation.clip_scores import open_evaluators
from training.evaluation.config import evaluation_smoke

PROMPTS = ["a dog barks", "rain falls then a bell rings"]
RATE = 22_050
BARE = replace(evaluation_smoke(), scorers=(), reward=None, embedders=(), judge=None)


@pytest.fixture(scope="module")
def pairs() -> list[tuple[str, tuple[np.ndarray, int]]]:
    rng = np.random.default_rng(0)
    noise = [(0.1 * rng.standard_normal(RATE)).astype(np.float32) for _ in PROMPTS]
    return [(prompt, (clip, RATE)) for prompt, clip in zip(PROMPTS, noise, strict=True)]


@pytest.fixture(scope="module")
def reward() -> Iterator[ServedReward]:
    with reward_serving(tiny_reward(tiny_clap())) as served:
        yield served


def test_scorers_of_a_service(tmp_path: Path, pairs: list[tuple[str, tuple[np.ndarray, int]]]) -> None:
    folder = save_tiny_clap(tmp_path / "tiny-a", 0)
    local = load_clap(folder, device="cpu")
    audio_BD = local.embed_windows([local.prepare(*sound) for _, sound in pairs])
    expected = (local.embed_text(PROMPTS) * audio_BD).sum(-1).numpy()
    with (
        scoring_serving({"a": f"file:{folder}"}) as served,
        AudioClient(scoring=served.hosted.target) as client,
    ):
        with pytest.raises(InvalidInputError, match="has no scorer b; it has a"):
            open_evaluators(replace(BARE, scorers=("a=x", "b=y")), scoring=client)
        evaluators = open_evaluators(replace(BARE, scorers=("a=never-loaded",)), scoring=client)
        scores = evaluators.scorers.score_audio(pairs, scorers=evaluators.clap_names)
    np.testing.assert_allclose(scores.values[:, 0], expected, atol=1e-5)
    assert evaluators.versions["a"].name == "tiny-a"


def test_the_reward_model_of_a_service(
    reward: ServedReward, pairs: list[tuple[str, tuple[np.ndarray, int]]]
) -> None:
    local = tiny_reward(tiny_clap())
    expected = local.reward(PROMPTS, [local.prepare(*sound) for _, sound in pairs])
    with AudioClient(reward=reward.target) as client:
        evaluators = open_evaluators(replace(BARE, reward="never-loaded"), reward=client)
        rewards = evaluators.scorers.compute_rewards(pairs).rewards
    np.testing.assert_allclose([one.logit for one in rewards], expected, atol=1e-4)
    assert evaluators.versions[REWARD].digest == "sha256:" + "1" * 64
