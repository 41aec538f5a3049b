"""Decode and check the clips and prompts of requests.

Every function blocks for milliseconds: call it off the event loop.

Shapes: N samples, C channels.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeVar

import numpy as np
from google.protobuf.duration_pb2 import Duration

from milonga.v1 import audio_pb2
from services.audio.containers import Container
from services.audio.decoding import (
    AudioBounds,
    Mix,
    ReadClip,
    channel_faults,
    decode_steps,
    length_faults,
    measure,
    rate_faults,
    refuse,
)
from services.audio.prompt import prompt_fault
from services.audio.steps import Steps, finish
from services.errors import FieldViolation, InvalidInputError, invalid

_BARE: "Final[Mapping[audio_pb2.AudioEncoding.ValueType, np.dtype[Any]]]" = {
    audio_pb2.AUDIO_ENCODING_LINEAR16: np.dtype("<i2"),
    audio_pb2.AUDIO_ENCODING_FLOAT32: np.dtype("<f4"),
}
_CONTAINERS: "Final[Mapping[audio_pb2.AudioEncoding.ValueType, Container | None]]" = {
    audio_pb2.AUDIO_ENCODING_UNSPECIFIED: None,
    audio_pb2.AUDIO_ENCODING_WAV: "WAV",
    audio_pb2.AUDIO_ENCODING_FLAC: "FLAC",
    audio_pb2.AUDIO_ENCODING_OGG_VORBIS: "OGG",
    audio_pb2.AUDIO_ENCODING_OGG_OPUS: "OGG",
    audio_pb2.AUDIO_ENCODING_MP3: "MP3",
}

Message = TypeVar("Message")
Read = TypeVar("Read")
Kept = TypeVar("Kept")


def read_clip(clip: audio_pb2.Clip, field: str, bounds: AudioBounds) -> ReadClip:
    """Return one decoded clip.

    Raises:
        InvalidInputError: lists the violated fields of `clip`, whose own path is `field`.
    """
    return finish(clip_steps(clip, field, bounds))


def clip_steps(clip: audio_pb2.Clip, field: str, bounds: AudioBounds) -> Steps[ReadClip]:
    """Do as `read_clip`, in steps."""
    if clip.encoding in _BARE:
        return _read_samples(clip, field, bounds, _BARE[clip.encoding])
    if clip.encoding in _CONTAINERS:
        return (yield from _read_file(clip, field, bounds))
    names = ", ".join(audio_pb2.AudioEncoding.Name(value) for value in (*_CONTAINERS, *_BARE))
    raise invalid(f"{field}.encoding", f"is {clip.encoding}, must be one of {names}")


@dataclass(frozen=True, kw_only=True, slots=True)
class CallSize:
    """What the clips of a call come to when they are decoded, at most."""

    seconds: tuple[float, ...]
    """Length of each clip; 0 for a clip that will be refused."""
    samples: int
    """Samples of all channels of all clips: how long decoding takes."""
    largest: int
    """Samples of the largest clip."""


def measure_clips(clips: Sequence[audio_pb2.Clip], field: str, bounds: AudioBounds) -> CallSize:
    """Return the size of a call by the headers of its clips; nothing is decoded.

    Raises:
        InvalidInputError: there are no clips, too many, or `bounds.max_decoded_bytes` is exceeded.
    """
    _check_count(clips, field, bounds)
    return _measure(((clip, f"{field}[{index}]") for index, clip in enumerate(clips)), bounds)


def measure_pairs(pairs: Sequence[audio_pb2.PromptedClip], field: str, bounds: AudioBounds) -> CallSize:
    """Do as `measure_clips` for clips with prompts."""
    _check_count(pairs, field, bounds)
    return _measure(((pair.clip, f"{field}[{index}].clip") for index, pair in enumerate(pairs)), bounds)


def read_clips(clips: Sequence[audio_pb2.Clip], field: str, bounds: AudioBounds) -> list[ReadClip]:
    """Return the decoded clips of a call.

    Raises:
        InvalidInputError: lists every violated field of every clip (``clips[2].audio``); or `field` if there
            are none or too many, or the first clip with which they exceed `bounds.max_decoded_bytes`.
    """
    measure_clips(clips, field, bounds)
    return finish(clips_steps(clips, field, bounds, lambda clip: clip))


def clips_steps(
    clips: Sequence[audio_pb2.Clip], field: str, bounds: AudioBounds, keep: Callable[[ReadClip], Kept]
) -> Steps[list[Kept]]:
    """Return what `keep` returns for each clip, in steps, after `measure_clips`. Raises as `read_clips`.

    `keep` is called as soon as a clip is decoded, so that no two need memory at a time.
    """

    def read(clip: audio_pb2.Clip, path: str) -> Steps[Kept]:
        decoded = yield from clip_steps(clip, path, bounds)
        return keep(decoded)

    return (yield from _read_each(clips, field, read))


def read_pairs(
    pairs: Sequence[audio_pb2.PromptedClip], field: str, bounds: AudioBounds
) -> list[tuple[str, ReadClip]]:
    """Do as `read_clips` for clips with prompts: ``pairs[2].prompt``, ``pairs[2].clip.audio``."""
    measure_pairs(pairs, field, bounds)
    return finish(pairs_steps(pairs, field, bounds, lambda clip: clip))


def pairs_steps(
    pairs: Sequence[audio_pb2.PromptedClip], field: str, bounds: AudioBounds, keep: Callable[[ReadClip], Kept]
) -> Steps[list[tuple[str, Kept]]]:
    """Do as `clips_steps` for clips with prompts, after `measure_pairs`. Raises as `read_pairs`."""

    def read(pair: audio_pb2.PromptedClip, path: str) -> Steps[tuple[str, Kept]]:
        faults = [*check_prompt(pair.prompt, f"{path}.prompt", bounds)]
        try:
            decoded = yield from clip_steps(pair.clip, f"{path}.clip", bounds)
        except InvalidInputError as error:
            raise InvalidInputError(*faults, *error.violations) from error
        refuse(faults)
        return pair.prompt, keep(decoded)

    return (yield from _read_each(pairs, field, read))


def read_prompts(prompts: Sequence[str], field: str, bounds: AudioBounds) -> list[str]:
    """Check the prompts of a call.

    Raises:
        InvalidInputError: lists every violated prompt (``prompts[2]``), or `field` if there are none or too
            many.
    """

    _check_count(prompts, field, bounds)
    refuse(
        fault
        for index, prompt in enumerate(prompts)
        for fault in check_prompt(prompt, f"{field}[{index}]", bounds)
    )
    return list(prompts)


def check_prompt(prompt: str, field: str, bounds: AudioBounds) -> tuple[FieldViolation, ...]:
    """Return the violations of `prompt`; empty if there are none."""
    fault = prompt_fault(prompt, bounds.max_prompt_characters)
    return () if fault is None else (FieldViolation(field, fault),)


def write_limits(bounds: AudioBounds, max_request_bytes: int) -> audio_pb2.AudioLimits:
    """Return the limits of a call as the wire states them."""
    return audio_pb2.AudioLimits(
        max_batch_size=bounds.max_batch_size,
        max_prompt_characters=bounds.max_prompt_characters,
        min_duration=_duration(bounds.min_seconds),
        max_duration=_duration(bounds.max_seconds),
        min_sample_rate_hertz=bounds.min_rate,
        max_sample_rate_hertz=bounds.max_rate,
        max_channel_count=bounds.max_channels,
        max_request_bytes=max_request_bytes,
    )


def _check_count(messages: Sequence[object], field: str, bounds: AudioBounds) -> None:
    if not messages:
        raise invalid(field, f"is empty, must have between 1 and {bounds.max_batch_size} elements")
    if len(messages) > bounds.max_batch_size:
        raise invalid(
            field,
            f"has {len(messages)} elements, the limit is {bounds.max_batch_size}; send them in several calls",
        )


def _measure(clips: Iterable[tuple[audio_pb2.Clip, str]], bounds: AudioBounds) -> CallSize:
    sizes: list[tuple[float, int]] = []
    total = 0
    for clip, path in clips:
        sizes.append(_clip_size(clip, bounds))
        total += 4 * sizes[-1][1]
        if total > bounds.max_decoded_bytes:
            raise invalid(
                f"{path}.audio",
                f"brings this call's clips, decoded, to {total / 2**20:.1f} MiB, "
                f"the limit is {bounds.max_decoded_bytes / 2**20:g} MiB; send them in several calls",
            )
    seconds, samples = zip(*sizes, strict=True)
    return CallSize(seconds=seconds, samples=sum(samples), largest=max(samples))


def _clip_size(clip: audio_pb2.Clip, bounds: AudioBounds) -> tuple[float, int]:
    if clip.encoding not in _BARE:
        return measure(clip.audio, bounds)
    samples = len(clip.audio) // _BARE[clip.encoding].itemsize
    rate = max(bounds.min_rate, clip.sample_rate_hertz) * max(1, clip.channel_count)
    return min(samples / rate, bounds.max_seconds), samples


def _read_each(
    messages: Sequence[Message], field: str, read: Callable[[Message, str], Steps[Read]]
) -> Steps[list[Read]]:
    done: list[Read] = []
    faults: list[FieldViolation] = []
    for index, message in enumerate(messages):
        try:
            made = yield from read(message, f"{field}[{index}]")
        except InvalidInputError as error:
            faults.extend(error.violations)
            done.clear()
        else:
            if not faults:  # a call that is refused anyway needs no samples
                done.append(made)
        yield
    refuse(faults)
    return done


def _read_samples(clip: audio_pb2.Clip, field: str, bounds: AudioBounds, kind: "np.dtype[Any]") -> ReadClip:
    rate, channels = clip.sample_rate_hertz, clip.channel_count or 1
    faults = [
        *rate_faults(
            f"{field}.sample_rate_hertz", "is", rate, bounds, "; bare samples carry it nowhere else"
        ),
        *channel_faults(f"{field}.channel_count", "is", channels, bounds),
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
        faults += length_faults(f"{field}.audio", frames / rate, bounds)
    refuse(faults)
    samples_NC = np.frombuffer(clip.audio, dtype=kind).reshape(frames, channels)
    if kind.kind == "i":
        samples_NC = np.maximum(samples_NC / np.float32(32767), np.float32(-1.0))
    mix = Mix(f"{field}.audio")
    mix.add(samples_NC)
    return mix.clip(rate, may_be_silent=bounds.may_be_silent)


def _read_file(clip: audio_pb2.Clip, field: str, bounds: AudioBounds) -> Steps[ReadClip]:
    if not clip.audio:
        raise InvalidInputError(_empty(f"{field}.audio"))
    return decode_steps(
        clip.audio,
        f"{field}.audio",
        bounds,
        expected=_CONTAINERS[clip.encoding],
        stated_rate=clip.sample_rate_hertz,
    )


def _empty(path: str) -> FieldViolation:
    return FieldViolation(path, "is empty; send an encoded clip")


def _duration(seconds: float) -> Duration:
    duration = Duration()
    duration.FromNanoseconds(round(seconds * 1e9))
    return duration
