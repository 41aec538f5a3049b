"""What kind of sound file some bytes are, and whether they end too early.

libsndfile decodes what there is of a WAV or OGG file that was cut short, and says nothing.
"""

import struct
from typing import Final, Literal

Container = Literal["WAV", "FLAC", "OGG"]

_RIFF_HEADER: Final = 12
_CHUNK_HEADER: Final = 8
# What programs write that did not know the length: everything up to the end is meant.
_UNKNOWN_SIZES: Final = frozenset({0, 0x7FFF_FFFF, 0x8000_0000, 0xFFFF_FFFF})

_OGG_HEADER: Final = 27
_OGG_LAST_PAGE: Final = 0x04


def container_of(audio: bytes) -> Container | None:
    """The kind of file by its first bytes; None where it is none that is known."""
    if audio[:4] == b"RIFF" and audio[8:12] == b"WAVE":
        return "WAV"
    if audio[:4] == b"fLaC":
        return "FLAC"
    return "OGG" if audio[:4] == b"OggS" else None


def is_truncated(audio: bytes, container: Container) -> bool:
    """Whether the file ends before its own headers say so. FLAC tells only while it is decoded: False."""
    if container == "WAV":
        return _wav_is_truncated(audio)
    return container == "OGG" and _ogg_is_truncated(audio)


def _wav_is_truncated(audio: bytes) -> bool:
    position = _RIFF_HEADER
    while position + _CHUNK_HEADER <= len(audio):
        name, size = struct.unpack_from("<4sI", audio, position)
        position += _CHUNK_HEADER
        if name == b"data":
            return size not in _UNKNOWN_SIZES and position + size > len(audio)
        position += size + size % 2
    return True


def _ogg_is_truncated(audio: bytes) -> bool:
    """Walk the pages: the last must be whole, and say that it is the last."""
    position, flags = 0, 0
    while position < len(audio):
        if len(audio) < position + _OGG_HEADER or audio[position : position + 4] != b"OggS":
            return True
        flags, segments = audio[position + 5], audio[position + 26]
        lengths = audio[position + _OGG_HEADER : position + _OGG_HEADER + segments]
        position += _OGG_HEADER + segments + sum(lengths)
    return position > len(audio) or not flags & _OGG_LAST_PAGE
