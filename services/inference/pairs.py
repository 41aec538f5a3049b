"""Prompts with clips as tensors: the inputs of scoring and reward.

Shapes: n pairs.
"""

from collections.abc import Iterator, Mapping
from typing import Final

from milonga.v1 import audio_pb2
from services.audio.clips import AudioBounds
from services.errors import FieldViolation, InvalidInputError
from services.inference.tensors import Tensors, TensorSpec, spread, texts

PROMPT: Final = TensorSpec(name="PROMPT", field="prompt", datatype="BYTES", dims=("n", 1))
AUDIO: Final = TensorSpec(name="AUDIO", field="audio", datatype="FP32", dims=("n", "samples"), optional=True)
SAMPLE_RATE: Final = TensorSpec(
    name="SAMPLE_RATE", field="sample_rate_hertz", datatype="INT32", dims=("n", 1), optional=True
)
ENCODED_AUDIO: Final = TensorSpec(
    name="ENCODED_AUDIO", field="audio", datatype="BYTES", dims=("n", 1), optional=True
)
INPUTS: Final = (PROMPT, AUDIO, SAMPLE_RATE, ENCODED_AUDIO)
"""Either samples with their rate, or whole files, which carry their own."""


def read_pairs(tensors: Tensors) -> list[audio_pb2.PromptedClip]:
    """Return the pairs as the native API takes them: it decodes them, and checks the rest.

    Raises:
        InvalidInputError: a prompt that is not UTF-8, no sound or two, or samples without a rate.
    """
    prompts, faults = texts(tensors, PROMPT)
    assert prompts is not None
    samples, rates, files = (tensors.get(spec.name) for spec in (AUDIO, SAMPLE_RATE, ENCODED_AUDIO))
    faults += _faults(samples is not None, rates is not None, files is not None)
    if faults:
        raise InvalidInputError(*faults)
    if samples is not None:
        encoding = audio_pb2.AUDIO_ENCODING_FLOAT32
        sounds = [waveform.astype("<f4", copy=False).tobytes() for waveform in samples]
    else:
        assert files is not None
        encoding, sounds = audio_pb2.AUDIO_ENCODING_UNSPECIFIED, files.flatten().tolist()
    return [
        audio_pb2.PromptedClip(
            prompt=prompt,
            clip=audio_pb2.Clip(audio=sound, encoding=encoding, sample_rate_hertz=rate or 0),
        )
        for prompt, sound, rate in zip(prompts, sounds, spread(rates, len(prompts)), strict=True)
    ]


def _faults(samples: bool, rates: bool, files: bool) -> Iterator[FieldViolation]:
    """What does not go together."""
    if samples and files:
        yield FieldViolation(
            AUDIO.field, "has both tensors AUDIO and ENCODED_AUDIO; give the one or the other"
        )
    elif samples and not rates:
        yield FieldViolation(
            SAMPLE_RATE.field,
            f"tensor SAMPLE_RATE is missing, expected {SAMPLE_RATE.expected}: samples carry none",
        )
    elif not samples and not files:
        yield FieldViolation(
            AUDIO.field,
            f"tensor AUDIO is missing, expected {AUDIO.expected}; or ENCODED_AUDIO, {ENCODED_AUDIO.expected}",
        )


def limits_of(bounds: AudioBounds) -> Mapping[str, str]:
    """What a clip may be, for the model's configuration; durations are in seconds, rates in hertz."""
    return {
        "min_duration": f"{bounds.min_seconds:g}",
        "max_duration": f"{bounds.max_seconds:g}",
        "min_sample_rate": str(bounds.min_rate),
        "max_sample_rate": str(bounds.max_rate),
    }
