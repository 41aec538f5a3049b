"""From recordings without captions to a generator trained on them: the commands of docs/training.md."""

import json
from pathlib import Path

import soundfile

from services import cli
from services.api.reading import compare
from training.data.captions import read_examples
from training.soundworld.reading import grammar_reader, truth_reading
from training.soundworld.scenes import SHORT, make_scene
from training.soundworld.synthesis import SAMPLING_RATE

CLIPS = 6


def test_recordings_are_described_and_a_generator_learns_from_them(tmp_path: Path) -> None:
    scenes = [make_scene(1_616, index, SHORT) for index in range(CLIPS)]
    (tmp_path / "recordings").mkdir()
    for number, scene in enumerate(scenes):
        soundfile.write(tmp_path / "recordings" / f"{number}.wav", scene.waveform, SAMPLING_RATE)
    captions = tmp_path / "captions.jsonl"
    assert cli.run(["caption", "--folder", str(tmp_path / "recordings"), "-o", str(captions)]) == 0

    examples = {Path(one.clip.name).stem: one.caption for one in read_examples(captions)}
    comparisons = [
        compare(truth_reading(scene.truth), grammar_reader().read(examples[str(number)]))
        for number, scene in enumerate(scenes)
    ]
    assert len(examples) == CLIPS
    assert sum(not one.missing for one in comparisons) >= CLIPS // 2

    model = tmp_path / "model"
    arguments = ["train", "sft", "--recipe", "smoke", "--set", f"captions={captions}", "--output", str(model)]
    assert cli.run(arguments) == 0
    report = json.loads((model / "training.json").read_text())
    assert report["data"]["examples"] == CLIPS
    assert list(report["data"]["files"]) == ["captions.jsonl"]
