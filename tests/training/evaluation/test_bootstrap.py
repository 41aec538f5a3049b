import math

import numpy as np
import pytest

from training.evaluation.bootstrap import mean_interval, normal_interval, paired_difference, prompt_resamples


def test_a_paired_difference_has_a_smaller_interval_than_two_means() -> None:
    """Prompts differ much, models a little."""
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
    assert alone[0].high > alone[1].low  # unpaired intervals overlap
    assert paired_difference(first, first, prompts).high == 0.0


def test_clips_of_a_prompt_are_dependent() -> None:
    random = np.random.RandomState(1)
    values = random.randn(50).repeat(8)
    prompts = [str(number) for number in range(50) for _ in range(8)]
    wide = mean_interval(values, prompts)
    narrow = mean_interval(values, [str(number) for number in range(400)])
    assert wide.high - wide.low > 2 * (narrow.high - narrow.low)


def test_coverage_of_the_interval() -> None:
    random = np.random.RandomState(2)
    hits = 0
    for _ in range(200):
        hard = random.randn(40).repeat(2)
        first, second = (hard + random.randn(80) + shift for shift in (0.0, 0.3))
        found = paired_difference(first, second, [str(n // 2) for n in range(80)])
        hits += found.low <= 0.3 <= found.high
    assert 0.89 <= hits / 200 <= 0.99


def test_nan_is_ignored_for_each_model_separately() -> None:
    nan = math.nan
    found = paired_difference([1.0, nan, 0.0, nan], [1.0, 1.0, nan, nan], ["a", "a", "b", "c"])
    assert found.value == pytest.approx(1.0 - 0.5)
    assert mean_interval([1.0, nan], ["a", "b"]).count == 1
    nothing = paired_difference([nan], [1.0], ["a"])
    assert nothing.count == 0
    assert math.isnan(nothing.value)


def test_resamples_are_always_the_same() -> None:
    first, second = list(prompt_resamples(5, 3)), list(prompt_resamples(5, 3))
    assert all((a == b).all() for a, b in zip(first, second, strict=True))
    assert {len(draw) for draw in first} == {5}


def test_a_set_metric_is_in_the_middle_of_its_interval() -> None:
    found = normal_interval(1.0, [3.0, 5.0, math.nan], 7)
    assert (found.low + found.high) / 2 == pytest.approx(1.0)
    assert found.high - found.low == pytest.approx(2 * 1.959964 * np.std([3, 5], ddof=1))
    assert math.isnan(normal_interval(1.0, [], 7).low)
