"""Prompts with clips as tensors: what the services that listen take.

Shapes: n pairs.
"""

from collections.abc import Mapping
from typing import Final

import numpy as np

from milonga.v1 import audio_pb2
from services.errors import FieldViolation, InvalidInputError
from services.runtime.clips import AudioBounds
from services.runtime.inference.tensors import Tensors, TensorSpec, spread, texts

PROMPT: Final = TensorSpec(name="PROMPT", field="prompt", forms={"BYTES": ("n",)})
AUDIO: Final = TensorSpec(name="AUDIO", field="audio", forms={"FP32": ("n", "samples"), "BYTES": ("n",)})
SAMPLE_RATE: Final = TensorSpec(
    name="SAMPLE_RATE", field="sample_rate_hertz", forms={"INT32": ("n",)}, optional=True, one_for_all=True
)
INPUTS: Final = (PROMPT, AUDIO, SAMPLE_RATE)
"""Samples want their rate; encoded files, which are BYTES, carry their own."""


def read_pairs(tensors: Tensors) -> list[audio_pb2.PromptedClip]:
    """Return the pairs as the native API takes them: it decodes them, and checks the rest.

    Raises:
        InvalidInputError: a prompt that is not UTF-8, or samples without a rate.
    """
    prompts, faults = texts(tensors, PROMPT)
    assert prompts is not None
    audio, rates = tensors[AUDIO.name], tensors.get(SAMPLE_RATE.name)
    bare = audio.dtype == np.float32
    if bare and rates is None:
        faults.append(
            FieldViolation(
                SAMPLE_RATE.field,
                f"tensor SAMPLE_RATE is missing, expected {SAMPLE_RATE.expected}: samples carry none",
            )
        )
    if faults:
        raise InvalidInputError(*faults)
    encoding = audio_pb2.AUDIO_ENCODING_FLOAT32 if bare else audio_pb2.AUDIO_ENCODING_UNSPECIFIED
    return [
        audio_pb2.PromptedClip(
            prompt=prompt,
            clip=audio_pb2.Clip(
                audio=sound.tobytes() if bare else sound, encoding=encoding, sample_rate_hertz=rate or 0
            ),
        )
        for prompt, sound, rate in zip(prompts, audio, spread(rates, len(prompts)), strict=True)
    ]


def limits_of(bounds: AudioBounds) -> Mapping[str, str]:
    """What a clip may be, for the model's configuration; durations are in seconds, rates in hertz."""
    return {
        "min_duration": f"{bounds.min_seconds:g}",
        "max_duration": f"{bounds.max_seconds:g}",
        "min_sample_rate": str(bounds.min_rate),
        "max_sample_rate": str(bounds.max_rate),
    }
