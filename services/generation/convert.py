"""Convert wire messages to requests, and events to wire messages. Pure functions.

Shapes: T mel frames, M mel bins.
"""

from milonga.v1 import generation_pb2 as pb
from services.api.generation import (
    Clip,
    Finished,
    GenerationModel,
    GenerationRequest,
    Preview,
    Progress,
    Queued,
    Timings,
    Update,
)
from services.errors import FieldViolation, InvalidInputError
from services.wire import write_duration, write_version
from services.wire.generation import read_generation, write_sound


def read_request(message: pb.GenerateAudioRequest, model: GenerationModel) -> GenerationRequest:
    """Return the complete request of a GenerateAudio message.

    Raises:
        InvalidInputError: with every violated field.
    """
    request, faults = read_generation(message, model)
    if faults:
        raise InvalidInputError(*faults)
    return request


def read_stream_request(message: pb.StreamGenerateAudioRequest, model: GenerationModel) -> GenerationRequest:
    """Return the request of a StreamGenerateAudio message; inner fields are named ``request.prompt``.

    Raises as `read_request`.
    """
    request, faults = read_generation(
        message.request, model, preview_interval_steps=message.preview_interval_steps
    )
    if faults:
        raise InvalidInputError(*map(_as_streamed, faults))
    return request


def write_clip(clip: Clip, request: GenerationRequest) -> pb.GeneratedClip:
    """Encode one clip. Takes milliseconds: call it off the event loop."""
    return pb.GeneratedClip(
        clip=write_sound(clip.as_requested(request)), clip_index=clip.index, seed=clip.seed
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
                    adapter=None if event.adapter is None else write_version(event.adapter),
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
