"""Decode and check the clips and prompts of requests.

No header is trusted: its values are checked first, and then no more is decoded than the longest permitted
clip, whatever the header states. Every function blocks for milliseconds: call it off the event loop.

Shapes: N samples.
"""

import io
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeVar

import numpy as np
import soundfile
from google.protobuf.duration_pb2 import Duration
from numpy.typing import NDArray

from milonga.v1 import audio_pb2
from services.audio.containers import Container, container_of, is_truncated
from services.audio.prompt import MAX_PROMPT_CHARACTERS, prompt_fault
from services.errors import FieldViolation, InvalidInputError

MIN_SECONDS: Final = 0.1
MAX_SECONDS: Final = 60.0
"""Shortest and longest clip."""
MIN_SAMPLING_RATE: Final = 8_000
MAX_SAMPLING_RATE: Final = 192_000
"""Bounds of a clip's sampling rate in hertz: telephone to high resolution."""
MAX_CHANNELS: Final = 2
"""Mono and stereo."""

_BARE: "Final[Mapping[audio_pb2.AudioEncoding.ValueType, np.dtype[Any]]]" = {
    audio_pb2.AUDIO_ENCODING_LINEAR16: np.dtype("<i2"),
    audio_pb2.AUDIO_ENCODING_FLOAT32: np.dtype("<f4"),
}
_CONTAINERS: "Final[Mapping[audio_pb2.AudioEncoding.ValueType, Container | None]]" = {
    audio_pb2.AUDIO_ENCODING_UNSPECIFIED: None,
    audio_pb2.AUDIO_ENCODING_WAV: "WAV",
    audio_pb2.AUDIO_ENCODING_FLAC: "FLAC",
    audio_pb2.AUDIO_ENCODING_OGG_VORBIS: "OGG",
}
_BLOCK_FRAMES: Final = 65_536
# libsndfile's count for a file without a length (a FLAC stream), and more than any real file has.
_UNKNOWN_FRAMES: Final = 2**62

_MAX_PEAK: Final = 10.0
"""Above this, float samples are integers that nobody scaled; below, a recording over full scale."""
_AUDIBLE_PEAK: Final = 1.01
"""Turning down less, by 0.1 dB as lossy decoders need it, is not worth a warning."""
_CANCELLED: Final = 0.05
"""Share of the channels' energy in the mono mix (-13 dB) below which they cancel; independent: half."""
_SILENT: Final = 1e-8
"""Mean square of a clip in which nothing can cancel: -80 dB."""

Message = TypeVar("Message")
Read = TypeVar("Read")


@dataclass(frozen=True, kw_only=True, slots=True)
class AudioBounds:
    """Limits of a call. All bounds are inclusive."""

    max_batch_size: int = 64
    """Most clips, pairs or prompts of a call."""
    max_prompt_characters: int = MAX_PROMPT_CHARACTERS
    """Longest prompt."""
    min_seconds: float = MIN_SECONDS
    """Shortest clip."""
    max_seconds: float = MAX_SECONDS
    """Longest clip."""
    min_rate: int = MIN_SAMPLING_RATE
    """Lowest sampling rate in hertz."""
    max_rate: int = MAX_SAMPLING_RATE
    """Highest sampling rate in hertz."""
    max_channels: int = MAX_CHANNELS
    """Most channels of a clip."""
    max_decoded_bytes: int = 512 * 2**20
    """Bytes of all clips of a call, decoded to mono float32: compressed silence can't fill the memory.
    Any call of 16-bit samples fits that the usual maximum message of 256 MiB admits."""

    def message(self, max_request_bytes: int) -> audio_pb2.AudioLimits:
        """Return the limits as the wire states them."""
        return audio_pb2.AudioLimits(
            max_batch_size=self.max_batch_size,
            max_prompt_characters=self.max_prompt_characters,
            min_duration=_duration(self.min_seconds),
            max_duration=_duration(self.max_seconds),
            min_sample_rate_hertz=self.min_rate,
            max_sample_rate_hertz=self.max_rate,
            max_channel_count=self.max_channels,
            max_request_bytes=max_request_bytes,
        )


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ReadClip:
    """A decoded clip: finite samples in [-1, 1]."""

    waveform: NDArray[np.float32]
    """[N]: channels are averaged."""
    sampling_rate: int
    """Hertz."""
    warnings: tuple[str, ...] = ()
    """What was changed or may surprise, one sentence each, which begins with ``clip``."""

    @property
    def seconds(self) -> float:
        """Length of the clip."""
        return int(self.waveform.shape[-1]) / self.sampling_rate


