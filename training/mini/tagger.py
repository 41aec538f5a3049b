"""Train the mini event tagger, the independent judge, which no training stage may use.

    python -m training.mini.tagger --work build/mini

Clips are scenes of the sound world with their true onsets and offsets, at random levels over random noise.
"""

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from services.models.mini.tagger import TIME_STRIDE, EventTagger
from training.loop.fit import LoopConfig
from training.mini.parts import part_arguments, train_part
from training.soundworld.scenes import Scene, SceneConfig, make_scene
from training.soundworld.synthesis import CLASSES

SEED = 303
BATCH = 16
LOOP = LoopConfig(steps=2_000, batch=BATCH, learning_rate=2e-3, warmup=100, decay=0.25, ema=0.995)
SCENES = SceneConfig(single=0.15, sequence=0.45)


def targets(scene: Scene, segments: int, segment_seconds: float) -> Tensor:
    """Return which class sounds in which segment: float32 [S, K]."""
    centres = (np.arange(segments) + 0.5) * segment_seconds
    truth = np.zeros((segments, len(CLASSES)), dtype=np.float32)
    for event in scene.events:
        truth[(centres >= event.onset) & (centres < event.offset), CLASSES.index(event.event_class)] = 1
    return torch.from_numpy(truth)


def batch(step: int, tagger: EventTagger) -> tuple[Tensor, Tensor]:
    """Waveforms [B, N] at random levels over noise, and targets [B, S, K]."""
    rng = np.random.default_rng([SEED, step])
    scenes = [make_scene(SEED, step * BATCH + i, SCENES) for i in range(BATCH)]
    gain = 10 ** (rng.uniform(-8, 3, (BATCH, 1)) / 20)
    noise = rng.standard_normal((BATCH, scenes[0].waveform.size)) * 10 ** (
        rng.uniform(-75, -50, (BATCH, 1)) / 20
    )
    waveform = torch.from_numpy(np.stack([s.waveform for s in scenes]) * gain + noise).float()
    segments = (waveform.shape[1] // tagger.config.hop_length + 1) // TIME_STRIDE
    return waveform, torch.stack([targets(s, segments, tagger.segment_seconds) for s in scenes])


def main() -> None:
    arguments = part_arguments(__doc__, LOOP.steps)
    torch.manual_seed(SEED)
    tagger = EventTagger(classes=list(CLASSES))

    def loss_at(step: int) -> tuple[Tensor, dict[str, float]]:
        waveform, truth = batch(step, tagger)
        return nn.functional.binary_cross_entropy_with_logits(tagger(waveform), truth), {}

    folder = arguments.work / "tagger"
    train_part(tagger, loss_at, replace(LOOP, steps=arguments.steps), folder, title="tagger")
    tagger.eval()
    right = total = 0
    for index in range(400):
        scene = make_scene(SEED + 1, index, replace(SCENES, split="validation"))
        found = tagger.detect(torch.from_numpy(scene.waveform)[None])[0]
        right += set(found) == set(scene.truth.classes)
        total += 1
    print(f"held-out clips whose classes were detected exactly: {right / total:.4f}")
    tagger.save_pretrained(folder / "final", safe_serialization=True)


if __name__ == "__main__":
    main()
