"""Sound and prompts on their way out. Checks only what the wire can't carry; the services judge the rest.

Shapes: N samples.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from google.protobuf.message import Message
from numpy.typing import NDArray

from milonga.v1 import audio_pb2
from services.api.generation import Clip
from services.api.scoring import Sound
from services.errors import FieldViolation, InvalidInputError
from services.wire import WIRE_ENCODINGS

MAX_REQUEST_BYTES = 255 * 2**20
"""Sound and text that one request may hold: eleven minutes of stereo float32 at 48 kHz. The rest of the
256 MiB that services take in is for the fields around them."""

M = TypeVar("M", bound=Message)


class RequestWriter:
    """Makes the parts of one request, and collects what is wrong with them, to say all of it at once."""

    def __init__(self) -> None:
        self._faults: list[FieldViolation] = []
        self._left = MAX_REQUEST_BYTES

    def checked(self, request: M) -> M:
        """Return the request that was made of the parts.

        Raises:
            InvalidInputError: with every fault of every part.
        """
        if self._faults:
            raise InvalidInputError(*self._faults)
        return request

    def pairs(self, pairs: Sequence[tuple[str, Sound]], field: str) -> Iterator[audio_pb2.PromptedClip]:
        """Prompts with their sounds; faults are at ``field[i].prompt`` and ``field[i].clip``."""
        for index, (prompt, sound) in enumerate(pairs):
            yield audio_pb2.PromptedClip(
                prompt=self.text(prompt, f"{field}[{index}].prompt"),
                clip=self.sound(sound, f"{field}[{index}].clip"),
            )

    def sounds(self, sounds: Sequence[Sound], field: str) -> Iterator[audio_pb2.Clip]:
        """Sounds; faults are at ``field[i]``."""
        for index, sound in enumerate(self._several(sounds, field)):
            yield self.sound(sound, f"{field}[{index}]")

    def texts(self, texts: Sequence[str] | None, field: str) -> Iterator[str]:
        """Texts, none where None; faults are at ``field[i]``."""
        for index, text in enumerate(() if texts is None else self._several(texts, field)):
            yield self.text(text, f"{field}[{index}]")

    def text(self, text: str, field: str) -> str:
        """One text."""
        try:
            self._take(len(text.encode()))
        except (AttributeError, UnicodeEncodeError) as error:
            self._refuse(field, f"is {str(text)[:40]!a}, which the wire can't carry: {error}")
            return ""
        except _UnfitError as error:
            self._refuse(field, str(error))
            return ""
        return text

    def sound(self, sound: Sound, field: str) -> audio_pb2.Clip:
        """One sound."""
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
                # One byte more than can be sent: what is longer, or has no end, is not read to it.
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
        """Bare samples: they arrive bit for bit, as no encoder would send them."""
        if waveform.dtype != np.float32:
            raise _UnfitError(f"has samples of {waveform.dtype}, must be float32 in [-1, 1]")
        if waveform.ndim not in (1, 2) or not waveform.size:
            shape = list(waveform.shape)
            raise _UnfitError(f"has samples of shape {shape}, must be [N] or [channels, N], not empty")
        self._take(waveform.nbytes)
        message = audio_pb2.Clip(
            # Interleaved: the first sample of every channel, then the second.
            audio=waveform.T.astype("<f4").tobytes(),
            encoding=audio_pb2.AUDIO_ENCODING_FLOAT32,
            channel_count=1 if waveform.ndim == 1 else len(waveform),
        )
        _set_rate(message, rate)
        return message

    def _several(self, values: Sequence[Any], field: str) -> Sequence[Any]:
        # A string is a sequence of strings, and bytes one of numbers; neither is ever meant.
        if isinstance(values, str | bytes):
            self._refuse(field, f"is one {type(values).__name__}, must be a list; put it into one")
            return ()
        return values

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
        raise _UnfitError(f"has sampling rate {rate!r}, which the wire can't carry: {error}") from error
