"""One generation: its request, its events, its clips, and the port `ClipMaker`.

The events of a request come in this order, from an engine in this process and from a service::

    Queued+  (Progress | Preview | Clip)*  (Finished | Failed)

Exactly one `Finished` or `Failed` ends a request. Field names are those of the wire, except `sampling_rate`,
which is `sample_rate_hertz` there. Shapes: N samples, T mel frames, M mel bins.
"""

import math
import secrets
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Final, Protocol, Self, TypedDict, Unpack

import numpy as np
from numpy.typing import NDArray

from services.api.model import ModelVersion
from services.audio.encoding import (
    DEFAULT_ENCODING,
    ENCODINGS,
    MAX_SAMPLING_RATE,
    MIN_SAMPLING_RATE,
    decode_audio,
    encode_audio,
    rate_fault,
)
from services.audio.prompt import MAX_PROMPT_CHARACTERS, prompt_fault
from services.errors import FieldViolation, InvalidInputError

DRAWN_SEED_BITS: Final = 32
"""Bits of a drawn seed: few enough to be easy to type, and exact in JSON."""

MEL_FLOOR, MEL_CEILING = math.log(1e-5), math.log(10.0)
"""Range of a preview: the log-mel spectrogram's floor, and ten times full scale."""

MAX_ADAPTER_CHARACTERS: Final = 1024
"""Maximum length of an adapter's name."""

LOUDNESS_RANGE: Final = (-60.0, -6.0)
"""Root mean squares that a clip can be brought to, in dB relative to full scale."""

# Headers of an audio file, and the fields around the audio.
_CLIP_OVERHEAD_BYTES = 4096


# ---------------------------------------------------------------------------------------------------- request


class GenerationOptions(TypedDict, total=False):
    """The keyword arguments of a generation. None, or left out: the model's default."""

    negative_prompt: str | None
    """Description that guidance leads away from."""
    duration: float | None
    """Length of each clip in seconds."""
    clip_count: int | None
    """Number of different clips of the prompt."""
    seed: int | None
    """Seed of the noise, 0 to 2**64 - 1. Default: drawn."""
    num_inference_steps: int | None
    """Number of denoising steps."""
    guidance_scale: float | None
    """Scale of classifier-free guidance; up to 1 means none."""
    guidance_stop: float | None
    """Share of the steps after which guidance stops, 0 to 1."""
    scheduler: str | None
    """Name of a scheduler."""
    encoding: str | None
    """Encoding of the clips, one of `services.audio.encoding.ENCODINGS`."""
    sampling_rate: int | None
    """Sampling rate of the clips in hertz."""
    loudness: float | None
    """Root mean square that each clip is brought to, in dB relative to full scale; None: left unchanged."""
    adapter: str | None
    """Name of an adapter of the denoiser: one of the service's, or NAME@VERSION of its registry."""
    profile: str | None
    """Name of a profile of the model, whose settings are then the defaults of steps, guidance, scheduler."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Profile:
    """A named balance of quality and cost, from a model's folder: settings of its denoising."""

    name: str
    num_inference_steps: int
    guidance_scale: float
    scheduler: str
    guidance_stop: float = 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Defaults:
    """Values of the options that a request leaves out."""

    duration: float
    num_inference_steps: int
    guidance_scale: float
    scheduler: str
    sampling_rate: int
    """The model's sampling rate in hertz."""
    guidance_stop: float = 1.0
    negative_prompt: str = ""
    clip_count: int = 1
    encoding: str = DEFAULT_ENCODING
    profile: str = ""
    """Name of the profile that the defaults are of; empty: the model's own defaults."""
    profiles: tuple[Profile, ...] = ()
    """The model's profiles."""

    def under(self, profile: str) -> "Defaults":
        """Return the defaults under a profile; themselves if there is none of that name."""
        for one in self.profiles:
            if one.name == profile:
                settings = asdict(one)
                return replace(self, profile=settings.pop("name"), **settings)
        return self


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerationRequest:
    """One prompt, and how to turn it into clips. Complete: every option has a value."""

    prompt: str
    """Description of the clip."""
    negative_prompt: str = ""
    """Description that guidance leads away from; empty: the unconditional embedding."""
    duration: float
    """Length of each clip in seconds."""
    clip_count: int = 1
    """Number of clips, each from different noise: (seed, 0), (seed, 1), …"""
    seed: int
    """Seed of the noise. The same seed, settings and batch shape give the same clip, bit for bit."""
    num_inference_steps: int
    """Number of denoising steps of each clip."""
    guidance_scale: float
    """Scale of classifier-free guidance; up to 1 means none."""
    guidance_stop: float = 1.0
    """Share of the steps after which guidance stops, 0 to 1: a clip's later steps take one row, not two."""
    scheduler: str
    """Name of a scheduler of the model."""
    encoding: str = DEFAULT_ENCODING
    """Encoding of the clips, one of `services.audio.encoding.ENCODINGS`."""
    sampling_rate: int
    """Sampling rate of the clips in hertz."""
    loudness: float | None = None
    """Root mean square that each clip is brought to, in dB relative to full scale; None: left unchanged."""
    adapter: str = ""
    """Name of an adapter of the denoiser; empty: none."""
    profile: str = ""
    """Name of the profile whose settings were the defaults; empty: none."""
    preview_interval_steps: int = 0
    """Steps between two `Preview`s of the first clip; 0: none. Previews change no bit of the clips."""

    @classmethod
    def of(
        cls,
        prompt: str,
        defaults: Defaults,
        *,
        preview_interval_steps: int = 0,
        **options: Unpack[GenerationOptions],
    ) -> Self:
        """Return the complete request: an option that is None takes its default; the seed is drawn.

        The defaults are those of the option `profile`, if given; `violations` refuses an unknown one.
        """
        given: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
        given.setdefault("seed", secrets.randbits(DRAWN_SEED_BITS))
        defaults = defaults.under(given.get("profile", ""))
        for name in Defaults.__slots__:
            if name != "profiles":
                given.setdefault(name, getattr(defaults, name))
        return cls(prompt=prompt, preview_interval_steps=preview_interval_steps, **given)


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """The valid ranges of a request. All bounds are inclusive."""

    max_prompt_characters: int = MAX_PROMPT_CHARACTERS
    """Maximum length of prompt and negative prompt in characters."""
    min_duration: float
    """Shortest clip in seconds: one latent frame."""
    max_duration: float
    """Longest clip in seconds."""
    max_clip_count: int = 8
    """Maximum number of clips in a request."""
    max_steps: int = 1000
    """Maximum number of denoising steps: those that the model was trained with."""
    max_guidance_scale: float = 20.0
    """Beyond this, guidance only saturates."""
    max_seed: int = 2**64 - 1
    """Seeds are unsigned 64-bit numbers on the wire."""
    schedulers: tuple[str, ...]
    """Names of the schedulers."""
    adapters: tuple[str, ...] = ()
    """Names of the adapters that a service lists. It may take others, of its registry."""
    profiles: tuple[str, ...] = ()
    """Names of the profiles."""

    @property
    def max_response_bytes(self) -> int:
        """Maximum size of a response: the longest clips, in float32 at the highest sampling rate."""
        samples = math.ceil(self.max_duration * MAX_SAMPLING_RATE)
        return self.max_clip_count * (samples * np.dtype(np.float32).itemsize + _CLIP_OVERHEAD_BYTES)


