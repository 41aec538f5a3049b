"""Reports on the clips of training examples."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from accelerate import Accelerator  # type: ignore[import-untyped]
from numpy.typing import NDArray

from training.data.content import report_content
from training.data.examples import Clip, FileClip
from training.data.scenes import SceneClip
from training.soundworld.captions import CaptionTruth

TONE_N = (0.3 * np.sin(np.arange(8_000) * 0.2)).astype(np.float32)


def write(path: Path, samples: NDArray[Any], kind: str = "WAV", subtype: str = "PCM_16") -> FileClip:
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, 16_000, format=kind, subtype=subtype)
    path.write_bytes(buffer.getvalue())
    return FileClip(path=path)


def test_equal_silent_and_changed_clips_are_counted_and_warned_of(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tone = write(tmp_path / "tone.wav", TONE_N)
    pcm_N, _ = soundfile.read(tone.path, dtype="int16")
    same = write(tmp_path / "same.flac", pcm_N, "FLAC")  # other bytes, the same samples
    other = write(tmp_path / "other.wav", TONE_N[::-1].copy())
    silent = write(tmp_path / "silent.wav", np.zeros(8_000, np.float32))
    antiphase = write(tmp_path / "antiphase.wav", np.stack([TONE_N, -TONE_N], axis=1))
    loud = write(tmp_path / "loud.wav", 4 * TONE_N, subtype="FLOAT")
    pairs: list[tuple[Clip, Clip | None]] = [
        (tone, same), (tone, other), (silent, other), (antiphase, other), (loud, silent), (tone, None)
    ]  # fmt: skip
    for accelerator in (None, Accelerator(cpu=True)):
        report = report_content(pairs, accelerator)
        assert (report["equal_pairs"], report["silent_chosen"]) == (1, 2)
        assert list(report["warnings"]) == [antiphase.name, loud.name]
        assert "channels that cancel each other" in report["warnings"][antiphase.name]
        assert "turned down as a whole" in report["warnings"][loud.name]
        err = capsys.readouterr().err
        assert (
            f"warning: 1 of 6 pairs have equal clips, so that nothing is preferred; the first: {tone.name}"
            in err
        )
        assert f"warning: 2 of 6 clips to learn from are silent; the first: {silent.name}" in err
        assert f"warning: {loud.name}: clip has samples up to 1.2" in err


def test_sound_examples_give_no_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tone, other = write(tmp_path / "a.wav", TONE_N), write(tmp_path / "b.wav", TONE_N[::-1].copy())
    scene = SceneClip(
        truth=CaptionTruth(classes=("rain",), relation="single"), seed=(1,), duration=0.5, gain=-90.0
    )
    report = report_content([(tone, other), (scene, scene), (tone, None)])
    assert report == {"equal_pairs": 0, "silent_chosen": 0, "warnings": {}}
    assert "warning" not in capsys.readouterr().err
