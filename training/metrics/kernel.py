"""KAD, the kernel audio distance (arXiv 2502.15602): an unbiased estimate of how two sets of clips differ.

The squared maximum mean discrepancy (Gretton et al. 2012, eq. 3) with a Gaussian kernel, times 100. No
Gaussian is fitted, so it can be trusted with a hundred clips, where the Fréchet distance can't.

Shape legend: N, M clips, D embedding width.
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.spatial.distance import cdist, pdist

SCALE = 100.0
"""The paper's factor, for figures that are easier to read."""

Matrix = NDArray[np.float64]


def bandwidth_of(reference_MD: ArrayLike) -> float:
    """Median distance of two clips of the reference set (of an even number the lower one, as kadtk does).

    The paper takes it from the reference set; so one reference makes the figures of many models comparable.
    """
    distances = np.sort(pdist(np.asarray(reference_MD, dtype=np.float64)))
    if not len(distances):
        raise ValueError("a bandwidth needs two clips or more")
    return float(distances[(len(distances) - 1) // 2])


def gaussian_kernel(first_ND: ArrayLike, second_MD: ArrayLike, bandwidth: float) -> Matrix:
    """``exp(-|x - y|² / 2 bandwidth²)``, [N, M]."""
    squared = cdist(
        np.asarray(first_ND, dtype=np.float64), np.asarray(second_MD, dtype=np.float64), "sqeuclidean"
    )
    # kadtk adds 1e-8 as well: a reference of equal clips has a bandwidth of 0.
    return np.exp(-squared / (2.0 * bandwidth**2 + 1e-8))


def squared_discrepancy(
    within_NN: Matrix,
    within_MM: Matrix,
    between_NM: Matrix,
    counts_N: ArrayLike | None = None,
    counts_M: ArrayLike | None = None,
) -> float:
    """The unbiased estimate from kernel matrices; clips may count several times, as a bootstrap draws them.

    Pairs of a clip with itself are left out, of a clip with its own copy they are not.
    """
    first = np.ones(len(within_NN)) if counts_N is None else np.asarray(counts_N, dtype=np.float64)
    second = np.ones(len(within_MM)) if counts_M is None else np.asarray(counts_M, dtype=np.float64)
    n, m = first.sum(), second.sum()
    if n < 2 or m < 2:
        raise ValueError(f"each set needs two clips or more, got {n:.0f} and {m:.0f}")
    inside = (first @ within_NN @ first - first @ np.diagonal(within_NN)) / (n * (n - 1))
    inside += (second @ within_MM @ second - second @ np.diagonal(within_MM)) / (m * (m - 1))
    return float(inside - 2.0 * (first @ between_NM @ second) / (n * m))


def kernel_audio_distance(
    generated_ND: ArrayLike, reference_MD: ArrayLike, bandwidth: float | None = None
) -> float:
    """KAD of two sets of two clips or more each; about 0, or a little below, for equal distributions.

    Without a `bandwidth`, that of `bandwidth_of`.
    """
    width = bandwidth_of(reference_MD) if bandwidth is None else bandwidth
    return SCALE * squared_discrepancy(
        gaussian_kernel(generated_ND, generated_ND, width),
        gaussian_kernel(reference_MD, reference_MD, width),
        gaussian_kernel(generated_ND, reference_MD, width),
    )
