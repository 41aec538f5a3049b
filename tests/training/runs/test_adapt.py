"""`milonga train adapt`: recordings as people have them, and what is refused, with the remedy."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from services.errors import InvalidInputError
from services.models.manifest import verify_manifest
from tests.training.finetuning.finetune_program import LOOP, write_model
from training.data.latents import LatentConfig
from training.data.recordings import read_recordings
from training.evaluation.prompts import read_prompts
from training.finetuning.held_out import compare_errors
from training.finetuning.session import summary
from training.loop.run_folder import JOURNAL, read_journal
from training.runs.adapt import HELD_OUT, Adaptation, adapt, adaptation

RATE = 22_050


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "start")


def write_sounds(folder: Path, classes: tuple[str, ...] = ("dog", "rain"), count: int = 7) -> Path:
    for number, sound in enumerate(classes):
        (folder / sound).mkdir(parents=True)
        for index in range(count):
            rng = np.random.default_rng([number, index])
            soundfile.write(folder / sound / f"{index}.wav", rng.normal(0, 0.1, RATE), RATE)
    return folder


def config_of(data: Path, start: Path, *, full: bool = False, **changes: Any) -> Adaptation:
    config = adaptation(data, "mine", f"file:{start}", full=full)
    loop = replace(LOOP, steps=2)
    training = replace(config.training, loop=loop, latents=LatentConfig(duration=0.64, normalise=True))
    return replace(config, training=training, **changes)


@pytest.mark.parametrize("full", [False, True])
def test_it_learns_clips_and_scenes_and_compares_held_out_ones(
    full: bool, start: Path, tmp_path: Path
) -> None:
    config = config_of(write_sounds(tmp_path / "sounds"), start, full=full)
    report = adapt(config, tmp_path / "mine")
    data = report["data"]
    # Twelve clips with four captions each, and as many scenes as clips; one of each class is held out.
    assert (data["recordings"], data["held_out_recordings"], data["examples"]) == (12, 2, 12 * 4 + 12)
    assert data["classes"] == ["dog", "rain"]
    assert data["held_out"]["clips"] == 2
    assert data["held_out"]["error_after"] != data["held_out"]["error_before"]
    assert (report["parameters"]["learn"] < report["parameters"]["all"]) is not full
    manifest = verify_manifest(tmp_path / "mine")
    assert manifest.name == "mine"
    card = (tmp_path / "mine" / "README.md").read_text()
    assert "12 recordings of sounds; licences: not stated" in card
    assert "denoising error of 2 held-out clips" in card
    listed = tmp_path / "mine.run" / HELD_OUT
    assert {one.sound for one in read_recordings(listed)} == {"dog", "rain"}
    assert all(prompt.reference is not None for prompt in read_prompts(listed))
    rows = len(read_journal(tmp_path / "mine.run" / JOURNAL))
    assert adapt(config, tmp_path / "mine")["data"] == data
    assert len(read_journal(tmp_path / "mine.run" / JOURNAL)) == rows


def test_other_recordings_are_another_run(start: Path, tmp_path: Path) -> None:
    sounds = write_sounds(tmp_path / "sounds")
    adapt(config_of(sounds, start, scenes=0), tmp_path / "mine")
    (sounds / "captions.json").write_text(json.dumps({"dog": "a dog barks"}))
    with pytest.raises(InvalidInputError, match="recordings_digest"):
        adapt(config_of(sounds, start, scenes=0), tmp_path / "mine")


def test_a_list_states_licences_and_folds(start: Path, tmp_path: Path) -> None:
    sounds = write_sounds(tmp_path / "sounds")
    rows = [
        {
            "file": str(path.relative_to(sounds)),
            "caption": "a dog barks",
            "fold": 1 + number % 5,
            "licence": "CC0" if number % 2 else "CC-BY-4.0",
            "author": "someone",
        }
        for number, path in enumerate(sorted(sounds.rglob("*.wav")))
    ]
    (sounds / "list.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    report = adapt(config_of(sounds, start), tmp_path / "mine")
    assert report["data"]["split"] == "fold 5"
    assert report["data"]["held_out_recordings"] == 2
    assert "licences: CC-BY-4.0, CC0; authors: someone" in summary(report)[2]


def test_one_class_is_learned_without_scenes(start: Path, tmp_path: Path) -> None:
    sounds = write_sounds(tmp_path / "sounds", ("dog",), 12)
    report = adapt(config_of(sounds, start), tmp_path / "mine")
    assert report["data"]["examples"] == 11 * 4
    with pytest.raises(InvalidInputError, match=r"has 1 class \(dog\), .* add recordings of another class"):
        adapt(config_of(sounds, start, scenes=5), tmp_path / "other")


def test_few_recordings_are_refused(start: Path, tmp_path: Path) -> None:
    sounds = write_sounds(tmp_path / "sounds", ("dog",), 3)
    with pytest.raises(
        InvalidInputError, match="has 3 recordings to learn from, and 10 are needed"
    ) as caught:
        adapt(config_of(sounds, start), tmp_path / "mine")
    assert f"`milonga data check {sounds}`" in str(caught.value)
    assert not (tmp_path / "mine").exists()


def test_recordings_that_cannot_be_read_are_refused(start: Path, tmp_path: Path) -> None:
    sounds = write_sounds(tmp_path / "sounds")
    for path in sounds.rglob("*.wav"):
        path.write_bytes(path.read_bytes()[:2_000])
    with pytest.raises(
        InvalidInputError, match=r"14 of 14 clips can't be read, at most 5% may be: .*cut short"
    ):
        adapt(config_of(sounds, start, scenes=0), tmp_path / "mine")
    assert not (tmp_path / "mine").exists()


def test_no_scene_is_made_of_a_recording_that_cannot_be_read(
    start: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sounds = write_sounds(tmp_path / "sounds", count=21)
    (sounds / "dog" / "3.wav").write_bytes(b"no sound")
    soundfile.write(sounds / "dog" / "4.wav", np.zeros(RATE), RATE)
    report = adapt(config_of(sounds, start, scenes=60), tmp_path / "mine")
    assert [Path(name).name for name in report["data"]["unreadable"]] == ["3.wav", "4.wav"]
    assert report["data"]["examples"] == report["data"]["recordings"] * 4 + 60
    assert "2 of 42 clips can't be read and are left out" in capsys.readouterr().err


def test_captions_in_another_language_are_refused_or_left_out(
    start: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sounds = write_sounds(tmp_path / "sounds", ("chien", "pluie"))
    with pytest.raises(InvalidInputError, match="14 of 14 recordings have no caption with a word") as caught:
        adapt(config_of(sounds, start), tmp_path / "mine")
    assert "('a chien'); write English captions" in str(caught.value)
    assert "`milonga train new`" in str(caught.value)
    write_sounds(sounds, ("dog",), 12)
    report = adapt(config_of(sounds, start), tmp_path / "mine")
    assert report["data"]["classes"] == ["dog"]
    assert "warning: 14 of 26 recordings have no caption with a word" in capsys.readouterr().err


def test_errors_are_compared_in_pairs() -> None:
    assert compare_errors([1.0, 2.0], [0.5, 1.7]) == {
        "clips": 2,
        "error_before": 1.5,
        "error_after": pytest.approx(1.1),
        "difference": pytest.approx(-0.4),
        "standard_error": pytest.approx(0.1),
    }
    assert compare_errors([1.0], [0.5])["standard_error"] is None
