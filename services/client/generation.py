"""The rpcs of generation.proto: build requests, read responses."""

from numbers import Real
from typing import Unpack

import numpy as np

from milonga.v1 import generation_pb2 as pb
from milonga.v1 import generation_pb2_grpc as rpc
from services.api.generation import (
    Clip,
    Defaults,
    Finished,
    Generation,
    GenerationModel,
    GenerationOptions,
    Limits,
    ModelGeometry,
    Preview,
    Profile,
    Progress,
    Queued,
    Timings,
    Update,
)
from services.client.transport import Service, Stream, Unary
from services.errors import FieldViolation, InvalidInputError, MilongaError, invalid, shown_value
from services.wire import WIRE_ENCODINGS, encoding_name, read_duration, read_version, write_duration

MAX_TEXT_BYTES = 2**18
"""Maximum size of a prompt that the client sends, in UTF-8. Services' limits are far lower."""


def build_request(prompt: str, **options: Unpack[GenerationOptions]) -> pb.GenerateAudioRequest:
    """Return the message of a prompt and options.

    Raises:
        InvalidInputError: values that a message can't hold (a NaN duration, a negative seed, an unknown
            encoding, a prompt of megabytes); lists all of them. The service checks the limits.
    """
    given = {name: value for name, value in options.items() if value is not None}
    seconds, encoding = given.pop("duration", None), given.pop("encoding", None)
    if "sampling_rate" in given:
        given["sample_rate_hertz"] = given.pop("sampling_rate")
    request = pb.GenerateAudioRequest()
    faults: list[FieldViolation] = []
    for name, value in {"prompt": prompt, **given}.items():
        if name not in request.DESCRIPTOR.fields_by_name:
            raise TypeError(f"there is no generation option {name!r}")
        try:
            setattr(request, name, value)
        except ValueError as error:
            faults.append(
                FieldViolation(name, f"is {shown_value(value)}, which the wire can't carry: {error}")
            )
        except TypeError:  # its message may have the text of any object
            faults.append(FieldViolation(name, f"is {shown_value(value)}, must be {_kind_of(request, name)}"))
    if seconds is not None:
        try:
            if not isinstance(seconds, Real):
                raise TypeError
            request.duration.CopyFrom(write_duration(float(seconds)))
        except (ValueError, OverflowError, TypeError):
            shown = shown_value(seconds)
            faults.append(
                FieldViolation("duration", f"is {shown}, which is not a duration; give finite seconds")
            )
    if encoding is not None and not (isinstance(encoding, str) and encoding in WIRE_ENCODINGS):
        known = ", ".join(WIRE_ENCODINGS)
        faults.append(FieldViolation("encoding", f"is {shown_value(encoding)}, must be one of {known}"))
    elif encoding is not None:
        request.encoding = WIRE_ENCODINGS[str(encoding)]
    for name in ("prompt", "negative_prompt"):
        size = len(getattr(request, name).encode())
        if size > MAX_TEXT_BYTES:
            # gRPC refuses a larger message with an error that does not name the field.
            faults.append(FieldViolation(name, f"is {size} bytes long, must be {MAX_TEXT_BYTES} at most"))
    if faults:
        raise InvalidInputError(*faults)
    return request


def _kind_of(request: pb.GenerateAudioRequest, name: str) -> str:
    field = request.DESCRIPTOR.fields_by_name[name]
    kinds = {field.CPPTYPE_STRING: "text", field.CPPTYPE_FLOAT: "a number", field.CPPTYPE_DOUBLE: "a number"}
    return kinds.get(field.cpp_type, "a whole number")


def stream_request(request: pb.GenerateAudioRequest, interval: int | None) -> pb.StreamGenerateAudioRequest:
    """Return the message of StreamGenerateAudio with `interval` steps between previews; None: no previews.

    Raises:
        InvalidInputError: a message can't hold the interval.
    """
    try:
        return pb.StreamGenerateAudioRequest(request=request, preview_interval_steps=interval)
    except (ValueError, TypeError) as error:
        raise invalid(
            "preview_interval_steps", f"is {shown_value(interval)}, must be a whole number of steps"
        ) from error


def read_response(response: pb.GenerateAudioResponse) -> Generation:
    """Return the value of a response of GenerateAudio."""
    clips = tuple(_read_clip(clip) for clip in response.clips)
    return Generation(
        clips=clips,
        seed=clips[0].seed if clips else 0,
        model=read_version(response.model),
        warnings=tuple(response.warnings),
        timings=_read_timings(response.timings),
        adapter=read_version(response.adapter) if response.HasField("adapter") else None,
    )


