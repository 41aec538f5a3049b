"""Griffin-Lim gives back a sound with the spectrogram that it was given.

Shape legend: B batch, T mel frames, M mel bins, N samples.
"""

from pathlib import Path

import torch
from torch import Tensor

from services.models.mel import LogMel
from services.models.vocoder import GriffinLimVocoder


def sounds(samples: int = 20_480) -> Tensor:
    """A wavering tone, a row of noise bursts and a bell: [3, samples]."""
    generator = torch.Generator().manual_seed(0)
    t = torch.arange(samples) / 16_000
    tone = 0.3 * torch.sin(2 * torch.pi * (600 * t + 16 * torch.sin(9 * t)))
    bursts = 0.4 * torch.randn(samples, generator=generator) * torch.exp(-12 * ((4 * t) % 1))
    partials = [
        torch.sin(2 * torch.pi * f * t) * torch.exp(-k * t) for f, k in ((880, 3), (1890, 5), (3200, 7))
    ]
    bell = 0.15 * torch.stack(partials).sum(0)
    return torch.stack([tone, bursts, bell]) + 0.001 * torch.randn(3, samples, generator=generator)


def spectrograms() -> Tensor:
    return LogMel()(sounds())[:, :128]


def test_resynthesis_keeps_the_spectrogram() -> None:
    mel_BTM = spectrograms()
    waveform_BN = GriffinLimVocoder()(mel_BTM)
    assert waveform_BN.shape == (3, 128 * 160) and waveform_BN.dtype == torch.float32
    found_BTM = LogMel()(waveform_BN)[:, :128]
    assert float((found_BTM - mel_BTM).abs().mean()) < 0.3
    difference_B = (found_BTM.exp() - mel_BTM.exp()).norm(dim=(1, 2)) / mel_BTM.exp().norm(dim=(1, 2))
    assert float(difference_B.max()) < 0.15


def test_loudness_is_kept() -> None:
    waveform_BN = GriffinLimVocoder()(spectrograms())
    ratio = waveform_BN.std(1) / sounds().std(1)
    assert float((ratio - 1).abs().max()) < 0.15


def test_one_spectrogram_gives_one_waveform() -> None:
    vocoder, mel_BTM = GriffinLimVocoder(iterations=4), spectrograms()
    torch.manual_seed(1)
    first = vocoder(mel_BTM)
    torch.manual_seed(2)
    assert torch.equal(vocoder(mel_BTM), first)
    assert float((vocoder(mel_BTM[1:2]) - first[1:2]).abs().max()) < 1e-4


def test_silence_and_short_clips() -> None:
    vocoder = GriffinLimVocoder(iterations=4)
    assert vocoder(torch.full((1, 1, 64), -11.5)).shape == (1, 160)
    silence = vocoder(torch.full((1, 8, 64), -11.5))
    assert bool(silence.isfinite().all()) and float(silence.abs().max()) < 1e-3


def test_folder_round_trip(tmp_path: Path) -> None:
    vocoder = GriffinLimVocoder(iterations=3, momentum=0.5)
    vocoder.save_pretrained(tmp_path / "vocoder")
    again = GriffinLimVocoder.from_pretrained(tmp_path / "vocoder")
    assert (again.config.iterations, again.config.momentum) == (3, 0.5)
    mel_BTM = spectrograms()[:1, :16]
    assert torch.equal(again(mel_BTM), vocoder(mel_BTM))


def test_half_precision_input_is_taken() -> None:
    assert GriffinLimVocoder(iterations=1)(spectrograms().bfloat16()).dtype == torch.float32
