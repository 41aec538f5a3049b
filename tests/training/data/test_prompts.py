"""Reports on prompts that a model does not read in full."""

from pathlib import Path

import pytest

from training.data.examples import FileClip, LabelledClip
from training.data.prompts import EXAMPLES, on_prompts, places_of, report_prompts
from training.soundworld.captions import CaptionTruth


def test_many_prompts_give_one_line_and_a_few_examples(capsys: pytest.CaptureFixture[str]) -> None:
    places = {f"prompt {number}": f"list.csv:{number + 2}" for number in range(2_000)}
    report = report_prompts(places, lambda prompt: [] if prompt.endswith("0") else ["prompt is odd"], "m")
    (entry,) = report.values()
    assert (entry["prompts"], entry["with_warnings"]) == (2_000, 1_800)
    assert len(entry["examples"]) == EXAMPLES
    assert entry["examples"][0] == {"row": "list.csv:3", "prompt": "prompt 1", "warnings": ["prompt is odd"]}
    assert capsys.readouterr().err == (
        "warning: 1800 of 2000 prompts are not read in full by m; the first: list.csv:3: prompt is odd\n"
    )


def test_prompts_that_are_read_in_full_give_no_line(capsys: pytest.CaptureFixture[str]) -> None:
    for warnings in ({}, {"another": ["prompt is odd"]}):
        report = report_prompts({"a dog barks": ""}, warnings, "m")
        assert report == {"prompt_warnings": {"by": "m", "prompts": 1, "with_warnings": 0, "examples": []}}
    report_prompts({"a": ""}, {"a": ["prompt is odd"]}, "m", quiet=True)
    assert not capsys.readouterr().err


def test_a_prompt_has_the_place_of_its_first_row_or_is_quoted(capsys: pytest.CaptureFixture[str]) -> None:
    clip, truth = FileClip(path=Path("a.wav")), CaptionTruth(classes=("rain",), relation="single")
    examples = [
        LabelledClip(prompt="rain", clip=clip, label=1.0, truth=truth),
        LabelledClip(prompt="dog", clip=clip, label=1.0, place="a.csv:2"),
        LabelledClip(prompt="dog", clip=clip, label=0.0, place="a.csv:3"),
    ]
    places = places_of(examples)
    assert places == {"rain": "", "dog": "a.csv:2"}
    report_prompts(places, {"rain": ["prompt is odd"]}, "m")
    assert "the first: 'rain': prompt is odd" in capsys.readouterr().err


def test_warnings_on_clips_are_not_on_prompts() -> None:
    both = ["clip is silent", "prompt is odd"]
    assert on_prompts(both, ["prompt is odd", "prompt is cut"]) == ["prompt is odd", "prompt is cut"]
