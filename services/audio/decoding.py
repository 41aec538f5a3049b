"""Decode a sound file: the one decoder of the services, the command, the client and training.

No header is trusted: its values are checked first, and then no more is decoded than the longest permitted
clip, whatever the header states.

Shapes: N samples, C channels.
"""

import io
import math
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import soundfile
from numpy.typing import NDArray

from services.audio.containers import Container, ContainerError, open_container
from services.audio.levels import SOUNDLESS_POWER
from services.audio.prompt import MAX_PROMPT_CHARACTERS
from services.audio.steps import Steps, finish
from services.errors import FieldViolation, InvalidInputError, invalid

MIN_SECONDS: Final = 0.1
MAX_SECONDS: Final = 60.0
"""Shortest and longest clip."""
MIN_SAMPLING_RATE: Final = 8_000
MAX_SAMPLING_RATE: Final = 192_000
"""Bounds of a clip's sampling rate in hertz: telephone to high resolution."""
MAX_CHANNELS: Final = 2
"""Mono and stereo."""

_BLOCK_FRAMES: Final = 65_536
# libsndfile's count for a file without a length (a FLAC stream), and more than any real file has.
_UNKNOWN_FRAMES: Final = 2**62

_MAX_PEAK: Final = 10.0
"""Above this, float samples are integers that nobody scaled; below, a recording over full scale."""
_AUDIBLE_PEAK: Final = 1.01
"""Turning down less, by 0.1 dB as lossy decoders need it, is not worth a warning."""
_CANCELLED: Final = 0.05
"""Share of the channels' energy in the mono mix (-13 dB) below which they cancel; independent: half."""


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
    may_be_silent: bool = True
    """Whether a clip may be silent."""
    max_decoded_bytes: int = 512 * 2**20
    """Bytes of all channels of all clips of a call as float32: a small message of compressed clips can't take
    memory or minutes to decode. Any call of 16-bit samples fits that the usual maximum message of 256 MiB
    admits."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ReadClip:
    """A decoded clip: finite samples in [-1, 1]."""

    waveform: NDArray[np.float32]
    """[N]: channels are averaged; or [C, N]."""
    sampling_rate: int
    """Hertz."""
    warnings: tuple[str, ...] = ()
    """What was changed or may surprise, one sentence each, which begins with ``clip``."""

    @property
    def seconds(self) -> float:
        """Length of the clip."""
        return int(self.waveform.shape[-1]) / self.sampling_rate


def decode(
    audio: bytes,
    field: str,
    bounds: AudioBounds,
    *,
    expected: Container | None = None,
    stated_rate: int = 0,
    keep_channels: bool = False,
) -> ReadClip:
    """Return the sound of a file.

    Args:
        audio: all of the file.
        field: what errors name; ``clips[2].audio`` has the rate's field next to it.
        bounds: limits of the clip.
        expected: kind of file that the caller says it is; None: any.
        stated_rate: sampling rate that the caller says it has, in hertz; 0: any.
        keep_channels: return the waveform as [channels, N], not averaged.

    Raises:
        InvalidInputError: it is no sound file that is supported, is truncated or damaged, or exceeds a limit.
    """
    steps = decode_steps(
        audio, field, bounds, expected=expected, stated_rate=stated_rate, keep_channels=keep_channels
    )
    return finish(steps)


def decode_steps(
    audio: bytes,
    field: str,
    bounds: AudioBounds,
    *,
    expected: Container | None = None,
    stated_rate: int = 0,
    keep_channels: bool = False,
) -> Steps[ReadClip]:
    """Do as `decode`, in steps of a block."""
    try:
        found, content = open_container(audio)
    except ContainerError as error:
        raise invalid(field, str(error)) from None
    if expected not in (None, found):
        raise invalid(field, f"begins as {found}, and encoding says {expected}; correct the one or the other")
    try:
        with _ForwardFile(_Content(content)) as file:
            refuse(_header_faults(file, field, bounds, stated_rate))
            return (yield from _read(file, field, found, bounds, keep_channels))
    except soundfile.SoundFileError as error:
        reason = str(getattr(error, "error_string", error)).strip().partition("\n")[0]
        raise invalid(
            field, f"can't be decoded as {found}, it is cut short or damaged: {reason} Get it again, whole"
        ) from error


def measure(audio: bytes, bounds: AudioBounds) -> tuple[float, int]:
    """Return the seconds of a file, and the samples of all its channels: `decode` reads no more.

    (0, 0) if `decode` refuses the file before it reads samples.
    """
    try:
        _, content = open_container(audio)
        with _ForwardFile(_Content(content)) as file:
            if any(_header_faults(file, "", bounds, 0)):
                return 0.0, 0
            frames = min(math.floor(bounds.max_seconds * file.samplerate) + 1, file.frames)
            return frames / file.samplerate, frames * file.channels
    except (ContainerError, soundfile.SoundFileError):
        return 0.0, 0


class _Content(io.BytesIO):
    """The bytes of a file. Damaged ones have libsndfile seek before the first, which then changes nothing."""

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        with suppress(ValueError):
            return super().seek(offset, whence)
        return self.tell()


class _ForwardFile(soundfile.SoundFile):  # type: ignore[misc]  # a library without types
    """A file that is read from beginning to end, whatever length its header states.

    soundfile seeks after each block, which fails at the end of a FLAC stream without a length.
    """

    def seekable(self) -> bool:
        return False


def _header_faults(
    file: soundfile.SoundFile, field: str, bounds: AudioBounds, stated_rate: int
) -> Iterable[FieldViolation]:
    """Yield the violations that the header of a file shows."""
    rate = file.samplerate
    yield from rate_faults(field, "has a sampling rate of", rate, bounds, "; resample it")
    yield from channel_faults(field, "has a channel count of", file.channels, bounds)
    if stated_rate not in (0, rate):
        yield FieldViolation(
            f"{field.removesuffix('audio')}sample_rate_hertz",
            f"is {stated_rate}, and the file says {rate}; correct it or leave it out",
        )
    if rate > 0 and file.frames < _UNKNOWN_FRAMES:
        yield from length_faults(field, file.frames / rate, bounds)


def _read(
    file: soundfile.SoundFile, field: str, container: Container, bounds: AudioBounds, keep_channels: bool
) -> Steps[ReadClip]:
    """Decode block by block, up to the longest clip and one frame more: headers may lie."""
    # What follows the last of a known number of frames is no sound.
    limit = min(math.floor(bounds.max_seconds * file.samplerate) + 1, file.frames)
    mix = Mix(field, keep_channels=keep_channels)
    while (left := limit - mix.count) > 0:
        block_NC = file.read(min(_BLOCK_FRAMES, left), dtype="float32", always_2d=True)
        if not len(block_NC):
            break
        mix.add(block_NC)
        yield
    if file.frames < _UNKNOWN_FRAMES and mix.count < file.frames:
        raise invalid(
            field,
            f"has {mix.count} samples of the {file.frames} that its {container} header says; "
            "it is cut short or damaged: get it again, whole",
        )
    refuse(length_faults(field, mix.count / file.samplerate, bounds))
    return mix.clip(file.samplerate, may_be_silent=bounds.may_be_silent)


class Mix:
    """Averages the channels of a clip, block by block, and checks the level of what comes out."""

    def __init__(self, path: str, *, keep_channels: bool = False) -> None:
        """Errors name `path`. With `keep_channels` the clip is [C, N], though checked as its average."""
        self._path, self._keep, self._blocks = path, keep_channels, list[NDArray[np.float32]]()
        self._channels, self._peak, self._energy = 1, 0.0, 0.0
        self.count = 0

    def add(self, samples_NC: NDArray[Any]) -> None:
        """Add samples, at least one. Raises `InvalidInputError` if they are not finite."""
        finite_N = np.isfinite(samples_NC).all(axis=1)
        if not finite_N.all():
            first = self.count + int(np.argmin(finite_N))
            raise invalid(
                self._path, f"holds NaN or infinity, first at sample {first}; send finite samples in [-1, 1]"
            )
        self.count, self._channels = self.count + len(samples_NC), samples_NC.shape[1]
        self._peak = max(self._peak, float(samples_NC.max()), -float(samples_NC.min()))
        self._energy += float(np.vdot(samples_NC, samples_NC)) / self._channels
        self._blocks.append(samples_NC if self._keep else samples_NC.mean(axis=1, dtype=np.float32))

    def clip(self, rate: int, *, may_be_silent: bool = True) -> ReadClip:
        """Return the clip, turned down as a whole if it exceeds full scale.

        Raises:
            InvalidInputError: the samples are integers that were written as floats; or their mono mix is
                silent and must not be.
        """
        waveform, peak = np.concatenate(self._blocks), self._peak
        waveform_N = waveform.mean(axis=1, dtype=np.float32) if self._keep else waveform
        warnings: list[str] = []
        if peak > 1.0:
            if peak > _MAX_PEAK or (peak >= 2.0 and not np.mod(waveform_N * self._channels, 1.0).any()):
                raise invalid(self._path, _integer_fault(peak))
            if peak > _AUDIBLE_PEAK:
                warnings.append(
                    f"clip has samples up to {peak:.3g}, over full scale, and was turned down as a whole by "
                    f"{20 * math.log10(peak):.1f} dB; send samples in [-1, 1]"
                )
        energy = float(np.vdot(waveform_N, waveform_N))
        if not may_be_silent and energy <= SOUNDLESS_POWER * self.count:
            raise invalid(self._path, _silence_fault(self._energy > SOUNDLESS_POWER * self.count))
        kept = energy / max(self._energy, 1e-12)
        if self._energy > SOUNDLESS_POWER * self.count and kept < _CANCELLED:
            left = "silence" if kept < 1e-6 else f"{-10 * math.log10(kept):.0f} dB quieter than they are"
            warnings.append(
                f"clip has channels that cancel each other: their mono mix is {left}; invert one, or send one"
            )
        if peak > 1.0:
            waveform /= np.float32(peak)
        return ReadClip(
            waveform=np.ascontiguousarray(waveform.T), sampling_rate=rate, warnings=tuple(warnings)
        )


def _silence_fault(cancels: bool) -> str:
    """Return what is wrong with a clip without sound, of channels that cancel or of silence."""
    if cancels:
        return "is silent: its channels cancel each other; invert one, or send one"
    return "is silent: nothing in it is above -80 dB; send a clip with sound, or leave it out"


def _integer_fault(peak: float) -> str:
    """Return what is wrong with float samples in an integer's range, and the divisor that corrects it."""
    divisor = next((2**bits for bits in (15, 23, 31) if peak <= 2**bits), None)
    found = f"has samples up to {peak:.6g}, must be in [-1, 1]"
    if divisor is None:
        return f"{found}; normalize them"
    bits = divisor.bit_length()
    return f"{found}; they are in the range of {bits}-bit integers: divide by {divisor}"


