import json
import math
from pathlib import Path

import numpy as np
import pytest
import soundfile

from services.api.reading import compare
from services.errors import InvalidInputError
from services.models.captioner.model import Captioner
from services.models.mini import mini_folder
from training.evaluation.config import EvaluationConfig
from training.evaluation.evaluate import evaluate
from training.evaluation.round_trip import (
    ROUND_TRIP_METRICS,
    open_round_trip,
    round_trip,
    round_trip_metrics,
)
from training.soundworld.reading import grammar_reader
from training.soundworld.scenes import SceneConfig, make_scene
from training.soundworld.synthesis import SAMPLING_RATE

READER = grammar_reader()


@pytest.mark.parametrize(
    ("prompt", "caption", "presence", "in_order", "both", "nothing_else"),
    [
        ("a dog barks then a siren wails", "a siren wails after a dog barks", 1, 1, 1, 1),
        ("a dog barks then a siren wails", "a siren wails then a dog barks", 1, 0, 0, 1),
        ("a dog barks then a siren wails", "a dog barks while a siren wails", 1, 0, 0, 1),
        ("a dog barks while a siren wails", "a siren wails and a dog barks", 1, 1, 1, 1),
        ("a dog barks then a siren wails", "a dog barks", 0, math.nan, 0, 1),
        ("a dog barks", "a dog barks then a bell rings", 1, math.nan, 1, 0),
        ("a dog barks", "", 0, math.nan, 0, 1),
    ],
)
def test_metrics_of_a_clip_are_shares_of_its_prompt(
    prompt: str, caption: str, presence: float, in_order: float, both: float, nothing_else: float
) -> None:
    metrics = round_trip_metrics(compare(READER.read(prompt), READER.read(caption)))
    assert tuple(metrics) == ROUND_TRIP_METRICS
    assert list(metrics.values()) == pytest.approx([presence, in_order, both, nothing_else], nan_ok=True)


@pytest.fixture(scope="module")
def clips() -> dict[str, np.ndarray]:
    """Scenes by their captions, a prompt of other words, and a clip without sound."""
    config = SceneConfig(single=0.2, sequence=0.5, split="validation")
    found = {scene.caption: scene.waveform for scene in (make_scene(7, index, config) for index in range(6))}
    noise = 0.1 * np.random.default_rng(0).standard_normal(SAMPLING_RATE).astype(np.float32)
    return found | {
        "a dragon sneezes in a cave": noise,
        "a dog barks then a siren wails": np.zeros(SAMPLING_RATE, np.float32),
    }


def test_clips_are_compared_with_their_prompts_by_what_the_captioner_says(
    clips: dict[str, np.ndarray],
) -> None:
    trip = open_round_trip("mini:captioner")
    pairs = [(waveform, SAMPLING_RATE) for waveform in clips.values()]
    found = round_trip(trip, list(clips), pairs)
    captioner = Captioner.from_pretrained(mini_folder("captioner"))
    for (prompt, waveform), metrics in zip(list(clips.items())[:6], found, strict=False):
        tokens = captioner.encode([captioner.prepare(waveform, SAMPLING_RATE)])
        ((candidate,),) = captioner.generate(tokens, (4,))
        expected = round_trip_metrics(compare(READER.read(prompt), READER.read(candidate.text)))
        assert list(metrics.values()) == pytest.approx(list(expected.values()), nan_ok=True)
    assert all(math.isnan(value) for value in found[6].values())  # no words for a dragon
    assert list(found[7].values()) == pytest.approx([0, math.nan, 0, 1], nan_ok=True)
    # A captioner that names nothing would fail here too.
    assert sum(metrics["round_trip_presence"] for metrics in found[:6]) >= 3


def test_clips_that_the_captioning_service_refuses_have_figures() -> None:
    trip = open_round_trip("mini:captioner")
    noise = 0.1 * np.random.default_rng(0).standard_normal(33 * SAMPLING_RATE).astype(np.float32)
    long, short = (noise, SAMPLING_RATE), (noise[:80], SAMPLING_RATE)
    whole = trip.captions([(noise[: 30 * SAMPLING_RATE], SAMPLING_RATE)])
    assert trip.captions([short, long, short]) == ["", *whole, ""]
    assert trip.captions([]) == []


def test_the_report_of_an_evaluation_has_the_round_trip(clips: dict[str, np.ndarray], tmp_path: Path) -> None:
    """Of clips that match their prompts, and of the same clips in the reverse order."""
    for name, step in (("matching", 1), ("other", -1)):
        (tmp_path / name).mkdir()
        rows = []
        for number, (prompt, waveform) in enumerate(zip(clips, list(clips.values())[::step], strict=True)):
            soundfile.write(tmp_path / name / f"{number}.wav", waveform, SAMPLING_RATE)
            rows.append({"location": f"{number}.wav", "captions": prompt, "seed": 0})
        (tmp_path / name / "index.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = EvaluationConfig(
        device="cpu", scorers=(), reward=None, embedders=(), judge=None, captioner="mini:captioner", sheet=0
    )
    report = evaluate(config, [str(tmp_path / "matching"), str(tmp_path / "other")], tmp_path / "out")
    matching, other = (model["figures"]["all"]["round_trip_presence"] for model in report["models"])
    assert matching["count"] == other["count"] == 7  # without the prompt of other words
    assert matching["value"] > other["value"]
    assert report["heard_by"]["captioner"].startswith("sha256:")
    (comparison,) = report["comparisons"]
    assert comparison["differences"]["all"]["round_trip_presence"]["value"] == pytest.approx(
        other["value"] - matching["value"]
    )
    assert "share of clips whose caption names all events" in (tmp_path / "out" / "report.md").read_text()


def test_a_captioner_without_a_list_of_events_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "captioner"
    Captioner.from_pretrained(mini_folder("captioner")).save_pretrained(folder)
    with pytest.raises(InvalidInputError, match=r"has no events\.json; give a captioner that has one"):
        open_round_trip(f"file:{folder}")
    with pytest.raises(InvalidInputError, match="captioner: is 'nothing', must be mini"):
        open_round_trip("nothing")
