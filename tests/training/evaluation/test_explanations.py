"""Figures of explanations against their closed forms, and a whole evaluation on the embedded model."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import average_precision_score  # type: ignore[import-untyped]

from services.audio.words import find_words
from services.cli import run
from services.errors import InvalidInputError
from training.evaluation.explanation_areas import area_sets, areas
from training.evaluation.explanation_config import explanations_smoke
from training.evaluation.explanation_metrics import (
    THRESHOLDS,
    average_precision,
    classes_of_words,
    frames_inside,
    mass_inside,
    points_inside,
    unions,
)
from training.evaluation.explanations import KINDS, evaluate_explanations, method_figures
from training.soundworld.captions import cut_caption
from training.soundworld.scenes import SHORT, make_scene

INSIDE = np.array([False, True, True, False, False, False])


def test_frames_are_inside_by_their_middle() -> None:
    assert frames_inside(0.1, 0.3, 6, 0.1).tolist() == INSIDE.tolist()
    assert frames_inside(0.14, 0.16, 6, 0.1).tolist() == [False, True, False, False, False, False]
    # Between two middles: the nearest.
    assert frames_inside(0.18, 0.19, 6, 0.1).sum() == 1


def test_mass_and_pointing() -> None:
    row = np.array([0.0, 3.0, 1.0, 0.0, 0.0, 4.0])
    assert mass_inside(row, INSIDE) == pytest.approx(0.5)
    assert points_inside(row, INSIDE) == 0.0
    # A frame next to the interval counts too.
    assert points_inside(np.array([9.0, 1, 1, 0, 0, 0]), INSIDE) == 1.0
    assert points_inside(np.array([0, 1.0, 1, 9, 0, 0]), INSIDE) == 1.0
    # Nothing said is chance.
    assert mass_inside(np.zeros(6), INSIDE) == pytest.approx(1 / 3)


def test_average_precision_is_the_fields() -> None:
    rng = np.random.default_rng(1)
    for _ in range(20):
        row = rng.integers(0, 4, 12).astype(float)  # with ties
        inside = rng.uniform(size=12) < 0.4
        inside[0] = True
        assert average_precision(row, inside) == pytest.approx(average_precision_score(inside, row))
    assert average_precision(np.ones(6), INSIDE) == pytest.approx(1 / 3)


def test_unions_at_each_threshold() -> None:
    row = np.array([0.2, 1.0, 0.6, 0.0, 0.0, 0.0])
    found = dict(zip(THRESHOLDS, unions(row, INSIDE), strict=True))
    assert found[0.1] == pytest.approx(2 / 3)
    assert found[0.5] == pytest.approx(1.0)
    assert found[0.7] == pytest.approx(0.5)


def test_words_name_the_event_of_their_phrase() -> None:
    caption = "While the old church bell is ringing, a dog barks"
    assert cut_caption(caption) is None
    caption = "While the church bell is ringing, a dog barks"
    words = find_words(caption)
    classes = dict(zip([word.text for word in words], classes_of_words(caption, words), strict=True))
    assert classes == {
        "While": None, "the": None, "church": "bell", "bell": "bell", "is": None, "ringing": "bell",
        "a": None, "dog": "dog", "barks": "dog",
    }  # fmt: skip


def test_every_event_of_a_scene_has_a_word() -> None:
    for index in range(60):
        scene = make_scene(5, index, replace(SHORT, split="test"))
        found = set(classes_of_words(scene.caption, find_words(scene.caption)))
        assert {event.event_class for event in scene.events} == found - {None}, scene.caption


def test_areas_of_a_right_and_a_wrong_order() -> None:
    # Word 2 alone carries everything: what is left is whether it is there.
    sets = area_sets([2, 0, 1], 3)
    assert sets.tolist() == [
        [False, False, True], [True, False, True],  # deletion: 2, then 0
        [True, True, False], [False, True, False],  # insertion: only 2 is there, then also 0
    ]  # fmt: skip
    right = areas(1 - sets[:, 2].astype(np.float64))
    wrong_sets = area_sets([0, 1, 2], 3)
    wrong = areas(1 - wrong_sets[:, 2].astype(np.float64))
    assert right == pytest.approx((1 / 6, 5 / 6))
    assert wrong == pytest.approx((5 / 6, 1 / 6))


def test_figures_of_clips_have_chance_and_paired_differences() -> None:
    clips = [
        {
            "mask": {"mass_inside": 0.9, "chance": 0.3, "unions": [0.5] * len(THRESHOLDS), "deletion": 0.2},
            "random": {"deletion": 0.5},
        },
        {
            "mask": {"mass_inside": 0.7, "chance": 0.5, "unions": [0.7] * len(THRESHOLDS), "deletion": 0.4},
            "random": {"deletion": 0.6},
        },
    ]
    table = method_figures(clips, "mask")
    assert table["mass_inside"]["value"]["value"] == pytest.approx(0.8)
    assert table["mass_inside"]["chance"] == pytest.approx(0.4)
    assert table["mass_inside"]["over_chance"]["value"] == pytest.approx(0.4)
    assert table["deletion"]["over_chance"]["value"] == pytest.approx(-0.25)
    assert table["iou"]["value"]["value"] == pytest.approx(0.6)


def test_an_evaluation_is_resumed_and_reported(tmp_path: Path) -> None:
    config = replace(explanations_smoke(), methods=("occlusion", "mask"), true_clips=2)
    report = evaluate_explanations(config, tmp_path / "a")
    rows = [json.loads(line) for line in (tmp_path / "a" / "clips.jsonl").read_text().splitlines()]
    assert set(report["clips"]) == set(KINDS) and report["clips"]["true"] == 2
    figures = report["figures"]["true"]["mask"]
    assert 0 <= figures["mass_inside"]["value"]["value"] <= 1
    assert figures["deletion"]["value"]["count"] == 2
    assert "### True" in (tmp_path / "a" / "report.md").read_text()

    # A run that was killed in the middle of a line continues, and comes to the same figures.
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "run.json").write_bytes((tmp_path / "a" / "run.json").read_bytes())
    half = [json.dumps(row) for row in rows[:2]]
    (tmp_path / "b" / "clips.jsonl").write_text("\n".join([*half, '{"kind": "tr']))
    again = evaluate_explanations(config, tmp_path / "b")
    assert again["figures"] == report["figures"]
    with pytest.raises(InvalidInputError, match="other settings"):
        evaluate_explanations(replace(config, iterations=3), tmp_path / "b")


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["train", "evaluate-explanations", "--recipe", "smoke", "-o", str(tmp_path / "x")]
    small = ["methods=attention", "true_clips=1", "generated_clips=0", "sanity_clips=0"]
    assert run([*words, *(word for one in small for word in ("--set", one))]) == 0
    assert "| mass inside |" in capsys.readouterr().out
    assert run([*words, "--set", "methods=magic"]) == 2
    assert "magic" in capsys.readouterr().err
    assert run([*words, "--show"]) == 0
    assert "true_clips" in capsys.readouterr().out
