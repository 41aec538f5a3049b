"""Recognise sound files by their bytes, detect truncated ones, and repair what libsndfile does not read.

libsndfile decodes what is left of a truncated file without an error, and reads nothing, or a part, of files
whose headers were never completed because they were written to a pipe.
"""

import re
import struct
import zlib
from collections.abc import Iterator
from typing import Final, Literal

from services.files import HEAD, describe_archive, describe_file

Container = Literal["WAV", "FLAC", "OGG", "MP3", "AIFF", "AU", "CAF"]

_OTHERS: Final[tuple[tuple[int, bytes, str], ...]] = (
    (4, b"ftyp", "an MP4 or M4A file"),
    (0, b"\xff\xf1", "an AAC file"),
    (0, b"\xff\xf9", "an AAC file"),
    (0, b"\x1aE\xdf\xa3", "a WebM or Matroska file"),
    (0, b"0&\xb2u\x8ef\xcf\x11", "a WMA file"),
    (0, b"#!AMR", "an AMR file"),
    (0, b"riff.\x91\xcf\x11", "a Wave64 file"),
    (0, b"wvpk", "a WavPack file"),
    (0, b"MAC ", "a Monkey's Audio file"),
    (0, b"NIST_1A", "a NIST SPHERE file"),
    (0, b"Creative Voice File", "a VOC file"),
    (8, b"AVI ", "an AVI file"),
    (0, b"FLV\x01", "an FLV file"),
    (0, b"DSD ", "a DSF file"),
)
"""Other sound files: offset and content of a mark, and their name."""

_CHUNK: Final = 8
"""Length of a chunk's name and size."""
_NAME: Final = re.compile(rb"fmt |data|fact|LIST|SSND|COMM|bext|id3 |cue |smpl|JUNK|PEAK")
"""Names by which a chunk is distinguished from padding."""
_NO_SIZE: Final = 2**30
"""Sizes from here on, and 0, stand for the end of the file: no clip is as long. A pipe can't be rewound, so
programs write 0, 0x7FFFF000, 0xFFFFFFFF and others there."""
_MAX_PARTS: Final = 2**16
"""Chunks or pages that are looked at: an hour has fewer."""
_MP3_IN_WAV: Final = 0x55

_OGG_HEADER: Final = 27
_OGG_FIRST_PAGE: Final = 0x02
_OGG_CHECKSUM: Final = slice(22, 26)
"""Place of a page's checksum in the page."""
_REVERSED: Final = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))
"""Each byte with its bits in reverse order."""

_MAX_MP3_FRAMES: Final = 2**13
"""Frames that are counted: minutes of sound."""
_MAX_MP3_RUBBISH: Final = 2**16
"""Bytes that are searched for the next frame where there is none."""
_MPEG1_KILOBITS: Final = (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320)
_MPEG2_KILOBITS: Final = (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160)
_MPEG1_RATES: Final = (44_100, 48_000, 32_000)


class ContainerError(ValueError):
    """Bytes that are no whole sound file. The message completes "the file …"."""


def open_container(audio: bytes) -> tuple[Container, bytes]:
    """Return the kind of file, and content that libsndfile decodes to all of its samples.

    The content is `audio` itself where possible.

    Raises:
        ContainerError: the file is truncated, or no sound file that is supported; says which, and the remedy.
    """
    start = 0
    while tag := _id3_size(audio, start):
        start += tag
    audio = audio[start:]
    if start and not audio:
        raise ContainerError("has an ID3 tag and no audio: it is cut short; get it again, whole")
    if audio[:4] in (b"RIFF", b"RIFX", b"RF64", b"BW64") and audio[8:12] in (b"WAVE", b"RMP3"):
        return "WAV", _open_wav(audio)
    if audio[:4] == b"fLaC":
        return "FLAC", _without_tags(audio)
    if audio[:4] == b"OggS":
        _check_ogg(audio)
        return "OGG", audio
    if audio[:4] == b"FORM" and audio[8:12] in (b"AIFF", b"AIFC"):
        _check_chunks(audio, "AIFF", 12, ">4sI", b"SSND")
        return "AIFF", audio
    if audio[:4] == b"caff":
        return "CAF", _open_caf(audio)
    if audio[:4] == b".snd" and len(audio) >= 12:
        offset, size = struct.unpack_from(">II", audio, 4)
        if size < _NO_SIZE and offset + size > len(audio):
            raise _cut(audio, "AU")
        return "AU", audio if 0 < size < _NO_SIZE else audio[:8] + b"\xff" * 4 + audio[12:]
    if _mp3_frame_size(audio, 0):
        return "MP3", _open_mp3(audio)
    raise ContainerError(_describe(audio))


def _describe(audio: bytes) -> str:
    """Return what a file is that can't be read, with the remedy."""
    if found := describe_file(audio[:HEAD]) or describe_archive(audio[:HEAD]):
        return f"is {found}"
    for offset, mark, name in _OTHERS:
        if audio[offset : offset + len(mark)] == mark:
            return f"is {name}, which can't be read; convert it: ffmpeg -i INPUT OUTPUT.wav"
    return (
        f"begins with {audio[:4].hex(' ')}, which is no WAV, FLAC or OGG file, nor MP3 or AIFF; "
        "convert it: ffmpeg -i INPUT OUTPUT.wav"
    )


