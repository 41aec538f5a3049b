"""Write sounds and prompts to requests. Checks only whether a message can hold them; services check the rest.

Shapes: N samples.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import IOBase
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from google.protobuf.message import Message
from numpy.typing import NDArray

from milonga.v1 import audio_pb2
from services.api.generation import Clip
from services.api.scoring import Sound
from services.errors import FieldViolation, InvalidInputError, shown_value
from services.wire import WIRE_ENCODINGS

MAX_REQUEST_BYTES = 255 * 2**20
"""Maximum bytes of audio and text in a request: eleven minutes of stereo float32 at 48 kHz. The rest of a
service's 256 MiB is for other fields."""

M = TypeVar("M", bound=Message)


class RequestWriter:
    """Writes the parts of one request, and collects their violations, to report all of them at once."""

    def __init__(self) -> None:
        self._faults: list[FieldViolation] = []
        self._left = MAX_REQUEST_BYTES

    def checked(self, request: M) -> M:
        """Return `request`, unless a part of it had a violation.

        Raises:
            InvalidInputError: parts are invalid; lists every violation.
        """
        if self._faults:
            raise InvalidInputError(*self._faults)
        return request

    def pairs(self, pairs: Sequence[tuple[str, Sound]], field: str) -> Iterator[audio_pb2.PromptedClip]:
        """Yield the messages of pairs; violations are at ``field[i].prompt`` and ``field[i].clip``."""
        for index, (prompt, sound) in enumerate(pairs):
            yield audio_pb2.PromptedClip(
                prompt=self.text(prompt, f"{field}[{index}].prompt"),
                clip=self.sound(sound, f"{field}[{index}].clip"),
            )

    def sounds(self, sounds: Sequence[Sound], field: str) -> Iterator[audio_pb2.Clip]:
        """Yield the messages of sounds; violations are at ``field[i]``."""
        for index, sound in enumerate(self._several(sounds, field)):
            yield self.sound(sound, f"{field}[{index}]")

    def texts(self, texts: Sequence[str] | None, field: str) -> Iterator[str]:
        """Yield texts, none for None; violations are at ``field[i]``."""
        for index, text in enumerate(() if texts is None else self._several(texts, field)):
            yield self.text(text, f"{field}[{index}]")

    def text(self, text: str, field: str) -> str:
        """Return a text after checking it."""
        if not isinstance(text, str):
            self._refuse(field, f"is {shown_value(text)}, must be text")
            return ""
        try:
            self._take(len(text.encode()))
        except UnicodeEncodeError as error:
            self._refuse(field, f"is {shown_value(text)}, which the wire can't carry: {error}")
            return ""
        except _UnfitError as error:
            self._refuse(field, str(error))
            return ""
        return text

    @contextmanager
    def refusing(self, field: str, value: object) -> Iterator[None]:
        """Note a violation of `field` if protobuf refuses its value in the context."""
        try:
            yield
        except (ValueError, TypeError) as error:
            self._refuse(field, f"is {str(value)[:40]!r}, which the wire can't carry: {error}")

    def sound(self, sound: Sound, field: str) -> audio_pb2.Clip:
        """Return the message of a sound."""
        try:
            match sound:
                case Clip():
                    return self._clip(sound)
                case bytes():
                    return self._file(sound)
                case Path():
                    return self._path(sound)
                case (np.ndarray() as waveform, rate):
                    return self._samples(waveform, rate)
                case _:
                    kinds = "a Clip, bytes, a Path, or a tuple of float32 samples and sampling rate"
                    raise _UnfitError(f"is of type {type(sound).__name__}, must be {kinds}")
        except _UnfitError as error:
            self._refuse(field, str(error))
            return audio_pb2.Clip()

    def _clip(self, clip: Clip) -> audio_pb2.Clip:
        if clip.encoding not in WIRE_ENCODINGS:
            raise _UnfitError(f"has encoding {clip.encoding!r}, must be one of {', '.join(WIRE_ENCODINGS)}")
        message = self._file(clip.audio)
        message.encoding = WIRE_ENCODINGS[clip.encoding]
        _set_rate(message, clip.sampling_rate)
        return message

    def _path(self, path: Path) -> audio_pb2.Clip:
        try:
            with path.open("rb") as file:
                # At most one byte more than can be sent: the file may be huge or endless.
                content = file.read(self._left + 1)
        except OSError as error:
            raise _UnfitError(f"is {path}, which can't be read: {error.strerror or error}") from error
        return self._file(content, f"is {path}, which ")

    def _file(self, content: bytes, subject: str = "") -> audio_pb2.Clip:
        if not content:
            raise _UnfitError(f"{subject}is empty; give a WAV, FLAC or OGG file")
        self._take(len(content))
        return audio_pb2.Clip(audio=content)

    def _samples(self, waveform: NDArray[Any], rate: int) -> audio_pb2.Clip:
        """Return the message of raw samples, which are sent losslessly."""
        if waveform.dtype != np.float32:
            raise _UnfitError(f"has samples of {waveform.dtype}, must be float32 in [-1, 1]")
        if waveform.ndim not in (1, 2) or not waveform.size:
            shape = list(waveform.shape)
            raise _UnfitError(f"has samples of shape {shape}, must be [N] or [channels, N], not empty")
        self._take(waveform.nbytes)
        message = audio_pb2.Clip(
            # Interleaved: the first sample of every channel, then the second of every channel.
            audio=waveform.T.astype("<f4", copy=False).tobytes(),
            encoding=audio_pb2.AUDIO_ENCODING_FLOAT32,
            channel_count=1 if waveform.ndim == 1 else len(waveform),
        )
        _set_rate(message, rate)
        return message

    def _several(self, values: Sequence[Any], field: str) -> Sequence[Any]:
        # str, bytes and files can be iterated too, but are no lists of sounds or texts.
        if isinstance(values, str | bytes | IOBase):
            self._refuse(field, f"is one {type(values).__name__}, must be a list; put it into one")
            return ()
        try:
            return list(values)
        except TypeError:
            self._refuse(field, f"is {shown_value(values)}, must be a list")
            return ()

    def _take(self, size: int) -> None:
        if size > self._left:
            limit = f"{MAX_REQUEST_BYTES // 2**20} MiB"
            raise _UnfitError(f"is more than fits into a request of at most {limit}; send less, or as FLAC")
        self._left -= size

    def _refuse(self, field: str, description: str) -> None:
        self._faults.append(FieldViolation(field, description))


class _UnfitError(Exception):
    """A part can't be sent; why."""


def _set_rate(message: audio_pb2.Clip, rate: int) -> None:
    try:
        message.sample_rate_hertz = rate
    except (ValueError, TypeError) as error:
        shown = shown_value(rate)
        raise _UnfitError(f"has a sampling rate that is {shown}, must be a whole number of hertz") from error
