"""Compute the spectrograms that an autoencoder learns from once, and keep them in shards.

Shape legend: N clips, T mel frames, M mel bins.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Final

import numpy as np
import torch

from services.audio.resampling import resample
from services.errors import OutputError
from services.models.hifigan import VocoderMel
from services.models.mel import LogMel, mel_frames
from training.data.examples import Clip
from training.loop.progress import progress
from training.pretraining.autoencoder import Mels

SHARD: Final = 256
"""Clips per file: at most so many are read again after a kill."""


def log_mel_of(mel: VocoderMel) -> LogMel:
    """Return the spectrogram that a vocoder reads."""
    return LogMel(
        sampling_rate=mel.sampling_rate,
        hop_length=mel.hop_length,
        mel_bins=mel.mel_bins,
        maximum_hertz=mel.maximum_hertz,
    )


def cache_spectrograms(clips: Sequence[Clip], mel: VocoderMel, samples: int, folder: Path) -> Mels:
    """Return the log-mel spectrograms [N, T, M] of the first `samples` samples of each clip, float16.

    Shards that are in `folder` are not computed again: it must belong to these clips. Raises `OutputError`;
    OSError or ValueError if a clip can't be read.
    """
    log_mel, parts = log_mel_of(mel), []
    with progress(total=len(clips), desc="spectrograms", unit="clip") as bar:
        for first in range(0, len(clips), SHARD):
            shard = clips[first : first + SHARD]
            path = folder / f"{first // SHARD:04d}.npy"
            if not path.exists():
                found = np.concatenate([_spectrogram(clip, log_mel, mel, samples) for clip in shard])
                _write(path, found)
            parts.append(np.load(path))
            bar.update(len(shard))
    return np.concatenate(parts)


def _spectrogram(clip: Clip, log_mel: LogMel, mel: VocoderMel, samples: int) -> Mels:
    waveform, rate = clip.read()
    mono_N = waveform.mean(axis=0) if waveform.ndim == 2 else waveform
    mono_N = resample(np.asarray(mono_N, dtype=np.float32), rate, mel.sampling_rate)[:samples]
    padded_N = np.pad(mono_N, (0, samples - len(mono_N)))
    with torch.no_grad():
        found: Mels = mel_frames(torch.from_numpy(padded_N)[None], log_mel)[:, 0].half().numpy()
    return found


def _write(path: Path, content: Mels) -> None:
    temporary = path.with_suffix(".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            np.save(file, content)
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OutputError(
            f"{path} can't be written: {error.strerror}; make room, or write elsewhere"
        ) from error
