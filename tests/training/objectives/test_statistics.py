import math

import pytest

from training.objectives.statistics import area_under_curve, bootstrap_mean


def test_the_area_under_the_curve_counts_pairs() -> None:
    assert area_under_curve([3, 2, 1, 0], [1, 1, 0, 0]) == 1
    assert area_under_curve([3, 1, 2, 0], [1, 1, 0, 0]) == 0.75
    assert area_under_curve([1, 1], [1, 0]) == 0.5
    assert math.isnan(area_under_curve([1, 2], [1, 1]))


def test_an_interval_contains_the_mean_and_is_wider_for_dependent_values() -> None:
    values = [0.0, 1.0] * 100
    alone = bootstrap_mean(values)
    assert alone.value == 0.5 and alone.count == 200
    assert alone.low == pytest.approx(0.5 - 1.96 * 0.5 / 200**0.5, abs=0.01)
    sorted_values, groups = sorted(values), [i // 20 for i in range(200)]
    grouped = bootstrap_mean(sorted_values, groups)
    assert grouped.high - grouped.low > 2 * (alone.high - alone.low)
    assert grouped == bootstrap_mean(sorted_values, groups)
    assert bootstrap_mean([1.0] * 5).low == 1
    assert math.isnan(bootstrap_mean([]).value)
