"""Train the mini captioner's audio encoder: an EAT at a fraction of the size, by detecting events.

    python -m training.mini.captioner_encoder --work build/mini

EAT-base starts from self-supervision and AudioSet's labels; this encoder starts from the events of the sound
world, time step by time step. The linear head is dropped afterwards.

Shape legend: B batch, N samples, T mel frames, M mel bins, P patches, S time steps of 16 frames, K classes.
"""

from dataclasses import replace

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from services.models.captioner.config import PATCH, CaptionerConfig
from services.models.captioner.eat import EatConfig, EatEncoder
from services.models.captioner.filterbank import FRAME_SHIFT, FilterBank
from services.models.captioner.model import fit_frames
from training.loop.fit import LoopConfig
from training.mini.captioner_clips import Sound, load_sounds, scene_sound
from training.mini.parts import part_arguments, train_part
from training.soundworld.synthesis import CLASSES, SAMPLING_RATE

SEED = 1_111
BATCH, LONG_BATCH, LONG_EVERY = 16, 8, 3
"""Clips of a step. Every `LONG_EVERY` steps they have the captioner's length, and are fewer: every other one
is of 5.12 s, and the rest is padded. Between, they are as short as a clip of 2.56 s is, to save time."""
BLOCK, PASSES = 1_024, 4
"""So many scenes are used so many times, at other levels, before the next: rendering them costs as much."""
LOOP = LoopConfig(steps=2_500, batch=BATCH, learning_rate=1.5e-3, warmup=150, decay=0.3, ema=0.995)
ENCODER = EatConfig(width=96, depth=4, heads=4, max_steps=32)
CAPTIONER = CaptionerConfig(frames=512, projector_width=256, beams=(2, 4), max_new_tokens=32)
"""It reads 5.12 s."""
STEP_SECONDS = PATCH * FRAME_SHIFT / SAMPLING_RATE
CACHED = 0.35
"""Share of the clips of 2.56 s that went through autoencoder and vocoder."""


class Detector(nn.Module):
    """The encoder with a linear head over the mel bands of a time step."""

    def __init__(self, encoder: EatEncoder) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(encoder.config.width * encoder.config.bands, len(CLASSES))

    def forward(self, mels_BTM: Tensor) -> Tensor:
        """Return logits [B, S, K]."""
        return self.logits(self.encoder(mels_BTM))

    def logits(self, tokens_BLD: Tensor) -> Tensor:
        """Return logits [B, S, K] of the encoder's tokens."""
        bands_BSF = tokens_BLD[:, 1:].unflatten(1, (-1, self.encoder.config.bands)).flatten(2)
        logits_BSK: Tensor = self.head(bands_BSF)
        return logits_BSK


def draw_sounds(step: int, seed: int, cached: list[Sound]) -> list[Sound]:
    """Return the clips of a step, at random levels over noise."""
    rng = np.random.default_rng([seed, step])
    full = step % LONG_EVERY == 0
    sounds = []
    for number in range(LONG_BATCH if full else BATCH):
        long = full and number % 2 == 0
        if cached and not long and rng.uniform() < CACHED:
            sound = cached[int(rng.integers(len(cached)))]
        else:
            block = step * BATCH // (BLOCK * PASSES)
            sound = scene_sound(seed, block * BLOCK + int(rng.integers(BLOCK)), long=long)
        sounds.append(at_level(sound, rng))
    return sounds


def at_level(sound: Sound, rng: np.random.Generator) -> Sound:
    """Return a clip at a random level over random noise."""
    gain, floor = 10 ** (rng.uniform(-8, 4) / 20), 10 ** (rng.uniform(-80, -55) / 20)
    noisy_N = sound.waveform_N * gain + rng.standard_normal(sound.waveform_N.size) * floor
    return replace(sound, waveform_N=noisy_N.astype(np.float32))


def targets(sounds: list[Sound], steps: int) -> Tensor:
    """Return which class sounds in which step, float32 [B, S, K]; NaN for clips of unknown times."""
    centres_S = (np.arange(steps) + 0.5) * STEP_SECONDS
    truth_BSK = np.zeros((len(sounds), steps, len(CLASSES)), dtype=np.float32)
    for row_SK, sound in zip(truth_BSK, sounds, strict=True):
        if not sound.events:
            row_SK[:] = np.nan
        for event in sound.events:
            sounding_S = (centres_S >= event.onset) & (centres_S < event.offset)
            row_SK[sounding_S, CLASSES.index(event.event_class)] = 1
    return torch.from_numpy(truth_BSK)


def detection_loss(logits_BSK: Tensor, truth_BSK: Tensor) -> Tensor:
    """Return the binary cross-entropy over the clips whose times are known."""
    known_B = ~truth_BSK.isnan().flatten(1).any(1)
    return nn.functional.binary_cross_entropy_with_logits(logits_BSK[known_B].float(), truth_BSK[known_B])


def mel_frames(sounds: list[Sound], filterbank: FilterBank) -> Tensor:
    """Return normalised mels [B, T, M] of the captioner's length, or shorter if all clips are short."""
    mels = [filterbank(torch.from_numpy(sound.waveform_N)) for sound in sounds]
    short = max(map(len, mels)) <= CAPTIONER.frames // 2
    return torch.stack([fit_frames(mel_TM, CAPTIONER, fixed=not short) for mel_TM in mels])


@torch.no_grad()
def accuracy(detector: Detector, filterbank: FilterBank, clips: int = 200) -> float:
    """Return the share of held-out scenes whose events are detected, and no others."""
    right = 0
    for index in range(clips):
        sound = scene_sound(SEED + 1, index, long=False)
        found_K = (detector(mel_frames([sound], filterbank))[0] > 0).any(0)
        right += {CLASSES[k] for k in found_K.nonzero()[:, 0].tolist()} == set(sound.truth.classes)
    return right / clips


def main() -> None:
    arguments = part_arguments(__doc__, LOOP.steps)
    torch.manual_seed(SEED)
    detector, filterbank, cached = (
        Detector(EatEncoder(ENCODER)),
        FilterBank(),
        load_sounds(arguments.work / "captioner" / "clips", "rebuilt"),
    )

    def loss_at(step: int) -> tuple[Tensor, dict[str, float]]:
        sounds = draw_sounds(step, SEED, cached)
        logits_BSK = detector(mel_frames(sounds, filterbank))
        return detection_loss(logits_BSK, targets(sounds, logits_BSK.shape[1])), {}

    folder = arguments.work / "captioner" / "encoder"
    train_part(detector, loss_at, replace(LOOP, steps=arguments.steps), folder, title="captioner's encoder")
    detector.eval()
    print(f"held-out scenes whose events were detected exactly: {accuracy(detector, filterbank):.3f}")
    save_file(detector.state_dict(), folder / "detector.safetensors")


if __name__ == "__main__":
    main()