def _cut(audio: bytes, container: Container) -> ContainerError:
    return ContainerError(
        f"is cut short: as {container}, {len(audio)} bytes are not all of it; get it again, whole"
    )


def _id3_size(audio: bytes, start: int = 0) -> int:
    """Return the length of the ID3v2 tag at `start`; 0 if there is none."""
    if audio[start : start + 3] != b"ID3" or len(audio) < start + 10:
        return 0
    size = 0
    for byte in audio[start + 6 : start + 10]:
        size = size << 7 | byte & 0x7F
    return size + (20 if audio[start + 5] & 0x10 else 10)


def _without_tags(audio: bytes) -> bytes:
    """Return a file without the ID3 and APE tags at its end, which libFLAC takes for damaged frames."""
    end = len(audio)
    if audio[max(0, end - 128) : end][:3] == b"TAG":
        end -= 128
    if audio[max(0, end - 32) : end][:8] == b"APETAGEX":
        size, _, flags = struct.unpack_from("<III", audio, end - 20)
        end -= size + (32 if flags & 0x8000_0000 else 0)
    start = audio.rfind(b"ID3", 0, max(0, end))
    if start > 0 and start + _id3_size(audio, start) == end:
        end = start
    return audio[: max(0, end)]


def _chunks(audio: bytes, start: int, header: str) -> Iterator[tuple[bytes, int, int]]:
    """Yield the name, position and size of each chunk of RIFF and similar formats, whose chunks are padded.

    Some programs do not pad.
    """
    length = struct.calcsize(header)
    for _ in range(_MAX_PARTS):
        if start + length > len(audio):
            return
        name, size = struct.unpack_from(header, audio, start)
        start += length
        yield name, start, size
        start += size + (size % 2 if length == _CHUNK and not _NAME.match(audio, start + size) else 0)


def _check_chunks(
    audio: bytes, container: Container, start: int, header: str, data: bytes
) -> tuple[int, int]:
    """Return position and size of the chunk `data`. Raises `ContainerError` unless all of it is there."""
    for name, position, size in _chunks(audio, start, header):
        if name == data:
            if size < _NO_SIZE and position + size > len(audio):
                raise _cut(audio, container)
            return position, size
    raise _cut(audio, container)


def _open_caf(audio: bytes) -> bytes:
    """Return a CAF file with its length, which is -1 or 0 if it was written to a pipe."""
    position, size = _check_chunks(audio, "CAF", 8, ">4sQ", b"data")
    if 0 < size < _NO_SIZE:
        return audio
    return audio[: position - 8] + struct.pack(">Q", len(audio) - position) + audio[position:]


def _open_wav(audio: bytes) -> bytes:
    """Return a WAV file with its length; the MP3 stream if it contains one."""
    order = ">" if audio[:4] == b"RIFX" else "<"
    found: dict[bytes, tuple[int, int]] = {}
    for name, position, size in _chunks(audio, 12, f"{order}4sI"):
        found.setdefault(name, (position, size))
        if name == b"data" and b"fmt " in found:
            break
    if b"data" not in found:
        raise _cut(audio, "WAV")
    start, size = found[b"data"]
    if b"ds64" in found and size == 0xFFFF_FFFF and found[b"ds64"][1] >= 16:
        (size,) = struct.unpack_from("<Q", audio, found[b"ds64"][0] + 8)
    known = 0 < size < _NO_SIZE
    end = start + size if known else _end_of_samples(audio, start, order)
    if end > len(audio):
        raise _cut(audio, "WAV")
    format_start, format_size = found.get(b"fmt ", (0, 0))
    if format_size < 16 and audio[8:12] != b"RMP3":
        raise ContainerError("has no format chunk (fmt) that fits WAV; it is damaged: get it again")
    if format_size < 16 or struct.unpack_from(f"{order}H", audio, format_start)[0] == _MP3_IN_WAV:
        return _open_mp3(audio[start:end])
    is_padded = not any(position % 2 for position, _ in found.values())
    if known and format_start < start and audio[:4] != b"BW64" and is_padded:
        return audio
    shape = audio[format_start : format_start + format_size]
    body = b"WAVE" + b"".join(
        name + struct.pack(f"{order}I", len(chunk)) + chunk + bytes(len(chunk) % 2)
        for name, chunk in ((b"fmt ", shape), (b"data", audio[start:end]))
    )
    return (b"RIFX" if order == ">" else b"RIFF") + struct.pack(f"{order}I", len(body)) + body


def _end_of_samples(audio: bytes, start: int, order: str) -> int:
    """Return where samples of unknown length end: at a list chunk that ends with the file, else with it."""
    last = audio.rfind(b"LIST", start)
    if last >= 0 and last + _CHUNK <= len(audio):
        (size,) = struct.unpack_from(f"{order}I", audio, last + 4)
        if last + _CHUNK + size + size % 2 == len(audio):
            return last
    return len(audio)


