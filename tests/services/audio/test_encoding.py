import io

import numpy as np
import pytest
import soundfile

from milonga.v1 import audio_pb2
from services.audio.encoding import ENCODING_RATES, ENCODINGS, decode_audio, encode_audio, rate_fault
from services.audio.resampling import resample
from services.wire import encoding_name

LOSSY = {"ogg": 20, "mp3": 20, "opus": 15}
"""Least signal-to-noise ratio of a tone in decibels, by lossy encoding."""


def _tone(seconds: float = 0.64, rate: int = 16_000) -> np.ndarray:
    time_N = np.arange(round(seconds * rate)) / rate
    return (0.5 * np.sin(2 * np.pi * 440 * time_N)).astype(np.float32)


@pytest.mark.parametrize(
    ("encoding", "target_rate"),
    [
        (encoding, rate)
        for encoding in ENCODINGS
        for rate in ENCODING_RATES.get(encoding, (8_000, 16_000, 44_100, 48_000))
    ],
)
def test_every_encoding_at_every_rate_decodes_back(encoding: str, target_rate: int) -> None:
    assert rate_fault(encoding, target_rate) is None
    tone_N = _tone()
    encoded = encode_audio(tone_N, 16_000, encoding, target_rate)
    decoded_N, rate = decode_audio(encoded, encoding, target_rate)
    assert rate == target_rate
    assert decoded_N.dtype == np.float32
    assert len(decoded_N) == round(len(tone_N) * target_rate / 16_000)
    expected_N = _tone(rate=target_rate)
    middle = slice(len(expected_N) // 4, -len(expected_N) // 4)
    noise = float(np.mean((decoded_N - expected_N)[middle] ** 2)) + 1e-12
    assert 10 * np.log10(np.mean(expected_N[middle] ** 2) / noise) > LOSSY.get(encoding, 50)


@pytest.mark.parametrize(
    ("encoding", "kind", "subtype"),
    [
        ("wav", "WAV", "PCM_16"),
        ("flac", "FLAC", "PCM_16"),
        ("ogg", "OGG", "VORBIS"),
        ("mp3", "MP3", "MPEG_LAYER_III"),
        ("opus", "OGG", "OPUS"),
    ],
)
def test_files_say_what_they_are(encoding: str, kind: str, subtype: str) -> None:
    info = soundfile.info(io.BytesIO(encode_audio(_tone(), 16_000, encoding)))
    assert (info.format, info.subtype, info.channels, info.samplerate) == (kind, subtype, 1, 16_000)


def test_loud_samples_are_clipped_and_never_wrap() -> None:
    loud_N = np.array([1.0, 1.5, -1.0, -7.0, 0.99999], dtype=np.float32)
    pcm = np.frombuffer(encode_audio(loud_N, 16_000, "linear16"), dtype="<i2")
    assert pcm.tolist() == [32767, 32767, -32767, -32767, 32767]


def test_samples_are_rounded_not_truncated() -> None:
    waveform_N = np.array([0.6, -0.6, 1.4], dtype=np.float32) / np.float32(32767)
    pcm = np.frombuffer(encode_audio(waveform_N, 16_000, "linear16"), dtype="<i2")
    assert pcm.tolist() == [1, -1, 1]


def test_float32_is_bit_for_bit() -> None:
    waveform_N = np.random.default_rng(0).uniform(-1, 1, 999).astype(np.float32)
    assert decode_audio(encode_audio(waveform_N, 16_000, "float32"), "float32", 16_000)[0].tobytes() == (
        waveform_N.tobytes()
    )


@pytest.mark.parametrize("encoding", LOSSY)
@pytest.mark.parametrize("samples", [1, 100, 4_800, 480_000])
def test_noise_of_any_length_keeps_it_in_lossy_files(encoding: str, samples: int) -> None:
    noise_N = np.random.default_rng(0).normal(0, 0.3, samples).astype(np.float32)
    decoded_N, _ = decode_audio(encode_audio(noise_N, 48_000, encoding), encoding, 48_000)
    assert len(decoded_N) == samples


@pytest.mark.parametrize(("encoding", "rate"), [("opus", 44_100), ("opus", 22_050), ("mp3", 9_600)])
def test_a_rate_that_an_encoding_does_not_hold_is_named_with_those_it_does(encoding: str, rate: int) -> None:
    fault = rate_fault(encoding, rate)
    assert fault is not None
    assert fault.startswith(f"is {rate} hertz, which {encoding} can't hold, must be one of 8000, ")
    with pytest.raises(soundfile.SoundFileError):
        encode_audio(_tone(rate=rate), rate, encoding)


@pytest.mark.parametrize("bad", [np.array([np.nan], np.float32), np.zeros((2, 3), np.float32)])
def test_what_is_no_mono_sound_is_our_fault(bad: np.ndarray) -> None:
    with pytest.raises(ValueError, match="finite mono"):
        encode_audio(bad, 16_000)


def test_resampling_to_the_same_rate_changes_nothing() -> None:
    tone_N = _tone()
    assert resample(tone_N, 16_000, 16_000) is tone_N


def test_every_wire_encoding_has_a_name() -> None:
    assert {encoding_name(value) for value in audio_pb2.AudioEncoding.values()} == set(ENCODINGS)
    assert encoding_name(audio_pb2.AUDIO_ENCODING_UNSPECIFIED) == "wav"
    assert encoding_name(99) is None  # type: ignore[arg-type]  # an open enum may carry unknown values
