"""Measure the mini captioner on held-out clips, by a reader of the grammar and by the field's metrics.

    python -m training.mini.evaluate_captioner --scenes 500
    python -m training.mini.evaluate_captioner --captioner build/mini/captioner/model/final --scenes 100

Several captions are right for one clip, so events and their order are compared, not strings. Scenes have
captions of the validation split; a fifth of them is of 5.12 s. What it says of generated clips is measured by
`benchmarks/round_trip.py`.
"""

import argparse
import json
import math
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from services.api.reading import Reading, compare, read_events
from services.models.captioner.model import Captioner
from services.models.mini import mini_folder
from training.data.store import batches
from training.evaluation.caption_metrics import CaptionSet, score_captions
from training.objectives.statistics import mean_interval
from training.soundworld.captions import write_caption
from training.soundworld.reading import truth_reading
from training.soundworld.scenes import Scene, SceneConfig, make_scene
from training.soundworld.synthesis import CLASSES, SAMPLING_RATE

SEED = 1_515
BATCH = 8
REFERENCES = 5
"""True captions of a clip for the field's metrics."""
SHORT = SceneConfig(single=0.2, sequence=0.5, split="validation")
LONG = SceneConfig(duration=5.12, single=0.15, sequence=0.6, three=0.5, split="validation")
LONG_EVERY = 5


def held_out_scene(index: int) -> Scene:
    """Return a scene whose caption is of the validation split."""
    return make_scene(SEED, index, LONG if index % LONG_EVERY == 0 else SHORT)


def captions_of(captioner: Captioner, scenes: list[Scene], beams: int) -> list[str]:
    """Return the caption of each scene."""
    clips = [captioner.prepare(scene.waveform, SAMPLING_RATE) for scene in scenes]
    return [found[0].text for found in captioner.generate(captioner.encode(clips), beams=(beams,))]


def figures(scenes: list[Scene], readings: list[Reading]) -> dict[str, object]:
    """Return shares with 95 % intervals over clips, by the reader."""
    columns: dict[str, list[float]] = {}
    for scene, reading in zip(scenes, readings, strict=True):
        found = compare(truth_reading(scene.truth), reading)
        in_order = math.nan if found.in_order is None else float(found.in_order)
        row = {
            "all_events_named": float(not found.missing),
            "order_given_events": in_order,
            "order_given_events_of_sequences": in_order if scene.truth.relation == "then" else math.nan,
            "nothing_else_named": float(not found.added),
            "right": float(not found.in_words()),
            "read_whole": float(not reading.unread),
        }
        for name, value in row.items():
            columns.setdefault(name, []).append(value)
    prompts = [str(number) for number in range(len(scenes))]
    intervals = {name: mean_interval(values, prompts) for name, values in columns.items()}
    return {name: [one.value, one.low, one.high] for name, one in intervals.items() if one.count}


def by_kind(scenes: list[Scene], readings: list[Reading]) -> dict[str, object]:
    """Return the figures of each kind of scene, and the share of each class's clips in which it is named."""
    kinds: dict[str, list[int]] = {}
    for number, scene in enumerate(scenes):
        seconds, count = len(scene.waveform) / SAMPLING_RATE, len(scene.truth.classes)
        name = f"{scene.truth.relation}, {count} events, {seconds:g} s"
        kinds.setdefault(name, []).append(number)
    found: dict[str, object] = {
        name: {"clips": len(rows), **figures([scenes[i] for i in rows], [readings[i] for i in rows])}
        for name, rows in sorted(kinds.items())
    }
    pairs = list(zip(scenes, readings, strict=True))
    found["named_by_class"] = {
        name: round(
            float(
                np.mean([name in reading.events for scene, reading in pairs if name in scene.truth.classes])
            ),
            4,
        )
        for name in CLASSES
        if any(name in scene.truth.classes for scene in scenes)
    }
    return found


def field_figures(scenes: list[Scene], captions: list[str]) -> dict[str, object]:
    """Return the field's metrics against `REFERENCES` captions of the grammar each, METEOR if it is there."""
    rng = np.random.default_rng(SEED)
    references = tuple(tuple(write_caption(scene.truth, rng) for _ in range(REFERENCES)) for scene in scenes)
    clips = tuple(str(number) for number in range(len(scenes)))
    report = score_captions(CaptionSet(clips=clips, captions=tuple(captions), references=references))
    return {"tokenizer": report["tokenizer"]} | report["figures"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--captioner", type=Path, help="a captioner's folder, instead of the shipped one")
    parser.add_argument("--scenes", type=int, default=500)
    parser.add_argument("--beams", type=int, default=4)
    parser.add_argument("--output", type=Path, help="write the figures here as JSON")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    folder = arguments.captioner or mini_folder("captioner")
    captioner, reader = Captioner.from_pretrained(folder), read_events(folder)
    assert reader is not None
    scenes, captions = [], list[str]()
    for numbers in tqdm(
        list(batches(range(arguments.scenes), BATCH)), desc="clips", unit="batch", mininterval=5.0
    ):
        part = [held_out_scene(index) for index in numbers]
        scenes += part
        captions += captions_of(captioner, part, arguments.beams)
    readings = [reader.read(caption) for caption in captions]
    report: dict[str, object] = {
        "scenes": len(scenes),
        "beams": arguments.beams,
        "torch": torch.__version__,
        **figures(scenes, readings),
        "by_kind": by_kind(scenes, readings),
        "field": field_figures(scenes, captions),
        "examples": [
            [scene.caption, caption] for scene, caption in zip(scenes[:20], captions[:20], strict=True)
        ],
    }
    text = json.dumps(report, indent=1)
    if arguments.output:
        arguments.output.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