def read_clip(clip: audio_pb2.Clip, field: str, bounds: AudioBounds) -> ReadClip:
    """Return one decoded clip.

    Raises:
        InvalidInputError: lists the violated fields of `clip`, whose own path is `field`.
    """
    if clip.encoding in _BARE:
        return _read_samples(clip, field, bounds, _BARE[clip.encoding])
    if clip.encoding in _CONTAINERS:
        return _read_file(clip, field, bounds, _CONTAINERS[clip.encoding])
    names = ", ".join(audio_pb2.AudioEncoding.Name(value) for value in (*_CONTAINERS, *_BARE))
    raise _invalid(f"{field}.encoding", f"is {clip.encoding}, must be one of {names}")


def read_clips(clips: Sequence[audio_pb2.Clip], field: str, bounds: AudioBounds) -> list[ReadClip]:
    """Return the decoded clips of a call.

    Raises:
        InvalidInputError: lists every violated field of every clip (``clips[2].audio``), or `field` if there
            are none or too many.
    """
    budget = _Budget(bounds)
    return _read_each(
        clips, field, bounds, lambda clip, path: budget.spend(read_clip(clip, path, bounds), path)
    )


def read_pairs(
    pairs: Sequence[audio_pb2.PromptedClip], field: str, bounds: AudioBounds
) -> list[tuple[str, ReadClip]]:
    """Do as `read_clips` for clips with prompts: ``pairs[2].prompt``, ``pairs[2].clip.audio``."""
    budget = _Budget(bounds)

    def read(pair: audio_pb2.PromptedClip, path: str) -> tuple[str, ReadClip]:
        faults = [*check_prompt(pair.prompt, f"{path}.prompt", bounds)]
        try:
            clip = budget.spend(read_clip(pair.clip, f"{path}.clip", bounds), f"{path}.clip")
        except InvalidInputError as error:
            raise InvalidInputError(*faults, *error.violations) from error
        _refuse(faults)
        return pair.prompt, clip

    return _read_each(pairs, field, bounds, read)


def read_prompts(prompts: Sequence[str], field: str, bounds: AudioBounds) -> list[str]:
    """Check the prompts of a call.

    Raises:
        InvalidInputError: lists every violated prompt (``prompts[2]``), or `field` if there are none or too
            many.
    """

    def read(prompt: str, path: str) -> str:
        _refuse(check_prompt(prompt, path, bounds))
        return prompt

    return _read_each(prompts, field, bounds, read)


def check_prompt(prompt: str, field: str, bounds: AudioBounds) -> tuple[FieldViolation, ...]:
    """Return the violations of `prompt`; empty if there are none."""
    fault = prompt_fault(prompt, bounds.max_prompt_characters)
    return () if fault is None else (FieldViolation(field, fault),)


class _ForwardFile(soundfile.SoundFile):  # type: ignore[misc]  # a library without types
    """A file that is read from beginning to end, whatever length its header states.

    soundfile seeks after each block, which fails at the end of a FLAC stream without a length.
    """

    def seekable(self) -> bool:
        return False


class _Budget:
    """Counts the bytes of the decoded clips of a call."""

    def __init__(self, bounds: AudioBounds) -> None:
        self._limit, self._left = bounds.max_decoded_bytes, bounds.max_decoded_bytes

    def spend(self, clip: ReadClip, field: str) -> ReadClip:
        self._left -= clip.waveform.nbytes
        if self._left < 0:
            raise _invalid(
                f"{field}.audio",
                f"brings this call's clips, decoded, to {(self._limit - self._left) / 2**20:.1f} MiB, "
                f"the limit is {self._limit / 2**20:g} MiB; send them in several calls",
            )
        return clip


def _read_each(
    messages: Sequence[Message], field: str, bounds: AudioBounds, read: Callable[[Message, str], Read]
) -> list[Read]:
    if not messages:
        raise _invalid(field, f"is empty, must have between 1 and {bounds.max_batch_size} elements")
    if len(messages) > bounds.max_batch_size:
        raise _invalid(
            field,
            f"has {len(messages)} elements, the limit is {bounds.max_batch_size}; send them in several calls",
        )
    done: list[Read] = []
    faults: list[FieldViolation] = []
    for index, message in enumerate(messages):
        try:
            made = read(message, f"{field}[{index}]")
        except InvalidInputError as error:
            faults.extend(error.violations)
            done.clear()
        else:
            if not faults:  # a call that is refused anyway needs no samples
                done.append(made)
    _refuse(faults)
    return done


