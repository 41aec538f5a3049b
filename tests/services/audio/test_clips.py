import tracemalloc
from typing import Any

import numpy as np
import pytest

from milonga.v1 import audio_pb2
from milonga.v1.audio_pb2 import Clip, PromptedClip
from services.audio.clips import check_prompt, read_clip, read_clips, read_pairs, read_prompts, write_limits
from services.audio.decoding import AudioBounds
from services.audio.encoding import ENCODINGS, encode_audio
from services.errors import FieldViolation, InvalidInputError
from services.wire import WIRE_ENCODINGS
from tests.services.audio.sounds import (
    RATE,
    file_of,
    float32,
    silent_flac,
    tone,
    with_flac_length,
    with_wav_length,
)

BOUNDS = AudioBounds()
WAV = file_of(tone())
FLAC = file_of(tone(), kind="FLAC")
OGG = file_of(tone(), kind="OGG", subtype="VORBIS")


def _refusals(clip: Clip, bounds: AudioBounds = BOUNDS) -> tuple[FieldViolation, ...]:
    with pytest.raises(InvalidInputError) as caught:
        read_clip(clip, "clips[2]", bounds)
    assert "\n" not in str(caught.value)
    return caught.value.violations


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("rate", [8_000, 48_000])
def test_what_our_services_answer_can_be_sent_on(encoding: str, rate: int) -> None:
    sent = Clip(
        audio=encode_audio(tone(rate=rate), rate, encoding),
        encoding=WIRE_ENCODINGS[encoding],
        sample_rate_hertz=rate,
    )
    read = read_clip(sent, "clip", BOUNDS)
    assert (read.sampling_rate, read.seconds) == (rate, 1.0)
    assert read.waveform.dtype == np.float32
    if encoding not in ("ogg", "mp3", "opus"):
        np.testing.assert_allclose(read.waveform, tone(rate=rate), atol=1e-4)


@pytest.mark.parametrize("audio", [WAV, FLAC, OGG], ids=["wav", "flac", "ogg"])
def test_a_file_tells_itself_what_it_is(audio: bytes) -> None:
    assert read_clip(Clip(audio=audio), "clip", BOUNDS).seconds == 1.0


@pytest.mark.parametrize("subtype", ["PCM_24", "FLOAT", "ULAW"])
def test_other_samples_in_a_wav_are_read_too(subtype: str) -> None:
    read = read_clip(Clip(audio=file_of(tone(), subtype=subtype)), "clip", BOUNDS)
    np.testing.assert_allclose(read.waveform, tone(), atol=1e-2)


def test_channels_are_averaged() -> None:
    stereo_NC = np.stack([np.full(RATE, 1.0), np.full(RATE, 0.5)], axis=1).astype(np.float32)
    for clip in (float32(stereo_NC), Clip(audio=file_of(stereo_NC, subtype="FLOAT"))):
        read = read_clip(clip, "clip", BOUNDS)
        assert (read.waveform.shape, read.warnings) == ((RATE,), ())
        np.testing.assert_array_equal(read.waveform, 0.75)


@pytest.mark.parametrize("channels", [1, 2])
def test_a_clip_a_little_over_full_scale_is_turned_down_as_a_whole(channels: int) -> None:
    samples = 5.0 * tone(channels=channels)
    peak = float(np.abs(samples).max())
    mono_N = samples if channels == 1 else samples.mean(axis=1)
    for clip in (float32(samples), Clip(audio=file_of(samples, subtype="FLOAT"))):
        read = read_clip(clip, "clip", BOUNDS)
        np.testing.assert_allclose(read.waveform, mono_N / peak, atol=1e-6)
        (warning,) = read.warnings
        assert warning.startswith(
            "clip has samples up to 1.5, over full scale, and was turned down as a whole"
        )


def test_what_a_lossy_encoder_overshoots_is_turned_down_without_a_warning() -> None:
    read = read_clip(float32(tone() * np.float32(1.005 / 0.3)), "clip", BOUNDS)
    assert (np.abs(read.waveform).max(), read.warnings) == (1.0, ())


@pytest.mark.parametrize(
    ("scale", "divisor"), [(32767.0, 32768), (3_000.0, 32768), (2.0**23, 8388608), (2.0**31, 2147483648)]
)
def test_integers_written_as_floats_are_refused_with_the_divisor(scale: float, divisor: int) -> None:
    samples_N = tone() * np.float32(scale)
    for clip in (float32(samples_N), Clip(audio=file_of(samples_N, subtype="FLOAT"))):
        (fault,) = _refusals(clip)
        assert fault.description.endswith(f"-bit integers: divide by {divisor}")


