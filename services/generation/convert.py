"""Between the wire and the engine: requests in, events out. Pure functions.

Shapes: N samples, T mel frames, M mel bins.
"""

import math
import secrets
from dataclasses import dataclass
from typing import TypedDict, Unpack

import numpy as np
from google.protobuf.duration_pb2 import Duration
from numpy.typing import NDArray

from milonga.v1 import audio_pb2
from milonga.v1 import generation_pb2 as pb
from services.audio.encoding import (
    DEFAULT_ENCODING,
    ENCODINGS,
    MAX_SAMPLING_RATE,
    MIN_SAMPLING_RATE,
    encode_audio,
    encoding_name,
)
from services.engine import Engine
from services.engine.events import ClipReady, Preview, Progress, Queued, Timings
from services.engine.request import GenerationRequest, Limits, violations
from services.errors import FieldViolation, InvalidInputError
from services.models.tango.geometry import Geometry
from services.weights.uri import ResolvedModel

# Drawn seeds stay below 2**32: easy to type, and exact in JSON.
_DRAWN_SEED_BITS = 32
# Room for headers of files and for the fields around the sound.
_CLIP_OVERHEAD_BYTES = 4096
# The range of a preview's bytes: the mel spectrogram's floor, and ten times full scale.
_PREVIEW_FLOOR, _PREVIEW_CEILING = math.log(1e-5), math.log(10.0)


@dataclass(frozen=True, kw_only=True, slots=True)
class Defaults:
    """What a field that is left out means."""

    duration: float
    """Seconds."""
    num_inference_steps: int
    """Denoising steps."""
    guidance_scale: float
    """Classifier-free guidance."""
    scheduler: str
    """Name of a scheduler."""


@dataclass(frozen=True, kw_only=True, slots=True)
class OutputFormat:
    """How the caller wants the sound."""

    encoding: str
    """A key of `services.audio.encoding.ENCODINGS`."""
    sampling_rate: int
    """Hertz."""


class Reading(TypedDict):
    """What a request is read against."""

    limits: Limits
    """What a request may ask for."""
    defaults: Defaults
    """What a field that is left out means."""
    sampling_rate: int
    """The model's own, in hertz."""


def reading_of(engine: Engine) -> Reading:
    """Return what requests to `engine` are read against."""
    config = engine.pipeline.config
    return {
        "limits": engine.limits,
        "defaults": Defaults(
            duration=config.default_duration,
            num_inference_steps=config.default_num_inference_steps,
            guidance_scale=config.default_guidance_scale,
            scheduler=config.default_scheduler,
        ),
        "sampling_rate": engine.pipeline.geometry.sampling_rate,
    }


def read_request(
    message: pb.GenerateAudioRequest, **reading: Unpack[Reading]
) -> tuple[GenerationRequest, OutputFormat]:
    """Return what GenerateAudio asks for, complete.

    Raises:
        InvalidInputError: with every violated field.
    """
    request = _request(message, reading["defaults"])
    output, faults = _output(message, reading["sampling_rate"])
    _refuse(*violations(request, reading["limits"]), *faults)
    return request, output


def read_stream_request(
    message: pb.StreamGenerateAudioRequest, **reading: Unpack[Reading]
) -> tuple[GenerationRequest, OutputFormat]:
    """As `read_request`, for StreamGenerateAudio; the inner request's fields are ``request.prompt``."""
    request = _request(message.request, reading["defaults"], message.preview_interval_steps)
    output, faults = _output(message.request, reading["sampling_rate"])
    _refuse(*(_as_streamed(fault) for fault in (*violations(request, reading["limits"]), *faults)))
    return request, output


def write_clip(event: ClipReady, output: OutputFormat) -> pb.GeneratedClip:
    """Encode one clip. Takes milliseconds: call it off the event loop."""
    return pb.GeneratedClip(
        clip=audio_pb2.Clip(
            audio=encode_audio(event.waveform, event.sampling_rate, output.encoding, output.sampling_rate),
            encoding=ENCODINGS[output.encoding],
            sample_rate_hertz=output.sampling_rate,
            duration=write_duration(len(event.waveform) / event.sampling_rate),
        ),
        clip_index=event.clip_index,
        seed=event.seed,
    )


def write_event(event: Queued | Progress | Preview) -> pb.StreamGenerateAudioResponse:
    """Return the message of an event on the way."""
    match event:
        case Queued():
            return pb.StreamGenerateAudioResponse(queued=pb.QueuedEvent(position=event.position))
        case Progress():
            return pb.StreamGenerateAudioResponse(progress=_progress(event))
        case Preview():
            return pb.StreamGenerateAudioResponse(preview=_preview(event))


def write_timings(timings: Timings, total: float) -> pb.GenerationTimings:
    """Return the message of the engine's timings and the `total` of the call, in seconds."""
    return pb.GenerationTimings(
        queued=write_duration(timings.queued),
        encode=write_duration(timings.encode),
        denoise=write_duration(timings.denoise),
        decode=write_duration(timings.decode),
        total=write_duration(total),
    )


