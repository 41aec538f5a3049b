"""Decode and check the clips and prompts of requests.

Every function blocks for milliseconds: call it off the event loop.

Shapes: N samples, C channels.
"""

from collections.abc import Callable, Mapping, Sequence
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
    decode,
    length_faults,
    rate_faults,
    refuse,
)
from services.audio.prompt import prompt_fault
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
}

Message = TypeVar("Message")
Read = TypeVar("Read")


def read_clip(clip: audio_pb2.Clip, field: str, bounds: AudioBounds) -> ReadClip:
    """Return one decoded clip.

    Raises:
        InvalidInputError: lists the violated fields of `clip`, whose own path is `field`.
    """
    if clip.encoding in _BARE:
        return _read_samples(clip, field, bounds, _BARE[clip.encoding])
    if clip.encoding in _CONTAINERS:
        return _read_file(clip, field, bounds)
    names = ", ".join(audio_pb2.AudioEncoding.Name(value) for value in (*_CONTAINERS, *_BARE))
    raise invalid(f"{field}.encoding", f"is {clip.encoding}, must be one of {names}")


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
        refuse(faults)
        return pair.prompt, clip

    return _read_each(pairs, field, bounds, read)


def read_prompts(prompts: Sequence[str], field: str, bounds: AudioBounds) -> list[str]:
    """Check the prompts of a call.

    Raises:
        InvalidInputError: lists every violated prompt (``prompts[2]``), or `field` if there are none or too
            many.
    """

    def read(prompt: str, path: str) -> str:
        refuse(check_prompt(prompt, path, bounds))
        return prompt

    return _read_each(prompts, field, bounds, read)


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


class _Budget:
    """Counts the bytes of the decoded clips of a call."""

    def __init__(self, bounds: AudioBounds) -> None:
        self._limit, self._left = bounds.max_decoded_bytes, bounds.max_decoded_bytes

    def spend(self, clip: ReadClip, field: str) -> ReadClip:
        self._left -= clip.waveform.nbytes
        if self._left < 0:
            raise invalid(
                f"{field}.audio",
                f"brings this call's clips, decoded, to {(self._limit - self._left) / 2**20:.1f} MiB, "
                f"the limit is {self._limit / 2**20:g} MiB; send them in several calls",
            )
        return clip


def _read_each(
    messages: Sequence[Message], field: str, bounds: AudioBounds, read: Callable[[Message, str], Read]
) -> list[Read]:
    if not messages:
        raise invalid(field, f"is empty, must have between 1 and {bounds.max_batch_size} elements")
    if len(messages) > bounds.max_batch_size:
        raise invalid(
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
    return mix.clip(rate)


def _read_file(clip: audio_pb2.Clip, field: str, bounds: AudioBounds) -> ReadClip:
    if not clip.audio:
        raise InvalidInputError(_empty(f"{field}.audio"))
    expected = _CONTAINERS[clip.encoding]
    return decode(clip.audio, f"{field}.audio", bounds, expected=expected, stated_rate=clip.sample_rate_hertz)


def _empty(path: str) -> FieldViolation:
    return FieldViolation(path, "is empty; send an encoded clip")


def _duration(seconds: float) -> Duration:
    duration = Duration()
    duration.FromNanoseconds(round(seconds * 1e9))
    return duration
