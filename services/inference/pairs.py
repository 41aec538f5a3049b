"""Input tensors with clips: of scoring and reward with prompts, of captioning alone.

Shapes: n pairs of a prompt and a clip.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Final

from milonga.v1 import audio_pb2
from services.audio.decoding import AudioBounds, refuse
from services.errors import FieldViolation
from services.inference.tensors import Tensors, TensorSpec, spread, texts
from services.runtime.decoding import also

PROMPT: Final = TensorSpec(name="PROMPT", field="prompt", datatype="BYTES", dims=("n", 1))
AUDIO: Final = TensorSpec(name="AUDIO", field="audio", datatype="FP32", dims=("n", "samples"), optional=True)
SAMPLE_RATE: Final = TensorSpec(
    name="SAMPLE_RATE", field="sample_rate_hertz", datatype="INT32", dims=("n", 1), optional=True
)
ENCODED_AUDIO: Final = TensorSpec(
    name="ENCODED_AUDIO", field="audio", datatype="BYTES", dims=("n", 1), optional=True
)
CLIPS: Final = (AUDIO, SAMPLE_RATE, ENCODED_AUDIO)
"""Either AUDIO with SAMPLE_RATE, or ENCODED_AUDIO: files, which state their rate."""
INPUTS: Final = (PROMPT, *CLIPS)


def read_pairs(tensors: Tensors) -> Iterator[audio_pb2.PromptedClip]:
    """Return the pairs as messages of the native API, which decodes and checks them: one at a time.

    Raises:
        InvalidInputError: a prompt is not UTF-8; or as `read_clips`.
    """
    prompts, faults = texts(tensors, PROMPT)
    assert prompts is not None
    with also(faults):
        clips = read_clips(tensors)
    return (
        audio_pb2.PromptedClip(prompt=prompt, clip=clip) for prompt, clip in zip(prompts, clips, strict=True)
    )


def read_clips(tensors: Tensors) -> Iterator[audio_pb2.Clip]:
    """Return the clips of the tensors `CLIPS` as messages of the native API: one at a time.

    Raises:
        InvalidInputError: there are no or two tensors of audio, or AUDIO is without SAMPLE_RATE.
    """
    samples, rates, files = (tensors.get(spec.name) for spec in CLIPS)
    refuse(_faults(samples is not None, rates is not None, files is not None))
    if samples is not None:
        encoding = audio_pb2.AUDIO_ENCODING_FLOAT32
        audio: Iterable[bytes] = (waveform.astype("<f4", copy=False).tobytes() for waveform in samples)
        n = len(samples)
    else:
        assert files is not None
        encoding, audio = audio_pb2.AUDIO_ENCODING_UNSPECIFIED, files.flatten().tolist()
        n = len(files)
    return (
        audio_pb2.Clip(audio=content, encoding=encoding, sample_rate_hertz=rate or 0)
        for content, rate in zip(audio, spread(rates, n), strict=True)
    )


def warning_parameters(warnings: Iterable[Iterable[str]]) -> dict[str, str]:
    """Return the parameter of the warnings of an answer's rows: one per line, after the number of its row."""
    lines = [f"row {row}: {warning}" for row, of in enumerate(warnings) for warning in of]
    return {"warnings": "\n".join(lines)} if lines else {}


def _faults(samples: bool, rates: bool, files: bool) -> Iterator[FieldViolation]:
    """Yield the violations of a combination of tensors."""
    if samples and files:
        yield FieldViolation(AUDIO.field, "has both tensors AUDIO and ENCODED_AUDIO; give only one of them")
    elif samples and not rates:
        yield FieldViolation(
            SAMPLE_RATE.field,
            f"tensor SAMPLE_RATE is missing, expected {SAMPLE_RATE.expected}: AUDIO does not state its rate",
        )
    elif not samples and not files:
        yield FieldViolation(
            AUDIO.field,
            f"tensor AUDIO is missing, expected {AUDIO.expected}; or ENCODED_AUDIO, {ENCODED_AUDIO.expected}",
        )


def limits_of(bounds: AudioBounds) -> Mapping[str, str]:
    """Return the limits of a clip, for the model's configuration; durations in seconds, rates in hertz."""
    return {
        "min_duration": f"{bounds.min_seconds:g}",
        "max_duration": f"{bounds.max_seconds:g}",
        "min_sample_rate": str(bounds.min_rate),
        "max_sample_rate": str(bounds.max_rate),
    }
