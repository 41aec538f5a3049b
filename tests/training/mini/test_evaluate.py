import numpy as np
import pytest
import torch

from services.models.mini.tagger import Detection, EventTagger, detections
from training.evaluation.events import compare_events, event_metrics
from training.evaluation.prompts import held_out_prompts
from training.mini.evaluate import interval, summarise
from training.soundworld.captions import CaptionTruth
from training.soundworld.scenes import split_of

THEN = CaptionTruth(classes=("dog", "siren"), relation="then")


def heard(seconds: float = 0.6, **centres: float) -> dict[str, Detection]:
    half = seconds / 2
    return {
        name: Detection(onset=c - half, offset=c + half, centre=c, seconds=seconds)
        for name, c in centres.items()
    }


@pytest.mark.parametrize(
    ("found", "present", "in_order", "reversed_"),
    [
        (heard(dog=0.5, siren=1.5), True, True, False),
        (heard(dog=1.5, siren=0.5), True, False, True),
        (heard(dog=1.0, siren=1.05), True, False, False),
        (heard(dog=0.5), False, None, None),
        (heard(dog=0.5, siren=1.5, rain=1.0), True, True, False),
    ],
)
def test_a_sequence_is_judged_by_presence_and_order(
    found: dict[str, Detection], present: bool, in_order: bool | None, reversed_: bool | None
) -> None:
    verdict = compare_events(THEN, found)
    assert (verdict.present, verdict.in_order, verdict.reversed) == (present, in_order, reversed_)


@pytest.mark.parametrize(
    ("seconds", "duration", "present"),
    [(0.42, 2.56, True), (0.40, 2.56, False), (0.80, 5.12, False), (0.84, 5.12, True)],
)
def test_an_event_is_present_for_half_of_its_usual_length(
    seconds: float, duration: float, present: bool
) -> None:
    found = heard(seconds, dog=0.5, siren=1.5)
    assert compare_events(THEN, found, duration).present == present


@pytest.mark.parametrize(
    ("seconds", "siren", "simultaneous"),
    [(1.2, 1.0, True), (1.2, 1.6, True), (1.2, 1.7, False), (0.6, 1.0, None)],
)
def test_events_at_the_same_time_have_no_order_and_must_overlap(
    seconds: float, siren: float, simultaneous: bool | None
) -> None:
    together = CaptionTruth(classes=("dog", "siren"), relation="while")
    verdict = compare_events(together, heard(seconds, dog=1.0, siren=siren))
    assert verdict.in_order is None
    assert verdict.present == (simultaneous is not None)
    assert verdict.simultaneous == simultaneous
    figures = event_metrics(verdict)
    assert figures["several_as_described"] == figures["as_described"] == float(simultaneous is True)
    assert figures["present_and_in_order"] == float(simultaneous is not None)


def test_figures_by_hand() -> None:
    right, wrong = (
        compare_events(THEN, heard(dog=0.5, siren=1.5)),
        compare_events(THEN, heard(dog=1.5, siren=0.5)),
    )
    absent = compare_events(THEN, heard(siren=1.5))
    figures = summarise([[right, right], [right, wrong], [absent, right], [absent, absent]])
    assert figures["presence"][0] == 5 / 8  # type: ignore[index]
    assert figures["order_given_presence"][0] == 4 / 5  # type: ignore[index]
    assert figures["reversed_given_presence"][0] == 1 / 5  # type: ignore[index]
    assert figures["present_and_in_order"][0] == 4 / 8  # type: ignore[index]
    assert figures["several_as_described"][0] == 4 / 8  # type: ignore[index]
    by_class = figures["by_class"]
    assert isinstance(by_class, dict)
    assert {name: row["heard"] for name, row in by_class.items()} == {"dog": 5 / 8, "siren": 1.0}
    assert by_class["dog"]["order_given_presence"] == 4 / 5


def test_an_interval_holds_the_mean_and_narrows_with_more_prompts() -> None:
    rng = np.random.default_rng(0)
    few, many = ([[float(x)] for x in rng.uniform(size=n) < 0.7] for n in (30, 3000))
    (mean, low, high), (_, narrow_low, narrow_high) = interval(few), interval(many)
    assert low < mean < high
    assert narrow_high - narrow_low < (high - low) / 5


def test_held_out_prompts_are_fixed_and_of_the_validation_split() -> None:
    prompts = held_out_prompts(20)
    assert prompts == held_out_prompts(20)
    assert {split_of(caption) for caption, _ in prompts} == {"validation"}


def test_detections_need_a_minimum_of_sound_and_tell_when() -> None:
    probabilities = torch.zeros(64, 2)
    probabilities[10:20, 0] = 0.9
    probabilities[5:7, 1] = 0.9
    found = detections(probabilities, ["dog", "siren"], 0.04)
    assert set(found) == {"dog"}
    assert found["dog"].onset == pytest.approx(0.4)
    assert found["dog"].offset == pytest.approx(0.8)
    assert found["dog"].centre == pytest.approx(0.6)


def test_a_tagger_gives_a_segment_each_forty_milliseconds_and_round_trips(tmp_path) -> None:  # type: ignore[no-untyped-def]
    torch.manual_seed(0)
    tagger = EventTagger(classes=["dog", "siren"], width=8, hidden=8).eval()
    waveform = torch.randn(2, 40960) * 0.1
    logits = tagger(waveform)
    assert logits.shape == (2, 64, 2)
    tagger.save_pretrained(tmp_path)
    torch.testing.assert_close(EventTagger.from_pretrained(tmp_path).eval()(waveform), logits)
