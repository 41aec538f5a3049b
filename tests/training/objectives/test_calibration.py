import math

import numpy as np
import pytest

from training.objectives.calibration import (
    BIAS,
    TEMPERATURES,
    Scaling,
    expected_calibration_error,
    fit_scaling,
    negative_log_likelihood,
    reliability,
    sigmoid,
)


def test_the_scaling_of_an_overconfident_or_biased_model_is_found() -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 2, 20_000)
    labels = rng.uniform(size=logits.size) < sigmoid(logits)
    for temperature, bias in ((1.0, 0.0), (3.0, 0.0), (0.5, -1.0), (2.0, 1.5)):
        found = fit_scaling((logits - bias) * temperature, labels)
        assert found.temperature == pytest.approx(temperature, rel=0.06)
        assert found.bias == pytest.approx(bias, abs=0.08)


def test_no_other_scaling_has_a_higher_likelihood() -> None:
    rng = np.random.default_rng(1)
    logits = rng.normal(0, 4, 300)
    labels = rng.uniform(size=300) < sigmoid(logits / 2 - 1)
    least = negative_log_likelihood(fit_scaling(logits, labels)(logits), labels)
    for temperature in np.geomspace(*TEMPERATURES, 60):
        for bias in np.linspace(-4, 4, 33):
            other = Scaling(temperature=float(temperature), bias=float(bias))
            assert least <= negative_log_likelihood(other(logits), labels) + 1e-9


def test_margins_in_both_orders_have_no_bias() -> None:
    margins = np.random.default_rng(2).normal(1, 1, 500)
    labels = np.concatenate([np.ones(500), np.zeros(500)])
    assert fit_scaling(np.concatenate([margins, -margins]), labels).bias == pytest.approx(0, abs=1e-3)


def test_the_likelihood_by_hand() -> None:
    assert negative_log_likelihood([0.0], [1.0]) == pytest.approx(math.log(2))
    assert negative_log_likelihood([1.0], [1.0]) == pytest.approx(0.3132617)
    assert negative_log_likelihood([-2000.0], [1.0]) == pytest.approx(2000.0)


def test_the_scaling_without_errors_or_without_examples_is_bounded() -> None:
    found = fit_scaling([1.0, -1.0], [1.0, 0.0])
    assert TEMPERATURES[0] <= found.temperature < 0.2 and abs(found.bias) <= BIAS
    assert fit_scaling([], []) == Scaling()


def test_the_calibration_error_by_hand() -> None:
    # A bin of four at 0.75 of which half are positive, and one of two at 0.1 of which none are.
    probabilities, labels = [0.75] * 4 + [0.1] * 2, [1, 1, 0, 0, 0, 0]
    assert expected_calibration_error(probabilities, labels) == pytest.approx(4 / 6 * 0.25 + 2 / 6 * 0.1)
    low, high = reliability(probabilities, labels)
    assert (low.count, low.share, high.count, high.share) == (2, 0, 4, 0.5)
    assert expected_calibration_error([1.0, 0.0], [1, 0]) == 0
    assert math.isnan(expected_calibration_error([], []))
