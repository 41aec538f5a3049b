import math

import numpy as np
import pytest

from training.evaluation.bootstrap import (
    PromptSums,
    bootstrap_difference,
    normal_interval,
    paired_difference,
    prompt_resamples,
    rate_difference,
)
from training.objectives.statistics import mean_interval


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


def test_rates_that_never_differ_are_not_known_exactly() -> None:
    """80 prompts that both models get right show no more than that a difference is below .046."""
    prompts = [str(number) for number in range(80)]
    right = [1.0] * 80
    found = paired_difference(right, right, prompts)
    assert (found.value, found.count) == (0.0, 80)
    assert found.low == pytest.approx(-0.0458, abs=1e-4)
    assert found.high == pytest.approx(0.0458, abs=1e-4)
    several = paired_difference(right * 4, right * 4, prompts * 4)
    assert several.low == pytest.approx(found.low)  # nothing shows that seeds of a prompt are independent


def test_the_interval_of_rates_is_the_bootstraps_where_rates_are_moderate() -> None:
    random = np.random.RandomState(3)
    hard = random.rand(400)
    first, second = ((random.rand(400) < 0.5 * hard + shift).astype(float) for shift in (0.3, 0.4))
    counts = np.ones(400, dtype=np.int64)
    one, other = (PromptSums(sums_P=side, counts_P=counts) for side in (first, second))
    score, resampled = rate_difference(one, other), bootstrap_difference(one, other)
    assert score == paired_difference(first, second, [str(number) for number in range(400)])
    assert score.value == resampled.value
    assert score.low == pytest.approx(resampled.low, abs=0.005)
    assert score.high == pytest.approx(resampled.high, abs=0.005)


@pytest.mark.parametrize(
    ("rates", "dependence"), [((0.99, 0.97), 0.0), ((0.95, 0.93), 0.8), ((0.8, 0.7), 0.5)]
)
def test_coverage_of_the_difference_of_rates(rates: tuple[float, float], dependence: float) -> None:
    """Two seeds per prompt; a prompt that is hard for one model is hard for the other, too."""
    random = np.random.RandomState(4)
    prompts = [str(number // 2) for number in range(200)]
    above = below = 0
    for _ in range(400):
        common = random.rand(100) < dependence
        shared, own = random.rand(100).repeat(2), random.rand(2, 200)
        first, second = (
            (np.where(common.repeat(2), shared, single) < rate).astype(float)
            for rate, single in zip(rates, own, strict=True)
        )
        found = paired_difference(first, second, prompts)
        above += found.low > rates[1] - rates[0]
        below += found.high < rates[1] - rates[0]
    assert above / 400 <= 0.045 and below / 400 <= 0.045  # 0.025 each, and three standard errors of a count


def test_rates_with_undefined_values_have_an_interval_too() -> None:
    """order_given_presence: each model's value is undefined for other clips."""
    nan = math.nan
    prompts = [str(number) for number in range(40)]
    first, second = [1.0] * 38 + [nan] * 2, [nan] * 3 + [1.0] * 37
    found = paired_difference(first, second, prompts)
    assert found.value == 0.0
    assert -0.11 < found.low < -0.08 and 0.08 < found.high < 0.11