def violations(request: GenerationRequest, limits: Limits) -> tuple[FieldViolation, ...]:
    """Return every violated field of `request`, in the order of the fields; empty if there is none."""
    found = (
        ("prompt", prompt_fault(request.prompt, limits.max_prompt_characters)),
        (
            "negative_prompt",
            prompt_fault(request.negative_prompt, limits.max_prompt_characters, may_be_blank=True),
        ),
        ("duration", _number_fault(request.duration, limits.min_duration, limits.max_duration, " s")),
        ("clip_count", _number_fault(request.clip_count, 1, limits.max_clip_count)),
        ("seed", _number_fault(request.seed, 0, limits.max_seed)),
        ("num_inference_steps", _number_fault(request.num_inference_steps, 1, limits.max_steps)),
        ("guidance_scale", _number_fault(request.guidance_scale, 0, limits.max_guidance_scale)),
        ("guidance_stop", _number_fault(request.guidance_stop, 0, 1)),
        ("scheduler", _choice_fault(request.scheduler, limits.schedulers)),
        ("profile", profile_fault(request.profile, limits.profiles)),
        ("encoding", _choice_fault(request.encoding, ENCODINGS)),
        (
            "sample_rate_hertz",
            _number_fault(request.sampling_rate, MIN_SAMPLING_RATE, MAX_SAMPLING_RATE, " hertz")
            or rate_fault(request.encoding, request.sampling_rate),
        ),
        (
            "loudness",
            None if request.loudness is None else _number_fault(request.loudness, *LOUDNESS_RANGE, " dB"),
        ),
        ("adapter", _name_fault(request.adapter)),
        ("preview_interval_steps", _number_fault(request.preview_interval_steps, 0, limits.max_steps)),
    )
    return tuple(FieldViolation(field, fault) for field, fault in found if fault is not None)


def profile_fault(name: str, profiles: Sequence[str]) -> str | None:
    """Return what is wrong with the name of a profile, None if nothing is; the empty one is none."""
    if name and not profiles:
        return f"is {name[:40]!r}, and this model has no profiles; leave it out"
    return _choice_fault(name, profiles) if name else None


