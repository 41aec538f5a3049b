"""Critical values of several looks."""

import numpy as np
import pytest
from scipy.stats import multivariate_normal, norm

from training.promotion.gates.looks import ERROR, critical_values, shares


def test_one_look_is_an_ordinary_test() -> None:
    assert critical_values(1) == pytest.approx((norm.isf(ERROR),))


@pytest.mark.parametrize("looks", [2, 3, 5])
def test_the_error_of_all_looks_together_is_that_of_one(looks: int) -> None:
    """Against the distribution of a Brownian motion at the looks, by scipy."""
    values, times = critical_values(looks), np.array(shares(looks))
    covariance = np.minimum.outer(times, times) / np.sqrt(np.outer(times, times))
    never = multivariate_normal.cdf(values, mean=np.zeros(looks), cov=covariance)
    assert 1 - never == pytest.approx(ERROR, abs=1e-4)
    assert list(values) == sorted(values, reverse=True)  # an early look needs more


def test_each_look_spends_its_share_of_the_error() -> None:
    first, second, *_ = critical_values(4)
    assert norm.sf(first) == pytest.approx(ERROR / 16)
    both = multivariate_normal.cdf([first, second], mean=[0, 0], cov=[[1, 0.5**0.5], [0.5**0.5, 1]])
    assert 1 - both == pytest.approx(ERROR / 4, abs=1e-5)
