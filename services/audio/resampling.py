"""Resample sound. Shapes: N samples."""

from fractions import Fraction
from typing import Final

import numpy as np
from numpy.typing import NDArray

_MAX_TERM: Final = 8_192
"""Largest numerator and denominator of a ratio. The filter has twenty times as many taps."""


def resample(waveform_N: NDArray[np.float32], sampling_rate: int, target_rate: int) -> NDArray[np.float32]:
    """Return [..., N * target_rate / sampling_rate, rounded] samples of [..., N], low-pass filtered.

    A polyphase filter is used, which may overshoot [-1, 1] a little. Equal rates return the same array.
    Ratios of unusual rates, such as 16,000 / 191,999, are rounded by less than 0.01 %: their filters would
    take seconds to compute.
    """
    if sampling_rate == target_rate:
        return waveform_N
    from scipy.signal import (
        resample_poly,
    )  # slow to import, rarely needed, and not a dependency of the client

    ratio = Fraction(target_rate, sampling_rate)
    up, down = filter_ratio(ratio).as_integer_ratio()
    resampled = resample_poly(waveform_N, up, down, axis=-1)
    # resample_poly rounds the length up, which would change the clip's duration.
    count = round(waveform_N.shape[-1] * ratio)
    missing = max(0, count - resampled.shape[-1])  # a rounded ratio may be a little less
    if missing:
        resampled = np.pad(resampled, [(0, 0)] * (resampled.ndim - 1) + [(0, missing)])
    return resampled[..., :count].astype(np.float32)


def filter_ratio(ratio: Fraction) -> Fraction:
    """Return the ratio nearest to `ratio` with terms up to `_MAX_TERM`."""
    if ratio > 1:
        return 1 / (1 / ratio).limit_denominator(_MAX_TERM)
    return ratio.limit_denominator(_MAX_TERM)