def test_whole_numbers_are_integers_however_quiet() -> None:
    pcm_NC = np.rint(tone(channels=2) * 10)
    assert np.abs(pcm_NC).max() == 3
    (fault,) = _refusals(float32(pcm_NC))
    assert fault.description.endswith("16-bit integers: divide by 32768")


def test_channels_that_cancel_each_other_come_with_a_warning() -> None:
    left_N = tone()
    for gain, left in ((-1.0, "silence"), (-0.9, "26 dB quieter than they are")):
        stereo_NC = np.stack([left_N, np.float32(gain) * left_N], axis=1)
        (warning,) = read_clip(float32(stereo_NC), "clip", BOUNDS).warnings
        assert warning == (
            f"clip has channels that cancel each other: their mono mix is {left}; invert one, or send one"
        )


def test_ordinary_stereo_does_not_cancel() -> None:
    noise_NC = np.random.default_rng(0).normal(0, 0.1, (RATE, 2)).astype(np.float32)
    panned_NC = np.stack([tone(), np.zeros(RATE, np.float32)], axis=1)
    silent_NC = np.zeros((RATE, 2), np.float32)
    for samples_NC in (noise_NC, panned_NC, silent_NC, tone(channels=2)):
        assert read_clip(float32(samples_NC), "clip", BOUNDS).warnings == ()


def test_linear16_goes_to_both_ends_and_no_further() -> None:
    pcm_N = np.tile(np.array([-32768, -32767, 0, 32767], dtype="<i2"), RATE)
    clip = Clip(audio=pcm_N.tobytes(), encoding=audio_pb2.AUDIO_ENCODING_LINEAR16, sample_rate_hertz=RATE)
    assert read_clip(clip, "clip", BOUNDS).waveform[:4].tolist() == [-1.0, -1.0, 0.0, 1.0]


def test_the_shortest_and_the_longest_clip_are_taken() -> None:
    for seconds in (0.1, 60.0):
        silence_N = np.zeros(round(seconds * 8_000), dtype=np.float32)
        assert read_clip(float32(silence_N, 8_000), "clip", BOUNDS).seconds == seconds
        assert read_clip(Clip(audio=file_of(silence_N, 8_000)), "clip", BOUNDS).seconds == seconds


@pytest.mark.parametrize(
    ("clip", "field", "said"),
    [
        (Clip(), "audio", "is empty"),
        (float32(tone(0.0)), "audio", "is empty"),
        (Clip(audio=b"not a sound at all"), "audio", "begins with 6e 6f 74 20"),
        (Clip(audio=WAV, encoding=99), "encoding", "is 99, must be one of AUDIO_ENCODING_UNSPECIFIED"),  # type: ignore[arg-type]
        (Clip(audio=WAV, encoding=audio_pb2.AUDIO_ENCODING_FLAC), "audio", "as WAV, and encoding says FLAC"),
        (Clip(audio=FLAC, encoding=audio_pb2.AUDIO_ENCODING_WAV), "audio", "as FLAC, and encoding says WAV"),
        (Clip(audio=b"fLaC" + bytes(100)), "audio", "can't be decoded as FLAC"),
        (Clip(audio=b"RIFF\0\0\0\0WAVE" + bytes(100)), "audio", "cut short"),
        (Clip(audio=OGG[:2000] + bytes(100) + OGG[2100:]), "audio", "can't be decoded as OGG"),
        (Clip(audio=WAV, sample_rate_hertz=44_100), "sample_rate_hertz", "is 44100, and the file says 16000"),
        (Clip(audio=file_of(tone(rate=4_000), 4_000)), "audio", "rate of 4000, must be between 8000 and"),
        (Clip(audio=file_of(tone(channels=3))), "audio", "channel count of 3, must be between 1 and 2"),
        (Clip(audio=file_of(tone(0.05))), "audio", "lasts 0.05 s, must last between 0.1 and 60 s"),
        (Clip(audio=file_of(tone(0.0))), "audio", "lasts 0 s"),
        (Clip(audio=file_of(tone(60.001, 8_000), 8_000)), "audio", "lasts 60.001 s"),
        (float32(tone(), 0), "sample_rate_hertz", "is 0, must be between 8000 and 192000 hertz; bare"),
        (float32(tone(), -16_000), "sample_rate_hertz", "is -16000"),
        (float32(tone(), 192_001), "sample_rate_hertz", "is 192001"),
        (float32(tone(channels=3)), "channel_count", "is 3, must be between 1 and 2"),
        (float32(tone(0.05)), "audio", "lasts 0.05 s"),
        (float32(tone(61, 8_000), 8_000), "audio", "lasts 61 s"),
    ],
)  # fmt: skip
def test_a_bad_clip_is_refused_by_field_value_limit_and_remedy(clip: Clip, field: str, said: str) -> None:
    (fault,) = _refusals(clip)
    assert fault.field == f"clips[2].{field}"
    assert said in fault.description


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_samples_that_are_no_numbers_are_refused(value: float) -> None:
    samples_N = tone(10.0)
    samples_N[100_000] = value
    for clip in (float32(samples_N), Clip(audio=file_of(samples_N, subtype="FLOAT"))):
        (fault,) = _refusals(clip)
        assert fault.field == "clips[2].audio"
        assert "first at sample 100000" in fault.description


