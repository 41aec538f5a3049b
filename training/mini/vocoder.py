"""Train a neural vocoder for the mini family, and compare it with Griffin-Lim.

    python -m training.mini.vocoder --work build/mini --steps 8000

SpeechT5HifiGan, Tango's vocoder class, without a discriminator: its loss is the distance of spectra at
several resolutions. The comparison at the end (log-mel error after re-synthesis, the tagger's detections)
decides which of the two ships; the model card names it.

Shape legend: B batch, N samples, T mel frames, M mel bins.
"""

import json
import time
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn
from transformers import SpeechT5HifiGan, SpeechT5HifiGanConfig

from services.models.mel import LogMel, mel_frames
from services.models.mini.tagger import EventTagger
from services.models.vocoder import GriffinLimVocoder
from training.loop.fit import LoopConfig
from training.mini.parts import part_arguments, train_part
from training.soundworld.scenes import SceneConfig, make_scene

SEED = 707
BATCH = 8
FRAMES = 64
"""Mel frames of a training crop."""
RESOLUTIONS = ((256, 64), (512, 128), (1024, 256))
"""Window and hop in samples of the loss's spectra."""
LOOP = LoopConfig(
    steps=8_000, batch=BATCH, learning_rate=1e-3, warmup=100, ema=0.998, weight_decay=0.0, decay=0.4
)


def build() -> SpeechT5HifiGan:
    """Tango's vocoder, 96 channels wide: 64 mel bins, hop 160 = 5 x 4 x 4 x 2."""
    return SpeechT5HifiGan(
        SpeechT5HifiGanConfig(
            model_in_dim=64,
            sampling_rate=16_000,
            upsample_initial_channel=96,
            upsample_rates=[5, 4, 4, 2],
            upsample_kernel_sizes=[11, 8, 8, 4],
            resblock_kernel_sizes=[3, 7],
            resblock_dilation_sizes=[[1, 3, 5], [1, 3, 5]],
            normalize_before=False,
        )
    )


def spectral_distance(made_BN: Tensor, true_BN: Tensor) -> Tensor:
    """Spectral convergence plus log-magnitude error, averaged over RESOLUTIONS (arXiv 1910.11480)."""
    total = torch.zeros(())
    for window, hop in RESOLUTIONS:
        hann = torch.hann_window(window)
        made, true = (
            torch.stft(x, window, hop, window=hann, return_complex=True).abs().clamp(min=1e-5)
            for x in (made_BN, true_BN)
        )
        convergence = (true - made).square().sum((1, 2)).sqrt() / true.square().sum((1, 2)).sqrt().clamp(
            min=1e-2
        )
        total = total + convergence.mean() + (true.log() - made.log()).abs().mean()
    return total / len(RESOLUTIONS)


def crops(step: int, log_mel: LogMel) -> tuple[Tensor, Tensor]:
    """Return log-mel crops [B, FRAMES, M] of fresh scenes and their samples [B, FRAMES * hop]."""
    rng = np.random.default_rng([SEED, step])
    config = SceneConfig(single=0.4, sequence=0.4)
    waveforms = np.stack([make_scene(SEED, step * BATCH + i, config).waveform for i in range(BATCH)])
    waveform = torch.from_numpy(waveforms)
    mel_BTM = mel_frames(waveform, log_mel)[:, 0]
    starts = rng.integers(0, mel_BTM.shape[1] - FRAMES, BATCH).tolist()
    hop = log_mel.hop_length
    mels = torch.stack([m[s : s + FRAMES] for m, s in zip(mel_BTM, starts, strict=True)])
    samples = [w[s * hop : (s + FRAMES) * hop] for w, s in zip(waveform, starts, strict=True)]
    return mels, torch.stack(samples)


@torch.no_grad()
def compare(vocoder: nn.Module, tagger: EventTagger, clips: int = 200) -> dict[str, float]:
    """Re-synthesise held-out clips: log-mel L1, share that the tagger detects right, CPU seconds per clip."""
    log_mel, errors, right = LogMel(), [], 0
    config, seconds = SceneConfig(split="validation"), 0.0
    for index in range(clips):
        scene = make_scene(SEED, index, config)
        mel_BTM = mel_frames(torch.from_numpy(scene.waveform)[None], log_mel)[:, 0]
        began = time.process_time()
        waveform = vocoder(mel_BTM)
        seconds += time.process_time() - began
        errors.append(float((mel_frames(waveform, log_mel)[:, 0] - mel_BTM).abs().mean()))
        right += set(tagger.detect(waveform)[0]) == set(scene.truth.classes)
    return {"log_mel_l1": float(np.mean(errors)), "heard": right / clips, "cpu_seconds": seconds / clips}


def main() -> None:
    arguments = part_arguments(__doc__, LOOP.steps)
    torch.manual_seed(SEED)
    log_mel, vocoder = LogMel(), build()

    def loss_at(step: int) -> tuple[Tensor, dict[str, float]]:
        mel_BTM, true_BN = crops(step, log_mel)
        with torch.autocast("cpu", torch.bfloat16):
            made_BN = vocoder(mel_BTM)
        return spectral_distance(made_BN.float(), true_BN), {}

    folder = arguments.work / "vocoder"
    train_part(vocoder, loss_at, replace(LOOP, steps=arguments.steps), folder, title="vocoder")
    vocoder.eval().save_pretrained(folder / "final", safe_serialization=True)
    tagger = EventTagger.from_pretrained(arguments.work / "tagger" / "final").eval()
    report = {"neural": compare(vocoder, tagger), "griffin-lim": compare(GriffinLimVocoder(), tagger)}
    (folder / "comparison.json").write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
