"""Whether a clip's file is whole."""

from pathlib import Path

import pytest

from services.clip_folder import ClipFolder
from tests.services.audio.sounds import file_of, tone


@pytest.mark.parametrize(("kind", "subtype"), [("WAV", "PCM_16"), ("FLAC", "PCM_16"), ("OGG", "VORBIS")])
def test_files_that_are_not_there_or_cut_off_are_missing(kind: str, subtype: str, tmp_path: Path) -> None:
    audio = file_of(tone(), kind=kind, subtype=subtype)
    (tmp_path / "whole").write_bytes(audio)
    (tmp_path / "cut").write_bytes(audio[: len(audio) // 2])
    (tmp_path / "empty").write_bytes(b"")
    folder = ClipFolder[str](tmp_path, lambda name: [name])
    assert folder.missing(["whole", "cut", "empty", "none"]) == ["cut", "empty", "none"]