def _check_ogg(audio: bytes) -> None:
    """Raise `ContainerError` for an incomplete page or last packet, a damaged page, or a second stream.

    Decoders leave out pages with a wrong checksum, and report no error. Whatever comes after the last page,
    and a missing mark of the stream's end, are no faults.
    """
    position, unfinished, begun = 0, False, False
    for _ in range(_MAX_PARTS):
        if audio[position : position + 4] != b"OggS":
            break
        if len(audio) < position + _OGG_HEADER:
            raise _cut(audio, "OGG")
        is_first, segments = bool(audio[position + 5] & _OGG_FIRST_PAGE), audio[position + 26]
        if is_first and begun:
            raise ContainerError(
                "has several OGG streams, one after the other; join them: ffmpeg -i INPUT OUTPUT.wav"
            )
        begun = not is_first
        lengths = audio[position + _OGG_HEADER : position + _OGG_HEADER + segments]
        start, position = position, position + _OGG_HEADER + segments + sum(lengths)
        if position <= len(audio) and not _is_ogg_page_intact(audio[start:position]):
            raise ContainerError(
                "can't be decoded as OGG, it is damaged: a page has a wrong checksum; get it again, whole"
            )
        unfinished = lengths.endswith(b"\xff") if lengths else unfinished
    rest = audio[position : position + 4]
    if position > len(audio) or unfinished or (rest and b"OggS".startswith(rest)):
        raise _cut(audio, "OGG")
    if audio.find(b"OggS", position) >= 0:
        raise ContainerError("has damaged OGG pages; get it again")


def _is_ogg_page_intact(page: bytes) -> bool:
    """Return whether a page has the checksum that its header states (RFC 3533, section 6).

    It is zlib's CRC-32 with the bits of each byte, and of the result, in reverse order, and without inversion
    before and after.
    """
    stated = page[_OGG_CHECKSUM]
    blank = page[: _OGG_CHECKSUM.start] + bytes(4) + page[_OGG_CHECKSUM.stop :]
    reversed_crc = zlib.crc32(blank.translate(_REVERSED), 0xFFFF_FFFF) ^ 0xFFFF_FFFF
    return reversed_crc.to_bytes(4, "big").translate(_REVERSED) == stated


def _mp3_frame_size(audio: bytes, position: int) -> int:
    """Return the length of the MP3 frame at `position`; 0 if there is none."""
    if position + 4 > len(audio) or audio[position] != 0xFF or audio[position + 1] & 0xE6 != 0xE2:
        return 0  # Layer III only.
    version, bits = audio[position + 1] >> 3 & 3, audio[position + 2]
    bitrate, rate, padding = bits >> 4, bits >> 2 & 3, bits >> 1 & 1
    if version == 1 or bitrate in (0, 15) or rate == 3:
        return 0
    if version == 3:
        return 144_000 * _MPEG1_KILOBITS[bitrate - 1] // _MPEG1_RATES[rate] + padding
    hertz = _MPEG1_RATES[rate] // (2 if version == 2 else 4)
    return 72_000 * _MPEG2_KILOBITS[bitrate - 1] // hertz + padding


def _next_mp3_frame(audio: bytes, start: int) -> int | None:
    """Return where the first frame from `start` on begins that another one follows; None if none does."""
    end = start + _MAX_MP3_RUBBISH
    while (start := audio.find(b"\xff", start, end)) >= 0:
        size = _mp3_frame_size(audio, start)
        if size and _mp3_frame_size(audio, start + size):
            return start
        start += 1
    return None


def _open_mp3(audio: bytes) -> bytes:
    """Return an MP3 file of its frames only, and with their number; without it libsndfile guesses one."""
    position, frames, sought = 0, 0, False
    while frames < _MAX_MP3_FRAMES:
        if size := _mp3_frame_size(audio, position):
            position, frames = position + size, frames + 1
        elif sought or (found := _next_mp3_frame(audio, position)) is None:
            break
        else:
            audio, sought = audio[:position] + audio[found:], True
    rest = audio[position : position + 4]
    if not frames or position > len(audio) or (0 < len(rest) < 4 and rest[0] == 0xFF):
        raise _cut(audio, "MP3")
    audio = audio[:position]
    mono, mpeg1 = audio[3] >> 6 == 3, audio[1] >> 3 & 3 == 3
    tag = 4 + (17 if mpeg1 == mono else 32 if mpeg1 else 9)
    first = _mp3_frame_size(audio, 0)
    if audio[tag : tag + 4] in (b"Xing", b"Info") and tag + 12 <= first:
        flags, stated = struct.unpack_from(">II", audio, tag + 4)
        if flags & 1 and stated > frames:
            raise _cut(audio, "MP3")
        if flags & 1 and stated >= frames - 1:
            return audio
        audio, frames = audio[first:], frames - 1
        if not frames:
            raise _cut(audio, "MP3")
    # The highest bitrate without padding: a frame with room for the count.
    header = bytes((0xFF, audio[1] | 1, audio[2] & 0x0C | 0xE0, audio[3]))
    count = header.ljust(tag, b"\0") + b"Xing" + struct.pack(">II", 1, frames)
    return count.ljust(_mp3_frame_size(header, 0), b"\0") + audio
