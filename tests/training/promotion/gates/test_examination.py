"""Judges behind services hear what the same weights hear in this process."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from services.errors import InvalidInputError
from services.models.clap.loading import load_clap
from tests.services.reward.serving import Served as ServedReward
from tests.services.reward.serving import serving as reward_serving
from tests.services.scoring.serving import save_tiny_clap
from tests.services.scoring.serving import serving as scoring_serving
from tests.tiny import tiny_clap, tiny_reward
from training.promotion.gates.examination import remote_reward, remote_scorers

PROMPTS = ["a dog barks", "rain falls then a bell rings"]
RATE = 22_050


@pytest.fixture(scope="module")
def clips() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [(0.1 * rng.standard_normal(RATE)).astype(np.float32) for _ in PROMPTS]


@pytest.fixture(scope="module")
def reward() -> Iterator[ServedReward]:
    with reward_serving(tiny_reward(tiny_clap())) as served:
        yield served


def test_scorers_of_a_service(tmp_path: Path, clips: list[np.ndarray]) -> None:
    folder = save_tiny_clap(tmp_path / "tiny-a", 0)
    local = load_clap(folder, device="cpu")
    expected = local.embed_windows([local.prepare(clip, RATE) for clip in clips])
    with scoring_serving({"a": f"file:{folder}"}) as served:
        with pytest.raises(InvalidInputError, match="has no scorer b; it has a"):
            remote_scorers(served.hosted.target, ["a", "b"])
        scorer = remote_scorers(served.hosted.target, ["a"])["a"]
        windows = [scorer.model.prepare(clip, RATE) for clip in clips]
        torch.testing.assert_close(scorer.model.embed_windows(windows), expected, atol=1e-5, rtol=0)
        torch.testing.assert_close(
            scorer.model.embed_text(PROMPTS), local.embed_text(PROMPTS), atol=1e-5, rtol=0
        )
    assert scorer.version.name == "tiny-a"


def test_the_reward_model_of_a_service(reward: ServedReward, clips: list[np.ndarray]) -> None:
    local = tiny_reward(tiny_clap())
    expected = local.reward(PROMPTS, [local.prepare(clip, RATE) for clip in clips])
    remote = remote_reward(reward.target)
    found = remote.model.reward(PROMPTS, [remote.model.prepare(clip, RATE) for clip in clips])
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    assert remote.version.digest == "sha256:" + "1" * 64
