"""Sound files as recorders, pipes and downloads leave them: read whole, or refused for what they are."""

import gzip
import random
import struct
import sys
from collections.abc import Callable
from typing import Any, Final

import numpy as np
import pytest

from services.audio.containers import ContainerError, open_container
from services.audio.decoding import AudioBounds, ReadClip, decode
from services.errors import InvalidInputError
from tests.services.audio.sounds import RATE, file_of, tone, with_flac_length, with_wav_length

BOUNDS: Final = AudioBounds()
SOUND_N: Final = (tone(2.5) + np.random.default_rng(0).normal(0, 0.05, 40_000)).astype(np.float32)
FILES: Final = {
    "wav": file_of(SOUND_N),
    "float": file_of(SOUND_N, subtype="FLOAT"),
    "adpcm": file_of(SOUND_N, subtype="IMA_ADPCM"),
    "rf64": file_of(SOUND_N, kind="RF64"),
    "flac": file_of(SOUND_N, kind="FLAC"),
    "ogg": file_of(SOUND_N, kind="OGG", subtype="VORBIS"),
    "opus": file_of(SOUND_N, kind="OGG", subtype="OPUS"),
    "mp3": file_of(SOUND_N, kind="MP3", subtype="MPEG_LAYER_III"),
    "aiff": file_of(SOUND_N, kind="AIFF"),
    "au": file_of(SOUND_N, kind="AU"),
    "caf": file_of(SOUND_N, kind="CAF"),
}
WAV, FLAC, OGG, MP3 = (FILES[name] for name in ("wav", "flac", "ogg", "mp3"))
FORMAT, DATA = WAV[12 : WAV.index(b"data")], WAV[WAV.index(b"data") :]
LIST: Final = b"LIST" + struct.pack("<I", 26) + b"INFOISFT" + struct.pack("<I", 14) + b"Lavf60.16.100\0"
ID3V1: Final = b"TAG" + b"x" * 125
UNPADDED: Final = b"LIST" + struct.pack("<I", 9) + b"INFOodd.1"
ID3V2: Final = b"ID3\x04\0\0\0\0\0\x0a" + bytes(10)
APE: Final = (
    b"APETAGEX" + struct.pack("<IIII", 2000, 52, 1, 0xA000_0000) + bytes(8) + b"x" * 20
    + b"APETAGEX" + struct.pack("<IIII", 2000, 52, 1, 0x8000_0000) + bytes(8)
)  # fmt: skip
MP3_FORMAT: Final = b"fmt " + struct.pack("<IHHIIHHHHIHHH", 30, 85, 1, RATE, 8000, 1, 0, 12, 1, 2, 576, 1, 0)


def read(audio: bytes) -> ReadClip:
    return decode(audio, "clip", BOUNDS)


def refusal(audio: bytes) -> str:
    with pytest.raises(InvalidInputError) as caught:
        read(audio)
    (fault,) = caught.value.violations
    assert fault.field == "clip"
    assert "\n" not in fault.description
    return fault.description


def riff(*chunks: bytes, size: int | None = None) -> bytes:
    body = b"".join(chunks)
    return b"RIFF" + struct.pack("<I", len(body) + 4 if size is None else size) + b"WAVE" + body


def chunk(name: bytes, content: bytes) -> bytes:
    return name + struct.pack("<I", len(content)) + content + bytes(len(content) % 2)


def without_end_of_stream(ogg: bytes) -> bytes:
    """Return an OGG file whose last page is not marked as the last, with its checksum."""
    start = ogg.rindex(b"OggS")
    page = bytearray(ogg[start:])
    page[5] &= ~4
    page[22:26] = bytes(4)
    checksum = 0
    for byte in page:
        checksum ^= byte << 24
        for _ in range(8):
            checksum = (checksum << 1 ^ (0x04C1_1DB7 if checksum >> 31 else 0)) & 0xFFFF_FFFF
    page[22:26] = struct.pack("<I", checksum)
    return ogg[:start] + page


def without_count(mp3: bytes) -> bytes:
    """Return an MP3 file without the frame that counts the others (libsndfile writes one first)."""
    return mp3[mp3.index(b"\xff\xf3", 4) :]


