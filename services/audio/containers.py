"""Recognise sound files by their bytes, and detect truncated ones.

libsndfile decodes what is left of a truncated WAV or OGG file without an error.
"""

import struct
from typing import Final, Literal

Container = Literal["WAV", "FLAC", "OGG"]

_RIFF_HEADER: Final = 12
_CHUNK_HEADER: Final = 8
# Lengths that programs write which do not know it yet: the data lasts until the end of the file.
_UNKNOWN_SIZES: Final = frozenset({0, 0x7FFF_FFFF, 0x8000_0000, 0xFFFF_FFFF})

_OGG_HEADER: Final = 27
_OGG_LAST_PAGE: Final = 0x04


def container_of(audio: bytes) -> Container | None:
    """Return the kind of file by its first bytes; None if it is unknown."""
    if audio[:4] == b"RIFF" and audio[8:12] == b"WAVE":
        return "WAV"
    if audio[:4] == b"fLaC":
        return "FLAC"
    return "OGG" if audio[:4] == b"OggS" else None


def is_truncated(audio: bytes, container: Container) -> bool:
    """Return whether the file ends before its headers say; False for FLAC, which only decoding shows."""
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
    """Return whether the last Ogg page is cut off, or is not marked as the last."""
    position, flags = 0, 0
    while position < len(audio):
        if len(audio) < position + _OGG_HEADER or audio[position : position + 4] != b"OggS":
            return True
        flags, segments = audio[position + 5], audio[position + 26]
        lengths = audio[position + _OGG_HEADER : position + _OGG_HEADER + segments]
        position += _OGG_HEADER + segments + sum(lengths)
    return position > len(audio) or not flags & _OGG_LAST_PAGE
