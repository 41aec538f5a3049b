"""Train the mini autoencoder: log-mel spectrograms to latents an eighth as long and as high.

    python -m training.mini.autoencoder --work build/mini

Shape legend: B batch, T mel frames, M mel bins, C latent channels.
"""

import math
from dataclasses import replace

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor

from services.models.mel import LogMel
from training.loop.fit import LoopConfig
from training.mini.parts import part_arguments, train_part
from training.soundworld.scenes import SceneConfig, make_scene

SEED = 101
CROP = 128
"""Mel frames of a training crop; the autoencoder is convolutional and sees any length when it serves."""
BATCH = 8
SCENES = SceneConfig(single=0.35, sequence=0.35)
LOOP = LoopConfig(
    steps=3_600, batch=BATCH, learning_rate=2e-3, warmup=100, weight_decay=1e-4, ema=0.998, decay=0.4
)
KL_WEIGHT = 1e-3


def build() -> AutoencoderKL:
    """Diffusers' class, as in Tango, but narrow, f8, 16 latent channels, no attention in the middle."""
    return AutoencoderKL(
        in_channels=1,
        out_channels=1,
        latent_channels=16,
        block_out_channels=(16, 32, 64, 64),
        layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=8,
        mid_block_add_attention=False,
        sample_size=256,
    )


def mel_batch(step: int, log_mel: LogMel) -> Tensor:
    """Random crops [B, 1, CROP, M] of fresh scenes; their levels vary by 6 dB more than the world's."""
    rng = np.random.default_rng([SEED, step])
    scenes = [make_scene(SEED, step * BATCH + i, SCENES) for i in range(BATCH)]
    gain = torch.from_numpy(10 ** (rng.uniform(-6, 2, (BATCH, 1)) / 20)).float()
    mel_BTM = log_mel(torch.from_numpy(np.stack([s.waveform for s in scenes])) * gain)
    starts = rng.integers(0, mel_BTM.shape[1] - CROP, BATCH)
    return torch.stack([m[s : s + CROP] for m, s in zip(mel_BTM, starts, strict=True)])[:, None]


def standardise_latents(vae: AutoencoderKL, mel_B1TM: Tensor) -> None:
    """Fold each latent channel's mean and deviation into the 1x1 convolutions, so that latents are
    zero-mean and unit-variance channel by channel and `scaling_factor` is 1."""
    with torch.no_grad():
        mean_BCTF = torch.cat([vae.encode(part).latent_dist.mean for part in mel_B1TM.split(16)])
        shift_C, scale_C = mean_BCTF.mean((0, 2, 3)), mean_BCTF.std((0, 2, 3))
        channels = len(shift_C)
        quant, post = vae.quant_conv, vae.post_quant_conv
        quant.weight[:channels] /= scale_C[:, None, None, None]
        quant.bias[:channels] = (quant.bias[:channels] - shift_C) / scale_C
        quant.bias[channels:] -= 2 * scale_C.log()
        post.bias += (post.weight[:, :, 0, 0] * shift_C[None]).sum(1)
        post.weight *= scale_C[None, :, None, None]
    vae.register_to_config(scaling_factor=1.0)


def turn_down(vae: AutoencoderKL, gain: float) -> None:
    """Let the autoencoder read and write clips whose amplitude is `gain` times that of its training.

    Log-mel magnitudes move by ln(gain). Latents stay as they are, except at the edges, where padding counts.
    """
    shift = math.log(gain)
    with torch.no_grad():
        first, last = vae.encoder.conv_in, vae.decoder.conv_out
        first.bias -= shift * first.weight.sum((1, 2, 3))
        last.bias += shift


def main() -> None:
    arguments = part_arguments(__doc__, LOOP.steps)
    torch.manual_seed(SEED)
    log_mel, vae = LogMel(), build()
    with torch.no_grad():
        vae.decoder.conv_out.bias.fill_(mel_batch(0, log_mel).mean())

    def loss_at(step: int) -> tuple[Tensor, dict[str, float]]:
        mel_B1TM = mel_batch(step, log_mel)
        with torch.autocast("cpu", torch.bfloat16):
            posterior = vae.encode(mel_B1TM).latent_dist
            decoded = vae.decode(posterior.sample()).sample
        error = decoded.float() - mel_B1TM
        l1, l2 = error.abs().mean(), error.square().mean()
        kl = (posterior.kl().float() / posterior.mean[0].numel()).mean()
        return l1 + 0.3 * l2 + KL_WEIGHT * kl, {"l1": l1.item(), "kl": kl.item()}

    folder = arguments.work / "autoencoder"
    train_part(vae, loss_at, replace(LOOP, steps=arguments.steps), folder, title="autoencoder")
    vae.eval()
    held_out = torch.cat([mel_batch(10_000_000 + i, log_mel) for i in range(16)])
    standardise_latents(vae, held_out)
    with torch.no_grad():
        latents = vae.encode(held_out).latent_dist.mean
        l1 = (vae.decode(latents).sample - held_out).abs().mean()
    print(f"held-out log-mel L1 {l1:.3f} (data std {held_out.std():.2f}); latent std {latents.std():.3f}")
    vae.save_pretrained(folder / "final", safe_serialization=True)


if __name__ == "__main__":
    main()
