from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import pytest

from services.errors import InvalidInputError
from training.loop.config import describe, differences, flatten, override
from training.runs.recipes import REWARD, recipe


@dataclass(frozen=True, kw_only=True, slots=True)
class Inner:
    rate: float = 0.1
    betas: tuple[float, float] = (0.9, 0.99)
    files: tuple[Path, ...] = ()
    limit: int | None = None

    def __post_init__(self) -> None:
        if self.limit is not None and self.rate > self.limit:
            raise ValueError(f"rate is {self.rate}, above limit ({self.limit})")


@dataclass(frozen=True, kw_only=True, slots=True)
class Outer:
    steps: int = 10
    kind: Literal["a", "b"] = "a"
    deep: bool = False
    inner: Inner = field(default_factory=Inner)


def test_values_take_the_types_of_their_annotations() -> None:
    found = override(
        Outer(),
        [
            "steps=1_000",
            "kind=b",
            "deep=True",
            "inner.rate=1e-3",
            "inner.betas=0.8, 0.9",
            "inner.files=a.json,/b/c.json",
            "inner.limit=3",
        ],
    )
    inner = Inner(rate=1e-3, betas=(0.8, 0.9), files=(Path("a.json"), Path("/b/c.json")), limit=3)
    assert found == Outer(steps=1000, kind="b", deep=True, inner=inner)
    assert override(found, ["inner.limit=none", "inner.files="]).inner == replace(inner, limit=None, files=())


def test_settings_that_only_fit_together_are_put_in_together() -> None:
    before = Outer(inner=Inner(limit=1))
    assert override(before, ["inner.rate=5", "inner.limit=9"]).inner.rate == 5


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("step=3", "step: is given as '3', and no setting has this name; known: steps"),
        ("inner.x=3", "known: inner.rate, inner.betas, inner.files, inner.limit"),
        ("inner=3", "no setting has this name"),
        ("steps=many", "steps: is 'many', must be a valid integer"),
        ("steps=1.5", "must be a valid integer"),
        ("kind=c", "kind: is 'c', must be 'a' or 'b'"),
        ("deep=maybe", "must be true or false"),
        ("inner.betas=", "must be 2 values with commas between"),
        ("inner.betas=1,2,3", "must be 2 values with commas between"),
        ("inner.betas=1", "inner.betas: is '1', must be 2 values with commas between"),
        ("inner.limit=x", "must be a valid integer"),
        ("steps", "'steps' must be NAME=VALUE"),
    ],
)
def test_what_is_wrong_is_named_with_what_would_be_right(assignment: str, message: str) -> None:
    with pytest.raises(InvalidInputError) as caught:
        override(Outer(), [assignment])
    assert message in str(caught.value)


def test_every_mistake_is_told_at_once_and_the_configs_own_checks_name_what_was_given() -> None:
    with pytest.raises(InvalidInputError) as caught:
        override(Outer(), ["steps=x", "kind=y"])
    assert len(caught.value.violations) == 2
    with pytest.raises(InvalidInputError, match=r"inner.limit=0: rate is 0.1, above limit \(0\)"):
        override(Outer(), ["inner.limit=0"])


def test_what_is_described_can_be_given_again() -> None:
    config = override(Outer(), ["inner.files=a,b", "deep=yes", "inner.limit=7"])
    assert override(Outer(), describe(config).splitlines()) == config


def test_differences_show_both_values_and_survive_json() -> None:
    assert differences({"a": 1, "b": [1, 2]}, {"a": 1, "b": (1, 2)}) == []
    assert differences({"a": 1, "old": None}, {"a": 2, "new": True}) == [
        "a was 1, is 2",
        "old was none, is not there",
        "new was not there, is true",
    ]


@pytest.mark.parametrize("name", REWARD)
def test_every_recipe_is_whole_and_can_be_written_down(name: str) -> None:
    config = recipe(REWARD, name)
    assert override(config, describe(config).splitlines()) == config
    assert flatten(config)["clap"]


def test_an_unknown_recipe_is_answered_with_those_that_are_known() -> None:
    with pytest.raises(InvalidInputError, match="'maxi', must be one of mini, smoke, baton"):
        recipe(REWARD, "maxi")