def validate(request: GenerationRequest, limits: Limits) -> None:
    """Raise `InvalidInputError` with every violation at once, if there is any."""
    found = violations(request, limits)
    if found:
        raise InvalidInputError(*found)


def _number_fault(value: float, low: float, high: float, unit: str = "") -> str | None:
    # Comparisons with NaN are false, so only the finite check refuses it.
    if math.isfinite(value) and low <= value <= high:
        return None
    # A duration arrives in binary floating point: show the bounds as a person would write them.
    return f"is {_plain(value)}{unit}, must be between {_plain(low)} and {_plain(high)}{unit}"


def _choice_fault(value: str, choices: Iterable[str]) -> str | None:
    if value in choices:
        return None
    return f"is {value[:40]!r}, must be one of {', '.join(choices)}"


def _name_fault(name: str) -> str | None:
    if len(name) <= MAX_ADAPTER_CHARACTERS and (name.isprintable() or not name):
        return None
    return f"is {name[:40]!r}, must be at most {MAX_ADAPTER_CHARACTERS} printable characters"


def _plain(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:g}"


# ----------------------------------------------------------------------------------------------------- events


@dataclass(frozen=True, kw_only=True, slots=True)
class Queued:
    """The request waits. Sent once at submission, and again whenever the position changes."""

    position: int
    """Clips of other requests that start before this request's first: 0 is next."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """One denoising step of the request is done. Sent once per denoiser call that held any of its clips."""

    clip_index: int
    """The first of the request's clips that took part in the call."""
    step: int
    """Steps that this clip has completed, 1 to `num_inference_steps`."""
    num_inference_steps: int
    """Steps that each clip of the request takes."""
    fraction: float
    """Exact share of the request's denoising steps that are done, over all its clips: 1.0 before decoding."""
    seconds_left: float | None
    """Estimated time until the last clip is decoded; None while there is no estimate."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Preview:
    """The first clip as the denoiser estimates it now: a log-mel spectrogram."""

    clip_index: int
    """Always the request's first clip, 0."""
    step: int
    """Steps that the clip has completed."""
    mel_TM: NDArray[np.uint8]
    """[T, M], linear in the natural logarithm: 0 is `MEL_FLOOR`, 255 is `MEL_CEILING`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Clip:
    """One clip. The engine gives it as ``float32``, which keeps every bit; services encode it."""

    audio: bytes = field(repr=False)
    encoding: str
    """Encoding of `audio`, one of `services.audio.encoding.ENCODINGS`."""
    sampling_rate: int
    """Sampling rate in hertz."""
    duration: float
    """Length in seconds."""
    index: int
    """Index in the request, 0 to `clip_count` - 1; clips arrive in the order in which they are done."""
    seed: int
    """The request's seed, which with `index` determines the noise."""

    @classmethod
    def of_samples(
        cls, waveform_N: NDArray[np.float32], sampling_rate: int, *, index: int = 0, seed: int = 0
    ) -> Self:
        """Return the clip of finite samples [N] within [-1, 1], bit for bit."""
        return cls(
            audio=waveform_N.astype("<f4", copy=False).tobytes(),
            encoding="float32",
            sampling_rate=sampling_rate,
            duration=len(waveform_N) / sampling_rate,
            index=index,
            seed=seed,
        )

    def waveform(self) -> NDArray[np.float32]:
        """Decode the samples, [N] in [-1, 1]."""
        return decode_audio(self.audio, self.encoding, self.sampling_rate)[0]

    def as_requested(self, request: GenerationRequest) -> "Clip":
        """Return the engine's clip at the loudness and in the encoding of `request`. Takes milliseconds."""
        clip = self
        if request.loudness is not None:
            waveform_N = at_loudness(self.waveform(), request.loudness)
            clip = Clip.of_samples(waveform_N, self.sampling_rate, index=self.index, seed=self.seed)
        return clip.encoded(request.encoding, request.sampling_rate)

    def encoded(self, encoding: str, sampling_rate: int) -> "Clip":
        """Return the clip in another encoding, resampled to `sampling_rate` hertz. Takes milliseconds."""
        if (encoding, sampling_rate) == (self.encoding, self.sampling_rate):
            return self
        audio = encode_audio(self.waveform(), self.sampling_rate, encoding, sampling_rate)
        return replace(self, audio=audio, encoding=encoding, sampling_rate=sampling_rate)


