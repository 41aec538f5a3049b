"""Train an autoencoder of log-mel spectrograms, first by distance, then against a discriminator.

Trained by distance alone, a small autoencoder blurs noise-like sounds (rain, fire, a chainsaw). The patch
discriminator on spectrograms prevents that (compare arXiv 2012.09841). Autoencoder and discriminator learn
in the same step: each loss reaches only its own side.

Shape legend: B batch, T mel frames, M mel bins, C latent channels, F latent mel bins.
"""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import leaky_relu
from torch.nn.utils.parametrizations import spectral_norm

from training.loop.checks import Count, Factor, Share, check_ranges
from training.loop.fit import LoopConfig, Positions, fit, make_accelerator
from training.mini.autoencoder import standardise_latents
from training.objectives.adversarial import feature_matching, hinge_discriminator, hinge_generator

SAMPLE = 128
"""Spectrograms that means and deviations are measured on."""

Mels = NDArray[np.float16]
"""Log-mel spectrograms [N, T, M]; may be mapped from a file."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AutoencoderTraining:
    """Architecture, losses and loop of the autoencoder."""

    loop: LoopConfig = field(
        default_factory=lambda: LoopConfig(
            steps=3_000,
            batch=8,
            learning_rate=1e-3,
            warmup=100,
            weight_decay=1e-4,
            betas=(0.8, 0.98),
            ema=0.998,
            decay=0.3,
            mixed_precision="bf16",
        )
    )
    widths: tuple[int, ...] = (32, 48, 64)
    """Channels of each level; each level but the last halves time and frequency."""
    latent_channels: Count = 8
    crop: Count = 64
    """Mel frames of a training crop; the autoencoder reads any length when it serves."""
    gain: tuple[float, float] = (-9.0, 3.0)
    """Bounds of the random gain of a crop, in dB."""
    l2: Factor = 0.2
    """Weight of the squared distance; the absolute distance weighs 1. Both in deviations of the data."""
    kl: Factor = 1e-3
    """Weight of the divergence from the prior, per latent value."""
    alone: Share = 0.33
    """Share of the steps, at the beginning, without a discriminator."""
    adversarial: Factor = 0.1
    """Weight of the discriminator's verdict."""
    matching: Factor = 0.6
    """Weight of feature matching."""
    discriminator_rate: Factor = 4e-4
    """Peak learning rate of the discriminator."""
    discriminator_widths: tuple[int, ...] = (32, 64, 96)

    def __post_init__(self) -> None:
        check_ranges(self)


class PatchDiscriminator(nn.Module):
    """Log-mel spectrograms [B, 1, T, M] to logits of patches: spectrally normalised 4 × 4 convolutions."""

    def __init__(self, widths: tuple[int, ...]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            spectral_norm(nn.Conv2d(inputs, outputs, 4, stride=2, padding=1))
            for inputs, outputs in zip((1, *widths[:-1]), widths, strict=True)
        )
        self.last = spectral_norm(nn.Conv2d(widths[-1], 1, 3, padding=1))

    def forward(self, mel_B1TM: Tensor) -> list[Tensor]:
        """Return the features of each layer, and the logits at the end."""
        found = []
        hidden = mel_B1TM
        for layer in self.layers:
            hidden = leaky_relu(layer(hidden), 0.2)
            found.append(hidden)
        return [*found, self.last(hidden)]