def _read_samples(clip: audio_pb2.Clip, field: str, bounds: AudioBounds, kind: "np.dtype[Any]") -> ReadClip:
    rate, channels = clip.sample_rate_hertz, clip.channel_count or 1
    faults = [
        *_rate_faults(
            f"{field}.sample_rate_hertz", "is", rate, bounds, "; bare samples carry it nowhere else"
        ),
        *_channel_faults(f"{field}.channel_count", "is", channels, bounds),
    ]
    frame_bytes = kind.itemsize * max(1, channels)
    frames, rest = divmod(len(clip.audio), frame_bytes)
    if not clip.audio:
        faults.append(_empty(f"{field}.audio"))
    elif not faults and rest:
        name = audio_pb2.AudioEncoding.Name(clip.encoding).removeprefix("AUDIO_ENCODING_")
        faults.append(
            FieldViolation(
                f"{field}.audio",
                f"has {len(clip.audio)} bytes, must be a multiple of {frame_bytes} "
                f"({name}, channel_count {channels}); it is cut short, or of another encoding",
            )
        )
    elif not faults:
        faults += _length_faults(f"{field}.audio", frames / rate, bounds)
    _refuse(faults)
    samples_NC = np.frombuffer(clip.audio, dtype=kind).reshape(frames, channels)
    if kind.kind == "i":
        samples_NC = np.maximum(samples_NC / np.float32(32767), np.float32(-1.0))
    mix = _Mix(f"{field}.audio")
    mix.add(samples_NC)
    return mix.clip(rate)


def _read_file(clip: audio_pb2.Clip, field: str, bounds: AudioBounds, expected: Container | None) -> ReadClip:
    path = f"{field}.audio"
    if not clip.audio:
        raise InvalidInputError(_empty(path))
    found = container_of(clip.audio)
    if found is None:
        begin = clip.audio[:4].hex(" ")
        raise _invalid(
            path,
            f"begins with {begin}, which is no WAV, FLAC or OGG file; send one, or say LINEAR16 or FLOAT32",
        )
    if expected not in (None, found):
        raise _invalid(path, f"begins as {found}, and encoding says {expected}; correct the one or the other")
    if is_truncated(clip.audio, found):
        raise _invalid(
            path, f"is cut short: as {found}, {len(clip.audio)} bytes are not all of it; send it whole"
        )
    try:
        with _ForwardFile(io.BytesIO(clip.audio)) as file:
            _refuse(_header_faults(file, clip, field, bounds))
            return _decode(file, path, found, bounds)
    except soundfile.SoundFileError as error:
        reason = str(getattr(error, "error_string", error)).strip().partition("\n")[0]
        raise _invalid(
            path, f"can't be decoded as {found}: {reason} Send it again, or another file"
        ) from error


def _header_faults(
    file: soundfile.SoundFile, clip: audio_pb2.Clip, field: str, bounds: AudioBounds
) -> Iterable[FieldViolation]:
    """Return the violations that the header of a file shows."""
    path, rate = f"{field}.audio", file.samplerate
    yield from _rate_faults(path, "has a sampling rate of", rate, bounds, "; resample it")
    yield from _channel_faults(path, "has a channel count of", file.channels, bounds)
    if clip.sample_rate_hertz not in (0, rate):
        yield FieldViolation(
            f"{field}.sample_rate_hertz",
            f"is {clip.sample_rate_hertz}, and the file says {rate}; correct it or leave it out",
        )
    if rate > 0 and file.frames < _UNKNOWN_FRAMES:
        yield from _length_faults(path, file.frames / rate, bounds)


def _decode(file: soundfile.SoundFile, path: str, container: Container, bounds: AudioBounds) -> ReadClip:
    """Decode block by block, up to the longest clip and one frame more: headers may lie."""
    limit = math.floor(bounds.max_seconds * file.samplerate) + 1
    mix = _Mix(path)
    while (left := limit - mix.count) > 0:
        block_NC = file.read(min(_BLOCK_FRAMES, left), dtype="float32", always_2d=True)
        if not len(block_NC):
            break
        mix.add(block_NC)
    count = mix.count
    if file.frames < _UNKNOWN_FRAMES and count < file.frames:
        raise _invalid(
            path,
            f"has {count} samples of the {file.frames} that its {container} header says; "
            "it is cut short or damaged: send it whole",
        )
    _refuse(_length_faults(path, count / file.samplerate, bounds))
    return mix.clip(file.samplerate)