def rate_faults(
    path: str, what: str, rate: int, bounds: AudioBounds, remedy: str
) -> Iterable[FieldViolation]:
    """Yield the violation of a sampling rate, if any. `what` is what the field does: ``is``."""
    if not bounds.min_rate <= rate <= bounds.max_rate:
        limits = f"must be between {bounds.min_rate} and {bounds.max_rate} hertz"
        yield FieldViolation(path, f"{what} {rate}, {limits}{remedy}")


def channel_faults(path: str, what: str, channels: int, bounds: AudioBounds) -> Iterable[FieldViolation]:
    """Yield the violation of a number of channels, if any."""
    if not 1 <= channels <= bounds.max_channels:
        limits = f"must be between 1 and {bounds.max_channels}"
        yield FieldViolation(path, f"{what} {channels}, {limits}; mix it down")


def length_faults(path: str, seconds: float, bounds: AudioBounds) -> Iterable[FieldViolation]:
    """Yield the violation of a clip's length, if any."""
    if not bounds.min_seconds <= seconds <= bounds.max_seconds:
        limits = f"must last between {bounds.min_seconds:g} and {bounds.max_seconds:g} s"
        remedy = "cut it" if seconds > bounds.max_seconds else "send a longer one"
        yield FieldViolation(path, f"lasts {seconds:.10g} s, {limits}; {remedy}")


def refuse(faults: Iterable[FieldViolation]) -> None:
    """Raise `InvalidInputError` if there are violations."""
    found = tuple(faults)
    if found:
        raise InvalidInputError(*found)
