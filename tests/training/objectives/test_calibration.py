import math

import numpy as np
import pytest

from training.objectives.calibration import (
    TEMPERATURES,
    expected_calibration_error,
    fit_temperature,
    negative_log_likelihood,
    reliability,
    sigmoid,
)


def test_the_temperature_of_an_overconfident_model_is_found() -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 2, 20_000)
    labels = rng.uniform(size=logits.size) < sigmoid(logits)
    assert fit_temperature(logits, labels) == pytest.approx(1.0, abs=0.05)
    assert fit_temperature(logits * 3, labels) == pytest.approx(3.0, abs=0.15)
    assert fit_temperature(logits / 2, labels) == pytest.approx(0.5, abs=0.03)


def test_no_other_temperature_has_a_higher_likelihood() -> None:
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


def test_the_temperature_without_errors_or_without_examples_is_bounded() -> None:
    assert TEMPERATURES[0] <= fit_temperature([1.0, -1.0], [1.0, 0.0]) < 0.06
    assert fit_temperature([], []) == 1.0


def test_the_calibration_error_by_hand() -> None:
    # A bin of four at 0.75 of which half are positive, and one of two at 0.1 of which none are.
    probabilities, labels = [0.75] * 4 + [0.1] * 2, [1, 1, 0, 0, 0, 0]
    assert expected_calibration_error(probabilities, labels) == pytest.approx(4 / 6 * 0.25 + 2 / 6 * 0.1)
    low, high = reliability(probabilities, labels)
    assert (low.count, low.share, high.count, high.share) == (2, 0, 4, 0.5)
    assert expected_calibration_error([1.0, 0.0], [1, 0]) == 0
    assert math.isnan(expected_calibration_error([], []))