def test_bytes_that_are_no_whole_samples_are_refused() -> None:
    clip = float32(tone())
    clip.audio = clip.audio[:-1]
    (fault,) = _refusals(clip)
    assert fault == FieldViolation(
        "clips[2].audio",
        "has 63999 bytes, must be a multiple of 4 (FLOAT32, channel_count 1); "
        "it is cut short, or of another encoding",
    )
    stereo = float32(tone(channels=2))
    stereo.audio = stereo.audio[:-4]
    assert "multiple of 8" in _refusals(stereo)[0].description


def test_every_fault_of_a_clip_is_told_at_once() -> None:
    bare = float32(tone(channels=3), 0)
    assert [f.field for f in _refusals(bare)] == ["clips[2].sample_rate_hertz", "clips[2].channel_count"]
    quadro = Clip(audio=file_of(tone(0.05, channels=4)), sample_rate_hertz=8_000)
    assert [f.field for f in _refusals(quadro)] == [
        "clips[2].audio",
        "clips[2].sample_rate_hertz",
        "clips[2].audio",
    ]


@pytest.mark.parametrize("audio", [WAV, FLAC, OGG], ids=["wav", "flac", "ogg"])
@pytest.mark.parametrize("kept", [0.001, 0.01, 0.5, 0.9, 0.9999])
def test_a_file_that_is_cut_short_is_refused(audio: bytes, kept: float) -> None:
    cut = audio[: max(1, int(len(audio) * kept))]
    assert len(cut) < len(audio)
    (fault,) = _refusals(Clip(audio=cut))
    assert fault.field == "clips[2].audio"


def test_files_that_do_not_say_how_long_they_are_are_read_to_their_end() -> None:
    for audio in (with_flac_length(FLAC, 0), with_wav_length(WAV, 0xFFFF_FFFF)):
        np.testing.assert_allclose(read_clip(Clip(audio=audio), "c", BOUNDS).waveform, tone(), atol=1e-4)


def test_a_file_shorter_than_it_says_is_refused() -> None:
    (fault,) = _refusals(Clip(audio=with_flac_length(FLAC, 2 * RATE)))
    assert "16000 samples of the 32000" in fault.description
    (fault,) = _refusals(Clip(audio=with_flac_length(FLAC, 2**36 - 1)))
    assert "must last between" in fault.description


@pytest.mark.parametrize("frames", [24 * 3600 * 8_000, 0], ids=["honest", "silent about it"])
def test_a_day_of_packed_silence_takes_no_memory(frames: int) -> None:
    bomb = with_flac_length(silent_flac(24), frames)
    assert len(bomb) < 2**20
    tracemalloc.start()
    try:
        (fault,) = _refusals(Clip(audio=bomb))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert "must last between 0.1 and 60 s" in fault.description
    assert peak < 16 * 2**20  # a minute is 2 MB, the day 2.7 GB


def test_the_clips_of_a_call_share_a_budget() -> None:
    bounds = AudioBounds(max_decoded_bytes=3 * RATE * 4)
    clip = Clip(audio=FLAC)
    assert len(read_clips([clip] * 3, "clips", bounds)) == 3
    with pytest.raises(InvalidInputError, match="in several calls") as caught:
        read_clips([clip] * 4, "clips", bounds)
    assert [v.field for v in caught.value.violations] == ["clips[3].audio"]


