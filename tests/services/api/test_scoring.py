"""Rewards and rankings as plain values."""

import math

import pytest

from services.api.scoring import Reward, rank


def test_a_ranking_is_best_first_and_equal_rewards_stay_in_order() -> None:
    places = rank([Reward.of(logit) for logit in (0.5, 2.0, -1.0, 2.0, 0.5)])
    assert [place.index for place in places] == [1, 3, 0, 4, 2]
    assert [place.reward.logit for place in places] == [2.0, 2.0, 0.5, 0.5, -1.0]
    beaten = [place.beats_next for place in places]
    better = pytest.approx(Reward.of(1.5).probability)
    assert beaten == [0.5, better, 0.5, better, None]


def test_the_probability_of_a_reward_holds_at_any_size() -> None:
    assert Reward.of(0.0).probability == 0.5
    assert Reward.of(math.log(3)).probability == pytest.approx(0.75)
    assert Reward.of(-math.log(3)).probability == pytest.approx(0.25)
    assert (Reward.of(1e4).probability, Reward.of(-1e4).probability) == (1.0, 0.0)
    assert Reward.of(-40.0).probability == pytest.approx(math.exp(-40.0))
