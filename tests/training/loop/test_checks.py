"""Checks of a config's numbers, and that every config makes them."""

import math
from collections.abc import Callable
from types import SimpleNamespace

import pytest

from training.evaluation.config import EvaluationConfig
from training.finetuning.baton import BatonData
from training.finetuning.session import PairData
from training.loop.checks import check_minimum, check_share
from training.loop.fit import LoopConfig
from training.preferences.captions import CaptionsConfig
from training.preferences.dataset import DatasetConfig
from training.preferences.scores import ScoresConfig
from training.reward.data import DataConfig


@pytest.mark.parametrize("value", [0, 0.25, 1])
def test_shares_include_both_ends(value: float) -> None:
    check_share(SimpleNamespace(share=value), "share")


@pytest.mark.parametrize("value", [-0.01, 1.01, math.nan, math.inf])
def test_other_numbers_are_no_shares(value: float) -> None:
    with pytest.raises(ValueError, match=rf"^share is {value}, must lie in \[0, 1\]$"):
        check_share(SimpleNamespace(count=1, share=value), "share")


@pytest.mark.parametrize("value", [2, -1, math.nan])
def test_a_minimum_is_inclusive(value: float) -> None:
    check_minimum(SimpleNamespace(count=3), 3, "count")
    with pytest.raises(ValueError, match=f"^count is {value}, must be 3 or more$"):
        check_minimum(SimpleNamespace(count=value), 3, "count")


@pytest.mark.parametrize(
    "config", [BatonData, DataConfig, DatasetConfig, EvaluationConfig, PairData, ScoresConfig]
)
@pytest.mark.parametrize("value", [5.0, -0.1, math.nan])
def test_every_limit_of_unreadable_clips_is_a_share(config: Callable[..., object], value: float) -> None:
    with pytest.raises(ValueError, match=rf"max_unreadable is {value}, must lie in \[0, 1\]"):
        config(max_unreadable=value)


@pytest.mark.parametrize("name", ["seed", "learning_rate", "warmup", "weight_decay", "clip", "threads"])
@pytest.mark.parametrize("value", [-1, math.nan])
def test_the_loop_refuses_negative_settings(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{name} is {value}, must be 0 or more"):
        LoopConfig(**{"steps": 1, "batch": 1, name: value})  # type: ignore[arg-type]


def test_captions_and_scores_refuse_negative_settings() -> None:
    with pytest.raises(ValueError, match="temporal_limit is -1, must be 0 or more"):
        CaptionsConfig(temporal_limit=-1)
    with pytest.raises(ValueError, match=r"timeout is 0\.0, must be seconds above 0"):
        ScoresConfig(timeout=0.0)
