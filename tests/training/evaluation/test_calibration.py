import math

import numpy as np
import pytest

from training.evaluation.calibration import (
    TEMPERATURES,
    expected_calibration_error,
    fit_temperature,
    negative_log_likelihood,
    reliability,
    sigmoid,
)
from training.evaluation.plots import reliability_plot
from training.evaluation.statistics import area_under_curve, bootstrap_mean


def test_the_temperature_of_a_model_that_exaggerates_is_found() -> None:
    rng = np.random.default_rng(0)
    honest = rng.normal(0, 2, 20_000)
    labels = rng.uniform(size=honest.size) < sigmoid(honest)
    assert fit_temperature(honest, labels) == pytest.approx(1.0, abs=0.05)
    assert fit_temperature(honest * 3, labels) == pytest.approx(3.0, abs=0.15)
    assert fit_temperature(honest / 2, labels) == pytest.approx(0.5, abs=0.03)


def test_no_other_temperature_is_likelier() -> None:
    rng = np.random.default_rng(1)
    logits = rng.normal(0, 4, 300)
    labels = rng.uniform(size=300) < sigmoid(logits / 2)
    best = fit_temperature(logits, labels)
    least = negative_log_likelihood(logits, labels, best)
    assert all(least <= negative_log_likelihood(logits, labels, t) for t in np.geomspace(*TEMPERATURES, 200))


def test_the_likelihood_by_hand() -> None:
    assert negative_log_likelihood([0.0], [1.0]) == pytest.approx(math.log(2))
    assert negative_log_likelihood([2.0], [1.0], 2.0) == pytest.approx(0.3132617)
    assert negative_log_likelihood([-2000.0], [1.0]) == pytest.approx(2000.0)


def test_without_a_mistake_or_without_examples_the_temperature_stays_within_bounds() -> None:
    assert TEMPERATURES[0] <= fit_temperature([1.0, -1.0], [1.0, 0.0]) < 0.06
    assert fit_temperature([], []) == 1.0


def test_the_calibration_error_by_hand() -> None:
    # One bin of four at 0.75 of which half are so, one of two at 0.1 of which none are.
    probabilities, labels = [0.75] * 4 + [0.1] * 2, [1, 1, 0, 0, 0, 0]
    assert expected_calibration_error(probabilities, labels) == pytest.approx(4 / 6 * 0.25 + 2 / 6 * 0.1)
    low, high = reliability(probabilities, labels)
    assert (low.count, low.share, high.count, high.share) == (2, 0, 4, 0.5)
    assert expected_calibration_error([1.0, 0.0], [1, 0]) == 0
    assert math.isnan(expected_calibration_error([], []))


def test_the_plot_is_an_image_and_always_the_same() -> None:
    bins = reliability([0.1, 0.4, 0.9], [0, 1, 1])
    image = reliability_plot({"before": bins, "after": bins}, "held-out")
    assert image.startswith(b"\x89PNG")
    assert image == reliability_plot({"before": bins, "after": bins}, "held-out")


def test_the_area_under_the_curve_counts_pairs() -> None:
    assert area_under_curve([3, 2, 1, 0], [1, 1, 0, 0]) == 1
    assert area_under_curve([3, 1, 2, 0], [1, 1, 0, 0]) == 0.75
    assert area_under_curve([1, 1], [1, 0]) == 0.5
    assert math.isnan(area_under_curve([1, 2], [1, 1]))


def test_an_interval_holds_the_mean_and_is_wider_where_values_go_together() -> None:
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
