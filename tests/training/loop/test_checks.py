"""Ranges of numbers in configs, and that every number of every config has one."""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, get_args, get_origin

import pytest

from services.errors import InvalidInputError
from training.evaluation.config import EVALUATIONS
from training.loop.checks import Count, Factor, Natural, Positive, Range, Seconds, Share, check_ranges
from training.loop.config import annotation_of, flatten, override
from training.preferences.pipeline import PREFERENCES
from training.runs.recipes import BATON, CAPTIONING, DPO, REWARD, SFT
from training.runs.run_recipes import RUNS

RECIPES: Mapping[str, Mapping[str, Callable[[], Any]]] = {
    "reward": REWARD, "sft": SFT, "dpo": DPO, "baton": BATON, "captioning": CAPTIONING,
    "preferences": PREFERENCES, "evaluation": EVALUATIONS, "run": RUNS,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class Numbers:
    count: Count = 1
    share: Share = 0.5
    limit: Natural | None = None
    betas: tuple[Annotated[float, Range(0, 1, below=True)], ...] = (0.9,)
    seconds: Seconds = 1.0
    factor: Factor = 0.0
    other: str = "x"

    def __post_init__(self) -> None:
        check_ranges(self)


def test_ends_belong_to_a_range_unless_they_are_excluded() -> None:
    Numbers(count=10**9, share=0.0, limit=0, betas=(0.0, 0.999), seconds=1e-9, factor=1e9)
    Numbers(share=1, betas=())


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"count": 0}, "count is 0, must be 1 or more"),
        ({"count": 10**10}, "count is 10000000000, must be 1e+09 or less"),
        ({"share": -0.01}, "share is -0.01, must lie in [0, 1]"),
        ({"share": math.nan}, "share is nan, must lie in [0, 1]"),
        ({"limit": -1}, "limit is -1, must be 0 or more"),
        ({"betas": (0.9, 1.0)}, "betas is 1.0, must lie in [0, 1)"),
        ({"seconds": 0.0}, "seconds is 0.0, must be above 0"),
        ({"seconds": math.inf}, "seconds is inf, must be 1e+09 or less"),
        ({"factor": math.nan}, "factor is nan, must be 0 or more"),
    ],
)
def test_what_is_out_of_range_is_named_with_its_value_and_the_range(
    changed: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError) as caught:
        Numbers(**changed)
    assert str(caught.value) == message


def kinds_of(annotation: Any) -> Iterator[type]:
    """Yield the plain types in an annotation."""
    if isinstance(annotation, type) and get_origin(annotation) is None:
        yield annotation
    for part in get_args(annotation):
        yield from kinds_of(part)


def numbers() -> Iterator[tuple[str, str, bool, bool]]:
    """Yield recipe, setting, whether it is whole, and whether it is a tuple, of every number."""
    for name, recipes in RECIPES.items():
        config = recipes["smoke"]()
        for setting in flatten(config):
            annotation = annotation_of(config, setting)
            kinds = set(kinds_of(annotation))
            if {int, float} & kinds:
                yield name, setting, float not in kinds, get_origin(annotation) is tuple


@pytest.mark.parametrize(("recipe", "setting", "whole", "several"), list(numbers()))
def test_every_number_of_every_config_refuses_nonsense(
    recipe: str, setting: str, whole: bool, several: bool
) -> None:
    config = RECIPES[recipe]["smoke"]()
    for value in (str(10**30), str(-(10**30))) if whole else ("nan", "inf", "-inf", "1e30", "-1e30"):
        written = f"{value},{value}" if several else value
        with pytest.raises(InvalidInputError, match=rf"{setting}.* is .*must") as caught:
            override(config, [f"{setting}={written}"])
        assert setting.rpartition(".")[2] in str(caught.value)
    for value in ("0", "-1"):
        with contextlib.suppress(InvalidInputError):  # and no other
            override(config, [f"{setting}={value},{value}" if several else f"{setting}={value}"])


def test_every_recipe_is_within_its_ranges() -> None:
    made = [recipe() for recipes in RECIPES.values() for recipe in recipes.values()]
    assert len(made) > 20


@pytest.mark.parametrize(
    ("recipe", "setting", "message"),
    [
        ("preferences", "captions.soundworld.duration=3", "duration must be one of"),
        ("reward", "head.width=10 head.heads=4", "width is 10, must be a multiple of heads"),
        ("reward", "class_weights=0,0", "one at least must be above 0"),
        ("preferences", "candidates.source.sampling_rate=7999", "must lie in [8000, 48000]"),
        ("dpo", "lora.alpha=-1", "alpha is -1, must lie in [0, 1e+06]"),
    ],
)
def test_settings_that_can_not_work_are_refused_before_a_stage_runs(
    recipe: str, setting: str, message: str
) -> None:
    with pytest.raises(InvalidInputError) as caught:
        override(RECIPES[recipe]["smoke"](), setting.split())
    assert message in str(caught.value)


def test_positive_is_above_zero() -> None:
    assert Range(0, above=True).fault(0.0) == "must be above 0"
    assert get_args(Positive)[1] == Range(0, above=True)
