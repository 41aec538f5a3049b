import pytest

from services.api.captioning import (
    MAX_TOTAL_BEAMS,
    PLAIN_BEAMS,
    CaptionCandidate,
    CaptionDefaults,
    CaptionOptions,
    CaptionRequest,
    compose,
    rank_candidates,
)
from services.errors import InvalidInputError

DEFAULTS = CaptionDefaults(beams=(2, 3), max_new_tokens=50, can_refine=True)
PLAIN = CaptionDefaults(beams=(2, 3), max_new_tokens=50, can_refine=False)


def candidate(text: str, log_probability: float, score: float | None = None) -> CaptionCandidate:
    return CaptionCandidate(text=text, beams=2, log_probability=log_probability, clap_score=score)


def test_options_that_are_left_out_have_defaults() -> None:
    refined = CaptionRequest.of(DEFAULTS)
    assert (refined.beams, refined.refine, refined.max_new_tokens, refined.max_candidates) == (
        (2, 3),
        True,
        50,
        0,
    )
    assert CaptionRequest.of(DEFAULTS, refine=False).beams == PLAIN_BEAMS
    assert CaptionRequest.of(PLAIN) == CaptionRequest.of(DEFAULTS, refine=False)
    assert CaptionRequest.of(PLAIN, beams=[5, 1]).total_beams == 6


@pytest.mark.parametrize(
    ("options", "fields"),
    [
        ({"beams": [0]}, ["beams[0]"]),
        ({"beams": [2, 17, 2]}, ["beams[1]", "beams[2]"]),
        ({"beams": [16, 15, 14, 13, 12]}, ["beams"]),
        ({"max_new_tokens": 51, "max_candidates": -1}, ["max_new_tokens", "max_candidates"]),
        ({"max_new_tokens": -1}, ["max_new_tokens"]),
    ],
)
def test_every_violation_is_named(options: CaptionOptions, fields: list[str]) -> None:
    with pytest.raises(InvalidInputError) as caught:
        CaptionRequest.of(DEFAULTS, **options)
    assert [fault.field for fault in caught.value.violations] == fields


def test_the_bound_of_all_beams_is_inclusive() -> None:
    beams = (16, 15, 14, 13, 6)
    assert sum(beams) == MAX_TOTAL_BEAMS
    assert CaptionRequest.of(PLAIN, beams=beams).beams == beams


def test_refinement_needs_a_scorer() -> None:
    with pytest.raises(InvalidInputError, match="refine: is true"):
        CaptionRequest.of(PLAIN, refine=True)


def test_clap_ranks_first_then_the_language_model() -> None:
    best, likely, unlikely = candidate("c", -9.0, 0.3), candidate("a", -1.0, 0.1), candidate("b", -2.0, 0.1)
    unscored = candidate("d", -0.1)
    assert rank_candidates([unscored, unlikely, likely, best]) == (best, likely, unlikely, unscored)
    # A negative score is better than none.
    assert rank_candidates([unscored, candidate("e", -5.0, -0.5)])[1] == unscored


def test_equal_candidates_stay_in_order() -> None:
    first, second = candidate("a", -1.0, 0.5), candidate("b", -1.0, 0.5)
    assert rank_candidates([first, second]) == (first, second)
    assert rank_candidates([second, first]) == (second, first)


def test_a_caption_is_the_best_of_its_candidates() -> None:
    candidates = [candidate("a", -2.0, 0.1), candidate("b", -3.0, 0.2)]
    caption = compose(candidates, CaptionRequest.of(DEFAULTS, max_candidates=1), ["clip hums"])
    assert (caption.text, caption.candidates, caption.warnings) == ("b", (candidates[1],), ("clip hums",))


def test_candidates_without_any_score_are_warned_of() -> None:
    candidates = [candidate("a", -2.0), candidate("b", -1.0)]
    caption = compose(candidates, CaptionRequest.of(DEFAULTS), ())
    assert caption.text == "b"
    assert len(caption.warnings) == 1
    assert compose(candidates, CaptionRequest.of(PLAIN), ()).warnings == ()
