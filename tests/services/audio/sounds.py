"""Sounds as bytes, good ones and bad ones."""

import functools
import io
import struct
from typing import Any

import numpy as np
import soundfile
from numpy.typing import NDArray

from milonga.v1 import audio_pb2

RATE = 16_000


def tone(
    seconds: float = 1.0, rate: int = RATE, hertz: float = 440.0, channels: int = 1
) -> NDArray[np.float32]:
    """[N], or [N, channels], each channel an octave above the one before."""
    times_N = np.arange(round(seconds * rate)) / rate
    octaves_C = hertz * 2.0 ** np.arange(channels)
    samples_NC = (0.3 * np.sin(2 * np.pi * times_N[:, None] * octaves_C)).astype(np.float32)
    return samples_NC[:, 0] if channels == 1 else samples_NC


def antiphase(seconds: float = 1.0) -> NDArray[np.float32]:
    """[N, 2] whose mono mix is silence."""
    return tone(seconds)[:, None] * np.array([1.0, -1.0], np.float32)


def file_of(samples: NDArray[Any], rate: int = RATE, kind: str = "WAV", subtype: str = "PCM_16") -> bytes:
    """A sound file of [N] or [N, channels]."""
    buffer = io.BytesIO()
    channels = 1 if samples.ndim == 1 else samples.shape[1]
    with soundfile.SoundFile(buffer, "w", rate, channels=channels, format=kind, subtype=subtype) as file:
        for start in range(0, len(samples), 4096):  # Vorbis' encoder needs blocks
            file.write(samples[start : start + 4096])
    return buffer.getvalue()


@functools.cache
def silent_flac(hours: float, rate: int = 8_000) -> bytes:
    """Hours of silence, mono, fifteen bytes for each eight seconds. An encoder takes long for a day."""
    block = 65_535
    count = round(hours * 3600 * rate)
    stream_info = (
        struct.pack(">HH", block, block)
        + bytes(6)  # frame sizes: not known
        + (rate << 44 | (16 - 1) << 36 | count).to_bytes(8, "big")
        + bytes(16)  # no MD5
    )
    frames = (_silent_frame(n, min(block, count - n * block)) for n in range(-(-count // block)))
    return b"fLaC\x80" + len(stream_info).to_bytes(3, "big") + stream_info + b"".join(frames)


def _silent_frame(number: int, size: int) -> bytes:
    # Size in 16 bits, rate of the stream, mono, 16 bits a sample; the number as UTF-8 writes one.
    header = b"\xff\xf8\x70\x08" + chr(number).encode("utf-8", "surrogatepass") + struct.pack(">H", size - 1)
    header += _crc(header, 8, 0x07)
    frame = header + bytes(3)  # a constant: 0
    return frame + _crc(frame, 16, 0x8005)


def _crc(data: bytes, bits: int, polynomial: int) -> bytes:
    register = 0
    for byte in data:
        register ^= byte << (bits - 8)
        for _ in range(8):
            register = register << 1 ^ (polynomial if register >> (bits - 1) else 0)
            register &= (1 << bits) - 1
    return register.to_bytes(bits // 8, "big")


def with_flac_length(flac: bytes, frames: int) -> bytes:
    """A FLAC file that says that it has so many samples; 0: that it does not know."""
    low = 21  # of STREAMINFO's 36 bits of length the first four share their byte
    return (
        flac[:low]
        + bytes([flac[low] & 0xF0 | frames >> 32])
        + (frames & 0xFFFF_FFFF).to_bytes(4, "big")
        + flac[low + 5 :]
    )


def with_wav_length(wav: bytes, size: int) -> bytes:
    """A WAV file whose `data` chunk says that it has so many bytes."""
    place = wav.index(b"data") + 4
    return wav[:place] + size.to_bytes(4, "little") + wav[place + 4 :]


def float32(samples: NDArray[np.float32], rate: int = RATE, **fields: Any) -> audio_pb2.Clip:
    """A clip of bare samples."""
    return audio_pb2.Clip(
        audio=samples.astype("<f4").tobytes(),
        encoding=audio_pb2.AUDIO_ENCODING_FLOAT32,
        sample_rate_hertz=rate,
        channel_count=1 if samples.ndim == 1 else samples.shape[1],
        **fields,
    )
