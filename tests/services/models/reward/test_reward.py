import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from services.errors import DigestMismatchError, ModelFormatError, ModelNotFoundError
from services.models.clap.model import ClapModel, Waveform
from services.models.reward.model import (
    WEIGHTS_NAME,
    RewardConfig,
    RewardModel,
    load_reward,
    read_reward_config,
    time_features,
)
from tests.tiny import tiny_clap, tiny_reward

RATE = 16_000
DIGEST = "sha256:" + "0" * 64


@pytest.fixture(scope="module")
def clap() -> ClapModel:
    return tiny_clap()


@pytest.fixture(scope="module")
def model(clap: ClapModel) -> RewardModel:
    return tiny_reward(clap, DIGEST)


@pytest.fixture
def folder(model: RewardModel, tmp_path: Path) -> Path:
    model.save(tmp_path / "reward")
    return tmp_path / "reward"


def noise(seconds: float, seed: int = 0) -> Waveform:
    samples = np.random.default_rng(seed).standard_normal(round(seconds * RATE))
    return (0.1 * samples).astype(np.float32)


def test_rewards_are_float32_and_finite_from_a_tenth_of_a_second_to_a_minute(model: RewardModel) -> None:
    clips = [model.prepare(noise(seconds), RATE) for seconds in (0.1, 1.0, 1.5, 60.0)]
    rewards = model.reward(["a dog barks"] * 4, clips)
    assert rewards.dtype == torch.float32 and rewards.shape == (4,)
    assert torch.isfinite(rewards).all()


def test_companions_of_other_lengths_do_not_change_a_reward(model: RewardModel) -> None:
    clips = [model.prepare(noise(seconds, seed), RATE) for seed, seconds in enumerate((0.3, 1.0, 5.2))]
    prompts = ["a dog barks", "a dog barks then a siren wails and a bell rings", "rain"]
    together = model.reward(prompts, clips)
    alone = torch.cat([model.reward([prompt], [clip]) for prompt, clip in zip(prompts, clips, strict=True)])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)


def test_the_order_of_sounds_changes_the_reward_and_that_of_words_too(model: RewardModel) -> None:
    first, second = noise(1.0, 1), 0.1 * noise(1.0, 2)
    clips = [model.prepare(np.concatenate(parts), RATE) for parts in ((first, second), (second, first))]
    forwards, backwards = model.reward(["a dog barks"] * 2, clips)
    assert abs(float(forwards - backwards)) > 1e-4
    said = model.reward(["a dog then a cat", "a cat then a dog"], [clips[0]] * 2)
    assert abs(float(said[0] - said[1])) > 1e-4


def test_what_lies_beyond_the_end_of_a_short_clip_is_silence_and_is_not_heard(model: RewardModel) -> None:
    """CLAP itself would repeat the clip, and order would be lost."""
    clip = model.prepare(noise(0.4), RATE)
    assert clip.windows_WS.shape == (1, RATE)
    assert not clip.windows_WS[0, round(0.4 * RATE) :].any()
    tokens = model.audio_tokens([clip])
    inside = tokens.seconds_BA[tokens.mask_BA]
    assert len(inside) >= 1 and float(inside.max()) < 0.4


def test_time_features_are_sines_of_periods_evenly_spread_in_logarithm() -> None:
    features = time_features(torch.tensor([[0.0, 0.25]]), 4)
    assert features.shape == (1, 2, 4)
    torch.testing.assert_close(features[0, 0], torch.tensor([0.0, 0.0, 1.0, 1.0]))
    angle = 2 * math.pi * 0.25 / 120.0
    expected = torch.tensor([math.sin(2 * math.pi), math.sin(angle), math.cos(2 * math.pi), math.cos(angle)])
    torch.testing.assert_close(features[0, 1], expected, atol=1e-5, rtol=0.0)


def test_the_temperature_divides_the_logit_and_the_bias_is_added(model: RewardModel) -> None:
    clip = model.prepare(noise(1.0), RATE)
    plain = model.reward(["a dog barks"], [clip])
    scaled = model.calibrated(2.0, -1.0).reward(["a dog barks"], [clip])
    torch.testing.assert_close(scaled, plain / 2 - 1)


def test_a_folder_gives_the_same_model_back_also_in_half_precision(
    model: RewardModel, clap: ClapModel, folder: Path
) -> None:
    clip = model.prepare(noise(1.0), RATE)
    expected = model.reward(["a dog barks"], [clip])
    loaded = load_reward(folder, clap, DIGEST)
    assert torch.equal(loaded.reward(["a dog barks"], [clip]), expected)
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())
    weights = {key: value.half() for key, value in load_file(folder / WEIGHTS_NAME).items()}
    save_file(weights, folder / WEIGHTS_NAME)
    half = load_reward(folder, clap, DIGEST).reward(["a dog barks"], [clip])
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, expected, atol=1e-2, rtol=1e-2)


def test_another_clap_is_refused(clap: ClapModel, folder: Path) -> None:
    other = "sha256:" + "1" * 64
    with pytest.raises(DigestMismatchError, match=f"tiny-clap .*{DIGEST}.*{other}.*give the one"):
        load_reward(folder, clap, other)


def test_a_clap_of_another_width_is_refused(clap: ClapModel) -> None:
    config = RewardConfig(text_width=17, audio_width=clap.audio_width, clap_name="x", clap_digest=DIGEST)
    with pytest.raises(ModelFormatError, match=r"text_width 17, .* have 16"):
        RewardModel(clap, config)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "clap"}, "holds no reward model"),
        ({"flavour": 3}, "does not know.*flavour"),
        ({"heads": 3}, "must be a multiple of 2 × heads"),
        ({"temperature": 0.0}, "temperature is 0.0; it must be above 0"),
        ({"layers": 0}, "layers is 0; it must be 1 or more"),
    ],
)
def test_a_config_that_is_wrong_is_refused(folder: Path, change: dict[str, object], message: str) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ModelFormatError, match=message):
        read_reward_config(folder)


def test_missing_and_truncated_weights_are_refused(clap: ClapModel, folder: Path) -> None:
    weights = load_file(folder / WEIGHTS_NAME)
    missing = {key: value for key, value in weights.items() if key != "query"}
    save_file(missing, folder / WEIGHTS_NAME)
    with pytest.raises(ModelFormatError, match="1 missing keys: query"):
        load_reward(folder, clap, DIGEST)
    save_file(weights, folder / WEIGHTS_NAME)
    whole = (folder / WEIGHTS_NAME).read_bytes()
    (folder / WEIGHTS_NAME).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ModelFormatError, match="truncated or not safetensors"):
        load_reward(folder, clap, DIGEST)


def test_pickles_are_refused(clap: ClapModel, folder: Path) -> None:
    (folder / WEIGHTS_NAME).rename(folder / "model.bin")
    with pytest.raises(ModelFormatError, match=r"only a pickle payload \(model.bin\)"):
        load_reward(folder, clap, DIGEST)


def test_a_folder_that_is_not_there_is_refused(clap: ClapModel, tmp_path: Path) -> None:
    with pytest.raises((ModelFormatError, ModelNotFoundError), match="nowhere"):
        load_reward(tmp_path / "nowhere", clap, DIGEST)
