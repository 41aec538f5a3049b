"""Critical values of gates that may stop early: a test at several looks, whose error is that of one test.

Lan and DeMets' error spending (1983, Biometrika 70, 659) with Kim and DeMets' power family (1987): up to the
share t of all prompts an error of ``0.025 t²`` is spent. The interval of a look, with its critical value in
place of 1.96, is a repeated confidence interval (Jennison and Turnbull 2000, section 9): the intervals of all
looks contain the true difference together, with 95 % probability. So a gate that decides by the interval of
whichever look it stops at errs as rarely as one that looks once. Stopping because a loss is certain can only
lower that error.
"""

from functools import cache
from typing import Final

import numpy as np
from numpy.typing import NDArray
from scipy.integrate import trapezoid
from scipy.optimize import brentq
from scipy.stats import norm

Array = NDArray[np.float64]

ERROR: Final = 0.025
"""Probability at most of passing with a loss of exactly the margin."""
SPENDING: Final = 2.0
"""Exponent of the share of prompts in the error that is spent up to it."""
_POINTS: Final = 801
"""Points of the numerical integrals."""


def shares(looks: int) -> tuple[float, ...]:
    """Return the share of the prompts that each look has."""
    return tuple(number / looks for number in range(1, looks + 1))


@cache
def critical_values(looks: int) -> tuple[float, ...]:
    """Return the normal quantile of the interval at each look; (1.96,) for a single one.

    The sum of the differences so far is a Brownian motion over the shares. Its density below all earlier
    bounds is integrated from look to look (Armitage, McPherson and Rowe 1969).
    """
    values: list[float] = []
    grid, density, before = np.zeros(1), np.ones(1), 0.0
    for time in shares(looks):
        spent, width = ERROR * (time**SPENDING - before**SPENDING), (time - before) ** 0.5
        bound = float(brentq(lambda b: _crossing(b, grid, density, width) - spent, 0.0, 20.0))  # noqa: B023
        values.append(bound / time**0.5)
        points = np.linspace(-8.0 * time**0.5, bound, _POINTS)
        grid, density = points, _integral(norm.pdf((points[:, None] - grid) / width) / width * density, grid)
        before = time
    return tuple(values)


def _crossing(bound: float, grid: Array, density: Array, width: float) -> float:
    """Return the probability that the sum, of `density` at the look before, is above `bound` at the next."""
    return float(_integral(density * norm.sf((bound - grid) / width), grid))


def _integral(values: Array, grid: Array) -> Array:
    """Integrate over the last dimension; the first look's grid is the single point that sums start from."""
    return np.asarray(values[..., 0] if len(grid) == 1 else trapezoid(values, grid, axis=-1))