def write_model(
    model: ResolvedModel, geometry: Geometry, limits: Limits, defaults: Defaults
) -> pb.GetModelResponse:
    """Return the answer of GetModel."""
    return pb.GetModelResponse(
        model=model.message(),
        geometry=pb.ModelGeometry(
            sample_rate_hertz=geometry.sampling_rate,
            hop_length=geometry.hop_length,
            mel_bin_count=geometry.mel_bins,
            latent_channel_count=geometry.latent_channels,
            latent_downsampling=geometry.latent_downsampling,
            duration_grid=write_duration(geometry.grid * geometry.frame_multiple),
        ),
        limits=_limits(limits),
        defaults=pb.GenerationDefaults(
            duration=write_duration(defaults.duration),
            clip_count=1,
            num_inference_steps=defaults.num_inference_steps,
            guidance_scale=defaults.guidance_scale,
            scheduler=defaults.scheduler,
            encoding=ENCODINGS[DEFAULT_ENCODING],
            sample_rate_hertz=geometry.sampling_rate,
        ),
    )


def max_response_bytes(limits: Limits) -> int:
    """Return the size of the largest answer: every clip at the longest, in float32 at the highest rate."""
    samples = math.ceil(limits.max_duration * MAX_SAMPLING_RATE)
    return limits.max_clip_count * (samples * np.dtype(np.float32).itemsize + _CLIP_OVERHEAD_BYTES)


def _request(
    message: pb.GenerateAudioRequest, defaults: Defaults, preview_interval: int = 0
) -> GenerationRequest:
    def given(name: str) -> bool:
        return message.HasField(name)  # type: ignore[arg-type]

    return GenerationRequest(
        prompt=message.prompt,
        negative_prompt=message.negative_prompt,
        duration=_seconds(message.duration) if given("duration") else defaults.duration,
        clip_count=message.clip_count if given("clip_count") else 1,
        seed=message.seed if given("seed") else secrets.randbits(_DRAWN_SEED_BITS),
        num_inference_steps=(
            message.num_inference_steps if given("num_inference_steps") else defaults.num_inference_steps
        ),
        guidance_scale=message.guidance_scale if given("guidance_scale") else defaults.guidance_scale,
        scheduler=message.scheduler or defaults.scheduler,
        preview_interval_steps=preview_interval,
    )


def _output(
    message: pb.GenerateAudioRequest, sampling_rate: int
) -> tuple[OutputFormat, tuple[FieldViolation, ...]]:
    faults = []
    encoding = encoding_name(message.encoding)
    if encoding is None:
        names = ", ".join(audio_pb2.AudioEncoding.Name(value) for value in ENCODINGS.values())
        faults.append(FieldViolation("encoding", f"is {message.encoding}, must be one of {names}"))
    rate = message.sample_rate_hertz if message.HasField("sample_rate_hertz") else sampling_rate
    if not MIN_SAMPLING_RATE <= rate <= MAX_SAMPLING_RATE:
        bounds = f"between {MIN_SAMPLING_RATE} and {MAX_SAMPLING_RATE} hertz"
        faults.append(
            FieldViolation(
                "sample_rate_hertz",
                f"is {rate}, must be {bounds}; leave it out for the model's own, {sampling_rate}",
            )
        )
    return OutputFormat(encoding=encoding or DEFAULT_ENCODING, sampling_rate=rate), tuple(faults)


def _refuse(*faults: FieldViolation) -> None:
    if faults:
        raise InvalidInputError(*faults)


def _as_streamed(fault: FieldViolation) -> FieldViolation:
    outer = fault.field in pb.StreamGenerateAudioRequest.DESCRIPTOR.fields_by_name
    return fault if outer else FieldViolation(f"request.{fault.field}", fault.description)


def _progress(event: Progress) -> pb.ProgressEvent:
    return pb.ProgressEvent(
        clip_index=event.clip_index,
        step=event.step,
        num_inference_steps=event.num_inference_steps,
        fraction=event.fraction,
        time_left=None if event.seconds_left is None else write_duration(event.seconds_left),
    )


def _preview(event: Preview) -> pb.PreviewEvent:
    frames, bins = event.mel_TM.shape
    return pb.PreviewEvent(
        clip_index=event.clip_index,
        step=event.step,
        frame_count=frames,
        mel_bin_count=bins,
        log_mel=_quantise(event.mel_TM).tobytes(),
    )


def _quantise(mel_TM: NDArray[np.float32]) -> NDArray[np.uint8]:
    share_TM = (mel_TM - _PREVIEW_FLOOR) / (_PREVIEW_CEILING - _PREVIEW_FLOOR)
    levels_TM: NDArray[np.uint8] = np.rint(np.clip(np.nan_to_num(share_TM), 0.0, 1.0) * 255).astype(np.uint8)
    return levels_TM


def _limits(limits: Limits) -> pb.GenerationLimits:
    return pb.GenerationLimits(
        max_prompt_characters=limits.max_prompt_characters,
        min_duration=write_duration(limits.min_duration),
        max_duration=write_duration(limits.max_duration),
        max_clip_count=limits.max_clip_count,
        min_num_inference_steps=1,
        max_num_inference_steps=limits.max_steps,
        min_guidance_scale=0.0,
        max_guidance_scale=limits.max_guidance_scale,
        schedulers=limits.schedulers,
        encodings=ENCODINGS.values(),
        min_sample_rate_hertz=MIN_SAMPLING_RATE,
        max_sample_rate_hertz=MAX_SAMPLING_RATE,
        max_response_bytes=max_response_bytes(limits),
    )


def _seconds(duration: Duration) -> float:
    return duration.ToNanoseconds() / 1e9


def write_duration(seconds: float) -> Duration:
    """Return the message of a length of time."""
    duration = Duration()
    duration.FromNanoseconds(round(seconds * 1e9))
    return duration