@dataclass(frozen=True, kw_only=True, slots=True)
class Timings:
    """Time of each stage of a request, in seconds of the wall clock."""

    queued: float
    """From submission until the first clip got a slot in the batch."""
    encode: float
    """Text encoder, for prompt and negative prompt; near 0 if both were cached."""
    denoise: float
    """From the start of its first denoiser call to the end of its last, calls for other requests included."""
    decode: float
    """Autoencoder and vocoder, summed over its clips."""
    total: float
    """From submission, or from the arrival of a call at a service, to the end."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Finished:
    """All clips were sent."""

    model: ModelVersion
    """Version of the weights that made them."""
    warnings: tuple[str, ...]
    """Warnings about the clips, one sentence each."""
    timings: Timings
    adapter: ModelVersion | None = None
    """Version of the adapter that they were made with."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Failed:
    """The request ended without (all of) its clips."""

    error: Exception
    """A `MilongaError` if the cause is known; any other exception is a bug."""


Update = Queued | Progress | Preview | Clip | Finished
"""The events of a stream; a failure is raised."""

Event = Update | Failed
"""The events of a request from the engine."""


def at_loudness(waveform_N: NDArray[np.float32], loudness: float) -> NDArray[np.float32]:
    """Return the clip with a root mean square of `loudness` dB relative to full scale.

    Less where its peak would exceed full scale. Silence stays silence.
    """
    peak = float(np.abs(waveform_N).max(initial=0.0))
    if not peak:
        return waveform_N
    rms = float(np.sqrt(np.mean(np.square(waveform_N, dtype=np.float64))))
    gain = min(10 ** (loudness / 20) / rms, 1 / peak)
    scaled_N: NDArray[np.float32] = (waveform_N * np.float32(gain)).clip(-1.0, 1.0)
    return scaled_N


def quantise_mel(mel_TM: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Return the bytes of a preview of a natural-log mel spectrogram; see `Preview.mel_TM`."""
    share_TM = (mel_TM - MEL_FLOOR) / (MEL_CEILING - MEL_FLOOR)
    levels_TM: NDArray[np.uint8] = np.rint(np.clip(np.nan_to_num(share_TM), 0.0, 1.0) * 255).astype(np.uint8)
    return levels_TM


# ---------------------------------------------------------------------------------------------------- answers


@dataclass(frozen=True, kw_only=True, slots=True)
class Generation:
    """The clips of one prompt."""

    clips: tuple[Clip, ...]
    """Clips, ordered by index."""
    seed: int
    """Seed of the noise, given or drawn."""
    model: ModelVersion
    warnings: tuple[str, ...]
    timings: Timings
    adapter: ModelVersion | None = None
    """Version of the adapter that they were made with."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelGeometry:
    """Sizes of a model's audio and latents. A size that a family does not have is 0."""

    sampling_rate: int
    """Sampling rate in hertz."""
    hop_length: int
    """Samples between two mel frames."""
    mel_bins: int
    latent_channels: int
    latent_downsampling: int
    """Mel frames per latent frame."""
    duration_grid: float
    """Step of the generated lengths in seconds; clips are cut to their duration."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerationModel:
    """A model that makes clips, with its limits and the defaults of its options."""

    model: ModelVersion
    geometry: ModelGeometry
    limits: Limits
    defaults: Defaults


def collect(events: Iterable[Event]) -> Generation:
    """Return the generation of a request's events. Raises the error of `Failed`."""
    clips: list[Clip] = []
    for event in events:
        match event:
            case Clip():
                clips.append(event)
            case Failed(error=error):
                raise error
            case Finished():
                return finished_generation(clips, event)
    raise ValueError("the events ended before the clips were finished")


def finished_generation(clips: Iterable[Clip], finished: Finished) -> Generation:
    """Return the generation of all clips and the last event."""
    ordered = tuple(sorted(clips, key=lambda clip: clip.index))
    return Generation(
        clips=ordered,
        seed=ordered[0].seed if ordered else 0,
        model=finished.model,
        warnings=finished.warnings,
        timings=finished.timings,
        adapter=finished.adapter,
    )


class ClipMaker(Protocol):
    """Makes clips: `AudioClient` through a service, `services.local.LocalClipMaker` in this process.

    Thread-safe. The same prompt, options and weights give the same clips. All methods raise the exceptions of
    `services.errors`.
    """

    def generate(self, prompt: str, **options: Unpack[GenerationOptions]) -> Generation:
        """Make the clips of a prompt; return when all are done."""
        ...

    def close(self) -> None:
        """Cancel requests in progress, and free all resources."""
        ...


class StreamingClipMaker(ClipMaker, Protocol):
    """A `ClipMaker` that also describes its model and yields events."""

    def get_model(self) -> GenerationModel:
        """Return the model that makes the clips, with its limits and defaults."""
        ...

    def stream(self, prompt: str, **options: Unpack[GenerationOptions]) -> Iterator[Update]:
        """Make the clips of a prompt; yield its events. Leaving the loop cancels the request."""
        ...
