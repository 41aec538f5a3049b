import math

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.stats import binomtest

from training.objectives.statistics import area_under_curve, mean_interval


def test_the_area_under_the_curve_counts_pairs() -> None:
    assert area_under_curve([3, 2, 1, 0], [1, 1, 0, 0]) == 1
    assert area_under_curve([3, 1, 2, 0], [1, 1, 0, 0]) == 0.75
    assert area_under_curve([1, 1], [1, 0]) == 0.5
    assert math.isnan(area_under_curve([1, 2], [1, 1]))


def test_an_interval_contains_the_mean_and_is_wider_for_dependent_values() -> None:
    values = [0.0, 1.0] * 100
    alone = mean_interval(values)
    assert alone.value == 0.5 and alone.count == 200
    assert alone.low == pytest.approx(0.5 - 1.96 * 0.5 / 200**0.5, abs=0.01)
    sorted_values, groups = sorted(values), [i // 20 for i in range(200)]
    grouped = mean_interval(sorted_values, groups)
    assert grouped.high - grouped.low > 2 * (alone.high - alone.low)
    assert grouped == mean_interval(sorted_values, groups)
    assert math.isnan(mean_interval([]).value)
    assert mean_interval([math.nan, 3.0, 5.0], ["a", "b", "c"]).count == 2


def test_other_means_have_a_bootstrap_interval() -> None:
    values = np.random.RandomState(0).randn(400)
    found = mean_interval(values)
    assert found.value == pytest.approx(values.mean())
    assert found.high - found.low == pytest.approx(2 * 1.96 / 20, rel=0.1)
    assert mean_interval([2.0] * 5).low == 2


@pytest.mark.parametrize(("hits", "total"), [(80, 80), (79, 80), (0, 30), (17, 20), (1, 3)])
def test_a_rate_of_independent_values_has_wilsons_interval(hits: int, total: int) -> None:
    found = mean_interval([1.0] * hits + [0.0] * (total - hits))
    expected = binomtest(hits, total).proportion_ci(method="wilson")
    assert found.low == pytest.approx(expected.low)
    assert found.high == pytest.approx(expected.high)
    assert found.low < found.high


def test_values_of_a_group_count_as_far_as_they_are_independent() -> None:
    """4 clips of each of 80 prompts: as 80 values if clips of a prompt are equal, as 320 if independent."""

    def width(values: NDArray[np.bool_], groups: list[int]) -> float:
        found = mean_interval(values, groups)
        return found.high - found.low

    random, groups = np.random.RandomState(0), [number // 4 for number in range(320)]
    equal, independent = (random.rand(80) < 0.7).repeat(4), np.asarray(random.rand(320) < 0.7)
    assert width(equal, groups) == pytest.approx(width(equal[::4], list(range(80))), rel=0.02)
    assert width(independent, groups) == pytest.approx(width(independent, list(range(320))), rel=0.15)
    right = mean_interval([1.0] * 320, groups)
    assert (right.value, right.high) == (1.0, 1.0)
    assert right.low == pytest.approx(
        mean_interval([1.0] * 80).low
    )  # nothing shows that they are independent
    almost = mean_interval([1.0] * 319 + [0.0], groups)
    assert almost.low == pytest.approx(right.low, abs=0.01)  # one value shows hardly more
    assert almost.high < 1.0


@pytest.mark.parametrize("dependence", [0.3, 0.9])
@pytest.mark.parametrize("rate", [0.99, 0.95, 0.7])
def test_coverage_of_the_interval_of_a_rate(rate: float, dependence: float) -> None:
    """8 clips per prompt, whose probability varies by prompt as a beta distribution."""
    random, groups = np.random.RandomState(1), [number // 8 for number in range(640)]
    strength, hits = (1 - dependence) / dependence, 0
    for _ in range(300):
        easy = random.beta(rate * strength, (1 - rate) * strength, 80).repeat(8)
        found = mean_interval((random.rand(640) < easy).astype(float), groups)
        hits += found.low <= rate <= found.high
    assert hits / 300 >= 0.92
