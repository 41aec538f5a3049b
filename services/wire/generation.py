"""Convert requests, clips and models of generation.proto between the wire and Python. Pure functions."""

from dataclasses import asdict
from typing import Any, cast

from milonga.v1 import audio_pb2
from milonga.v1 import generation_pb2 as pb
from services.api.generation import (
    Clip,
    GenerationModel,
    GenerationOptions,
    GenerationRequest,
    Limits,
    violations,
)
from services.audio.encoding import MAX_SAMPLING_RATE, MIN_SAMPLING_RATE
from services.errors import FieldViolation
from services.wire import (
    WIRE_ENCODINGS,
    encoding_name,
    read_duration,
    write_duration,
    write_version,
)


def read_generation(
    message: pb.GenerateAudioRequest, model: GenerationModel, *, preview_interval_steps: int = 0
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


def write_sound(clip: Clip) -> audio_pb2.Clip:
    """Return the message of a clip, in its own encoding."""
    return audio_pb2.Clip(
        audio=clip.audio,
        encoding=WIRE_ENCODINGS[clip.encoding],
        sample_rate_hertz=clip.sampling_rate,
        duration=write_duration(clip.duration),
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
            guidance_stop=defaults.guidance_stop,
            scheduler=defaults.scheduler,
            encoding=WIRE_ENCODINGS[defaults.encoding],
            sample_rate_hertz=defaults.sampling_rate,
            profile=defaults.profile,
            profiles=[pb.GenerationProfile(**asdict(one)) for one in defaults.profiles],
        ),
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
        adapters=limits.adapters,
        encodings=WIRE_ENCODINGS.values(),
        min_sample_rate_hertz=MIN_SAMPLING_RATE,
        max_sample_rate_hertz=MAX_SAMPLING_RATE,
        max_response_bytes=limits.max_response_bytes,
    )
