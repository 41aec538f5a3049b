"""Convert small values between the wire and Python: durations, encodings, model versions."""

from collections.abc import Mapping
from types import MappingProxyType

from google.protobuf.duration_pb2 import Duration

from milonga.v1 import audio_pb2, model_pb2
from services.api.model import ModelVersion
from services.audio.encoding import DEFAULT_ENCODING

WIRE_ENCODINGS: "Mapping[str, audio_pb2.AudioEncoding.ValueType]" = MappingProxyType(
    {
        "wav": audio_pb2.AUDIO_ENCODING_WAV,
        "flac": audio_pb2.AUDIO_ENCODING_FLAC,
        "ogg": audio_pb2.AUDIO_ENCODING_OGG_VORBIS,
        "mp3": audio_pb2.AUDIO_ENCODING_MP3,
        "opus": audio_pb2.AUDIO_ENCODING_OGG_OPUS,
        "linear16": audio_pb2.AUDIO_ENCODING_LINEAR16,
        "float32": audio_pb2.AUDIO_ENCODING_FLOAT32,
    }
)
"""The wire's value of each of `services.audio.encoding.ENCODINGS`."""


def encoding_name(encoding: "audio_pb2.AudioEncoding.ValueType") -> str | None:
    """Return the name of a wire encoding; the default's for UNSPECIFIED, None for an unknown one."""
    if encoding == audio_pb2.AUDIO_ENCODING_UNSPECIFIED:
        return DEFAULT_ENCODING
    return next((name for name, value in WIRE_ENCODINGS.items() if value == encoding), None)


def write_duration(seconds: float) -> Duration:
    """Return the message of a length of time. Raises `ValueError` or `OverflowError` unless it is finite."""
    duration = Duration()
    duration.FromNanoseconds(round(seconds * 1e9))
    return duration


def read_duration(duration: Duration) -> float:
    """Return the seconds of a message."""
    return duration.ToNanoseconds() / 1e9


def write_version(version: ModelVersion) -> model_pb2.ModelVersion:
    """Return the message of the identity of weights."""
    return model_pb2.ModelVersion(
        name=version.name, version=version.version, digest=version.digest, license=version.license
    )


def read_version(message: model_pb2.ModelVersion) -> ModelVersion:
    """Return the identity of weights that a message states."""
    return ModelVersion(
        name=message.name, version=message.version, digest=message.digest, license=message.license
    )