@pytest.mark.parametrize("name", FILES)
def test_whole_files_are_read(name: str) -> None:
    clip = read(FILES[name])
    assert clip.sampling_rate == RATE
    assert 40_000 <= len(clip.waveform) <= 40_700  # ADPCM has blocks
    assert clip.warnings == ()
    assert np.corrcoef(clip.waveform[:40_000], SOUND_N)[0, 1] > 0.85


@pytest.mark.parametrize("kept", [0.25, 0.5, 0.9, -3, -1])
@pytest.mark.parametrize("name", FILES)
def test_cut_files_are_refused(name: str, kept: float) -> None:
    whole = FILES[name]
    cut = whole[: int(len(whole) * kept) if kept > 0 else int(kept)]
    assert "cut short" in refusal(cut)


@pytest.mark.parametrize("riff_size", [None, 0, 0xFFFF_FFFF])
@pytest.mark.parametrize(
    "size", [0, 0x7FFF_F000, 0x7FFF_FFDB, 0x7FFF_FFFF, 0x8000_0000, 0xFFFF_FFDB, 0xFFFF_FFFF]
)
def test_a_wav_from_a_pipe_is_read(size: int, riff_size: int | None) -> None:
    piped = with_wav_length(WAV, size)
    if riff_size is not None:
        piped = piped[:4] + struct.pack("<I", riff_size) + piped[8:]
    np.testing.assert_array_equal(read(piped).waveform, read(WAV).waveform)


@pytest.mark.parametrize(
    ("name", "mark", "size"),
    [
        *(("caf", b"data", struct.pack(">q", size)) for size in (-1, 0, 2**40)),
        *(("aiff", b"SSND", struct.pack(">I", size)) for size in (0, 0x7FFF_FF00, 0xFFFF_FFFF)),
        *(
            ("au", FILES["au"][4:8], struct.pack(">I", size))
            for size in (0, 0x7FFF_FFFF, 0x8000_0000, 0xFFFF_FFF0, 0xFFFF_FFFF)
        ),
    ],
)
def test_other_files_from_a_pipe_are_read(name: str, mark: bytes, size: bytes) -> None:
    whole = FILES[name]
    start = whole.index(mark) + len(mark)
    piped = whole[:start] + size + whole[start + len(size) :]
    np.testing.assert_array_equal(read(piped).waveform, read(whole).waveform)


@pytest.mark.parametrize(
    "audio",
    [
        riff(FORMAT, DATA, LIST),
        riff(FORMAT, LIST, DATA),
        riff(LIST, FORMAT, chunk(b"bext", bytes(602)), DATA),
        riff(chunk(b"junk", b"odd"), FORMAT, DATA),
        riff(DATA, FORMAT),
        riff(FORMAT, DATA[:4] + b"\xff" * 4 + DATA[8:] + LIST),
        riff(FORMAT, DATA, b"rubbish after it"),
        b"BW64" + FILES["rf64"][4:],
        ID3V2 + WAV,
        ID3V2 + ID3V2 + WAV,
        riff(UNPADDED, FORMAT, DATA),
        riff(FORMAT, UNPADDED, LIST, DATA),
    ],
    ids=[
        "LIST after",
        "LIST before",
        "bext",
        "odd",
        "data first",
        "pipe with LIST",
        "rubbish",
        "BW64",
        "ID3",
        "two ID3",
        "odd without padding",
        "odd without padding after the format",
    ],
)
def test_a_wav_of_other_chunks_is_read(audio: bytes) -> None:
    np.testing.assert_array_equal(read(audio).waveform, read(WAV).waveform)


def test_a_wav_of_the_other_byte_order_is_read() -> None:
    samples = np.rint(SOUND_N * 32767).astype(">i2").tobytes()
    shape = b"fmt " + struct.pack(">IHHIIHH", 16, 1, 1, RATE, 2 * RATE, 2, 16)
    for size in (len(samples), 0xFFFF_FFFF):
        audio = b"RIFX" + struct.pack(">I", size) + b"WAVE" + shape + b"data" + struct.pack(">I", size)
        np.testing.assert_allclose(read(audio + samples).waveform, SOUND_N, atol=1e-4)


