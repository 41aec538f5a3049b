"""`milonga data check` and `milonga data scenes` on recordings with every fault."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile
import typer.main

from services.cli import exit_code
from services.errors import InvalidInputError, MilongaError
from training.commands.data import data
from training.data.health import flat_peaks
from training.data.recordings import read_recordings

RATE = 16_000


def run(*arguments: str) -> None:
    typer.main.get_command(data).main(args=list(arguments), standalone_mode=False)


def noise(seed: int, seconds: float = 1.0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0.0, 0.1, round(seconds * RATE))


@pytest.fixture
def sounds(tmp_path: Path) -> Path:
    """A folder of two classes with a clip of every fault."""
    folder = tmp_path / "sounds"
    for number in range(12):
        path = folder / ("dog" if number % 2 else "rain") / f"{number:02d}.wav"
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, noise(number), RATE)
    dog = folder / "dog"
    shutil.copy(dog / "01.wav", dog / "copy.wav")
    samples, _ = soundfile.read(dog / "01.wav", dtype="int16")
    soundfile.write(dog / "same-samples.flac", samples, RATE)
    (dog / "cut.wav").write_bytes((dog / "01.wav").read_bytes()[:9_000])
    (dog / "page.wav").write_text("<!doctype html><html></html>")
    soundfile.write(dog / "silent.wav", np.zeros(RATE), RATE)
    soundfile.write(dog / "quiet.wav", noise(20) / 40, RATE)
    soundfile.write(dog / "clipped.wav", np.clip(8 * noise(21), -0.7, 0.7), RATE)
    tone = 0.3 * np.sin(np.arange(RATE) / 3)
    soundfile.write(dog / "opposite.wav", np.stack([tone, -tone], axis=1), RATE)
    return folder


def test_every_fault_is_found_and_named(
    sounds: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "report.html"
    run("check", str(sounds), "--json", "-o", str(page))
    report = json.loads(capsys.readouterr().out)
    found = {one["name"]: set(one["problems"]) for one in report["details"] if one["problems"]}
    assert found == {
        "dog/copy.wav": {"duplicate"},
        "dog/same-samples.flac": {"duplicate"},
        "dog/cut.wav": {"cut"},
        "dog/page.wav": {"unreadable"},
        "dog/silent.wav": {"silent"},
        "dog/quiet.wav": {"quiet"},
        "dog/clipped.wav": {"clipped"},
        "dog/opposite.wav": {"silent", "changed"},
    }
    assert (report["clips"], report["usable"]) == (20, 14)
    assert report["classes"] == {"dog": 8, "rain": 6}
    details = {one["name"]: one for one in report["details"]}
    assert details["dog/copy.wav"]["problems"]["duplicate"] == "dog/01.wav"
    assert "web page" in details["dog/page.wav"]["problems"]["unreadable"]
    text = page.read_text()
    assert text.count("data:image/png;base64,") == 7  # all but cut and unreadable; two of the silent one
    for kind in report["problems"]:
        assert f"<h2>{kind}: {report['problems'][kind]}</h2>" in text
    assert "<script" not in text


def test_the_table_names_the_first_clip_of_each_kind(
    sounds: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run("check", str(sounds))
    lines = capsys.readouterr().out.splitlines()
    assert "clips\t20, usable 14" in lines
    (row,) = [line for line in lines if line.startswith("duplicate\t")]
    assert row.split("\t")[1:3] == ["2", "unusable"]
    assert row.endswith("dog/copy.wav: dog/01.wav")
    assert any(line.startswith("warning: 14 usable clips are few") for line in lines)


def test_captions_without_a_known_word_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    captions = ["A dog barks", "Un perro ladra", "Собака лает", None, "x" * 2_000]
    for number in range(len(captions)):
        soundfile.write(tmp_path / f"{number}.wav", noise(number), RATE)
    rows = [{"audio": f"{number}.wav", "caption": text} for number, text in enumerate(captions)]
    (tmp_path / "list.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run("check", str(tmp_path), "--model", "mini-base", "--json")
    report = json.loads(capsys.readouterr().out)
    assert [tuple(one["problems"]) for one in report["details"]] == [
        (),
        ("unknown words",),
        ("unknown words",),
        ("no caption",),
        ("no caption",),
    ]
    assert list(report["unusable_captions"]) == ["list.jsonl:4", "list.jsonl:5"]
    run("check", str(tmp_path), "--json")
    (few, foreign) = json.loads(capsys.readouterr().out)["warnings"]
    assert "1 of 3 captions have no Latin letter ('Собака лает')" in foreign
    assert "3 usable clips are few" in few


@pytest.mark.parametrize("strict", [False, True])
def test_it_fails_if_nothing_is_usable_or_by_strict(
    strict: bool, sounds: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if strict:
        with pytest.raises(InvalidInputError, match=r"--strict: .*duplicate 2; clipped 1") as caught:
            run("check", str(sounds), "--strict")
    else:
        for path in sounds.rglob("*"):
            if path.is_file():
                path.write_bytes(b"")
        with pytest.raises(
            InvalidInputError, match=r"no usable clip of 20; dog/01\.wav: unreadable, is an empty file"
        ) as caught:
            run("check", str(sounds))
        assert "nothing can be trained" in capsys.readouterr().out
    assert exit_code(caught.value) == 2


def test_clips_that_are_not_there_are_named_with_the_remedy(sounds: Path, tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_text("file,class\ndog/01.wav,dog\nrain/00.wav,rain\n")
    with pytest.raises(
        InvalidInputError, match=r"No such file or directory \(dog/01\.wav\); give .*--audio-root"
    ):
        run("check", str(tmp_path / "list.csv"))
    run("check", str(tmp_path / "list.csv"), "--audio-root", str(sounds))


def test_a_single_class_is_warned_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "dog").mkdir()
    for number in range(3):
        soundfile.write(tmp_path / "dog" / f"{number}.wav", noise(number), RATE)
    run("check", str(tmp_path))
    out = capsys.readouterr().out
    assert "warning: 3 usable clips are few" in out
    assert "warning: all clips are of the class dog: " in out
    with pytest.raises(MilongaError, match="has 1 class"):
        run("scenes", str(tmp_path), "-o", str(tmp_path / "scenes"))


def test_a_page_that_cannot_be_written_is_refused_first(sounds: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match=r"must end in \.html"):
        run("check", str(sounds), "-o", str(tmp_path / "report.pdf"))
    with pytest.raises(MilongaError, match="does not exist; make it first"):
        run("check", str(sounds), "-o", str(tmp_path / "none" / "report.html"))


def test_scenes_are_made_of_the_two_parts(sounds: Path, tmp_path: Path) -> None:
    for name in ("cut", "page", "silent", "opposite"):
        (sounds / "dog" / f"{name}.wav").unlink()
    output = tmp_path / "scenes"
    given = ("--count", "3", "--held-out", "2", "--duration", "2.56", "--rate", "16000", "--three", "0")
    run("scenes", str(sounds), "-o", str(output), *given)
    rows = [json.loads(line) for line in (output / "scenes.jsonl").read_text().splitlines()]
    assert [row["split"] for row in rows] == ["train"] * 3 + ["validation"] * 2
    used = [{name for row in rows if row["split"] == split for name in row["recordings"]} for split in
            ("train", "validation")]  # fmt: skip
    assert not used[0] & used[1]
    assert [one.fold for one in read_recordings(output)] == ["train"] * 3 + ["validation"] * 2


def test_damaged_recordings_are_refused_before_anything_is_written(sounds: Path, tmp_path: Path) -> None:
    for path in sounds.rglob("*.wav"):
        path.write_bytes(path.read_bytes()[:2_000])
    with pytest.raises(
        InvalidInputError, match=r"19 of 20 clips can't be read, at most 5% may be: .*cut short"
    ):
        run("scenes", str(sounds), "-o", str(tmp_path / "scenes"))
    assert not (tmp_path / "scenes").exists()


def test_a_part_that_gives_no_scenes_is_refused_before_the_other_is_written(tmp_path: Path) -> None:
    for sound, count in (("dog", 4), ("rain", 1)):
        (tmp_path / sound).mkdir()
        for number in range(count):
            soundfile.write(tmp_path / sound / f"{number}.wav", noise(number), RATE)
    with pytest.raises(InvalidInputError, match=r"validation part: has 1 class \(dog\)"):
        run("scenes", str(tmp_path), "-o", str(tmp_path / "scenes"), "-n", "2", "--held-out", "1")
    assert not (tmp_path / "scenes").exists()
    run("scenes", str(tmp_path), "-o", str(tmp_path / "scenes"), "-n", "2")
    assert len(list((tmp_path / "scenes").glob("*.flac"))) == 2


def test_flat_peaks_are_those_of_clipping() -> None:
    time = np.arange(RATE) / RATE
    assert flat_peaks((0.9 * np.sin(2 * np.pi * 440 * time)).astype(np.float32)) == 0
    assert flat_peaks(np.clip(2 * np.sin(2 * np.pi * 440 * time), -0.9, 0.9).astype(np.float32)) == 880
    assert flat_peaks(noise(0).astype(np.float32)) == 0
