"""A study on recordings: its pairs, prompts and judge; with YAMNet's file (MILONGA_YAMNET), all stages."""

import io
import json
import math
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq  # type: ignore[import-untyped]
import pytest
import soundfile

from benchmarks.study2.__main__ import Study, run_stages
from benchmarks.study2.recipes import study_real, study_real_smoke
from benchmarks.study2.recorded import (
    MISTAKES,
    RecordedSounds,
    RecordedStudy,
    RecordedWorld,
    figures_of,
    pairs_of,
    write_pairs,
)
from benchmarks.study2.tables import tabulate
from services.errors import InvalidInputError
from services.models.manifest import write_manifest
from tests.tiny import tiny_pipeline
from training.data.recorded_scenes import RecordedSceneClip, RecordedSceneConfig
from training.data.recordings import read_recordings
from training.evaluation.probe import SceneJudgement
from training.loop.config import override

RATE = 16_000
PITCHES = {"bell": 200, "dog": 500, "rain": 1_100, "saw": 2_300}
SCENES = RecordedSceneConfig(duration=1.28, sampling_rate=RATE, single=0.1, sequence=0.6)


@pytest.fixture(scope="module")
def sounds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four classes of eight tones, two of each in a fold that is held out."""
    folder = tmp_path_factory.mktemp("recorded")
    rows = []
    for name, pitch in PITCHES.items():
        for number in range(8):
            file = f"{name}-{number}.wav"
            tone = np.sin(2 * np.pi * pitch * (1 + number / 30) * np.arange(RATE) / RATE)
            soundfile.write(folder / file, 0.2 * tone, RATE)
            rows.append({"file": file, "class": name, "fold": "test" if number > 5 else "train"})
    (folder / "clips.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def study(sounds: Path, **changes: object) -> RecordedStudy:
    config = study_real_smoke()
    return replace(config, world=replace(config.world, recordings=sounds, **changes))  # type: ignore[arg-type]


def events(clip: RecordedSceneClip) -> list[str]:
    return [part.sound for part in clip.parts]


def test_the_rejected_scene_has_one_mistake_of_the_same_recordings(sounds: Path) -> None:
    recordings = read_recordings(sounds)
    pairs = list(pairs_of(recordings, SCENES, 150))
    assert pairs == list(pairs_of(recordings, SCENES, 150))
    assert {one.mistake for one in pairs} == {name for kinds in MISTAKES.values() for name, _ in kinds}
    for pair in pairs:
        chosen, rejected = events(pair.chosen), events(pair.rejected)
        times = [(part.onset, part.length) for part in pair.chosen.parts]
        if pair.mistake == "swapped":
            assert rejected == chosen[::-1] and [(p.onset, p.length) for p in pair.rejected.parts] == times
        elif pair.mistake == "missing":
            assert len(rejected) == len(chosen) - 1 and set(rejected) < set(chosen)
        else:
            (new,) = set(rejected) - set(chosen)
            assert len(rejected) == len(chosen) and new in PITCHES
        kept = {part.clip for part in pair.rejected.parts} & {part.clip for part in pair.chosen.parts}
        assert len(kept) >= len(chosen) - 1
    two = [one for one in recordings if one.sound in ("bell", "dog")]
    with pytest.raises(InvalidInputError, match="has 2 classes; mistakes need a third one"):
        next(pairs_of(two, SCENES, 1))


def test_pairs_are_written_as_clips_that_trainings_read(sounds: Path, tmp_path: Path) -> None:
    pairs = list(pairs_of(read_recordings(sounds), SCENES, 40))
    write_pairs(iter(pairs), 40, tmp_path / "pairs.parquet")
    table = pq.read_table(tmp_path / "pairs.parquet")
    assert table["prompt"].to_pylist() == [one.caption for one in pairs]
    for side in ("chosen", "rejected"):
        waveform, rate = soundfile.read(io.BytesIO(table[side][39].as_py()["bytes"]))
        expected, _ = getattr(pairs[39], side).read()
        assert rate == RATE and np.allclose(waveform, expected, atol=1e-4)


def test_prompts_are_of_held_out_recordings_and_of_their_split(sounds: Path, tmp_path: Path) -> None:
    config = study(sounds)
    plans = {}
    for split in ("validation", "test"):
        prompts = replace(config.prompts, split=split, short=15)
        world = RecordedWorld(config=replace(config, prompts=prompts), output=tmp_path)
        plans[split] = world.plan("short")
        assert len(plans[split]) == 15 and not world.plan("long")
    texts = {split: {one.prompt.text for one in plan} for split, plan in plans.items()}
    assert len(texts["test"]) == 15 and not texts["test"] & texts["validation"]
    for planned in plans["test"]:
        scene = planned.prompt.reference
        assert isinstance(scene, RecordedSceneClip) and planned.prompt.truth is not None
        assert sorted(events(scene)) == sorted(planned.prompt.truth.classes)
        assert all(int(Path(part.clip.name).stem[-1]) > 5 for part in scene.parts)
    many = replace(config, prompts=replace(config.prompts, short=5_000))
    with pytest.raises(
        InvalidInputError, match=r"prompts\.short: is 5000, and the recordings give \d+ captions"
    ):
        RecordedWorld(config=many, output=tmp_path).plan("short")


def test_figures_of_a_judgement_by_hand() -> None:
    found = {"a": True, "b": True}
    right = SceneJudgement(present=True, in_order=True, reversed=False, found=found, others=1)
    figures = figures_of(right)
    assert (figures["present_and_in_order"], figures["as_described"], figures["others"]) == (1.0, 0.0, 1.0)
    wrong = figures_of(replace(right, in_order=False, reversed=True, others=0))
    assert (wrong["presence"], wrong["present_and_in_order"], wrong["reversed_given_presence"]) == (
        1.0,
        0.0,
        1.0,
    )
    both = figures_of(replace(right, in_order=None, reversed=None, others=0))
    assert both["as_described"] == 1.0 and math.isnan(both["order_given_presence"])
    absent = figures_of(replace(right, present=False, in_order=None, reversed=None, others=0))
    assert absent["present_and_in_order"] == absent["as_described"] == 0.0


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("methods=sft,online", "methods has online, which needs a reward model"),
        ("prompts.long=10", "must be 0: prompts of recordings are short"),
        ("pairs=0", "pairs is 0"),
    ],
)
def test_what_a_study_on_recordings_can_not_do_is_refused(setting: str, message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        override(study_real(), [setting])


def test_recordings_without_classes_are_refused(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", np.ones(RATE) / 3, RATE)
    (tmp_path / "list.jsonl").write_text(json.dumps({"audio": "a.wav", "caption": "a dog barks"}) + "\n")
    with pytest.raises(InvalidInputError, match=r"world\.recordings: .*a\.wav has no class"):
        RecordedWorld(config=study(tmp_path), output=tmp_path).splits()


@pytest.mark.skipif("MILONGA_YAMNET" not in os.environ, reason="needs YAMNet's file")
def test_all_stages(sounds: Path, tmp_path: Path) -> None:
    start = tmp_path / "start"
    tiny_pipeline().save_pretrained(start)
    write_manifest(start, name="tiny", version="1", license="Apache-2.0")
    config = replace(
        study(sounds, yamnet=Path(os.environ["MILONGA_YAMNET"])), start=f"file:{start}", growth_betas=(60.0,)
    )
    output = tmp_path / "study"
    run_stages(Study(config, output).stages(), output / "locks")
    lines = tabulate(output / "result")
    assert [line.partition(":")[0] for line in lines[:-1]] == ["sft", "safeguarded"]
    found = json.loads((output / "result" / "study.json").read_text())
    figures = found["splits"]["all"]["figures"]
    assert list(figures) == ["base", "sft-0", "safeguarded-0", "beta-60"]
    assert {"present_and_in_order", "as_described", "others", "fad.yamnet", "kad.yamnet"} <= figures[
        "base"
    ].keys()
    assert pq.read_table(output / "data" / "shared-6" / "pairs.parquet").num_rows == 6
    assert found["judges"] is None and isinstance(config.world, RecordedSounds)
