"""Encode samples to bytes and decode them, in every encoding of the wire. Shapes: N samples.

Imports neither torch nor scipy, so that the client can decode clips.
"""

import io
from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

import numpy as np
import soundfile
from numpy.typing import NDArray

from services.audio.resampling import resample
from services.errors import invalid

Waveform = NDArray[np.float32]

ENCODINGS: Final = ("wav", "flac", "ogg", "mp3", "opus", "linear16", "float32")
"""Names of the encodings; the first is the default. ``ogg`` is Vorbis, ``opus`` is Opus in an OGG file."""

ENCODING_RATES: Final[Mapping[str, tuple[int, ...]]] = MappingProxyType(
    {
        "mp3": (8_000, 11_025, 12_000, 16_000, 22_050, 24_000, 32_000, 44_100, 48_000),
        "opus": (8_000, 12_000, 16_000, 24_000, 48_000),
    }
)
"""Sampling rates in hertz of the encodings that don't hold every rate."""

DEFAULT_ENCODING = "wav"
MIN_SAMPLING_RATE = 8_000
MAX_SAMPLING_RATE = 48_000
"""Bounds of a clip's sampling rate in hertz: telephone to studio. Vorbis and FLAC hold all of them."""

_FILES: Final = {
    "wav": ("WAV", "PCM_16"),
    "flac": ("FLAC", "PCM_16"),
    "ogg": ("OGG", "VORBIS"),
    "mp3": ("MP3", "MPEG_LAYER_III"),
    "opus": ("OGG", "OPUS"),
}
"""libsndfile's format and subtype of the encodings that are files."""

# Vorbis' encoder (libsndfile) needs its input in blocks: 10 s at once overflow its stack.
_BLOCK = 4096


def rate_fault(encoding: str, sampling_rate: int) -> str | None:
    """Return why an encoding can't hold a sampling rate, and the remedy; None if it can."""
    rates = ENCODING_RATES.get(encoding)
    if rates is None or sampling_rate in rates:
        return None
    return (
        f"is {sampling_rate} hertz, which {encoding} can't hold, must be one of {', '.join(map(str, rates))}"
    )


def encode_audio(
    waveform_N: Waveform, sampling_rate: int, encoding: str = DEFAULT_ENCODING, target_rate: int | None = None
) -> bytes:
    """Encode mono float samples.

    Args:
        waveform_N: samples; those outside [-1, 1] are clipped.
        sampling_rate: of `waveform_N`, in hertz.
        encoding: one of `ENCODINGS`.
        target_rate: rate to resample to, in hertz, without a `rate_fault`; None keeps `sampling_rate`.

    Raises:
        ValueError: samples are not one-dimensional or not finite: a fault of the model, never of the caller.
    """
    if waveform_N.ndim != 1 or not np.isfinite(waveform_N).all():
        raise ValueError(f"expected finite mono samples, got shape {waveform_N.shape}")
    rate = target_rate or sampling_rate
    clipped_N = np.clip(resample(waveform_N, sampling_rate, rate), -1.0, 1.0)
    if encoding == "float32":
        return clipped_N.astype("<f4", copy=False).tobytes()
    pcm_N = np.rint(clipped_N * 32767.0).astype("<i2")
    if encoding == "linear16":
        return bytes(pcm_N.tobytes())
    kind, subtype = _FILES[encoding]
    samples_N = pcm_N if subtype == "PCM_16" else clipped_N
    buffer = io.BytesIO()
    with soundfile.SoundFile(buffer, "w", rate, channels=1, format=kind, subtype=subtype) as file:
        for start in range(0, len(samples_N), _BLOCK):
            file.write(samples_N[start : start + _BLOCK])
    return buffer.getvalue()


def decode_audio(audio: bytes, encoding: str, sampling_rate: int) -> tuple[Waveform, int]:
    """Return ([N] samples in [-1, 1], sampling rate in hertz) of mono sound that `encode_audio` made.

    Raises `InvalidInputError` if it is damaged.
    """
    if encoding == "float32":
        return np.frombuffer(audio, dtype="<f4").astype(np.float32), sampling_rate
    if encoding == "linear16":
        return (np.frombuffer(audio, dtype="<i2") / np.float32(32767)).astype(np.float32), sampling_rate
    try:
        waveform_N, rate = soundfile.read(io.BytesIO(audio), dtype="float32")
    except soundfile.SoundFileError as error:  # whose own text begins with the object that was read
        reason = str(getattr(error, "error_string", error)).strip()
        raise invalid("audio", f"can't be decoded as {encoding}, it is damaged: {reason}") from error
    return waveform_N, rate
