"""The adversarial autoencoder: what each loss moves, and that a training resumes to the bit."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from training.loop.fit import LoopConfig
from training.pretraining.autoencoder import (
    AdversarialAutoencoder,
    AutoencoderTraining,
    Mels,
    crops,
    train_autoencoder,
)

CONFIG = AutoencoderTraining(
    loop=LoopConfig(steps=6, batch=2, warmup=1, ema=0.5, device="cpu", threads=1, checkpoint_seconds=0.0),
    widths=(8, 8),
    latent_channels=2,
    crop=16,
    alone=0.5,
    discriminator_widths=(4, 4),
)
MEAN, DEVIATION = -5.0, 2.0


@pytest.fixture(scope="module")
def mels() -> Mels:
    """Random spectrograms of 24 frames and 16 bins."""
    return (np.random.default_rng(0).standard_normal((6, 24, 16)) * DEVIATION + MEAN).astype(np.float16)


def test_an_untrained_autoencoder_is_near_the_mean() -> None:
    torch.manual_seed(0)
    vae = AdversarialAutoencoder(CONFIG, MEAN, DEVIATION).autoencoder
    decoded = vae.decode(torch.zeros(1, 2, 12, 8)).sample
    assert decoded.shape == (1, 1, 24, 16)
    assert abs(float(decoded.detach().mean()) - MEAN) < DEVIATION


def test_each_loss_moves_its_own_side(mels: Mels) -> None:
    torch.manual_seed(0)
    # In evaluation mode, spectral norms stay as they are.
    module = AdversarialAutoencoder(CONFIG, MEAN, DEVIATION).eval()
    mel_B1TM = crops(mels, np.arange(2), CONFIG)
    loss, figures = module(mel_B1TM, adversarial=False)
    loss.backward()
    assert figures.keys() == {"l1", "kl"}
    assert all(one.grad is None for one in module.discriminator.parameters())
    assert all(one.grad is not None for one in module.autoencoder.parameters())

    module.zero_grad()
    silenced = replace(CONFIG, adversarial=0.0, matching=0.0)
    torch.manual_seed(1)
    module.config = silenced
    module(mel_B1TM, adversarial=True)[0].backward()
    own = [one.grad.clone() for one in module.autoencoder.parameters() if one.grad is not None]
    discriminator = [one.grad.clone() for one in module.discriminator.parameters() if one.grad is not None]

    module.zero_grad()
    torch.manual_seed(1)
    module.config = CONFIG
    module(mel_B1TM, adversarial=True)[0].backward()
    after = [one.grad for one in module.autoencoder.parameters() if one.grad is not None]
    assert any(not torch.equal(one, other) for one, other in zip(own, after, strict=True))
    # The generator's verdict and the matching do not teach the discriminator.
    judged = [one.grad for one in module.discriminator.parameters() if one.grad is not None]
    assert len(judged) == len(discriminator) > 0
    assert all(torch.equal(one, other) for one, other in zip(discriminator, judged, strict=True))


def test_a_crop_is_a_part_of_a_spectrogram_at_another_gain(mels: Mels) -> None:
    found = crops(mels, np.array([3]), CONFIG)[0, 0].numpy()
    shifts = [
        found - mel[start : start + 16].astype(np.float32) for mel in mels for start in range(24 - 16 + 1)
    ]
    assert min(float(shift.std()) for shift in shifts) < 1e-5
    assert np.array_equal(crops(mels, np.array([3]), CONFIG), crops(mels, np.array([3]), CONFIG))


def test_a_training_that_was_stopped_gives_the_same_weights(mels: Mels, tmp_path: Path) -> None:
    whole = train_autoencoder(mels, CONFIG, tmp_path / "whole")
    # The decay of the rate begins after the fourth step, the adversary with it.
    train_autoencoder(
        mels, replace(CONFIG, alone=0.75, loop=replace(CONFIG.loop, steps=4, horizon=6)), tmp_path / "parts"
    )
    parts = train_autoencoder(mels, CONFIG, tmp_path / "parts")
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, parts.state_dict()[name]), name


def test_latents_are_standardised(mels: Mels, tmp_path: Path) -> None:
    vae = train_autoencoder(mels, CONFIG, tmp_path / "run")
    latents = vae.encode(torch.from_numpy(mels.astype(np.float32))[:, None]).latent_dist.mean
    torch.testing.assert_close(latents.mean((0, 2, 3)), torch.zeros(2), atol=1e-3, rtol=0)
    torch.testing.assert_close(latents.std((0, 2, 3)), torch.ones(2), atol=1e-2, rtol=0)
    assert vae.config.scaling_factor == 1.0
