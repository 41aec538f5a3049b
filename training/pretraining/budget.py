"""How many steps of a training fit into some minutes on this machine."""

import time
from collections.abc import Callable
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from training.loop.fit import LoopConfig, make_accelerator
from training.pretraining.autoencoder import AdversarialAutoencoder, AutoencoderTraining, Mels, crops

TRIALS: Final = 4
"""Steps that are timed, after one that is not."""
FEWEST: Final = 20
"""Fewest steps of a training, however slow the machine."""


def steps_in(seconds: float, per_step: float, most: int) -> int:
    """Return how many steps of `per_step` seconds fit into `seconds`: at least `FEWEST`, at most `most`."""
    return max(min(FEWEST, most), min(most, int(seconds / max(per_step, 1e-9))))


def autoencoder_seconds(mels: Mels, config: AutoencoderTraining) -> float:
    """Return the seconds of a step of the autoencoder's training, the discriminator included."""
    accelerator = make_accelerator(config.loop)
    module = AdversarialAutoencoder(config, 0.0, 1.0).to(accelerator.device)
    positions = np.arange(config.loop.batch)
    mel_B1TM = crops(mels, positions, config).to(accelerator.device)

    def step() -> Tensor:
        loss: Tensor = module(mel_B1TM, adversarial=True)[0]
        return loss

    return _timed(step, module, config.loop)


def denoiser_seconds(
    unet: Any, loop: LoopConfig, shape: tuple[int, ...], text_length: int, width: int
) -> float:
    """Return the seconds of a step of a denoiser's training, for latents of `shape` and text of `width`."""
    accelerator = make_accelerator(loop)
    module, device = unet.to(accelerator.device), accelerator.device
    noisy_BX = torch.randn(loop.batch, *shape, device=device)
    embeds_BLD = torch.randn(loop.batch, text_length, width, device=device)
    timesteps_B = torch.randint(0, 1000, (loop.batch,), device=device)

    def step() -> Tensor:
        predicted_BX = module(noisy_BX, timesteps_B, encoder_hidden_states=embeds_BLD).sample
        loss: Tensor = predicted_BX.float().square().mean()
        return loss

    return _timed(step, module, loop)


def _timed(loss_of: Callable[[], Tensor], module: Any, loop: LoopConfig) -> float:
    """Return the mean seconds of a step: loss, gradients, optimiser."""
    optimiser = torch.optim.AdamW(module.parameters(), lr=loop.learning_rate)
    accelerator = make_accelerator(loop)
    began = 0.0
    for trial in range(TRIALS + 1):
        if trial == 1:
            began = time.monotonic()
        with accelerator.autocast():
            loss = loss_of()
        loss.backward()
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        float(loss.detach())  # waits for the device
    return (time.monotonic() - began) / TRIALS