def test_clips_beyond_the_budget_are_refused_by_their_headers() -> None:
    """A few kilobytes of silence take long to decode. What was decoded would be refused as damaged."""
    minute = silent_flac(1 / 60)[:-40]
    with pytest.raises(InvalidInputError, match="damaged"):
        read_clips([Clip(audio=minute)], "clips", BOUNDS)
    with pytest.raises(InvalidInputError, match="in several calls") as caught:
        read_clips([Clip(audio=minute)] * 64, "clips", AudioBounds(max_decoded_bytes=600 * 8_000 * 4))
    assert [v.field for v in caught.value.violations] == ["clips[10].audio"]


def test_all_channels_count_in_the_budget() -> None:
    samples = np.stack([tone(), tone()], axis=1).astype("<f4").tobytes()
    stereo = Clip(
        audio=samples, encoding=audio_pb2.AUDIO_ENCODING_FLOAT32, sample_rate_hertz=RATE, channel_count=2
    )
    (read,) = read_clips([stereo], "clips", BOUNDS)
    mono = read.waveform.nbytes
    read_clips([stereo], "clips", AudioBounds(max_decoded_bytes=2 * mono))
    with pytest.raises(InvalidInputError, match="in several calls"):
        read_clips([stereo], "clips", AudioBounds(max_decoded_bytes=2 * mono - 1))


def test_exactly_the_failing_elements_are_named() -> None:
    good, bad = Clip(audio=WAV), Clip(audio=b"noise")
    with pytest.raises(InvalidInputError) as caught:
        read_clips([good, bad, good, float32(tone(), 0)], "clips", BOUNDS)
    assert [v.field for v in caught.value.violations] == ["clips[1].audio", "clips[3].sample_rate_hertz"]
    pairs = [
        PromptedClip(prompt="a dog", clip=good),
        PromptedClip(prompt=" ", clip=bad),
        PromptedClip(prompt="a\x07", clip=good),
        PromptedClip(prompt="a dog"),
    ]
    with pytest.raises(InvalidInputError) as caught:
        read_pairs(pairs, "pairs", BOUNDS)
    assert [v.field for v in caught.value.violations] == [
        "pairs[1].prompt",
        "pairs[1].clip.audio",
        "pairs[2].prompt",
        "pairs[3].clip.audio",
    ]
    ((prompt, read),) = read_pairs(pairs[:1], "pairs", BOUNDS)
    assert (prompt, read.seconds) == ("a dog", 1.0)


@pytest.mark.parametrize("read", [read_clips, read_pairs, read_prompts])
def test_none_and_too_many_are_refused_before_anything_is_decoded(read: Any) -> None:
    bounds = AudioBounds(max_batch_size=2)
    for count, said in ((0, "is empty, must have between 1 and 2"), (3, "has 3 elements, the limit is 2")):
        with pytest.raises(InvalidInputError, match=said) as caught:
            read([None] * count, "things", bounds)
        assert [v.field for v in caught.value.violations] == ["things"]


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        ("", "is empty"),
        (" \u3000", "is empty"),
        ("\u200b\u2800\ufeff", "is empty"),
        ("a" * 1001, "has 1001 characters, the limit is 1000"),
        ("a dog\nbarks", "control character U+000A at position 5"),
    ],
)
def test_a_bad_prompt_is_refused(prompt: str, said: str) -> None:
    (fault,) = check_prompt(prompt, "prompt", BOUNDS)
    assert fault.field == "prompt"
    assert said in fault.description
    with pytest.raises(InvalidInputError) as caught:
        read_prompts(["a dog", prompt], "prompts", BOUNDS)
    assert [v.field for v in caught.value.violations] == ["prompts[1]"]


def test_a_prompt_of_the_largest_length_is_taken() -> None:
    assert check_prompt("é" * 1000, "prompt", BOUNDS) == ()


def test_the_bounds_travel() -> None:
    limits = write_limits(BOUNDS, 2**28)
    assert (limits.max_batch_size, limits.max_prompt_characters, limits.max_channel_count) == (64, 1000, 2)
    assert (limits.min_duration.ToNanoseconds(), limits.max_duration.ToNanoseconds()) == (10**8, 6 * 10**10)
    assert (limits.min_sample_rate_hertz, limits.max_sample_rate_hertz) == (8_000, 192_000)
    assert limits.max_request_bytes == 2**28
