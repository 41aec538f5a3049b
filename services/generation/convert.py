"""Convert wire messages to requests, and events to wire messages. Pure functions.

Shapes: T mel frames, M mel bins.
"""

from typing import Any, cast

from milonga.v1 import audio_pb2
from milonga.v1 import generation_pb2 as pb
from services.api.generation import (
    Clip,
    Finished,
    GenerationModel,
    GenerationOptions,
    GenerationRequest,
    Limits,
    Preview,
    Progress,
    Queued,
    Timings,
    Update,
    violations,
)
from services.audio.encoding import MAX_SAMPLING_RATE, MIN_SAMPLING_RATE
from services.errors import FieldViolation, InvalidInputError
from services.wire import (
    WIRE_ENCODINGS,
    encoding_name,
    read_duration,
    write_duration,
    write_version,
)


def read_request(message: pb.GenerateAudioRequest, model: GenerationModel) -> GenerationRequest:
    """Return the complete request of a GenerateAudio message.

    Raises:
        InvalidInputError: with every violated field.
    """
    request, faults = _read(message, model, preview_interval_steps=0)
    if faults:
        raise InvalidInputError(*faults)
    return request


def read_stream_request(message: pb.StreamGenerateAudioRequest, model: GenerationModel) -> GenerationRequest:
    """Return the request of a StreamGenerateAudio message; inner fields are named ``request.prompt``.

    Raises as `read_request`.
    """
    request, faults = _read(message.request, model, preview_interval_steps=message.preview_interval_steps)
    if faults:
        raise InvalidInputError(*map(_as_streamed, faults))
    return request


def write_clip(clip: Clip, request: GenerationRequest) -> pb.GeneratedClip:
    """Encode one clip. Takes milliseconds: call it off the event loop."""
    encoded = clip.as_requested(request)
    return pb.GeneratedClip(
        clip=audio_pb2.Clip(
            audio=encoded.audio,
            encoding=WIRE_ENCODINGS[encoded.encoding],
            sample_rate_hertz=encoded.sampling_rate,
            duration=write_duration(clip.duration),
        ),
        clip_index=clip.index,
        seed=clip.seed,
    )


def write_event(event: Update, request: GenerationRequest, total: float) -> pb.StreamGenerateAudioResponse:
    """Return the message of an event. `total`: seconds since the call arrived. Clips take milliseconds."""
    match event:
        case Queued():
            return pb.StreamGenerateAudioResponse(queued=pb.QueuedEvent(position=event.position))
        case Progress():
            return pb.StreamGenerateAudioResponse(progress=_progress(event))
        case Preview():
            return pb.StreamGenerateAudioResponse(preview=_preview(event))
        case Clip():
            return pb.StreamGenerateAudioResponse(clip=write_clip(event, request))
        case Finished():
            return pb.StreamGenerateAudioResponse(
                finished=pb.FinishedEvent(
                    model=write_version(event.model),
                    warnings=event.warnings,
                    timings=write_timings(event.timings, total),
                )
            )


def write_timings(timings: Timings, total: float) -> pb.GenerationTimings:
    """Return the message of the engine's timings and the `total` of the call, in seconds."""
    return pb.GenerationTimings(
        queued=write_duration(timings.queued),
        encode=write_duration(timings.encode),
        denoise=write_duration(timings.denoise),
        decode=write_duration(timings.decode),
        total=write_duration(total),
    )


def write_model(model: GenerationModel) -> pb.GetModelResponse:
    """Return the response of GetModel."""
    geometry, defaults = model.geometry, model.defaults
    return pb.GetModelResponse(
        model=write_version(model.model),
        geometry=pb.ModelGeometry(
            sample_rate_hertz=geometry.sampling_rate,
            hop_length=geometry.hop_length,
            mel_bin_count=geometry.mel_bins,
            latent_channel_count=geometry.latent_channels,
            latent_downsampling=geometry.latent_downsampling,
            duration_grid=write_duration(geometry.duration_grid),
        ),
        limits=_limits(model.limits),
        defaults=pb.GenerationDefaults(
            duration=write_duration(defaults.duration),
            clip_count=defaults.clip_count,
            num_inference_steps=defaults.num_inference_steps,
            guidance_scale=defaults.guidance_scale,
            scheduler=defaults.scheduler,
            encoding=WIRE_ENCODINGS[defaults.encoding],
            sample_rate_hertz=defaults.sampling_rate,
        ),
    )


def _read(
    message: pb.GenerateAudioRequest, model: GenerationModel, *, preview_interval_steps: int
) -> tuple[GenerationRequest, tuple[FieldViolation, ...]]:
    """Return the request, and its violations under the field names of `GenerateAudioRequest`."""
    options: dict[str, Any] = {field.name: value for field, value in message.ListFields()}
    faults: list[FieldViolation] = []
    prompt = options.pop("prompt", "")
    if "duration" in options:
        options["duration"] = read_duration(message.duration)
    if "sample_rate_hertz" in options:
        options["sampling_rate"] = options.pop("sample_rate_hertz")
    if "encoding" in options:
        options["encoding"] = encoding_name(message.encoding)
        if options["encoding"] is None:
            names = ", ".join(audio_pb2.AudioEncoding.Name(value) for value in WIRE_ENCODINGS.values())
            faults.append(FieldViolation("encoding", f"is {message.encoding}, must be one of {names}"))
    request = GenerationRequest.of(
        prompt,
        model.defaults,
        preview_interval_steps=preview_interval_steps,
        **cast(GenerationOptions, options),
    )
    return request, (*violations(request, model.limits), *faults)


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
        log_mel=event.mel_TM.tobytes(),
    )


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
        encodings=WIRE_ENCODINGS.values(),
        min_sample_rate_hertz=MIN_SAMPLING_RATE,
        max_sample_rate_hertz=MAX_SAMPLING_RATE,
        max_response_bytes=limits.max_response_bytes,
    )