def read_update(response: pb.StreamGenerateAudioResponse) -> Update:
    """Return the value of an event of StreamGenerateAudio.

    Raises:
        MilongaError: the event is unknown, since the client is too old.
    """
    match response.WhichOneof("event"):
        case "queued":
            return Queued(position=response.queued.position)
        case "progress":
            return _read_progress(response.progress)
        case "preview":
            return _read_preview(response.preview)
        case "clip":
            return _read_clip(response.clip)
        case "finished":
            return Finished(
                model=read_version(response.finished.model),
                warnings=tuple(response.finished.warnings),
                timings=_read_timings(response.finished.timings),
                adapter=read_version(response.finished.adapter)
                if response.finished.HasField("adapter")
                else None,
            )
        case _:
            raise MilongaError("the service sent an event that this client does not know; update milonga")


def read_model(response: pb.GetModelResponse) -> GenerationModel:
    """Return the value of a response of GetModel."""
    geometry, limits, defaults = response.geometry, response.limits, response.defaults
    return GenerationModel(
        model=read_version(response.model),
        geometry=ModelGeometry(
            sampling_rate=geometry.sample_rate_hertz,
            hop_length=geometry.hop_length,
            mel_bins=geometry.mel_bin_count,
            latent_channels=geometry.latent_channel_count,
            latent_downsampling=geometry.latent_downsampling,
            duration_grid=read_duration(geometry.duration_grid),
        ),
        limits=Limits(
            max_prompt_characters=limits.max_prompt_characters,
            min_duration=read_duration(limits.min_duration),
            max_duration=read_duration(limits.max_duration),
            max_clip_count=limits.max_clip_count,
            max_steps=limits.max_num_inference_steps,
            max_guidance_scale=limits.max_guidance_scale,
            schedulers=tuple(limits.schedulers),
            adapters=tuple(limits.adapters),
            profiles=tuple(one.name for one in defaults.profiles),
        ),
        defaults=Defaults(
            duration=read_duration(defaults.duration),
            clip_count=defaults.clip_count,
            num_inference_steps=defaults.num_inference_steps,
            guidance_scale=defaults.guidance_scale,
            guidance_stop=_guidance_stop(defaults),
            scheduler=defaults.scheduler,
            encoding=encoding_name(defaults.encoding) or "unknown",
            sampling_rate=defaults.sample_rate_hertz,
            profile=defaults.profile,
            profiles=tuple(_read_profile(one) for one in defaults.profiles),
        ),
    )


SERVICE = Service(
    name="generation",
    argument="target",
    stub=rpc.GenerationServiceStub,
    remedy="take fewer steps",
)
GENERATE = Unary(service=SERVICE, method=lambda stub: stub.GenerateAudio, read=read_response)
STREAM = Stream(
    service=SERVICE, method=lambda stub: stub.StreamGenerateAudio, read=read_update, last=Finished
)
GET_MODEL = Unary(service=SERVICE, method=lambda stub: stub.GetModel, read=read_model)


def _read_profile(profile: pb.GenerationProfile) -> Profile:
    return Profile(
        name=profile.name,
        num_inference_steps=profile.num_inference_steps,
        guidance_scale=profile.guidance_scale,
        guidance_stop=_guidance_stop(profile),
        scheduler=profile.scheduler,
    )


def _guidance_stop(settings: pb.GenerationDefaults | pb.GenerationProfile) -> float:
    # Services of earlier releases do not send it.
    return settings.guidance_stop if settings.HasField("guidance_stop") else 1.0


def _read_progress(event: pb.ProgressEvent) -> Progress:
    return Progress(
        clip_index=event.clip_index,
        step=event.step,
        num_inference_steps=event.num_inference_steps,
        fraction=event.fraction,
        seconds_left=read_duration(event.time_left) if event.HasField("time_left") else None,
    )


def _read_preview(event: pb.PreviewEvent) -> Preview:
    mel_TM = np.frombuffer(event.log_mel, dtype=np.uint8).reshape(event.frame_count, event.mel_bin_count)
    return Preview(clip_index=event.clip_index, step=event.step, mel_TM=mel_TM)


def _read_clip(generated: pb.GeneratedClip) -> Clip:
    return Clip(
        audio=generated.clip.audio,
        encoding=encoding_name(generated.clip.encoding) or "unknown",
        sampling_rate=generated.clip.sample_rate_hertz,
        duration=read_duration(generated.clip.duration),
        index=generated.clip_index,
        seed=generated.seed,
    )


def _read_timings(timings: pb.GenerationTimings) -> Timings:
    return Timings(
        queued=read_duration(timings.queued),
        encode=read_duration(timings.encode),
        denoise=read_duration(timings.denoise),
        decode=read_duration(timings.decode),
        total=read_duration(timings.total),
    )
