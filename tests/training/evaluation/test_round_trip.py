import math

import pytest

from services.api.reading import compare
from training.evaluation.round_trip import ROUND_TRIP_METRICS, round_trip_metrics
from training.soundworld.reading import grammar_reader

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
