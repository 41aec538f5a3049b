"""Scenes on disk: WAV files and JSON lines in the format of Tango's AudioCaps lists."""

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import soundfile

from training.soundworld.scenes import SceneConfig, make_scene
from training.soundworld.synthesis import SAMPLING_RATE

INDEX = "soundworld.jsonl"


def export_scenes(folder: Path, *, count: int, seed: int, config: SceneConfig) -> Iterator[str]:
    """Write `count` scenes to `folder` and yield each caption when its clip is there.

    The list, one line per clip (`dataset`, `location`, `captions`, and the truth in `events`), is written
    last and renamed into place: where it exists, all its clips do.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for index in range(count):
        scene = make_scene(seed, index, config)
        name = f"{seed}-{index:06d}.wav"
        temporary = folder / f".{name}.part"
        soundfile.write(temporary, scene.waveform, SAMPLING_RATE, subtype="PCM_16", format="WAV")
        temporary.replace(folder / name)
        events = [asdict(event) for event in scene.events]
        rows.append({"dataset": "soundworld", "location": name, "captions": scene.caption, "events": events})
        yield scene.caption
    temporary = folder / f".{INDEX}.part"
    temporary.write_text("".join(json.dumps(row) + "\n" for row in rows))
    temporary.replace(folder / INDEX)