class _Mix:
    """Averages the channels of a clip, block by block, and checks the level of what comes out."""

    def __init__(self, path: str) -> None:
        self._path, self._blocks = path, list[NDArray[np.float32]]()
        self._channels, self._peak, self._energy = 1, 0.0, 0.0
        self.count = 0

    def add(self, samples_NC: NDArray[Any]) -> None:
        """Add samples. Raises `InvalidInputError` if they are not finite."""
        finite_N = np.isfinite(samples_NC).all(axis=1)
        if not finite_N.all():
            first = self.count + int(np.argmin(finite_N))
            raise _invalid(
                self._path, f"holds NaN or infinity, first at sample {first}; send finite samples in [-1, 1]"
            )
        self.count, self._channels = self.count + len(samples_NC), samples_NC.shape[1]
        self._peak = max(self._peak, float(np.abs(samples_NC).max(initial=0.0)))
        self._energy += float(np.square(samples_NC, dtype=np.float64).sum()) / self._channels
        self._blocks.append(samples_NC.mean(axis=1, dtype=np.float32))

    def clip(self, rate: int) -> ReadClip:
        """Return the clip, turned down as a whole if it exceeds full scale.

        Raises:
            InvalidInputError: the samples are integers that were written as floats.
        """
        waveform_N, peak = np.concatenate(self._blocks), self._peak
        warnings: list[str] = []
        if peak > 1.0:
            if peak > _MAX_PEAK or (peak >= 2.0 and not np.mod(waveform_N * self._channels, 1.0).any()):
                raise _invalid(self._path, _integer_fault(peak))
            if peak > _AUDIBLE_PEAK:
                warnings.append(
                    f"clip has samples up to {peak:.3g}, over full scale, and was turned down as a whole by "
                    f"{20 * math.log10(peak):.1f} dB; send samples in [-1, 1]"
                )
        kept = float(np.square(waveform_N, dtype=np.float64).sum()) / max(self._energy, 1e-12)
        if self._energy > _SILENT * self.count and kept < _CANCELLED:
            left = "silence" if kept < 1e-9 else f"{-10 * math.log10(kept):.0f} dB quieter than they are"
            warnings.append(
                f"clip has channels that cancel each other: their mono mix is {left}; invert one, or send one"
            )
        if peak > 1.0:
            waveform_N /= np.float32(peak)
        return ReadClip(waveform=waveform_N, sampling_rate=rate, warnings=tuple(warnings))


def _integer_fault(peak: float) -> str:
    """Return what is wrong with float samples in an integer's range, and the divisor that corrects it."""
    divisor = next((2**bits for bits in (15, 23, 31) if peak <= 2**bits), None)
    found = f"has samples up to {peak:.6g}, must be in [-1, 1]"
    if divisor is None:
        return f"{found}; normalize them"
    bits = divisor.bit_length()
    return f"{found}; they are in the range of {bits}-bit integers: divide by {divisor}"


def _rate_faults(
    path: str, what: str, rate: int, bounds: AudioBounds, remedy: str
) -> Iterable[FieldViolation]:
    if not bounds.min_rate <= rate <= bounds.max_rate:
        limits = f"must be between {bounds.min_rate} and {bounds.max_rate} hertz"
        yield FieldViolation(path, f"{what} {rate}, {limits}{remedy}")


def _channel_faults(path: str, what: str, channels: int, bounds: AudioBounds) -> Iterable[FieldViolation]:
    if not 1 <= channels <= bounds.max_channels:
        limits = f"must be between 1 and {bounds.max_channels}"
        yield FieldViolation(path, f"{what} {channels}, {limits}; mix it down")


def _length_faults(path: str, seconds: float, bounds: AudioBounds) -> Iterable[FieldViolation]:
    if not bounds.min_seconds <= seconds <= bounds.max_seconds:
        limits = f"must last between {bounds.min_seconds:g} and {bounds.max_seconds:g} s"
        remedy = "cut it" if seconds > bounds.max_seconds else "send a longer one"
        yield FieldViolation(path, f"lasts {seconds:.10g} s, {limits}; {remedy}")


def _empty(path: str) -> FieldViolation:
    return FieldViolation(path, "is empty; send an encoded clip")


def _duration(seconds: float) -> Duration:
    duration = Duration()
    duration.FromNanoseconds(round(seconds * 1e9))
    return duration


def _refuse(faults: Iterable[FieldViolation]) -> None:
    found = tuple(faults)
    if found:
        raise InvalidInputError(*found)


def _invalid(field: str, description: str) -> InvalidInputError:
    return InvalidInputError(FieldViolation(field, description))
