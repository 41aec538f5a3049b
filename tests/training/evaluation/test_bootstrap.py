import math

import numpy as np
import pytest

from training.evaluation.bootstrap import draws, mean_interval, paired_difference, set_interval


def test_a_paired_difference_is_surer_than_two_means() -> None:
    """Prompts differ a lot, models a little: pairing must see it."""
    random = np.random.RandomState(0)
    hardness = random.randn(200).repeat(2)
    prompts = [str(number) for number in range(200) for _ in range(2)]
    first, second = hardness + 0.1 * random.randn(400), hardness + 0.05 + 0.1 * random.randn(400)
    found = paired_difference(first, second, prompts)
    assert found.low > 0
    assert found.low < found.value < found.high
    assert found.value == pytest.approx(second.mean() - first.mean())
    assert found.count == 200
    alone = [mean_interval(values, prompts) for values in (first, second)]
    assert alone[0].high > alone[1].low  # unpaired, nothing could be said
    assert paired_difference(first, first, prompts).high == 0.0


def test_clips_of_a_prompt_are_no_independent_witnesses() -> None:
    random = np.random.RandomState(1)
    values = random.randn(50).repeat(8)
    prompts = [str(number) for number in range(50) for _ in range(8)]
    wide = mean_interval(values, prompts)
    narrow = mean_interval(values, [str(number) for number in range(400)])
    assert wide.high - wide.low > 2 * (narrow.high - narrow.low)


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    random = np.random.RandomState(2)
    hits = 0
    for _ in range(200):
        hard = random.randn(40).repeat(2)
        first, second = (hard + random.randn(80) + shift for shift in (0.0, 0.3))
        found = paired_difference(first, second, [str(n // 2) for n in range(80)])
        hits += found.low <= 0.3 <= found.high
    assert 0.89 <= hits / 200 <= 0.99


def test_what_does_not_count_is_left_out_on_its_own_side() -> None:
    nan = math.nan
    found = paired_difference([1.0, nan, 0.0, nan], [1.0, 1.0, nan, nan], ["a", "a", "b", "c"])
    assert found.value == pytest.approx(1.0 - 0.5)
    assert mean_interval([1.0, nan], ["a", "b"]).count == 1
    nothing = paired_difference([nan], [1.0], ["a"])
    assert nothing.count == 0
    assert math.isnan(nothing.value)


def test_draws_are_the_same_for_every_model() -> None:
    first, second = list(draws(5, 3)), list(draws(5, 3))
    assert all((a == b).all() for a, b in zip(first, second, strict=True))
    assert {len(draw) for draw in first} == {5}


def test_a_figure_of_a_set_stands_in_the_middle_of_its_interval() -> None:
    found = set_interval(1.0, [3.0, 5.0, math.nan], 7)
    assert (found.low + found.high) / 2 == pytest.approx(1.0)
    assert found.high - found.low == pytest.approx(2 * 1.959964 * np.std([3, 5], ddof=1))
    assert math.isnan(set_interval(1.0, [], 7).low)