def test_a_wav_without_samples_is_empty_whatever_follows() -> None:
    for audio in (riff(FORMAT, chunk(b"data", b"")), riff(FORMAT, chunk(b"data", b""), LIST)):
        assert refusal(audio).startswith("lasts 0 s")


def test_mp3_in_wav_is_read() -> None:
    inside = riff(MP3_FORMAT, chunk(b"fact", bytes(4)), chunk(b"data", MP3))
    for audio in (inside, b"RIFF" + inside[4:8] + b"RMP3" + chunk(b"data", MP3)):
        np.testing.assert_array_equal(read(audio).waveform, read(MP3).waveform)
    late = riff(MP3_FORMAT, chunk(b"data", bytes(100) + MP3))
    np.testing.assert_array_equal(read(late).waveform, read(MP3).waveform)
    assert "cut short" in refusal(inside[: len(inside) // 2])


@pytest.mark.parametrize("frames", [40_000, 0], ids=["with its length", "of unknown length"])
@pytest.mark.parametrize(
    "tag", [b"", ID3V1, APE, ID3V2, APE + ID3V1], ids=["", "ID3v1", "APE", "ID3v2", "both"]
)
def test_a_flac_file_between_tags_is_read(frames: int, tag: bytes) -> None:
    audio = ID3V2 + with_flac_length(FLAC, frames) + tag
    np.testing.assert_array_equal(read(audio).waveform, read(FLAC).waveform)


def test_a_flac_file_of_unknown_length_that_is_cut_is_refused() -> None:
    unknown = with_flac_length(FLAC, 0)
    for cut in (unknown[: len(unknown) // 2], unknown[:-1]):
        assert "cut short or damaged" in refusal(cut)


def test_rubbish_after_a_flac_file_with_its_length_is_not_read() -> None:
    np.testing.assert_array_equal(read(FLAC + bytes(1000)).waveform, read(FLAC).waveform)


@pytest.mark.parametrize("tail", [b"", ID3V1, APE, b"rubbish" * 50, bytes(999)])
@pytest.mark.parametrize("marked", [True, False])
def test_an_ogg_file_ends_with_its_last_page(tail: bytes, marked: bool) -> None:
    audio = (OGG if marked else without_end_of_stream(OGG)) + tail
    np.testing.assert_array_equal(read(audio).waveform, read(OGG).waveform)


@pytest.mark.parametrize("tail", [b"O", b"Ogg", b"OggS", b"OggS\0\0" + bytes(12)])
def test_the_beginning_of_another_ogg_page_is_a_cut(tail: bytes) -> None:
    assert "cut short" in refusal(OGG + tail)


@pytest.mark.parametrize("place", [0.3, 0.5, 0.9])
def test_an_ogg_page_with_a_wrong_checksum_is_not_left_out(place: float) -> None:
    damaged = bytearray(OGG)
    damaged[int(place * len(OGG))] ^= 1
    assert "damaged: a page has a wrong checksum" in refusal(bytes(damaged))


def test_ogg_streams_in_a_row_are_refused_and_not_half_read() -> None:
    assert refusal(OGG + OGG).startswith("has several OGG streams")


def test_an_mp3_file_without_a_count_is_read_whole() -> None:
    # The bitrate varies: guessed from its first frame, the file would lose half of its sound.
    bare = without_count(MP3)
    assert b"Xing" not in bare and b"Info" not in bare
    for audio in (bare, bare + ID3V1, ID3V2 + bare, bare + b"rubbish" * 9):
        clip = read(audio)
        assert 40_000 <= len(clip.waveform) < 43_000  # encoders pad both ends
        assert np.abs(clip.waveform[-4_000:]).max() > 0.2
    assert "cut short" in refusal(bare[:-1])
    assert "cut short" in refusal(bare[: len(bare) // 3])


def test_an_mp3_file_of_nothing_but_its_count_is_cut() -> None:
    only_count = MP3[: -len(without_count(MP3))]
    assert "is cut short" in refusal(only_count)
    place = only_count.index(b"Xing") + 4
    assert "is cut short" in refusal(only_count[:place] + bytes(4) + only_count[place + 4 :])


def test_an_mp3_file_whose_count_is_too_small_is_read_whole() -> None:
    place = MP3.index(b"Xing") + 8
    frames = int.from_bytes(MP3[place : place + 4], "big")
    audio = MP3[:place] + (frames // 2).to_bytes(4, "big") + MP3[place + 4 :]
    assert len(read(audio).waveform) >= 40_000


def test_a_damaged_file_writes_no_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    # libsndfile seeks before the first byte; an error in its callback would go to standard error.
    written: list[Any] = []
    monkeypatch.setattr(sys, "unraisablehook", written.append)
    aiff = FILES["aiff"]
    place = aiff.index(b"SSND") - 2
    assert "can't be decoded as AIFF" in refusal(aiff[:place] + bytes(8) + aiff[place:])
    assert written == []


def test_rubbish_between_mp3_frames_is_skipped() -> None:
    bare = without_count(MP3)
    second = bare.index(b"\xff\xf3", 4)
    assert len(read(bare[:second] + b"x" * 1000 + bare[second:]).waveform) > 39_000


@pytest.mark.parametrize(
    ("audio", "says"),
    [
        (b"", "is an empty file"),
        (b"\0\0\0\x1cftypM4A isomiso2", "is an MP4 or M4A file, which can't be read; convert it: ffmpeg"),
        (b"\xff\xf1\x50\x80" + bytes(99), "is an AAC file, which can't be read; convert it: ffmpeg"),
        (ID3V2, "has an ID3 tag and no audio"),
        (ID3V2 + b"\xff\xf1\x50\x80" + bytes(99), "is an AAC file"),
        (b"\x1aE\xdf\xa3" + bytes(99), "is a WebM or Matroska file"),
        (b"RIFF\0\0\0\0AVI LIST", "is an AVI file"),
        (gzip.compress(b"RIFF", mtime=0), "is compressed by gzip; unpack it first"),
        (b"PK\x03\x04" + bytes(40), "is a ZIP archive; unpack it first"),
        (b"Rar!\x1a\x07" + bytes(40), "is a RAR archive; unpack it first"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "run `git lfs pull`"),
        (b"<!DOCTYPE html><html>", "is a web page (HTML)"),
        (bytes(5000), "is a file of zero bytes"),
        (b"no sound", "begins with 6e 6f 20 73, which is no WAV, FLAC or OGG file"),
        (b"RIFF\0\0\0\0WAVE", "is cut short: as WAV"),
        (riff(DATA), "has no format chunk"),
    ],
)  # fmt: skip
def test_other_files_are_named_with_the_remedy(audio: bytes, says: str) -> None:
    assert says in refusal(audio)


@pytest.mark.parametrize("name", FILES)
def test_changed_bytes_are_read_or_refused_and_nothing_else(name: str) -> None:
    rng, whole = random.Random(name), FILES[name]
    changes: list[Callable[[bytearray], object]] = [
        lambda audio: audio.__setitem__(rng.randrange(min(len(audio), 200)), rng.randrange(256)),
        lambda audio: audio.__setitem__(rng.randrange(len(audio)), rng.randrange(256)),
        lambda audio: audio.__delitem__(slice((at := rng.randrange(len(audio))), at + rng.randrange(1, 40))),
        lambda audio: audio.__setitem__(slice((at := rng.randrange(200)), at + 4), b"\xff" * 4),
    ]
    outcomes = set()
    for _ in range(60):
        audio = bytearray(whole)
        for _ in range(rng.randrange(1, 4)):
            rng.choice(changes)(audio)
        try:
            clip = read(bytes(audio))
        except InvalidInputError:
            outcomes.add("refused")
        else:
            outcomes.add("read")
            assert np.isfinite(clip.waveform).all() and np.abs(clip.waveform).max(initial=0.0) <= 1.0
    assert "refused" in outcomes


def test_content_that_needs_no_repair_is_not_copied() -> None:
    for audio in FILES.values():
        assert open_container(audio)[1] is audio
    with pytest.raises(ContainerError):
        open_container(b"RIFF")