class AdversarialAutoencoder(nn.Module):
    """What is trained: the autoencoder and its discriminator."""

    def __init__(self, config: AutoencoderTraining, mean: float, deviation: float) -> None:
        """Build both for spectrograms with this mean and standard deviation."""
        super().__init__()
        self.config, self.mean, self.deviation = config, mean, deviation
        self.autoencoder = build_autoencoder(config, mean, deviation)
        self.discriminator = PatchDiscriminator(config.discriminator_widths)

    def forward(self, mel_B1TM: Tensor, *, adversarial: bool) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the sum of the losses, of the discriminator too if `adversarial`, and figures."""
        config = self.config
        posterior = self.autoencoder.encode(mel_B1TM).latent_dist
        decoded_B1TM = self.autoencoder.decode(posterior.sample()).sample
        gap = (decoded_B1TM.float() - mel_B1TM) / self.deviation
        l1, l2 = gap.abs().mean(), gap.square().mean()
        kl = (posterior.kl().float() / posterior.mean[0].numel()).mean()
        loss = l1 + config.l2 * l2 + config.kl * kl
        figures = {"l1": l1.detach(), "kl": kl.detach()}
        if not adversarial:
            return loss, figures
        fake_B1TM, real_B1TM = (self._standardised(one) for one in (decoded_B1TM.float(), mel_B1TM))
        real, judged = self.discriminator(real_B1TM), self.discriminator(fake_B1TM.detach())
        frozen = {name: one.detach() for name, one in self.discriminator.named_parameters()}
        fake = functional_call(self.discriminator, frozen, (fake_B1TM,))
        matching = feature_matching(real[:-1], fake[:-1])
        verdict = hinge_generator(fake[-1].float())
        discriminator = hinge_discriminator(real[-1].float(), judged[-1].float())
        loss = loss + config.adversarial * verdict + config.matching * matching + discriminator
        return loss, figures | {
            "matching": matching.detach(),
            "verdict": verdict.detach(),
            "discriminator": discriminator.detach(),
        }

    def _standardised(self, mel_B1TM: Tensor) -> Tensor:
        return (mel_B1TM - self.mean) / self.deviation


def build_autoencoder(config: AutoencoderTraining, mean: float, deviation: float) -> Any:
    """Return diffusers' class, as in Tango, but narrow, and without attention in the middle.

    The first and the last convolution begin as if the spectrogram was standardised.
    """
    levels = len(config.widths)
    vae = AutoencoderKL(
        in_channels=1,
        out_channels=1,
        latent_channels=config.latent_channels,
        block_out_channels=config.widths,
        layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        norm_num_groups=8,
        mid_block_add_attention=False,
        sample_size=256,
        scaling_factor=1.0,
    )
    first, last = vae.encoder.conv_in, vae.decoder.conv_out
    with torch.no_grad():
        first.weight /= deviation
        first.bias -= mean * first.weight.sum((1, 2, 3))
        last.weight *= deviation
        last.bias.fill_(mean)
    return vae


def crops(mels: Mels, positions: Positions, config: AutoencoderTraining) -> Tensor:
    """Return a random crop [B, 1, T, M] of a random spectrogram for each position, at a random gain.

    A gain of a factor g adds ln g to log magnitudes.
    """
    found = []
    for position in positions.tolist():
        rng = np.random.default_rng([config.loop.seed, position])
        mel_TM = mels[rng.integers(len(mels))]
        start = rng.integers(max(1, len(mel_TM) - config.crop + 1))
        shift = rng.uniform(*config.gain) / 20 * np.log(10)
        found.append(mel_TM[start : start + config.crop].astype(np.float32) + np.float32(shift))
    return torch.from_numpy(np.stack(found))[:, None]


def train_autoencoder(
    mels: Mels, config: AutoencoderTraining, folder: Path, *, title: str = "autoencoder"
) -> Any:
    """Train an autoencoder on the spectrograms `mels`; resumable. Returns it with standardised latents."""
    torch.manual_seed(config.loop.seed)
    sample = mels[:: math.ceil(len(mels) / SAMPLE)].astype(np.float32)
    module = AdversarialAutoencoder(config, float(sample.mean()), float(sample.std()))
    accelerator = make_accelerator(config.loop)
    device = accelerator.device
    first = int(config.alone * config.loop.steps)

    def loss_of(wrapped: nn.Module, positions: Positions) -> tuple[Tensor, dict[str, Tensor]]:
        step = int(positions[0]) // config.loop.batch
        mel_B1TM = crops(mels, positions, config).to(device)
        loss: tuple[Tensor, dict[str, Tensor]] = wrapped(mel_B1TM, adversarial=step >= first)
        return loss

    loop = config.loop
    groups: list[dict[str, Any]] = [
        {"params": list(module.autoencoder.parameters())},
        {"params": list(module.discriminator.parameters()), "lr": config.discriminator_rate},
    ]
    optimiser = torch.optim.AdamW(
        groups, lr=loop.learning_rate, betas=loop.betas, weight_decay=loop.weight_decay
    )
    fit(module, optimiser, loss_of, loop, folder, accelerator=accelerator, title=title)
    vae = module.autoencoder.cpu().float().eval().requires_grad_(False)
    standardise_latents(vae, torch.from_numpy(sample)[:, None])
    return vae
